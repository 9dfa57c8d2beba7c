"""Reads files that others wrote, which may be damaged, hostile, or not files at all: JSON and safetensors."""

import dataclasses
import json
import math
import mmap
import stat
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma3_jax.messages import printable
from gemma3_jax.types import JsonObject

_MOST_JSON = 2**28  # bytes; a config takes kilobytes, an index of the largest models less than a megabyte
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# By their names in safetensors headers: the dtypes of parameters, and those of quantised weights and other tensors.
NUMPY_DTYPES = {
    "F32": jnp.dtype("float32"),
    "BF16": jnp.dtype("bfloat16"),
    "F16": jnp.dtype("float16"),
    "F64": jnp.dtype("float64"),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
    "F8_E5M2": jnp.dtype("float8_e5m2"),
    **{
        f"{kind}{bits}": jnp.dtype(f"{name}{bits}")
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    "BOOL": jnp.dtype("bool"),
}


class CheckpointError(ValueError):
    """A checkpoint, or a file, that cannot be read or written; the message is one line, and names file and tensor."""

    def __init__(self, message: object):
        super().__init__(printable(message))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: its header, and `start`, its offset in bytes from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


def check_file(file: Path) -> None:
    """Raise an error unless `file` is a regular file that can be read.

    Links are followed, wherever they lead: a snapshot of the hub consists of links to another directory.

    Raises:
        CheckpointError: the file is missing, a broken link, a directory, a FIFO or a device (reading from one of these
            may never end), not readable, or a Git LFS pointer in place of its content.
    """
    try:
        mode = file.stat().st_mode
        beginning = b""
        if stat.S_ISREG(mode):
            with file.open("rb") as opened:
                beginning = opened.read(len(_LFS_POINTER))
    except FileNotFoundError:
        why = f"is a link to {file.readlink()}, which is missing" if file.is_symlink() else "is missing"
        raise CheckpointError(f"{file} {why}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise CheckpointError(f"{file} is {kind}, not a file")
    if beginning == _LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, without the content; run `git lfs pull` in its directory")


def read_json(file: Path) -> Any:
    """The content of a JSON file, which may begin with a byte order mark.

    Raises:
        CheckpointError: as in `check_file`; or the file is too large, or its content is not valid JSON, repeats a key,
            is nested too deeply, or has an integer of thousands of digits.
    """
    check_file(file)
    size = file.stat().st_size
    if size > _MOST_JSON:
        raise CheckpointError(f"{file} has {size:,} bytes; this is too large for {file.name}")
    return parse_json(file, file.read_bytes())


def parse_json(file: str | Path, content: bytes) -> Any:
    """The value of JSON that was read from `file`; errors as in `read_json`."""
    if not content.strip():
        raise CheckpointError(f"{file} is empty")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object with these keys. JSON's readers disagree on the value of a key that occurs twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in entries if keys.count(key) > 1)!r} occurs twice")
    return entries


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by key, in file order, without reading data.

    Raises:
        CheckpointError: as in `check_file`; or the file is truncated or corrupt.
    """
    header, data = _safetensors_header(file)
    header.pop("__metadata__", None)
    return {
        key: Stored(file, tuple(tensor["shape"]), tensor["dtype"], data + tensor["data_offsets"][0])
        for key, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file has beside its tensors; errors as in `read_header`."""
    return dict(_safetensors_header(file)[0].get("__metadata__") or {})


def _safetensors_header(file: Path) -> tuple[JsonObject, int]:
    """The header of a safetensors file, and where its data begins."""
    check_file(file)
    try:
        with safe_open(file, "numpy"):  # checks that the header is consistent and matches the file's size
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = opened.read(size)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}") from error
    return parse_json(file, content), 8 + size


def map_tensor(key: str, stored: Stored) -> np.ndarray:
    """One tensor as a read-only memory-mapped NumPy array (bfloat16 through `ml_dtypes`).

    A page is read when it is first used. Pages in use count as memory until the array is released.
    """
    dtype = NUMPY_DTYPES.get(stored.dtype)
    if dtype is None:
        raise CheckpointError(f"{stored.file}: {key} has dtype {stored.dtype}, which NumPy cannot represent")
    if not math.prod(stored.shape):
        return np.empty(stored.shape, dtype)  # an empty file region cannot be mapped
    try:
        mapped = np.memmap(stored.file, np.uint8, "r", stored.start, dtype.itemsize * math.prod(stored.shape))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {key} cannot be read: {error}") from error
    return mapped.view(np.ndarray).view(dtype).reshape(stored.shape)


def release(mapped: np.ndarray) -> None:
    """Give back the memory of the pages of `map_tensor` that were read; they are read again when they are used.

    Other arrays stay as they are.
    """
    base = mapped.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
