"""The files of a store: units, which are safetensors with a checksum, and the names of everything.

manifest.json   what the store has: see `gemma3_jax.harvest.manifest`
plan.npy        where each unit begins; it can be computed again
units/000/000012.safetensors
claims/         while processes share the work: the units that they are working on
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.folders import Folder
from gemma3_jax.harvest.storage import Place
from gemma3_jax.reading import NUMPY_DTYPES
from gemma3_jax.types import JsonObject

MANIFEST, PLAN, UNITS, CLAIMS = "manifest.json", "plan.npy", "units", "claims"
_A_FOLDER = 1000  # units
_HEADER = 2**13  # bytes that are read first; a header of ten sites takes less
_BLOCK = 2**26  # bytes of a unit that are read at once to be checked
_BLANK = b"00000000"  # the checksum of a unit is that of its header with this in its place, and of its content
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def unit_name(number: int) -> str:
    """The name of the file of a unit."""
    return f"{UNITS}/{number // _A_FOLDER:03d}/{number:06d}.safetensors"


def present(place: Place, units: int) -> np.ndarray:
    """[units] bool: which units have a file."""
    found = np.zeros(units, bool)
    names = (name.partition(".") for name in place.names(UNITS))
    numbers = np.asarray([int(name) for name, _, kind in names if name.isdecimal() and kind == "safetensors"], int)
    found[numbers[numbers < units]] = True
    return found


def write_unit(place: Place, arrays: Mapping[str, np.ndarray], number: int) -> int:
    """Write a unit, whole or not at all, and return its number of bytes. It is there for good when this returns.

    The format is that of safetensors, which the library would write from a copy of all arrays, with its metadata in
    any order: the same unit must have the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    # Wide ones first, so that each array is aligned.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    contents = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in ordered]
    header: JsonObject = {"__metadata__": {"checksum": _BLANK.decode(), "unit": str(number)}}
    at = 0
    for (name, array), content in zip(ordered, contents, strict=True):
        entry = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + len(content)]}
        header[name], at = entry, at + len(content)
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    checksum = zlib.crc32(words)
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    words = words.replace(_BLANK, f"{checksum:08x}".encode(), 1)
    place.write(unit_name(number), [len(words).to_bytes(8, "little") + words, *contents])
    return 8 + len(words) + at


class Stored(NamedTuple):
    """Where an array is in the file of a unit: `start` is the byte where it begins."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class UnitFile(NamedTuple):
    """The header of a unit: its arrays by name, and its checksum."""

    place: Place
    name: str
    arrays: dict[str, Stored]
    checksum: str

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array, as in a slice: mapped into memory, or the only ones that are read."""
        stored = self.arrays[key]
        start, stop, _ = slice(start, stop).indices(stored.shape[0])
        count = max(stop - start, 0)
        at = stored.start + start * stored.row
        content = self.place.read(self.name, at, at + count * stored.row)
        return content.view(stored.dtype).reshape(count, *stored.shape[1:])


def in_threads(place: Place, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """The results for all items, as many at once as the place can give."""
    if place.readers == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(place.readers) as readers:
        return list(readers.map(function, items))


def read_unit(place: Place, number: int) -> UnitFile:
    """The header of a unit, after a check that the file has its whole length.

    Raises:
        StoreError: the file is damaged; the message has the remedy.
    """
    name = unit_name(number)
    try:
        size = place.size(name)
        if size is None:
            raise FileNotFoundError(2, "it is missing", place.full(name))
        first = place.read(name, 0, min(size, _HEADER)).tobytes()
        length = int.from_bytes(first[:8], "little")
        words = first[8 : 8 + length] if 8 + length <= len(first) else b""
        if len(words) < length <= size - 8:
            words = place.read(name, 8, 8 + length).tobytes()
        return UnitFile(place, name, *_parsed(words, size))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, _Wrong) else "its header cannot be read"
        raise StoreError(_damaged(place.full(name), why)) from error
    except OSError as error:
        raise StoreError(f"{place.full(name)} cannot be read: {error.strerror or error}") from error


class _Wrong(ValueError):
    """What is wrong with a unit, in words."""


