"""Where a store is: a folder of this machine, or the objects below a name such as `s3://bucket/folder`."""

from __future__ import annotations

import os
from pathlib import Path

from gemma3_jax.harvest.folders import Folder
from gemma3_jax.harvest.storage import Place


def place_of(out: str | os.PathLike[str]) -> Place:
    """The place of a store.

    Raises:
        StoreError: the name begins with a scheme that `fsspec` does not have.
        ModuleNotFoundError: the package for the scheme is missing.

    >>> place_of("folder").full("manifest.json"), place_of("memory://folder").full("manifest.json")
    ('folder/manifest.json', 'memory://folder/manifest.json')
    """
    scheme, separator, rest = os.fspath(out).partition("://")
    if not separator:
        return Folder(Path(out))
    if scheme in ("file", "local"):
        return Folder(Path(rest))
    from gemma3_jax.harvest.objects import Objects

    return Objects(os.fspath(out))
