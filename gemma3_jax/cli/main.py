"""The `gemma3-jax` command: a thin layer over the library and `conversion`. Each command has a file beside this one."""

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.table import Table
from rich.text import Text

import gemma3_jax
from gemma3_jax import atomic
from gemma3_jax.extras import needs_extra

with needs_extra("cli", "the command line needs"):
    import typer

from gemma3_jax.cli.checkpoints import convert, export, info
from gemma3_jax.cli.features import features
from gemma3_jax.cli.fits import fits
from gemma3_jax.cli.generate import generate
from gemma3_jax.cli.harvest import harvest
from gemma3_jax.cli.parity import parity, parity_module
from gemma3_jax.cli.shared import check_devices, console, say, size, working
from gemma3_jax.cli.sites import sites
from gemma3_jax.messages import printable

_JAXS_NOTE = "JAX has removed its internal frames"  # a note about tracebacks, which are not printed

app = typer.Typer(
    help="Gemma 3 in JAX, open at every site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"gemma3-jax {gemma3_jax.__version__}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Gemma 3 in JAX, open at every site."""
    from gemma3_jax.kept import keep_programs

    keep_programs()


@app.command()
def demo(
    picture: Annotated[Path, typer.Option(help="File for the picture, .png or .html.")] = Path("induction.png"),
) -> None:
    """Convert the shipped model, check it against Hugging Face, and find its induction heads."""
    from gemma3_jax.cli import demo as steps

    atomic.check_new_file(picture)
    if picture.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"--picture is {picture.name}; a picture is saved as .html or .png")
    check_devices()
    start = time.perf_counter()
    with working("converting the shipped model"):
        model = gemma3_jax.HookedGemma3.from_pretrained(gemma3_jax.TINY)
    console.print(f"Converted {gemma3_jax.TINY.name} in {time.perf_counter() - start:.1f} s: {size(model.params)}.")
    _demo_parity()

    tokens = steps.repeated_tokens(model, rows=16, half=24)
    with working("looking for induction heads"):
        first, repeated = steps.half_losses(model, tokens)
        scores = steps.induction_scores(model, tokens)
    losses = (f"{first:.2f}", "bold"), " nats; on their repetition: ", (f"{repeated:.2f}", "bold")
    console.print(Text.assemble("Loss on random syllables: ", *losses, ". It copies."))
    ranked = sorted(np.ndindex(scores.shape), key=lambda at: -scores[at])[:4]
    table = Table("layer", "head", "reach", "attention to what followed the last time", title="Induction heads")
    for layer, head in ranked:
        reach = "local" if model.config.layer_types[layer] == "sliding_attention" else "global"
        table.add_row(str(layer), str(head), reach, f"{scores[layer, head]:.2f}")
    console.print(table)
    with working("drawing their attention patterns"):
        steps.draw_heads(model, steps.repeated_tokens(model, rows=1, half=12), ranked[:2], picture)
    say(f"Their attention patterns: {picture}")


for command in (convert, export, parity, generate, sites, info, fits):
    app.command()(command)
app.add_typer(harvest, name="harvest")
app.add_typer(features, name="features")


def main() -> None:
    """Run the command. An error prints one line.

    The exit code is 1; it is 2 for an error in the command line, and 130 after Ctrl-C.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        # typer's errors about the command line format their own message.
        usage = getattr(error, "format_message", None)
        notes = [note for note in getattr(error, "__notes__", []) if _JAXS_NOTE not in note]
        # A KeyError shows its message in quotes.
        text = str(error.args[0]) if type(error) is KeyError and error.args else str(error)
        parts = [usage() if usage else text, *notes]
        message = printable(" ".join(" ".join(parts).split()))
        if usage and not message:  # there was no command, and the help is printed
            sys.exit(2)
        unnamed = f"{type(error).__name__}; run gemma3-jax --traceback ... to see where"
        print(f"error: {message or unnamed}", file=sys.stderr)
        sys.exit(2 if usage else 1)


def _demo_parity() -> None:
    try:
        module = parity_module()
    except ImportError as error:
        say(f"Not compared with Hugging Face: {error}")
        return
    with working("comparing it with Hugging Face"):
        report = module.parity(gemma3_jax.TINY)
    worst = max(report.rows, key=lambda row: row.ratio)
    verdict = ("equal to Hugging Face", "bold") if report.passed else ("NOT equal to Hugging Face", "red")
    ratio = f"From float64 the port is at most {worst.ratio:.1f} times as far, at {worst.kind}."
    console.print(Text.assemble(f"{len(report.rows)} kinds of sites and gradients: ", verdict, f". {ratio}"))
