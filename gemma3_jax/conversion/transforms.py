"""The steps of conversion: each transforms one tensor, and has an inverse for export.

A step works on NumPy and JAX arrays of any dtype. It keeps the dtype unless it says otherwise, and may return a view.
Steps are hashable, so `convert` can be compiled.
"""

import dataclasses
from typing import Protocol

import einops
import jax
import numpy as np

Array = np.ndarray | jax.Array


class Step(Protocol):
    """`revert(convert(x))` is `x`, up to the bound that the step states."""

    def convert(self, tensor: Array) -> Array: ...

    def revert(self, tensor: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Keep:
    """The identity, for embeddings and the bias of the output projection."""

    def convert(self, tensor: Array) -> Array:
        return tensor

    def revert(self, tensor: Array) -> Array:
        return tensor


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """An einops rearrange in which axis `n` has length `heads`; exact both ways.

    >>> Rearrange("(n h) m -> n m h", heads=2).convert(np.zeros((6, 5))).shape
    (2, 5, 3)
    """

    pattern: str
    heads: int

    def convert(self, tensor: Array) -> Array:
        return einops.rearrange(tensor, self.pattern, n=self.heads)

    def revert(self, tensor: Array) -> Array:
        theirs, ours = self.pattern.split(" -> ")
        return einops.rearrange(tensor, f"{ours} -> {theirs}")


@dataclasses.dataclass(frozen=True)
class Transpose:
    """[out, in] <-> [in, out]; exact both ways."""

    def convert(self, tensor: Array) -> Array:
        return tensor.T

    def revert(self, tensor: Array) -> Array:
        return tensor.T


@dataclasses.dataclass(frozen=True)
class AddOne:
    """RMSNorm weights: Hugging Face stores w and multiplies by 1 + w; the model stores 1 + w, always in float32.

    `revert` is exact if 1 + w fits in float32's 24 bits. For |w| < 2**24, that is true for every bfloat16 weight with
    a magnitude of at least 2**-16, and for every float16 weight of at least 2**-13. Any other such weight changes by at
    most half a unit in the last place of 1 + w, which is 2**-24 for |w| < 1. The model's results do not change: the
    weight gives the same 1 + w when it is converted again.
    """

    def convert(self, tensor: Array) -> Array:
        return tensor.astype(np.float32) + np.float32(1)

    def revert(self, tensor: Array) -> Array:
        return tensor.astype(np.float32) - np.float32(1)
