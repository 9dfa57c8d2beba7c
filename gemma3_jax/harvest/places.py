"""Where a store is: a folder of this machine, or the objects below a name such as `s3://bucket/folder`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.folders import Folder
from gemma3_jax.harvest.storage import Place


def place_of(out: str | os.PathLike[str]) -> Place:
    """The place of a store.

    Raises:
        StoreError: the name begins with a scheme that `fsspec` does not have; or it was a `Path`, which has no schemes.
        ModuleNotFoundError: the package for the scheme is missing.

    >>> place_of("folder").full("manifest.json"), place_of("memory://folder").full("manifest.json")
    ('folder/manifest.json', 'memory://folder/manifest.json')
    """
    name = os.fspath(out)
    scheme, separator, rest = name.partition("://")
    if isinstance(out, os.PathLike) and re.match(r"[a-z][a-z0-9+.-]+:/", name):
        raise StoreError(
            f"{name} is a path, which lost a slash of its name: give the name of an object store as a text"
        )
    if not separator:
        return Folder(Path(out))
    if scheme in ("file", "local"):
        return Folder(Path(rest))
    from gemma3_jax.harvest.objects import Objects

    return Objects(name)
