"""What may be in place of a file, and what the message says of it."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NESTED = b'{"a":' * 100_000
NOT_A_FILE = {
    "directory": (Path.mkdir, "is a directory, not a file"),
    "fifo": (os.mkfifo, "is a FIFO, a socket or a device, not a file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is a FIFO, a socket or a device, not a file"),
    "broken link": (lambda file: file.symlink_to("../blobs/1234"), "is a link to ../blobs/1234, which is missing"),
    "circle of links": (lambda file: file.symlink_to(file.name), "cannot be read"),
    "LFS pointer": (POINTER, "is a Git LFS pointer, without the content; run `git lfs pull`"),
}


def replace(file: Path, content: bytes | Callable[[Path], object]) -> None:
    """Put bytes, or what a function makes, in place of a file."""
    file.unlink(missing_ok=True)
    content(file) if callable(content) else file.write_bytes(content)


def safetensors(header: bytes, size: int | None = None) -> bytes:
    """A safetensors file of a header alone; `size` is the size that it states."""
    return struct.pack("<Q", len(header) if size is None else size) + header
