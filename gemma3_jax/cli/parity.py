"""`gemma3-jax parity`: the comparison with Hugging Face."""

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import gemma3_jax
from gemma3_jax import atomic
from gemma3_jax.cli.shared import Adapter, Revision, Source, check_devices, console, say, working
from gemma3_jax.extras import needs_extra
from gemma3_jax.messages import printable

if TYPE_CHECKING:
    from gemma3_jax.parity.report import Report


def parity(
    source: Source = str(gemma3_jax.TINY),
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokens: Annotated[
        int | None, typer.Option(help="Length of the prompts. Default: 64, and 64 past the sliding window.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    revision: Revision = None,
    adapter: Adapter = None,
) -> None:
    """Compare a checkpoint with Hugging Face, site by site: how far is either from float64? Exit code 1 if a row fails.

    SOURCE may also be an adapter or a directory that `convert` wrote.
    """
    from gemma3_jax.conversion.sources import locate_sources

    if json_file is not None:
        atomic.check_new_file(json_file)
    check_devices()
    module = parity_module()
    locate_sources(source, revision, adapter)  # what must be downloaded shows its own progress
    with working(f"comparing {source} with Hugging Face"):
        report = module.parity(source, dtype, tokens, revision, adapter=adapter)
    if json_file is not None:
        with atomic.new_file(json_file) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    console.print(_table(report))
    lengths = " and ".join(map(str, report.tokens))
    failed = sum(not row.passed for row in report.rows)
    say(f"{report.dtype}, {report.prompts} of {lengths} tokens, {report.platform}.")
    if report.note:
        say(f"Note: {report.note}.")
    say(f"{failed} of {len(report.rows)} rows fail.")
    if failed:
        raise typer.Exit(1)


def _table(report: "Report") -> Table:
    """One row per kind: the distance of both sides from float64, each in its worst layer, and the ratio judged."""
    headings = "site", "tokens", "layer", "Hugging Face", "layer", "port", "ratio", "bar", ""
    table = Table(*headings, title=printable(report.source), caption="Distances from Hugging Face in float64, in norm.")
    table.columns[0].no_wrap = True
    for row in report.rows:
        hf_layer, port_layer = ("" if layer is None else str(layer) for layer in (row.hf_layer, row.port_layer))
        distances = hf_layer, f"{row.hf:.1e}", port_layer, f"{row.port:.1e}"
        verdict = "pass" if row.passed else Text("FAIL", "red")
        table.add_row(row.kind, str(row.tokens), *distances, f"{row.ratio:.2f}", f"{row.bar:.2f}", verdict)
    return table


def parity_module() -> ModuleType:
    """The package `gemma3_jax.parity`, which needs torch.

    Raises:
        ModuleNotFoundError: torch is not installed; the message has the command.
    """
    with needs_extra("parity", "parity needs"):
        from gemma3_jax import parity
    import transformers

    transformers.logging.disable_progress_bar()
    return parity
