"""From distances to a table: one row per kind of site, and its verdict."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gemma3_jax.sites.names import layer_of
from gemma3_jax.sites.table import site
from gemma3_jax.types import JsonObject

# Scores below this are masked: Hugging Face adds the lowest number of its dtype, the port writes that of float32.
_MASKED = -1e30
# Values whose distance is computed at a time, so that they stay in a processor's cache.
_BLOCK = 2**16


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far both sides are from the truth at one site, for one prompt: norm of the error over norm of the truth.

    Attributes:
        hf: Hugging Face's distance.
        port: the port's.
        floor: the root mean square of what rounding every value once, to the port's dtype, can leave.
        size: number of independent errors in the norm.
    """

    hf: float
    port: float
    floor: float
    size: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of site, or of gradient, over several prompts of one length.

    Attributes:
        kind: canonical name with `{i}` for the layer, or "... (gradient)".
        tokens: length of the prompts.
        hf: Hugging Face's distance from the truth, in its worst layer; the median over prompts.
        hf_layer: that layer; None outside the blocks.
        port: the port's distance, in its worst layer; the median over prompts.
        port_layer: that layer.
        ratio: what is judged, the port's distance over Hugging Face's, each in its worst layer; the median over
            prompts. A distance of Hugging Face's that is below `Distances.floor` counts as that.
        bar: what `ratio` may be.
    """

    kind: str
    tokens: int
    hf: float
    hf_layer: int | None
    port: float
    port_layer: int | None
    ratio: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the ratio is within the bar; NaN is not."""
        return self.ratio <= self.bar


@dataclasses.dataclass(frozen=True)
class Report:
    """What was compared, on what, and the outcome per kind.

    Attributes:
        source: the checkpoint.
        dtype: of both sides; the truth is float64.
        tokens: the lengths of the prompts.
        prompts: how many of each length, and of what.
        platform: devices and versions.
        rows: of each kind the length with the largest ratio.
        note: what the prompts could not show, or where something was taken at some positions only.
    """

    source: str
    dtype: str
    tokens: tuple[int, ...]
    prompts: str
    platform: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def as_dict(self) -> JsonObject:
        """Plain data for JSON."""
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]
        return {**dataclasses.asdict(self), "passed": self.passed, "rows": rows}


def judge(prompts: Sequence[Mapping[str, Distances]], tokens: int, dtype: str) -> list[Row]:
    """One row per kind, in the order of the sites, from the distances of several prompts of one length.

    float32: the ratio may be 2. bfloat16: it may be 1, up to the sampling error of such a comparison. Each distance is
    a norm over N independent errors. Such a norm has a relative standard deviation of 1 / sqrt(2 N), and the ratio of
    two 1 / sqrt(N). The bar adds three of these, which is 1 % at 100,000 values and 27 % at 128.
    """
    kinds: dict[str, list[str]] = {}
    for name in prompts[0]:
        kinds.setdefault(kind_of(name), []).append(name)
    rows = []
    for kind, names in kinds.items():
        # [prompts, layers]
        hf, port, floor, size = (
            np.array([[getattr(distances[name], field) for name in names] for distances in prompts])
            for field in ("hf", "port", "floor", "size")
        )
        at_worst = port.max(1), np.maximum(hf, floor).max(1)
        with np.errstate(divide="ignore"):  # an error where Hugging Face has none is infinitely larger
            ratio = np.divide(*at_worst, out=np.zeros(len(prompts)), where=at_worst[0] != 0)
        sizes = np.take_along_axis(size, port.argmax(1)[:, None], axis=1)
        bar = 2.0 if dtype == "float32" else 1 + 3 / np.sqrt(np.median(sizes))
        worst = [_worst_layer(names, np.median(side, axis=0)) for side in (hf, port)]
        rows.append(Row(kind, tokens, *worst[0], *worst[1], float(np.median(ratio)), float(bar)))
    return rows


def _worst_layer(names: Sequence[str], distances: np.ndarray) -> tuple[float, int | None]:
    worst = int(np.argmax(distances))
    return float(distances[worst]), layer_of(names[worst])


def worst_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Of each kind the row with the largest ratio, or with none that is a number."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row.kind not in worst or not row.ratio <= worst[row.kind].ratio:
            worst[row.kind] = row
    return tuple(worst.values())


def kind_of(name: str) -> str:
    """The name with `{i}` for its layer."""
    layer = layer_of(name)
    return name if layer is None else name.replace(f"blocks.{layer}.", "blocks.{i}.", 1)


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The worst layer of one kind of site under a bar of its own: see `compare_sites`."""

    kind: str
    layer: int | None
    relative: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bar; NaN is not."""
        return self.relative <= self.bar


def compare_sites(
    wanted: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    bar: float | Mapping[str, float],
    attention_mask: np.ndarray | None = None,
) -> list[Deviation]:
    """One row per kind, in the order of `wanted`: the layer with the largest relative error in norm.

    `bar` is one for all kinds, or one for each. Only real tokens of `attention_mask` [b, p] count.
    """
    worst: dict[str, Deviation] = {}
    for name, reference in wanted.items():
        kind = kind_of(name)
        allowed = bar if isinstance(bar, float) else bar[kind]
        row = Deviation(kind, layer_of(name), distance(name, reference, got[name], attention_mask), allowed)
        if kind not in worst or not row.relative <= worst[kind].relative:
            worst[kind] = row
    return list(worst.values())


def distance(name: str, truth: np.ndarray, value: np.ndarray, attention_mask: np.ndarray | None = None) -> float:
    """Norm of the error over norm of the truth, in float64; of real tokens, and of scores that the mask lets through.

    Where the truth is 0 throughout: 0 if there is no error, else infinite.
    """
    if truth.shape != value.shape:
        raise ValueError(f"shapes differ at {name}: {truth.shape} in Hugging Face, {value.shape} in the port")
    if attention_mask is not None:
        axes = ["b", "p", "V"] if name == "logits" else site(name).axes.split()
        position = axes.index("p" if "p" in axes else "k")
        real = attention_mask.astype(bool)
        truth, value = (np.moveaxis(array, position, 1)[real] for array in (truth, value))
    if name.endswith("hook_attn_scores"):
        seen = truth > _MASKED
        # A difference in what is masked is an infinite error.
        value = np.where((value > _MASKED) == seen, value, np.inf)
        truth, value = truth[seen], value[seen]
    size, error = _sums_of_squares(truth.ravel(), value.ravel())
    return float(np.sqrt(error / size)) if size else (np.inf if error else 0.0)


def _sums_of_squares(truth: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Of the truth [n], and of its difference to the value [n]."""
    size = error = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN have a verdict of their own
        for start in range(0, len(truth), _BLOCK):
            t = truth[start : start + _BLOCK].astype(np.float64)
            d = value[start : start + _BLOCK].astype(np.float64) - t
            # not @, whose threads would wait for each other longer than they compute
            size, error = size + float(np.einsum("n,n->", t, t)), error + float(np.einsum("n,n->", d, d))
    return size, error
