"""The tensors of a file, whose sizes are checked against each other when they are taken."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.features.activations import Activation
from gemma3_jax.features.normalizations import Normalization
from gemma3_jax.messages import printable
from gemma3_jax.reading import CheckpointError, map_tensor, read_header


class Arguments(TypedDict):
    """Arguments of a dictionary's class, without sites. The arrays are mapped until `placement.place` reads them."""

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    activation: Activation
    normalization: NotRequired[Normalization | None]
    subtracts_b_dec: NotRequired[bool]


class Tensors:
    """Tensors by key, of the file that messages name; `sizes` has the size of each axis letter so far."""

    def __init__(self, file: Path, arrays: Mapping[str, np.ndarray]):
        self.file, self.arrays = file, arrays
        self.sizes: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def take(self, key: str, axes: str) -> Any:
        """The tensor with that key, a mapped array; `axes` has a letter for each of its axes.

        Raises:
            CheckpointError: it is missing, has other axes, or is not of floating-point numbers.
        """
        self.require(key)
        tensor, letters = self.arrays[key], axes.split()
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(f"{self.file}: {key} has dtype {tensor.dtype}; weights are floating-point numbers")
        expected = [self.sizes.get(letter, "any") for letter in letters]
        if tensor.ndim == len(letters):
            found = dict(zip(letters, tensor.shape, strict=True))
            if all(
                found[letter] == size and self.sizes.setdefault(letter, size) == size
                for letter, size in zip(letters, tensor.shape, strict=True)
            ):
                return tensor
        raise CheckpointError(
            f"{self.file}: {key} has shape {list(tensor.shape)}; it must be [{', '.join(letters)}] = {expected}"
        )

    def zeros(self, letter: str) -> Any:
        """Zeros [n] float32 in the place of a tensor, of the size of an axis letter."""
        return np.zeros(self.sizes[letter], np.float32)

    def require(self, *keys: str) -> None:
        """Raise a CheckpointError if a tensor is missing."""
        missing = [key for key in keys if key not in self.arrays]
        if missing:
            known = ", ".join(map(printable, list(self.arrays)[:10])) or "none"
            raise CheckpointError(f"{self.file} has no tensor {missing[0]}; its tensors are: {known}")


def of_safetensors(file: Path, keys: Iterable[str] | None = None) -> Tensors:
    """The tensors of a safetensors file, or those with the keys, as mapped arrays.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    header = read_header(file)
    return Tensors(
        file, {key: map_tensor(key, stored) for key, stored in header.items() if keys is None or key in keys}
    )


def of_k(k: object, width: int, file: Path) -> int:
    """The number of active features that a config states.

    Raises:
        CheckpointError: it is not an integer between 1 and the width.
    """
    if isinstance(k, bool) or not isinstance(k, int | float) or k != int(k) or not 1 <= k <= width:
        raise CheckpointError(f"{file}: k is {k!r}; it must be an integer between 1 and the width, {width}")
    return int(k)
