"""The benchmark suite: measures the port and its alternatives in one run.

python -m benchmarks --quick
python -m benchmarks --size 270m --only forward,decode --json benchmarks/results/cpu-270m.json
python -m benchmarks --page
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from benchmarks import limits, peers, report
from benchmarks.rows import Settings
from benchmarks.timing import machine
from gemma3_jax import atomic

console = Console(stderr=True)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: shows that everything runs.")] = False,
    size: Annotated[str, typer.Option(help="270m, 1b, 4b, 12b or 27b.")] = "270m",
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(report.TITLES)}.")] = ",".join(report.TITLES),
    dtypes: str = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/benchmarks.md, from results/.")] = False,
) -> None:
    """Measure, print the time of each row, and list the missed goals."""
    if page:
        with atomic.new_file(PAGE) as temporary:
            temporary.write_text(report.page())
        return
    settings = Settings("quick", ("float32",), 1) if quick else Settings(size, tuple(dtypes.split(",")), rounds)
    names = only.split(",")
    unknown = [name for name in names if name not in report.TITLES]
    if unknown:
        raise typer.BadParameter(f"there is no benchmark {unknown[0]!r}; there are {', '.join(report.TITLES)}")
    if json_file is not None:
        _check_target(json_file)
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "size": settings.size,
        "machine": machine() | {"peers": [name for name in peers.OPTIONAL if peers.installed(name)]},
        "limits": limits.measure(quick),
        "benchmarks": {},
    }
    # This order is fixed: gemma's imports fail after nnsight has added a method to every object.
    for name in filter(names.__contains__, report.TITLES):
        rows = results["benchmarks"][name] = []
        for row in importlib.import_module(f"benchmarks.{name}").rows(settings):
            console.print(f"{name}: {row.case}, {row.dtype}: {row.seconds['port']:.3g} s")
            rows.append(row.as_dict())
            if json_file:  # written after each row, so a later failure loses nothing
                report.write(results, json_file)
        jax.clear_caches()
    for goal in report.missed(results):
        console.print(f"missed: {goal}", style="yellow", highlight=False)


def _check_target(file: Path) -> None:
    """Refuse a file that cannot be written before anything is measured."""
    try:
        atomic.check_new_file(file)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
