"""`gemma3-jax convert`, `export` and `info`: what is done with checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import gemma3_jax
from gemma3_jax.cli.shared import (
    Adapter,
    Checkpoint,
    Dtype,
    Output,
    Revision,
    Source,
    Tied,
    check_devices,
    console,
    say,
    size,
    working,
)
from gemma3_jax.messages import printable

if TYPE_CHECKING:
    from gemma3_jax.conversion.description import Description

_INFO_TOKENS = 64, 1024  # lengths of text for which `info` prints the memory of a run

Converted = Annotated[Path, typer.Argument(help="Directory that `convert` or `save_params` wrote.")]
ExportDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")]


def convert(
    source: Checkpoint,
    output: Output,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    tied: Tied = None,
) -> None:
    """Convert a Hugging Face checkpoint or a GGUF file to parameters, in the new directory OUTPUT."""
    from gemma3_jax.conversion.dtypes import parameter_dtype
    from gemma3_jax.conversion.files import check_target, is_gguf
    from gemma3_jax.conversion.sources import convert_sources, load_tokenizer, locate_sources
    from gemma3_jax.conversion.store import save_params
    from gemma3_jax.conversion.tokenizers import has_tokenizer

    check_target(output)
    parameter_dtype(dtype)
    check_devices()
    sources = locate_sources(source, revision, adapter)
    with working(f"converting {source}"):
        config, params = convert_sources(sources, dtype, tie_word_embeddings=tied)
    # A directory's tokenizer files are copied as they are.
    path = sources.tokenizer
    with working(f"writing {output}"):
        tokenizer = load_tokenizer(sources) if is_gguf(path) else path if has_tokenizer(path) else None
        save_params(config, params, output, tokenizer=tokenizer)
    say(f"{output}: {size(params)}.")


def export(source: Converted, output: Output, dtype: ExportDtype = None) -> None:
    """Export converted parameters to a Hugging Face checkpoint, in the new directory OUTPUT."""
    from gemma3_jax.conversion.dtypes import dtype_among
    from gemma3_jax.conversion.export import export_checkpoint
    from gemma3_jax.conversion.files import DTYPES, check_target
    from gemma3_jax.conversion.store import load_params
    from gemma3_jax.conversion.tokenizers import has_tokenizer

    check_target(output)
    dtype_among(DTYPES, dtype)
    check_devices()
    with working(f"reading {source}"):
        config, params = load_params(source)
    with working(f"writing {output}"):
        export_checkpoint(config, params, output, dtype, tokenizer=source if has_tokenizer(source) else None)
    say(f"{output}: {size(params)}.")


def info(
    source: Source = str(gemma3_jax.TINY), dtype: Dtype = None, revision: Revision = None, adapter: Adapter = None
) -> None:
    """Describe a checkpoint without reading or downloading its weights. Exit code 1 if it does not load."""
    from gemma3_jax.conversion.description import describe
    from gemma3_jax.conversion.dtypes import parameter_dtype

    parameter_dtype(dtype)
    with working(f"reading the headers of {source}"):
        checkpoint = describe(source, dtype, revision, adapter)
    table = Table("", "", title=printable(source), show_header=False)
    for name, text in _info_rows(checkpoint):
        table.add_row(name, printable(text))
    console.print(table)
    if checkpoint.error:
        raise ValueError(f"this checkpoint does not load: {checkpoint.error}")


def _info_rows(checkpoint: "Description") -> Iterator[tuple[str, str]]:
    """What `info` prints: names and texts."""
    config = checkpoint.config
    kinds = ", ".join(f"{config.layer_types.count(k)} {k}" for k in sorted(set(config.layer_types)))
    for name, value in config.to_hf().items():
        yield name, kinds if name == "layer_types" else json.dumps(value)
    yield from (("adapter", str(directory)) for directory in checkpoint.adapters)
    yield "files", ", ".join(checkpoint.files)
    yield "stored tensors", ", ".join(f"{n} {kind}" for kind, n in sorted(checkpoint.stored.items()))
    yield "tokenizer", ", ".join(checkpoint.tokenizer) or "none: the model takes token ids"
    if checkpoint.parameters:
        dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in sorted(checkpoint.parameters.items()))
        yield "parameters", f"{sum(checkpoint.parameters.values()):,}: {dtypes}"
        yield "memory", f"{checkpoint.bytes / 1e9:,.2f} GB"
        for tokens in _INFO_TOKENS:
            yield f"to run {tokens:,} tokens", f"at least {checkpoint.least_bytes(tokens) / 1e9:,.2f} GB"
    yield from (("note", note) for note in checkpoint.notes)
