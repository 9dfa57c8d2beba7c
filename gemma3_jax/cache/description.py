"""What a cache says of itself at the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Protocol, Self

import jax

from gemma3_jax.cache.components import Captured
from gemma3_jax.descriptions import Description, arrays_text, size_text
from gemma3_jax.sites.names import layer_of
from gemma3_jax.types import Integers

_MOST = 24  # kinds that are listed: a run that captures everything has 60


class Summarized(Captured, Sized, Protocol):
    """What these functions read of an `ActivationCache`."""

    tokens: Integers | None

    @property
    def grads(self) -> Self | None: ...

    def __iter__(self) -> Iterator[str]: ...


def describe(cache: Summarized) -> Description:
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
    rows = [(kind.replace("{}", layers_text(names)), what) for (kind, what), names in kinds.items()]
    more = [(f"and {len(rows) - _MOST} more kinds of sites",)] if len(rows) > _MOST else []
    return Description(_summary(cache), (*rows[:_MOST], *more))


def _summary(cache: Summarized) -> str:
    leaves = [leaf for leaf in jax.tree.leaves(cache) if hasattr(leaf, "nbytes")]
    parts = [f"{len(cache)} site{'' if len(cache) == 1 else 's'}", size_text(sum(leaf.nbytes for leaf in leaves))]
    if cache.grads is not None:
        parts.append(f"gradients of {len(cache.grads)}")
    if not cache.batched:
        parts.append("no batch axis")
    if cache.tokens is not None:
        parts.append(f"tokens {list(cache.tokens.shape)}")
    return f"ActivationCache: {', '.join(parts)}"


def _described(cache: Summarized, name: str) -> str:
    """Shape and dtype of the value; for the result of a reduction, those of its arrays and the reduction's name."""
    arrays = arrays_text(cache[name])
    return f"{arrays}, reduced by {cache.reduced[name]}" if name in cache.reduced else arrays


def layers_text(names: list[str]) -> str:
    """The layers of some sites of one kind, as a glob has them: `3`, `{0..17}` or `{0,5,11}`."""
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    if len(layers) < 2:
        return "".join(map(str, layers))
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}..{layers[-1]}}}"
    return f"{{{','.join(map(str, layers))}}}"
