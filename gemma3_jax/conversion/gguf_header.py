"""The header of a GGUF file: its metadata and the place of each tensor, read without the data.

`gguf.GGUFReader` reads the same, but makes an array for each token: 8 seconds for Gemma's vocabulary. Source of the
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gemma3_jax.conversion.files import GGUF_MAGIC
from gemma3_jax.extras import needs_extra
from gemma3_jax.reading import CheckpointError, Stored, check_file
from gemma3_jax.types import Settings

# By the number of the type: the code of `struct`. A string is 8 and an array is 9.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_AXES = 4
_PIECE, _MOST_HEADER = 2**23, 2**26  # bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file has before its data.

    Attributes:
        file: the file.
        fields: metadata by key; arrays are lists.
        tensors: shape, quantisation type and first byte of each tensor by its GGUF name, in file order. Shapes are
            in the order of PyTorch: GGUF has the fastest axis first.
    """

    file: Path
    fields: Settings
    tensors: Mapping[str, Stored]


def read_header(file: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: as in `check_file`; or the file is not a GGUF file, is truncated or corrupt, is big-endian, or
            has a quantisation type that the `gguf` package does not know.
        ModuleNotFoundError: the `gguf` package is not installed.
    """
    check_file(file)
    with file.open("rb") as opened:
        _check_start(file, opened.read(24))
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _checked(file, data, len(data))


def read_remote_header(file: Path, opened: BinaryIO, size: int) -> Header:
    """The header of a GGUF file elsewhere, of which only the beginning is read: 7 MB for Gemma's vocabulary.

    Args:
        file: its name, for messages.
        opened: the file, at its beginning.
        size: bytes of the whole file.

    Raises:
        CheckpointError, ModuleNotFoundError: as in `read_header`.
    """
    data = opened.read(_PIECE)
    _check_start(file, data[:24])
    while True:
        try:
            return _checked(file, data, size)
        except _Incomplete as error:
            more = opened.read(len(data)) if len(data) < _MOST_HEADER else b""
            if not more:
                raise _corrupt(file, error) from error
            data += more


def _checked(file: Path, data: mmap.mmap | bytes, size: int) -> Header:
    """The header at the beginning of `data`.

    Raises:
        _Incomplete: it goes on after `data`, but not after the file.
        CheckpointError: as in `read_header`.
    """
    try:
        return _read(file, data, size)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, CheckpointError) or (isinstance(error, _Incomplete) and len(data) < size):
            raise
        raise _corrupt(file, error) from error


def _corrupt(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or corrupt: {error}; download it again")


class _Incomplete(ValueError):
    """A header that goes on after the bytes that were read."""


def vocabulary(fields: Settings) -> list[str]:
    """The tokens in the metadata of a GGUF file; none if that has something else in their place."""
    tokens = fields.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) else []


def block_sizes(kind: str) -> tuple[int, int]:
    """The number of weights and of bytes in a block of a quantisation type."""
    with needs_extra("gguf", "GGUF files need"):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _check_start(file: Path, start: bytes) -> None:
    if not start.startswith(GGUF_MAGIC):
        raise CheckpointError(f"{file} is not a GGUF file: it does not begin with {GGUF_MAGIC.decode()}")
    if len(start) < 24:
        raise CheckpointError(f"{file} is truncated: it has {len(start)} bytes; download it again")
    version = int.from_bytes(start[4:8], "little")
    if not version & 0xFFFF:
        raise CheckpointError(f"{file} is big-endian; convert it with the gguf package's gguf-convert-endian")
    if version not in _VERSIONS:
        raise CheckpointError(f"{file} has version {version} of GGUF; this library reads versions 2 and 3")


class _Reader:
    """Reads values one after the other, and raises ValueError at the end of the file."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data, self.at, self.end = data, 4, len(data)

    def numbers(self, code: str, n: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * n
        start = self.at
        self._advance(size)
        return struct.unpack(f"<{n}{code}", self.data[start : start + size])

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def strings(self, n: int = 1) -> list[str]:
        # A vocabulary has 262,144 strings: this loop is most of the time to read a header.
        data, at, end, texts = self.data, self.at, self.end, []
        for _ in range(n):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > end:
                break
            texts.append(data[start:at].decode())
        self._advance(at - self.at)
        return texts

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.strings()[0]
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        kind, n = self.number("I"), self.number("Q")
        return self.strings(n) if kind == _STRING else list(self.numbers(_scalar(kind), n))

    def _advance(self, size: int) -> None:
        if size > self.end - self.at:
            raise _Incomplete(f"its header goes on after the last of {self.end:,} bytes")
        self.at += size


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has a value of type {kind}")
    return _SCALARS[kind]


def _read(file: Path, data: mmap.mmap | bytes, size: int) -> Header:
    reader = _Reader(data)
    _, n_tensors, n_fields = reader.number("I"), reader.number("Q"), reader.number("Q")
    fields: dict[str, object] = {}
    for _ in range(n_fields):
        [key] = reader.strings()
        if key in fields:
            raise ValueError(f"its metadata has {key} twice")
        fields[key] = reader.value(reader.number("I"))
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        [name] = reader.strings()
        axes = reader.number("I")
        if axes > _MOST_AXES or name in places:
            raise ValueError(f"{name} has {axes} axes" if axes > _MOST_AXES else f"it has {name} twice")
        shape = reader.numbers("Q", axes)[::-1]
        places[name] = shape, reader.number("I"), reader.number("Q")
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    tensors = {
        name: Stored(file, shape, _kind(file, name, number), start + offset)
        for name, (shape, number, offset) in places.items()
    }
    _check_places(tensors, size)
    return Header(file, fields, dict(sorted(tensors.items(), key=lambda item: item[1].start)))


def _kind(file: Path, name: str, number: int) -> str:
    """The name of a quantisation type."""
    with needs_extra("gguf", "GGUF files need"):
        from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        raise CheckpointError(
            f"{file}: {name} has quantisation type {number}, which the installed gguf package does not know; "
            "upgrade it: pip install --upgrade gguf"
        ) from None


def _check_places(tensors: Mapping[str, Stored], size: int) -> None:
    """Raise unless the tensors have whole blocks, lie inside the file, and do not overlap."""
    before = 0
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
        weights, _ = block_sizes(stored.dtype)
        if not stored.shape or stored.shape[-1] % weights:
            raise ValueError(f"{name} has shape {list(stored.shape)}, but {stored.dtype} has blocks of {weights}")
        end = stored.start + n_bytes(stored)
        if end > size:
            raise ValueError(f"{name} ends at byte {end:,} of a file of {size:,}")
        if stored.start < before:
            raise ValueError(f"{name} overlaps the tensor before it")
        before = end


def n_bytes(stored: Stored) -> int:
    """The size of a tensor in its file."""
    weights, size = block_sizes(stored.dtype)
    return math.prod(stored.shape) // weights * size
