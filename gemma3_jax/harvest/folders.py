"""A store in a folder: a file is written under a temporary name, reaches the disk and is renamed."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gemma3_jax import atomic
from gemma3_jax.harvest.storage import Claim


class Folder:
    """A folder of this machine, or of a network file system. Files are mapped into memory."""

    gap = math.inf  # what is mapped is not read
    readers = 1
    expiry = "now"

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def full(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        file = self.folder / name
        stop = file.stat().st_size if stop is None else stop
        if stop <= start:
            return np.empty(0, np.uint8)  # an empty region cannot be mapped
        try:
            return np.memmap(file, np.uint8, "r", start, stop - start).view(np.ndarray)
        except ValueError as error:
            raise OSError(f"{file} ends before byte {stop:,}") from error

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        file = self.folder / name
        if self.folder.is_dir():  # it is not made again if it is lost
            file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.new_durable_file(file) as temporary, temporary.open("wb") as opened:
            for part in parts:
                opened.write(part)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def names(self, folder: str) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.full(folder)) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self.names(f"{folder}/{entry.name}")
                else:
                    yield entry.name

    def prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def strangers(self) -> list[str]:
        return [file.name for file in self.folder.glob("[!.]*")]

    def tidy(self) -> None:
        for folder in (self.folder, *(self.folder / "units").glob("*")):
            atomic.remove_abandoned(folder)
        with contextlib.suppress(OSError):
            (self.folder / "claims").rmdir()  # unless some are there

    def room(self) -> int | None:
        return shutil.disk_usage(self.folder).free

    def check_claims(self) -> None:
        pass

    def claim(self, name: str) -> Claim | None:
        """A lock on the file. The kernel releases it when the process ends, however it ends.

        A network file system does so for a host that is gone.
        """
        file = self.folder / name
        opened = _opened(file)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = file.exists() and file.stat().st_ino == os.fstat(opened).st_ino
        except OSError:
            is_there = False
        if not is_there:  # others have it, or have just removed it
            os.close(opened)
            return None
        return _Lock(file, opened)


class _Lock:
    def __init__(self, file: Path, opened: int):
        self._file, self._opened = file, opened

    def release(self) -> None:
        self._file.unlink(missing_ok=True)
        os.close(self._opened)


def _opened(file: Path) -> int:
    """A file, which is created if it is absent; so is its folder, which other processes remove when they are done."""
    while True:
        file.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return os.open(file, os.O_RDWR | os.O_CREAT)
