"""`gemma3-jax fits`: whether a run fits a machine that is not there."""

from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from gemma3_jax.cli.shared import Revision, console, working

if TYPE_CHECKING:
    from gemma3_jax.placing.fitting import Fit
    from gemma3_jax.placing.programs import Wrt

GIB = 2**30


def fits(
    source: Annotated[str, typer.Argument(help="270m, 1b, 4b, 12b or 27b; or a directory, GGUF file or hub id.")],
    on: Annotated[str, typer.Option(help="The machine, such as v5e-8, v5p-8, h100 or h100x8.")],
    model: Annotated[int, typer.Option(help="Devices that share one copy of the parameters.")] = 1,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each row, or of each prompt.")] = 1024,
    capture: Annotated[list[str] | None, typer.Option(help="A site to capture, or a glob; repeat it for more.")] = None,
    captures_only: Annotated[
        bool, typer.Option("--captures-only", help="End the run after the last captured site, as a harvest does.")
    ] = False,
    generate: Annotated[int | None, typer.Option(help="Number of new tokens.")] = None,
    gradients: Annotated[str | None, typer.Option(help="sites (those captured) or params.")] = None,
    remat: Annotated[bool, typer.Option("--remat", help="Compute each block again for the gradients.")] = False,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    scan_layers: Annotated[
        bool | None, typer.Option("--scan-layers/--no-scan-layers", help="Default: scan, except to generate.")
    ] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch/--one-batch", help="Search for the largest batch, or take this one alone.")
    ] = True,
    revision: Revision = None,
) -> None:
    """Compile a run for a machine that need not be there, and say whether it fits. Exit code 1 if it does not."""
    from gemma3_jax.placing import fits

    with working(f"compiling for {on}"):
        report = fits(
            source,
            on,
            model=model,
            batch=batch,
            length=length,
            capture=capture or (),
            return_type=None if captures_only else "logits",
            generate=generate,
            gradients=cast("Wrt", gradients),
            remat=remat,
            dtype=dtype,
            scan_layers=scan_layers,
            largest_batch=largest_batch,
            revision=revision,
        )
    console.print(_table(report), _verdict(report), sep="\n")
    if not report.fits:
        raise typer.Exit(1)


def _table(report: "Fit") -> Table:
    """The bytes of each device, by program, and the operations between devices."""
    shown = Table("on each device", "GiB", title=f"{report.machine}: {_mesh(report)}")
    shown.add_row("limit", f"{report.limit / GIB:.2f}")
    shown.add_row("weights", f"{report.weights / GIB:.2f}")
    if report.added:
        shown.add_row("arrays of reductions and edits", f"{report.added / GIB:.2f}")
    for program in report.programs:
        peak = "unknown" if program.peak is None else f"{program.peak / GIB:.2f}"
        shown.add_row(f"peak of {program.name}", peak + (", refused by the compiler" if program.refused else ""))
        for name, count in program.collectives.items():
            shown.add_row(f"  {count} {name}", "")
    return shown


def _mesh(report: "Fit") -> str:
    """The mesh in words."""
    return " x ".join(f"{count} {name}" for name, count in report.mesh.items())


def _verdict(report: "Fit") -> Text:
    """Whether the run fits, and the largest batch."""
    rows = f"{report.batch:,} row" + "s" * (report.batch != 1)
    text = Text.assemble(f"{rows}: ", "fits" if report.fits else ("does NOT fit", "red"), ".")
    if report.largest_batch is None:
        return text
    most = f"The largest batch that fits: {report.largest_batch:,}." if report.largest_batch else "No batch fits."
    return text.append(f" {most}")
