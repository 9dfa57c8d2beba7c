"""From two sets of activations to a table: one row per kind of site, and its verdict."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma3_jax.sites import layer_of, site

Activations = Mapping[str, np.ndarray]

# Scores below this are masked: Hugging Face adds the lowest number, the port writes it.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Row:
    """The worst layer of one kind of site or gradient.

    Attributes:
        kind: canonical name with `{i}` for the layer, or "d loss / d ..." for a gradient.
        layer: where the relative error is largest; None outside the blocks.
        max_abs: largest absolute error there.
        relative: norm of the error over the norm of the reference, there.
        cosine: between the two, there.
        bar: what `relative` may be.
    """

    kind: str
    layer: int | None
    max_abs: float
    relative: float
    cosine: float
    bar: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bar; NaN is not."""
        return self.relative <= self.bar


@dataclasses.dataclass(frozen=True)
class Report:
    """What was compared, where, and the outcome per kind; `note` says what the prompt could not show."""

    source: str
    dtype: str
    tokens: int
    platform: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]
        return {**dataclasses.asdict(self), "passed": self.passed, "rows": rows}


def kind_of(name: str) -> str:
    """The name with `{i}` for its layer."""
    layer = layer_of(name)
    return name if layer is None else name.replace(f"blocks.{layer}.", "blocks.{i}.", 1)


def compare_sites(
    wanted: Activations,
    got: Activations,
    bar: float | Mapping[str, float],
    attention_mask: np.ndarray | None = None,
) -> list[Row]:
    """One row per kind, in the order of `wanted`: the layer with the largest relative error.

    `bar` is one for all kinds, or one for each. Only real tokens of `attention_mask` [b, p] count.
    """
    worst: dict[str, Row] = {}
    for name, reference in wanted.items():
        kind, layer = kind_of(name), layer_of(name)
        allowed = bar if isinstance(bar, float) else bar[kind]
        row = Row(kind, layer, *_errors(*_compared(name, reference, got[name], attention_mask)), allowed)
        if kind not in worst or not row.relative <= worst[kind].relative:
            worst[kind] = row
    return list(worst.values())


def _compared(
    name: str, reference: np.ndarray, got: np.ndarray, attention_mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The entries that count: those of real tokens, and of scores those that the mask lets through."""
    if attention_mask is not None:
        axes = ["b", "p", "V"] if name == "logits" else site(name).axes.split()
        position = axes.index("p" if "p" in axes else "k")
        real = attention_mask.astype(bool)
        reference, got = (np.moveaxis(array, position, 1)[real] for array in (reference, got))
    if name.endswith("hook_attn_scores"):
        seen = reference > _MASKED
        # A difference in what is masked is an infinite error.
        got = np.where((got > _MASKED) == seen, got, np.inf)
        reference, got = reference[seen], got[seen]
    return reference, got


def _errors(reference: np.ndarray, got: np.ndarray) -> tuple[float, float, float]:
    """(largest absolute error, relative error in norm, cosine)."""
    if reference.shape != got.shape:
        raise ValueError(f"shapes differ: {reference.shape} in Hugging Face, {got.shape} in the port")
    a, b = reference.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    norm, difference = np.linalg.norm(a), np.linalg.norm(a - b)
    relative = difference / norm if norm else float(difference > 0)
    lengths = norm * np.linalg.norm(b)
    cosine = float(not difference)
    if lengths:
        cosine = float(a @ b / lengths) if np.isfinite(lengths) else float("nan")
    return float(np.max(np.abs(a - b))), float(relative), float(cosine)
