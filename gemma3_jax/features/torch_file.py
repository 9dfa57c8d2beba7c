"""Reads tensors from the zip files that `torch.save` writes, without torch and without executing their pickle.

A pickle is a program that may call anything. This reader allows the few calls that a state dict of tensors consists of,
with objects of its own in place of torch's functions, whose attributes a pickle cannot set. It refuses all others.
"""

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma3_jax.reading import CheckpointError, check_file

_MOST_PICKLE = 2**24  # bytes; that of a state dict takes a few hundred for each tensor
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Inert:
    """An object of an unpickler that ignores what a pickle says of its attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class _StateDict(_Inert, collections.OrderedDict[str, object]):
    """An ordered dict; torch keeps the versions of modules in an attribute."""


class _Array(_Inert):
    """The numbers of a storage or of a tensor."""

    def __init__(self, values: np.ndarray):
        self.values = values


class _RebuildTensor(_Inert):
    """In place of torch's function: a view of a storage, whose strides count numbers."""

    def __call__(
        self, storage: _Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
    ) -> _Array:
        """The tensor. It is an error if it leaves the storage."""
        values = storage.values
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"a tensor of shape {shape} and strides {strides}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= len(values):
            raise ValueError(f"a tensor of shape {shape} in a storage of {len(values)} numbers")
        bytes_apart = [stride * values.itemsize for stride in strides]
        return _Array(np.lib.stride_tricks.as_strided(values[offset:], shape, bytes_apart, writeable=False))


class _RebuildParameter(_Inert):
    """In place of torch's function: the tensor of a parameter."""

    def __call__(self, tensor: _Array, *_: object) -> _Array:
        """The tensor."""
        return tensor


def read_torch_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by key.

    Raises:
        CheckpointError: the file is missing or damaged; is not a zip file of torch; or its pickle has anything but
            tensors.
    """
    check_file(file)
    try:
        with zipfile.ZipFile(file) as archive:
            state = _unpickled(file, archive)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a zip file as torch.save writes it since torch 1.6, or is damaged: {error}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, _Array) for key, value in state.items()
    ):
        raise CheckpointError(f"{file} does not have a state dict, tensors by name; save that of the dictionary")
    return {key: tensor.values for key, tensor in state.items()}


def _unpickled(file: Path, archive: zipfile.ZipFile) -> object:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(f"{file} has no data.pkl; it is not a file of torch.save")
    content = _member(file, archive, names[0], _MOST_PICKLE)
    try:
        return _Unpickler(file, archive, names[0].removesuffix("data.pkl"), content).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise CheckpointError(f"{file}: its data.pkl is damaged: {type(error).__name__}: {error}") from error


def _member(file: Path, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The content of a member of the archive, of at most so many bytes."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise CheckpointError(f"{file} is damaged: it has no {name}") from None
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        raise CheckpointError(f"{file}: {name} is compressed, or larger than its tensors say; torch.save does neither")
    return archive.read(info)


class _Unpickler(pickle.Unpickler):
    """Builds NumPy arrays, where torch's unpickler builds tensors."""

    def __init__(self, file: Path, archive: zipfile.ZipFile, prefix: str, content: bytes):
        super().__init__(io.BytesIO(content))
        self.file, self.archive, self.prefix = file, archive, prefix
        self.allowed = {
            ("collections", "OrderedDict"): _StateDict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> object:
        """One of the few functions and types that a state dict needs."""
        found = self.allowed.get((module, name))
        if found is None:
            raise CheckpointError(
                f"{self.file}: its pickle refers to {module}.{name}; only tensors are read, and nothing is executed. "
                "Save the state dict alone, or convert it to safetensors"
            )
        return found

    def persistent_load(self, pid: Any) -> _Array:
        """The storage of tensors: all its numbers, on one axis."""
        kind, name, key, _, size = pid
        if kind != "storage" or name not in _STORAGES.values() or not isinstance(key, str):
            raise CheckpointError(f"{self.file}: its pickle refers to {pid!r}, which is not a storage")
        dtype = jnp.dtype(name)
        content = _member(self.file, self.archive, f"{self.prefix}data/{key}", size * dtype.itemsize)
        return _Array(np.frombuffer(content, dtype, size))
