"""What is kept on disk from one process to the next."""

import os
from pathlib import Path
from typing import Any

import jax


def cache_directory() -> Path:
    """Where this library keeps what takes long to make again; it need not exist.

    Raises:
        OSError: the user has no home directory, as in some containers, and nothing can be kept.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma3-jax"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def keep_programs() -> None:
    """Let JAX keep the programs that take a second or more to compile, of this library and of others.

    It does nothing if JAX has a directory for them, if its cache is off, or if ours cannot be written.
    """
    settings: Any = jax.config  # jax's stubs do not have these two
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
