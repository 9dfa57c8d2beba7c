"""Optional packages: a missing one raises an error that names the extra to install."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str, reason: str) -> Iterator[None]:
    """Import the packages of an extra inside this block, and nothing else.

    Args:
        extra: its name in pyproject.toml, under `[project.optional-dependencies]`.
        reason: who needs the packages, as a subject and a verb.

    Raises:
        ModuleNotFoundError: a package is not installed. Any other failure of an import passes through unchanged.

    >>> with needs_extra("plots", "pictures need"):
    ...     import not_installed
    Traceback (most recent call last):
    ModuleNotFoundError: pictures need not_installed: pip install 'gemma3-jax[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{reason} {error.name}: pip install 'gemma3-jax[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
