"""The benchmark suite: what the port does, beside what its users would pick instead, in one run.

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

console = Console(stderr=True)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model: shows that everything runs.")] = False,
    size: Annotated[str, typer.Option(help="270m, 1b, 4b, 12b or 27b.")] = "270m",
    only: Annotated[str, typer.Option(help=f"Of {', '.join(report.TITLES)}.")] = ",".join(report.TITLES),
    dtypes: str = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(help="Turns of each measurement.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/benchmarks.md, from results/.")] = False,
) -> None:
    """Measure, print the page of this run, and say which goals were missed."""
    if page:
        PAGE.write_text(report.page())
        return
    settings = Settings("quick", ("float32",), 1) if quick else Settings(size, tuple(dtypes.split(",")), rounds)
    asked = only.split(",")
    unknown = [name for name in asked if name not in report.TITLES]
    if unknown:
        raise typer.BadParameter(f"there is no benchmark {unknown[0]!r}; there are {', '.join(report.TITLES)}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{json_file.parent} is no directory; the report has no place there")
    found: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "size": settings.size,
        "machine": machine() | {"peers": [name for name in peers.OPTIONAL if peers.installed(name)]},
        "limits": limits.measure(quick),
        "benchmarks": {},
        "notes": {},
    }
    # In this order always: gemma's imports fail once nnsight has given every object a method.
    for name in filter(asked.__contains__, report.TITLES):
        rows = found["benchmarks"][name] = []
        for row in importlib.import_module(f"benchmarks.{name}").rows(settings):
            console.print(f"{name}: {row.case}, {row.dtype}: {row.seconds['port']:.3g} s")
            rows.append(row.as_dict())
            if json_file:  # what is measured is kept, whatever happens later
                report.write(found, json_file)
        jax.clear_caches()
    for goal in report.missed(found):
        console.print(f"missed: {goal}", style="yellow", highlight=False)


if __name__ == "__main__":
    typer.run(main)
