"""The files of a store: units, which are safetensors with a checksum, and the names of everything.

out/manifest.json   what the store has: see `gemma3_jax.harvest.manifest`
out/plan.npy        where each unit begins; it can be computed again
out/units/000/000012.safetensors
out/claims/         while processes share the work: the units that they are working on
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from gemma3_jax import atomic
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.reading import NUMPY_DTYPES, CheckpointError, Stored, map_tensor

MANIFEST, PLAN, UNITS, CLAIMS = "manifest.json", "plan.npy", "units", "claims"
_A_FOLDER = 1000  # units
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def unit_file(out: Path, number: int) -> Path:
    """The file of a unit."""
    return Path(_unit_name(str(out), number))


def _unit_name(out: str, number: int) -> str:
    """As a text, which takes a fraction of the time of a path: there may be a million."""
    return f"{out}/{UNITS}/{number // _A_FOLDER:03d}/{number:06d}.safetensors"


def present(out: Path, units: int) -> np.ndarray:
    """[units] bool: which units have a file."""
    found = np.zeros(units, bool)
    for folder in sorted((out / UNITS).glob("*")):
        names = (entry.name.partition(".") for entry in os.scandir(folder))  # faster than `iterdir`
        numbers = np.asarray([int(name) for name, _, kind in names if name.isdecimal() and kind == "safetensors"], int)
        found[numbers[numbers < units]] = True
    return found


def write_unit(file: Path, arrays: Mapping[str, np.ndarray], number: int) -> int:
    """Write a unit, whole or not at all, and return its number of bytes. It is on the disk when this returns.

    The format is that of safetensors, which the library would write from a copy of all arrays, with its metadata in
    any order: the same unit must have the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    # Wide ones first, so that each array is aligned.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    contents = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in ordered]
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    header: dict[str, Any] = {"__metadata__": {"checksum": f"{checksum:08x}", "unit": str(number)}}
    at = 0
    for (name, array), content in zip(ordered, contents, strict=True):
        entry = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + len(content)]}
        header[name], at = entry, at + len(content)
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    with atomic.new_durable_file(file) as temporary, temporary.open("wb") as opened:
        opened.write(len(words).to_bytes(8, "little") + words)
        for content in contents:
            opened.write(content)
    return 8 + len(words) + at


class UnitFile(NamedTuple):
    """The header of a unit: its arrays by name, and its checksum."""

    arrays: dict[str, Stored]
    checksum: str

    def array(self, name: str) -> np.ndarray:
        """An array, mapped into memory."""
        return map_tensor(name, self.arrays[name])


def read_unit(file: Path) -> UnitFile:
    """The header of a unit, after a check that the file has its whole length.

    Raises:
        StoreError: the file is damaged; the message has the remedy.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = os.fstat(opened.fileno()).st_size
            header = json.loads(opened.read(length)) if 0 < length <= size else {}
        metadata = header.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in header.values())
        if size != 8 + length + end:
            raise StoreError(_damaged(file, f"it has {size:,} bytes, not {8 + length + end:,}"))
        arrays = {
            name: Stored(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        return UnitFile(arrays, metadata["checksum"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(_damaged(file, "its header cannot be read")) from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error


def _has_its_length(file: str) -> bool:
    """Whether a file ends where its header says; a fraction of the time of `read_unit`, for a million units."""
    try:
        opened = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        start, size = os.pread(opened, 2**12, 0), os.fstat(opened).st_size
        length = int.from_bytes(start[:8], "little")
        header = start[8 : 8 + length] if 8 + length <= len(start) else os.pread(opened, min(length, size), 8)
    finally:
        os.close(opened)
    # The last entry is that of the last array: ..."data_offsets":[12,34]}}
    end = header.rstrip()[header.rfind(b",") + 1 :].removesuffix(b"]}}")
    return end.isdigit() and size == 8 + length + int(end)


def check_unit(file: Path) -> None:
    """Read a whole unit and compare its checksum.

    Raises:
        StoreError: the file is damaged; the message has the remedy.
    """
    unit = read_unit(file)
    try:
        with safe_open(file, "numpy"):
            pass
        checksum = 0
        for name in sorted(unit.arrays, key=lambda name: unit.arrays[name].start):
            checksum = zlib.crc32(unit.array(name).reshape(-1).view(np.uint8).data, checksum)
    except (SafetensorError, CheckpointError, OSError) as error:
        raise StoreError(_damaged(file, str(error))) from error
    if f"{checksum:08x}" != unit.checksum:
        raise StoreError(_damaged(file, "its content does not have its checksum"))


def damaged(out: Path, numbers: Iterator[int], *, whole: bool) -> dict[int, str]:
    """What is wrong with some units, by number; with `whole`, all of their content is read."""
    found, folder = {}, str(out)
    for number in numbers:
        if not whole and _has_its_length(_unit_name(folder, number)):
            continue
        try:
            (check_unit if whole else read_unit)(unit_file(out, number))
        except StoreError as error:
            found[number] = str(error)
    return found


def remove_abandoned(out: Path) -> None:
    """Remove what killed processes left: temporary files."""
    for folder in (out, *(out / UNITS).glob("*")):
        atomic.remove_abandoned(folder)


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged: {why}; harvest(..., repair=True), or gemma3-jax harvest run --repair, does it again"
