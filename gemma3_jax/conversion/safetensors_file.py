"""Writes a safetensors file with one tensor in memory at a time: `safetensors` itself needs all of them, twice.

Format: https://huggingface.co/docs/safetensors#format. The file is byte for byte the one that `safetensors` writes.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from gemma3_jax.conversion.files import DTYPES
from gemma3_jax.processes import in_first
from gemma3_jax.reading import NUMPY_DTYPES

_ALIGNMENT = 8  # bytes
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def write_tensors(
    file: Path,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], Callable[[], np.ndarray]],
) -> None:
    """Write a file in the first process; all processes call this.

    Args:
        file: a new file.
        tensors: shape and dtype of each tensor, by key.
        read: called for each key in every process. It returns a function that returns the tensor, which only the first
            process calls.
    """
    # The order of `safetensors`: wide dtypes first, so that every tensor is aligned, and then by key.
    keys = sorted(tensors, key=lambda key: (DTYPES.index(tensors[key].dtype.name), key))
    in_first(lambda: _append(file, _header({key: tensors[key] for key in keys})))
    for key in keys:
        in_first(functools.partial(_append_tensor, file, read(key)))


def _header(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    """The bytes before the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, tensor in tensors.items():
        end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _append_tensor(file: Path, tensor: Callable[[], np.ndarray]) -> None:
    _append(file, np.ascontiguousarray(tensor()).reshape(-1).view(np.uint8).data)


def _append(file: Path, content: bytes | memoryview) -> None:
    with file.open("ab") as opened:
        opened.write(content)
