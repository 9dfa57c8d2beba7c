"""The adapter's conversion steps: what is done to one tensor on its way in, and undone on its way out.

Each step works on numpy and JAX arrays of any dtype, keeps the dtype unless it says otherwise, and may return a view.
Steps are hashable, so that `convert` can be compiled.
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
    """Nothing: embeddings and the bias of the output projection."""

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
    """RMSNorm weights: Hugging Face stores w and multiplies by 1 + w; the model holds 1 + w, in float32 always.

    `revert` is exact where 1 + w fits float32's 24 bits. For |w| < 2**24 that holds of every bfloat16 weight of
    magnitude at least 2**-16, and of every float16 weight of at least 2**-13. Any other such weight comes back
    changed by at most half a unit in the last place of 1 + w, 2**-24 for |w| < 1, which the model cannot tell
    apart: converted again it gives the same 1 + w.
    """

    def convert(self, tensor: Array) -> Array:
        return tensor.astype(np.float32) + np.float32(1)

    def revert(self, tensor: Array) -> Array:
        return tensor.astype(np.float32) - np.float32(1)
