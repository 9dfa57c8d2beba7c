"""What `gemma3-jax fits` prints."""

from rich.markup import escape
from rich.table import Table

from gemma3_jax.placing.fitting import Fit

GIB = 2**30


def table(report: Fit) -> Table:
    """The bytes of each device, by program, and the operations between devices."""
    shown = Table("on each device", "GiB", title=f"{report.machine}: {mesh(report)}")
    shown.add_row("limit", f"{report.limit / GIB:.2f}")
    shown.add_row("weights", f"{report.weights / GIB:.2f}")
    for program in report.programs:
        peak = "unknown" if program.peak is None else f"{program.peak / GIB:.2f}"
        shown.add_row(f"peak of {program.name}", peak + (", refused by the compiler" if program.refused else ""))
        for name, count in program.collectives.items():
            shown.add_row(escape(f"  {count} {name}"), "")
    return shown


def mesh(report: Fit) -> str:
    """The mesh in words."""
    return " x ".join(f"{count} {name}" for name, count in report.mesh.items())


def verdict(report: Fit) -> str:
    """Whether the run fits, and the largest batch."""
    rows = f"{report.batch:,} row" + "s" * (report.batch != 1)
    text = f"{rows}: {'fits' if report.fits else '[red]does NOT fit[/red]'}."
    if report.largest_batch is None:
        return text
    most = f"The largest batch that fits: {report.largest_batch:,}." if report.largest_batch else "No batch fits."
    return f"{text} {most}"
