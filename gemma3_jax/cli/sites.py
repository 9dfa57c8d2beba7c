"""`gemma3-jax sites`: the table of hook sites."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from gemma3_jax.cli.shared import console
from gemma3_jax.sites.names import rows_named
from gemma3_jax.sites.table import HEAD_SITES, SITES, Site


def sites(
    name: Annotated[
        str | None,
        typer.Argument(help="Only sites with this in one of their names; it may be a glob, such as 'attn.hook_*'."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List the hook sites: their names, shape and contents, and what an edit there affects."""
    if as_json and markdown:
        raise ValueError("--json and --markdown exclude each other; give one")
    rows = (*SITES, *HEAD_SITES) if name is None else rows_named(name)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif markdown:
        print(sites_markdown(rows), end="")
    else:
        console.print(_table(rows))


def _table(rows: Sequence[Site]) -> Table:
    table = Table("names: canonical, legacy, Hugging Face", "shape, dtype", "holds", "an edit reaches", show_lines=True)
    table.columns[0].no_wrap = True
    for row in rows:
        others = [f"\n{other}" for other in (row.legacy, row.hf) if other]
        names = Text.assemble((row.name, "bold"), *others)
        table.add_row(names, f"{row.axes}\n{row.dtype}", row.holds, row.reaches)
    return table


def sites_markdown(rows: Sequence[Site] = (*SITES, *HEAD_SITES)) -> str:
    """The table of sites in Markdown."""
    header = ["site", "TransformerLens", "Hugging Face", "shape", "dtype", "holds", "an edit reaches"]
    cells = [[s.name, s.legacy or "", s.hf or "", s.axes, s.dtype, s.holds, s.reaches] for s in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *cells])
