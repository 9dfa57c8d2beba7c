"""What a cache says of itself at the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Protocol, Self

import jax
import numpy as np

from gemma3_jax.cache.components import Captured
from gemma3_jax.sites.names import layer_of
from gemma3_jax.types import Integers, PyTree

_MOST = 24  # kinds that are listed: a run that captures everything has 60


class Described(Captured, Sized, Protocol):
    """What these functions read of an `ActivationCache`."""

    tokens: Integers | None

    @property
    def grads(self) -> Self | None: ...

    def __iter__(self) -> Iterator[str]: ...


def describe(cache: Described) -> str:
    """The sites by kind, with layers, shapes, dtypes and reductions; the size of all; and what the cache knows besides.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> model.run_with_cache("ba ke lo", ["blocks.*.hook_resid_post", "unembed.hook_out"])[1]
    ActivationCache: 5 sites, 4.6 KiB, tokens [1, 4]
      blocks.{0..3}.hook_out  [1, 4, 96] bfloat16
      unembed.hook_out        [1, 4, 104] float32
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in cache:
        layer = layer_of(name)
        kind = name if layer is None else name.replace(f"blocks.{layer}.", "blocks.{}.", 1)
        kinds.setdefault((kind, _described(cache, name)), []).append(name)
    rows = [(kind.replace("{}", _layers(names)), what) for (kind, what), names in kinds.items()]
    width = max((len(kind) for kind, _ in rows[:_MOST]), default=0)
    lines = [_summary(cache), *(f"  {kind:{width}}  {what}" for kind, what in rows[:_MOST])]
    return "\n".join([*lines, *([f"  and {len(rows) - _MOST} more kinds of sites"] if len(rows) > _MOST else [])])


def _summary(cache: Described) -> str:
    leaves = [leaf for leaf in jax.tree.leaves(cache) if hasattr(leaf, "nbytes")]
    parts = [f"{len(cache)} site{'' if len(cache) == 1 else 's'}", size_text(sum(leaf.nbytes for leaf in leaves))]
    if cache.grads is not None:
        parts.append(f"gradients of {len(cache.grads)}")
    if not cache.batched:
        parts.append("no batch axis")
    if cache.tokens is not None:
        parts.append(f"tokens {list(cache.tokens.shape)}")
    return f"ActivationCache: {', '.join(parts)}"


def _described(cache: Described, name: str) -> str:
    """Shape and dtype of the value; for the result of a reduction, those of its arrays and the reduction's name."""
    arrays = _arrays(cache[name])
    return f"{arrays}, reduced by {cache.reduced[name]}" if name in cache.reduced else arrays


def _arrays(value: PyTree) -> str:
    leaves = jax.tree.leaves(value)
    shown = [f"{list(np.shape(leaf))} {getattr(leaf, 'dtype', type(leaf).__name__)}" for leaf in leaves]
    return " and ".join(shown)


def _layers(names: list[str]) -> str:
    """The layers of some sites of one kind, as a glob has them: `3`, `{0..17}` or `{0,5,11}`."""
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    if len(layers) < 2:
        return "".join(map(str, layers))
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}..{layers[-1]}}}"
    return f"{{{','.join(map(str, layers))}}}"


def size_text(n: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> size_text(12), size_text(1536), size_text(3 * 2**30)
    ('12 bytes', '1.5 KiB', '3.0 GiB')
    """
    if n < 1024:
        return f"{n:.0f} bytes"
    exponent = min(3, int(np.log2(n)) // 10)
    return f"{n / 1024**exponent:,.1f} {'KMG'[exponent - 1]}iB"