def _parsed(words: bytes, size: int) -> tuple[dict[str, Stored], str]:
    """The arrays of a header, and the checksum; errors of any kind if it is none, or not that of so many bytes."""
    header = json.loads(words)
    metadata, begin, arrays = header.pop("__metadata__"), 8 + len(words), {}
    at = begin
    for name, entry in header.items():
        stored = Stored(NUMPY_DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + entry["data_offsets"][0])
        end = begin + entry["data_offsets"][1]
        if (stored.start, end) != (at, at + stored.dtype.itemsize * math.prod(stored.shape)):
            raise ValueError(f"{name} has other bytes than its shape")
        arrays[name], at = stored, end
    if not arrays or size != at:
        raise _Wrong(f"it has {size:,} bytes, not {at:,}")
    return arrays, str(metadata["checksum"])


def _cut_short(folder: str, numbers: Iterable[int]) -> Iterator[int]:
    """Units of a folder whose file does not end where its header says, a candidate for `read_unit`.

    It takes a fraction of the time of `read_unit`: there may be a million.
    """
    for part, some in itertools.groupby(numbers, lambda number: number // _A_FOLDER):
        directory = os.open(f"{folder}/{UNITS}/{part:03d}", os.O_RDONLY)
        try:
            yield from (number for number in some if not _has_its_length(f"{number:06d}.safetensors", directory))
        finally:
            os.close(directory)


def _has_its_length(file: str, directory: int) -> bool:
    try:
        opened = os.open(file, os.O_RDONLY, dir_fd=directory)
    except OSError:
        return False
    try:
        start, size = os.pread(opened, 2**11, 0), os.fstat(opened).st_size
        length = int.from_bytes(start[:8], "little")
        header = start[8 : 8 + length] if 8 + length <= len(start) else os.pread(opened, min(length, size), 8)
    finally:
        os.close(opened)
    # The last entry is that of the last array: ..."data_offsets":[12,34]}}
    end = header[header.rfind(b",") + 1 :].rstrip().removesuffix(b"]}}")
    return end.isdigit() and size == 8 + length + int(end)


def check_unit(place: Place, number: int) -> None:
    """Read a whole unit and compare its checksum.

    Raises:
        StoreError: the file is damaged; the message has the remedy.
    """
    unit = read_unit(place, number)
    size = place.size(unit.name)
    begin = min(stored.start for stored in unit.arrays.values())
    words = place.read(unit.name, 8, begin).tobytes()
    checksum = zlib.crc32(words.replace(unit.checksum.encode(), _BLANK, 1))
    for at in range(begin, size or 0, _BLOCK):
        checksum = zlib.crc32(place.read(unit.name, at, min(at + _BLOCK, size or 0)).data, checksum)
    if f"{checksum:08x}" != unit.checksum:
        raise StoreError(_damaged(place.full(unit.name), "its content does not have its checksum"))


def damaged(place: Place, numbers: Iterable[int], *, whole: bool) -> dict[int, str]:
    """What is wrong with some units, by number; with `whole`, all of their content is read.

    Without it, the objects of an object store are not looked at: a put is atomic.
    """
    if not whole:
        numbers = list(_cut_short(str(place), numbers)) if isinstance(place, Folder) else []

    def wrong(number: int) -> tuple[int, str]:
        try:
            (check_unit if whole else read_unit)(place, number)
        except StoreError as error:
            return number, str(error)
        return number, ""

    return {number: why for number, why in in_threads(place, wrong, numbers) if why}


def remove_abandoned(place: Place) -> None:
    """Remove what killed processes left: temporary files, and claims of units that are there or not being done."""
    for name in list(place.names(CLAIMS)):
        if name.isdecimal() and place.size(unit_name(int(name))) is not None:
            place.remove(f"{CLAIMS}/{name}")
        elif (claim := place.claim(f"{CLAIMS}/{name}")) is not None:
            claim.release()
    place.tidy()


def _damaged(file: str, why: str) -> str:
    return f"{file} is damaged: {why}; harvest(..., repair=True), or gemma3-jax harvest run --repair, does it again"
