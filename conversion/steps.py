"""The adapter's conversion steps: what is done to one tensor on its way in, and undone on its way out.

Each step works on numpy arrays of any dtype, keeps the dtype unless it says otherwise, and may return a view.
"""

import dataclasses
from typing import Protocol

import einops
import numpy as np


class Step(Protocol):
    """`revert(convert(x))` is `x`, up to the bound that the step states."""

    def convert(self, tensor: np.ndarray) -> np.ndarray: ...

    def revert(self, tensor: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Keep:
    """Nothing: embeddings and the bias of the output projection."""

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def revert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """An einops rearrange in which axis `n` has length `heads`; exact both ways.

    >>> Rearrange("(n h) m -> n m h", heads=2).convert(np.zeros((6, 5))).shape
    (2, 5, 3)
    """

    pattern: str
    heads: int

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, self.pattern, n=self.heads)

    def revert(self, tensor: np.ndarray) -> np.ndarray:
        theirs, ours = self.pattern.split(" -> ")
        return einops.rearrange(tensor, f"{ours} -> {theirs}")


@dataclasses.dataclass(frozen=True)
class Transpose:
    """[out, in] <-> [in, out]; exact both ways."""

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T

    def revert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T


@dataclasses.dataclass(frozen=True)
class AddOne:
    """RMSNorm weights: Hugging Face stores w and multiplies by 1 + w; the model holds 1 + w, in float32 always.

    `revert` is exact where 1 + w needs no more than float32's 24 bits. A bfloat16 or float16 weight of magnitude at
    least 2**-16 (bfloat16) or 2**-13 (float16) always does. Any other weight comes back changed by at most half a
    unit in the last place of 1 + w, 2**-24 for |w| < 1, which the model cannot tell apart: converted again it
    gives the same 1 + w.
    """

    def convert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.astype(np.float32) + np.float32(1)

    def revert(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.astype(np.float32) - np.float32(1)
