"""What the commands share: their arguments, the console, and what they show while a user waits."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gemma3_jax.messages import printable
from gemma3_jax.types import Params

# A table that is written to a file or a pipe has a fixed width, since there is no terminal to fit. Names of files and
# checkpoints may look like rich's markup or its emoji codes, so every text is printed as it is; styles are `Text`s.
console = Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False)

_CHECKPOINT = "Checkpoint directory, GGUF file or hub id, also of a PEFT adapter"
Checkpoint = Annotated[str, typer.Argument(help=f"{_CHECKPOINT}.")]
Source = Annotated[
    str,
    typer.Argument(
        help=f"{_CHECKPOINT}; or a directory that `convert` wrote. Default: the shipped model.", show_default=False
    ),
]
Output = Annotated[Path, typer.Argument(help="Directory to write; it does not exist yet, or is empty.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16. Default: as stored; float32 for float16, bfloat16 for GGUF.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Adapter = Annotated[str | None, typer.Option(help="Directory or hub id of a PEFT adapter to merge into the source.")]
Tied = Annotated[
    bool | None,
    typer.Option(
        "--tie-word-embeddings/--untie-word-embeddings",
        help="Whether the embedding is the unembedding, too, if the checkpoint has both. Default: as its config says.",
    ),
]


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on standard error, if that is a terminal, what the block does and for how long; it vanishes at the end."""
    terminal = Console(stderr=True, markup=False, emoji=False)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        progress.add_task(printable(what), total=None)
        yield


def say(text: str) -> None:
    """Print a text, which may have a path, without breaking its lines."""
    console.print(text, soft_wrap=True)


def check_devices() -> None:
    """Check that JAX has a device to compute on.

    Raises:
        RuntimeError: JAX_PLATFORMS names platforms that are not there; the message has the remedy.
    """
    import jax

    platforms = jax.config.jax_platforms  # type: ignore[attr-defined] # missing in jax's stubs
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # jax asserts that it found one, without a message
        if not platforms:
            raise
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        why = f" ({reason})" if reason else ""
        raise RuntimeError(
            f"JAX_PLATFORMS is {platforms!r}, and JAX finds no such device{why}; unset JAX_PLATFORMS to take the best "
            "device that there is, or install what JAX needs for yours, such as pip install 'gemma3-jax[cuda]'"
        ) from error


def size(params: Params) -> str:
    """The number of parameters and their bytes, in words."""
    import jax

    leaves = jax.tree.leaves(params)
    count, bytes_ = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return f"{count:,} parameters, {bytes_ / 1e6:,.1f} MB"
