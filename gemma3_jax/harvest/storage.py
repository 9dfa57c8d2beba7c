"""What a store needs of the place where it is: files by name, and claims. Folders and object stores have it.

Names are such as `units/000/000012.safetensors`. A file is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np


class Claim(Protocol):
    """A unit that this process is working on."""

    def release(self) -> None:
        """Let others have the unit."""


class Place(Protocol):
    """The files of a store by name. Errors are those of a file system: OSError.

    Attributes:
        gap: bytes between two parts of a file that are read faster than they are left out.
        readers: parts that are read at once.
        expiry: when the claims of a process that is gone end, in words.
    """

    gap: float
    readers: int
    expiry: str

    def full(self, name: str) -> str:
        """The name of a file that people can find it by."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes of a file from `start` to `stop`, [n] uint8, which cannot be written to."""

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file. It is there for good, and whole, when this returns."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def names(self, folder: str) -> Iterator[str]:
        """The names of all files below a folder, without those of the folders."""

    def prepare(self) -> None:
        """Create the folder of the store, if there is such a thing."""

    def strangers(self) -> list[str]:
        """The names at the top of the store, without hidden files."""

    def tidy(self) -> None:
        """Remove what killed processes left behind."""

    def room(self) -> int | None:
        """Bytes that are free; None if there is no limit."""

    def check_claims(self) -> None:
        """Raise StoreError if units cannot be claimed here."""

    def claim(self, name: str) -> Claim | None:
        """The claim of a name, which is created if it is absent; None if another process has it."""
