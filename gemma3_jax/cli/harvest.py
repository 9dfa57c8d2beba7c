"""`gemma3-jax harvest`: activations of a corpus to disk, how far a harvest is, and whether its files are whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gemma3_jax.cli.shared import Dtype, Revision, check_devices, console, say, working

if TYPE_CHECKING:
    from gemma3_jax.harvest.packing import Pack
    from gemma3_jax.harvest.sources import Corpus
    from gemma3_jax.reductions import Cast, Int8

harvest = typer.Typer(
    help="Write the activations of a corpus to a folder, and look after it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Store = Annotated[str, typer.Argument(help="The folder of the store, or a name such as s3://bucket/folder.")]


@harvest.command()
def run(
    source: Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file or hub id.")],
    corpus: Annotated[Path, typer.Argument(help="A .txt, .jsonl, .parquet or .npy file, or a folder of text files.")],
    out: Store,
    site: Annotated[list[str], typer.Option(help="A site or a glob, such as 'blocks.{5,9}.hook_out'; repeat it.")],
    cast: Annotated[str | None, typer.Option(help="bfloat16 or float32; or int8, with a scale for each token.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of a unit.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    part: Annotated[str, typer.Option(help="Units to do: 0/4, environment or claim.")] = "0/1",
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0,
    field: Annotated[str | None, typer.Option(help="Field of a .jsonl or .parquet file with the text.")] = None,
    pack: Annotated[str, typer.Option(help="whole or cut documents share rows; or no, one document a row.")] = "whole",
    drop_bos: Annotated[bool, typer.Option("--drop-bos", help="Do not keep BOS.")] = False,
    sample: Annotated[int | None, typer.Option(help="Keep so many tokens of each document.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Check all units, and do damaged ones again.")] = False,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Do the units of a store that are not there yet. Run it again after a crash; run it on many machines."""
    from gemma3_jax.harvest import ActivationStore
    from gemma3_jax.harvest import harvest as do
    from gemma3_jax.hooked.hooked import HookedGemma3

    kinds: dict[str, Pack] = {"whole": True, "cut": "cut", "no": False}
    if pack not in kinds:
        raise ValueError(f"--pack is {pack!r}; it must be whole, cut or no")
    check_devices()
    texts, reduction = corpus_of(corpus, field), _reduction(cast)
    with working(f"loading {source}"):
        model = HookedGemma3.from_pretrained(source, dtype, revision)
    do(
        model,
        texts,
        dict.fromkeys(site, reduction),
        out,
        rows,
        length,
        part,
        seed,
        pack=kinds[pack],
        drop_bos=drop_bos,
        sample=sample,
        repair=repair,
    )
    say(repr(ActivationStore(out)))


@harvest.command()
def status(out: Store) -> None:
    """How far a harvest is, and what it has."""
    from gemma3_jax.harvest import ActivationStore

    store = ActivationStore(out)
    manifest = store.manifest
    table = Table("", "", show_header=False)
    there = manifest["units"] - len(store.missing)
    table.add_row("units", f"{there:,} of {manifest['units']:,}")
    table.add_row("kept tokens", f"{len(store):,}")
    table.add_row("real tokens when done", f"{manifest['tokens']:,}")
    cells = manifest["units"] * manifest["layout"]["rows"] * manifest["layout"]["length"]
    if manifest["layout"]["pack"]:
        table.add_row("padding", f"{1 - manifest['tokens'] / cells:.1%}")
    for name, described in manifest["sites"].items():
        kept = described["reduction"] or "whole"
        shapes = [f"{array['shape']} {array['dtype']}" for array in described["arrays"].values()]
        table.add_row(name, f"{kept}: {', '.join(shapes)}")
    console.print(table)


@harvest.command()
def verify(out: Store) -> None:
    """Read all of a store and compare checksums. Exit code 1 if a unit is damaged or missing."""
    from gemma3_jax.harvest import verify as check

    with working(f"reading {out}"):
        check(out)
    say(f"{out} is whole.")


def corpus_of(file: Path, field: str | None) -> "Path | Corpus":
    """The corpus of a file, by its field if one is named."""
    from gemma3_jax.harvest.sources import READERS

    if not file.exists():
        raise ValueError(f"the corpus {file} is neither a file nor a folder")
    if field is None:
        return file
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"--field is for .jsonl and .parquet files; {file.name} has no fields")
    return reader(file, field)


def _reduction(cast: str | None) -> "Cast | Int8 | None":
    from gemma3_jax import reductions

    if cast not in (None, "bfloat16", "float32", "int8"):
        raise ValueError(f"--cast is {cast!r}; it must be bfloat16, float32 or int8")
    if cast is None:
        return None
    return reductions.Int8() if cast == "int8" else reductions.Cast(cast)
