"""Whether a dictionary is at the site that it was trained on: how well it explains that site, and those near it.

Axes: b batch, p position, n tokens, d features of a site, f features of the dictionary, l layers that are read, m
layers that are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.features.layered import Crosscoder
from gemma3_jax.features.neighbours import Place, neighbours, place_of
from gemma3_jax.features.parts import LAYERED
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.splicing import splice
from gemma3_jax.features.unchecked import mark
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.hooks.edits import Replace
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.selection import Edits

ROWS, WIDTHS = 8, 4  # texts that run at once, and lengths at which they run at most: each compiles
TOKENS, FEATURES = 256, 2**24  # so many tokens are encoded at once, and so many values of features at most
# By what part of it, and by how much, a neighbour's FVU must be smaller.
_MARGIN, _ROUNDING = 0.01, 1e-9


@dataclasses.dataclass(frozen=True)
class Report:
    """How well a dictionary explains its site; made by `check`.

    Attributes:
        fvu: fraction of variance unexplained, |y - output|^2 / |y - mean|^2, summed over tokens: 0 is perfect, and 1 is
            what the mean explains.
        l0: active features of a token, on average; of all layers together.
        dead: fraction of the features that no token activates.
        cosine: of output and value, on average over tokens.
        delta_loss: by how much the mean next-token loss rises, in nats, when the outputs replace the values.
        tokens: how many tokens these are measured on.
        site: canonical name of the site that is read; with "*" for the layers of a dictionary of several.
        better: (site, FVU) of neighbouring sites that are explained better, the best first.
        neighbours: (site, FVU) of all neighbouring sites, the best first; infinite where the sizes do not match.
        arguments: by such a site, the arguments of `load` that would name it.
    """

    fvu: float
    l0: float
    dead: float
    cosine: float
    delta_loss: float
    tokens: int
    site: str
    better: list[tuple[str, float]]
    neighbours: list[tuple[str, float]] = dataclasses.field(repr=False)
    arguments: Mapping[str, str] = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        lines = [
            f"{self.site}: FVU {self.fvu:.3f}, L0 {self.l0:.1f}, dead {self.dead:.1%}, cosine {self.cosine:.3f}, "
            f"delta loss {self.delta_loss:+.3f} on {self.tokens} tokens"
        ]
        for name, fvu in self.better[:3]:
            lines.append(f"  {name} explains more: FVU {fvu:.3f}; load with another {self.arguments[name]}")
        return "\n".join(lines if self.better else [*lines, "  no neighbouring site explains more"])


def check(self: Dictionary, model: HookedGemma3, texts: Input) -> Report:
    """Measure how well a dictionary explains its site in a model, and whether it explains another one better.

    The neighbours are the other sites of the block, before and after each norm, with and without its gain, and the same
    sites of the layers beside; for a transcoder, those of its input and those of its output. Of a dictionary of several
    layers, all layers move together. The fraction of variance unexplained (FVU) is 0 for a perfect dictionary.

    Args:
        self: a dictionary of any kind, of which this is a method.
        model: the model.
        texts: text, texts or token ids; a few thousand tokens make the figures steady. BOS and padding are left out,
            and the first four tokens of each text if the tokenizer has a chat template.

    Returns:
        A `Report`: .fvu, .l0, .dead, .cosine, .delta_loss, .site, and .better, [(site, FVU), ...] of the neighbouring
        sites that are explained better. It costs two runs of the model, and an encoding for each neighbour.

    Raises:
        ValueError: the texts are too short; or the sites do not have the dictionary's features.
        UnknownSite: the model does not have the sites.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> one = jnp.eye(model.config.hidden_size)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=jnp.concatenate([one, -one], 1), b_enc=jnp.zeros(2 * len(one)), W_dec=jnp.concatenate([one, -one]),
    ...     b_dec=jnp.zeros(len(one)), activation=features.Relu(), site_in="blocks.1.hook_out",
    ... )
    >>> report = sae.check(model, "ba ke lo mu ti so re")
    >>> round(report.fvu, 3), report.better
    (0.0, [])
    """
    sae = self
    mark(sae, False)
    inputs = model.inputs(texts)
    kept = _kept(model, inputs)
    if kept.sum() < 2:
        raise ValueError(f"the texts have {kept.sum()} tokens after those that are left out; give longer ones")
    places = [place_of(sae), *neighbours(sae, model.config)]
    names = sorted({name for place in places for name in (*place.read, *place.written)})
    sums, losses = [_Sums() for _ in places], np.zeros(2)
    for rows, chosen in _batches(inputs, kept):
        mask = rows.attention_mask
        loss, cache = model.run_with_cache(rows.tokens, names, return_type="loss", attention_mask=mask)
        for i, place in enumerate(places):
            _add(sums[i], sae, place, cache, chosen, own=i == 0)
        spliced = model.run_with_hooks(
            rows.tokens, _spliced(sae, cache, chosen), return_type="loss", attention_mask=mask
        )
        pairs = _pairs_of(rows)
        losses += pairs * np.asarray([float(spliced) - float(loss), 1.0])
    own = sums[0]
    near = sorted((each.fvu, place) for each, place in zip(sums[1:], places[1:], strict=True))
    better = [(fvu, place) for fvu, place in near if fvu < (1 - _MARGIN) * own.fvu - _ROUNDING]
    return Report(
        fvu=own.fvu,
        l0=own.l0 / own.tokens,
        dead=1 - float(np.mean(own.alive)),
        cosine=own.cosine / own.tokens / len(places[0].written),
        delta_loss=float(losses[0] / losses[1]),
        tokens=own.tokens,
        site=places[0].name,
        better=[(place.name, fvu) for fvu, place in better],
        neighbours=[(place.name, fvu) for fvu, place in near],
        arguments={place.name: place.argument for _, place in better},
    )


@dataclasses.dataclass
class _Sums:
    """Sums over tokens, in float64."""

    tokens: int = 0
    values: np.ndarray | float = 0.0  # [m, d]
    squares: np.ndarray | float = 0.0
    missed: float = 0.0
    cosine: float = 0.0
    l0: float = 0.0
    alive: np.ndarray | bool = False  # [..., f]

    @property
    def fvu(self) -> float:
        """Infinite where a site cannot be compared."""
        if not self.tokens:
            return np.inf
        variance = np.sum(self.squares - self.values**2 / self.tokens)
        return float(self.missed / variance) if variance > 0 else np.inf

    def add(self, y: np.ndarray, out: np.ndarray) -> None:
        """Add tokens: their values and the outputs for them, both [m, n, d]."""
        self.tokens += y.shape[1]
        self.values = self.values + y.sum(axis=1)
        self.squares = self.squares + (y**2).sum(axis=1)
        self.missed += float(((y - out) ** 2).sum())
        lengths = np.linalg.norm(y, axis=-1) * np.linalg.norm(out, axis=-1)
        self.cosine += float(np.sum(np.sum(y * out, axis=-1) / np.where(lengths > 0, lengths, 1)))


def _add(
    sums: _Sums, sae: Dictionary, place: Place, cache: Mapping[str, jax.Array], kept: np.ndarray, own: bool
) -> None:
    """Add the kept tokens of some rows; nothing if the values of a neighbouring site do not have the right sizes."""
    read, written = (_tokens(cache, names, kept) for names in (place.read, place.written))
    W_enc, b_dec = (sae.W_enc[0], sae.b_dec[0]) if isinstance(sae, LAYERED) else (sae.W_enc, sae.b_dec)
    if not own and (read.shape[-1], written.shape[-1]) != (W_enc.shape[0], b_dec.shape[-1]):
        return
    step = min(max(FEATURES // (sae.width * len(read)), 1), TOKENS)
    for start in range(0, read.shape[1], step):
        x, y = read[:, start : start + step], written[:, start : start + step].astype(np.float64)
        n = x.shape[1]
        # [l, n, d]: as many tokens each time, for one compilation
        x = np.pad(x, ((0, 0), (0, step - n), (0, 0)))
        x = x if isinstance(sae, LAYERED) else x[0]
        f = sae.encode(x)
        # [m, n, d]
        out = np.asarray(sae.decode(f, x), np.float64).reshape(len(y), step, -1)[:, :n]
        sums.add(y, out)
        if own:
            active = f[..., :n, :] != 0  # those of a JumpReLU that does not rectify may be negative
            sums.l0 += float(jnp.sum(active))
            sums.alive = sums.alive | np.asarray(jnp.any(active, axis=-2))


def _tokens(cache: Mapping[str, jax.Array], names: Sequence[str], kept: np.ndarray) -> np.ndarray:
    """[m, n, d] float32: the values of sites at the kept tokens, heads side by side."""
    return np.stack([np.asarray(cache[name], np.float32).reshape(*kept.shape, -1)[kept] for name in names])


def _kept(model: HookedGemma3, inputs: Inputs) -> np.ndarray:
    """[b, p]: the real tokens after BOS, and after the beginning of the first turn in a model of turns."""
    mask = np.ones(np.shape(inputs.tokens), int) if inputs.attention_mask is None else np.asarray(inputs.attention_mask)
    left_out = 4 if getattr(model.tokenizer, "chat_template", None) else 1
    return (mask > 0) & (np.cumsum(mask, axis=1) > left_out)


def _batches(inputs: Inputs, kept: np.ndarray) -> Iterator[tuple[Inputs, np.ndarray]]:
    """Rows of about the same length, without the columns of padding that they share, and their kept tokens."""
    tokens = np.asarray(inputs.tokens)
    mask = np.ones_like(tokens) if inputs.attention_mask is None else np.asarray(inputs.attention_mask)
    lengths = np.sum(mask, axis=1)
    part = -(-int(lengths.max()) // WIDTHS)
    order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]  # rows of padding come first
    for start in range(0, len(order), ROWS):
        here = order[start : start + ROWS]
        columns = np.flatnonzero(mask[here].any(axis=0))
        # The padding is on the left or on the right.
        width = -(-(columns[-1] + 1 - columns[0]) // part) * part
        first = max(0, min(columns[0], mask.shape[1] - width))
        cut = slice(first, first + width)
        yield Inputs(tokens[here, cut], mask[here, cut]), kept[here, cut]


def _pairs_of(rows: Inputs) -> int:
    """The number of pairs of tokens that a mean loss is over."""
    tokens = np.size(rows.tokens) if rows.attention_mask is None else int(np.sum(rows.attention_mask))
    return tokens - len(rows.tokens)


def _spliced(sae: Dictionary, cache: Mapping[str, jax.Array], kept: np.ndarray) -> Edits:
    """Edits that replace the kept tokens' values by outputs; a crosscoder's are those for the values without edits."""
    if not isinstance(sae, Crosscoder):
        return [splice(sae, error=False, positions=kept)]
    outputs = zip(sae.site_out, sae(cache), strict=True)
    return [(name, Replace(output, where=kept[..., None])) for name, output in outputs]
