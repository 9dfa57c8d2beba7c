"""The `gemma3-jax` command: a thin layer over the library and `conversion`."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gemma3_jax
from gemma3_jax import atomic
from gemma3_jax.extras import needs_extra
from gemma3_jax.messages import printable
from gemma3_jax.reading import check_file, map_tensor, read_header
from gemma3_jax.sites.table import HEAD_SITES, SITES
from gemma3_jax.types import Params

with needs_extra("cli", "the command line needs"):
    import typer

if TYPE_CHECKING:
    from gemma3_jax.conversion.description import Description
    from gemma3_jax.parity.report import Report

app = typer.Typer(
    help="Gemma 3 in JAX, open at every site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INFO_TOKENS = 64, 1024  # lengths of text for which `info` prints the memory of a run
# A table that is written to a file or a pipe has a fixed width, since there is no terminal to fit.
console = Console(width=None if sys.stdout.isatty() else 130)

Source = Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file or hub id. Default: the shipped model.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16. Default: as stored; float32 for float16, bfloat16 for GGUF.")
]
ExportDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Adapter = Annotated[str | None, typer.Option(help="Directory or hub id of a PEFT adapter to merge into the source.")]

Tied = Annotated[
    bool | None,
    typer.Option(
        "--tie-word-embeddings/--untie-word-embeddings",
        help="Whether the embedding is the unembedding, too, if the checkpoint has both. Default: as its config says.",
    ),
]


@app.callback()
def options(traceback: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Gemma 3 in JAX, open at every site."""
    from gemma3_jax.kept import keep_programs

    keep_programs()


@app.command()
def demo(picture: Annotated[Path, typer.Option(help="File for the picture.")] = Path("induction.png")) -> None:
    """Convert the shipped model, check it against Hugging Face, and find its induction heads."""
    from gemma3_jax.cli import demo as steps

    atomic.check_new_file(picture)
    start = time.perf_counter()
    model = gemma3_jax.HookedGemma3.from_pretrained(gemma3_jax.TINY)
    console.print(f"Converted {gemma3_jax.TINY.name} in {time.perf_counter() - start:.1f} s: {_size(model.params)}.")
    _demo_parity()

    tokens = steps.repeated_tokens(model, rows=16, half=24)
    first, repeated = steps.half_losses(model, tokens)
    console.print(
        f"Loss on random syllables: [b]{first:.2f}[/b] nats; on their repetition: [b]{repeated:.2f}[/b]. It copies."
    )
    scores = steps.induction_scores(model, tokens)
    ranked = sorted(np.ndindex(scores.shape), key=lambda at: -scores[at])[:4]
    table = Table("layer", "head", "reach", "attention to what followed the last time", title="Induction heads")
    for layer, head in ranked:
        reach = "local" if model.config.layer_types[layer] == "sliding_attention" else "global"
        table.add_row(str(layer), str(head), reach, f"{scores[layer, head]:.2f}")
    console.print(table)
    steps.draw_heads(model, steps.repeated_tokens(model, rows=1, half=12), ranked[:2], picture)
    console.print(f"Their attention patterns: {picture}")


@app.command()
def convert(
    source: str,
    output: Path,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    tied: Tied = None,
) -> None:
    """Convert a Hugging Face checkpoint or a GGUF file to parameters, in the new directory OUTPUT."""
    from gemma3_jax.conversion.files import check_target, is_gguf
    from gemma3_jax.conversion.sources import convert_sources, load_tokenizer, locate_sources
    from gemma3_jax.conversion.store import save_params
    from gemma3_jax.conversion.tokenizers import has_tokenizer

    check_target(output)
    sources = locate_sources(source, revision, adapter)
    config, params = convert_sources(sources, dtype, tie_word_embeddings=tied)
    # A directory's tokenizer files are copied as they are.
    path = sources.tokenizer
    save_params(
        config,
        params,
        output,
        tokenizer=load_tokenizer(sources) if is_gguf(path) else path if has_tokenizer(path) else None,
    )
    console.print(f"{output}: {_size(params)}.")


@app.command()
def export(source: Path, output: Path, dtype: ExportDtype = None) -> None:
    """Export converted parameters to a Hugging Face checkpoint, in the new directory OUTPUT."""
    from gemma3_jax.conversion.export import export_checkpoint
    from gemma3_jax.conversion.files import check_target
    from gemma3_jax.conversion.store import load_params
    from gemma3_jax.conversion.tokenizers import has_tokenizer

    check_target(output)
    config, params = load_params(source)
    export_checkpoint(config, params, output, dtype, tokenizer=source if has_tokenizer(source) else None)
    console.print(f"{output}: {_size(params)}.")


@app.command()
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
    if json_file is not None:
        atomic.check_new_file(json_file)
    report = _parity_module().parity(source, dtype, tokens, revision, adapter=adapter)
    if json_file is not None:
        with atomic.new_file(json_file) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    console.print(_parity_table(report))
    lengths = " and ".join(map(str, report.tokens))
    failed = sum(not row.passed for row in report.rows)
    console.print(f"{report.dtype}, {report.prompts} of {lengths} tokens, {report.platform}.")
    if report.note:
        console.print(f"Note: {report.note}.")
    console.print(f"{failed} of {len(report.rows)} rows fail.")
    if failed:
        raise typer.Exit(1)


def _parity_table(report: "Report") -> Table:
    """One row per kind: the distance of both sides from float64, each in its worst layer, and the ratio judged."""
    headings = "site", "tokens", "layer", "Hugging Face", "layer", "port", "ratio", "bar", ""
    table = Table(*headings, title=escape(report.source), caption="Distances from Hugging Face in float64, in norm.")
    table.columns[0].no_wrap = True
    for row in report.rows:
        hf_layer, port_layer = ("" if layer is None else str(layer) for layer in (row.hf_layer, row.port_layer))
        distances = hf_layer, f"{row.hf:.1e}", port_layer, f"{row.port:.1e}"
        verdict = "pass" if row.passed else "[red]FAIL[/red]"
        table.add_row(row.kind, str(row.tokens), *distances, f"{row.ratio:.2f}", f"{row.bar:.2f}", verdict)
    return table


@app.command()
def generate(
    source: Source = str(gemma3_jax.TINY),
    prompt: Annotated[str, typer.Option(help="The text to continue; with --chat, the user's turn.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; needs --temperature.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens with this probability; needs --temperature.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    steer: Annotated[Path | None, typer.Option(help="A vector to add: .npy, or .safetensors with one tensor.")] = None,
    site: Annotated[str | None, typer.Option(help="Site of the vector, such as blocks.5.hook_resid_post.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Factor of the vector. Default: 1.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    tied: Tied = None,
) -> None:
    """Continue a text and print it token by token; --steer adds a steering vector."""
    from gemma3_jax.generation.sampling import Options, sampling

    if not prompt:
        raise ValueError("there is no text to continue; give --prompt")
    if (steer is None) != (site is None):
        raise ValueError("--steer and --site belong together: the vector and the site to add it at; give both")
    if steer is None and alpha is not None:
        raise ValueError("--alpha is the factor of a steering vector; give --steer and --site too")
    alpha = 1.0 if alpha is None else alpha
    if not np.isfinite(alpha):
        raise ValueError(f"--alpha is {alpha}; it must be a finite number")
    hooks = [] if steer is None or site is None else [(site, gemma3_jax.edits.Add(_vector(steer), alpha))]
    options: Options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling(1, **options)  # raises errors before a checkpoint is loaded
    model = gemma3_jax.HookedGemma3.from_pretrained(source, dtype, revision, adapter=adapter, tie_word_embeddings=tied)
    source_text: str | list[dict[str, str]] = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = model.generate_stream(source_text, max_new_tokens, fwd_hooks=hooks, **options)
    if not chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def sites(markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False) -> None:
    """List every hook site: its names, shape and contents, and what an edit there affects."""
    if markdown:
        print(sites_markdown(), end="")
        return
    table = Table("names: canonical, legacy, Hugging Face", "shape, dtype", "holds", "an edit reaches", show_lines=True)
    table.columns[0].no_wrap = True
    for row in (*SITES, *HEAD_SITES):
        names = "\n".join(filter(None, (f"[b]{row.name}[/b]", row.legacy, row.hf)))
        table.add_row(names, f"{row.axes}\n{row.dtype}", row.holds, row.reaches)
    console.print(table)


def sites_markdown() -> str:
    """The table of sites in Markdown."""
    header = ["site", "TransformerLens", "Hugging Face", "shape", "dtype", "holds", "an edit reaches"]
    rows = [[s.name, s.legacy or "", s.hf or "", s.axes, s.dtype, s.holds, s.reaches] for s in (*SITES, *HEAD_SITES)]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *rows])


@app.command()
def info(
    source: Source = str(gemma3_jax.TINY), dtype: Dtype = None, revision: Revision = None, adapter: Adapter = None
) -> None:
    """Describe a checkpoint without reading or downloading its weights. Exit code 1 if it does not load."""
    from gemma3_jax.conversion.description import describe

    checkpoint = describe(source, dtype, revision, adapter)
    table = Table("", "", title=escape(printable(source)), show_header=False)
    for name, text in _info_rows(checkpoint):
        table.add_row(name, escape(printable(text)))
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


@app.command()
def fits(
    source: Annotated[str, typer.Argument(help="270m, 1b, 4b, 12b or 27b; or a directory, GGUF file or hub id.")],
    on: Annotated[str, typer.Option(help="The machine, such as v5e-8, v5p-8, h100 or h100x8.")],
    model: Annotated[int, typer.Option(help="Devices that share one copy of the parameters.")] = 1,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each row, or of each prompt.")] = 1024,
    capture: Annotated[list[str] | None, typer.Option(help="A site to capture, or a glob; repeat it for more.")] = None,
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
    from gemma3_jax.cli import fits as shown
    from gemma3_jax.placing import fits

    report = fits(
        source,
        on,
        model=model,
        batch=batch,
        length=length,
        capture=capture or (),
        generate=generate,
        gradients=cast(Any, gradients),
        remat=remat,
        dtype=dtype,
        scan_layers=scan_layers,
        largest_batch=largest_batch,
        revision=revision,
    )
    console.print(shown.table(report), shown.verdict(report), sep="\n")
    if not report.fits:
        raise typer.Exit(1)


def main() -> None:
    """Run the command. An error prints one line. The exit code is 1, or 2 for an error in the command line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        # typer's errors about the command line format their own message.
        usage = getattr(error, "format_message", None)
        parts = [usage() if usage else str(error), *getattr(error, "__notes__", [])]
        message = printable(" ".join(" ".join(parts).split())) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if usage else 1)


def _vector(file: Path) -> np.ndarray:
    """The one array of a file, in float32."""
    if file.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{file.name} is neither .npy nor .safetensors")
    if not os.path.lexists(file):
        raise FileNotFoundError(f"there is no file {file}")
    check_file(file)
    if file.suffix == ".safetensors":
        tensors = {key: map_tensor(key, stored) for key, stored in read_header(file).items()}
    else:
        try:
            tensors = {"": np.load(file, allow_pickle=False)}
        except Exception as error:
            raise ValueError(f"{file.name} cannot be read as .npy ({error}); write it again") from error
    if len(tensors) != 1:
        raise ValueError(f"{file.name} has {len(tensors)} tensors ({', '.join(tensors)}); a vector is one tensor")
    [vector] = tensors.values()
    if vector.dtype.kind not in "fiu" and vector.dtype != "bfloat16":
        raise ValueError(f"{file.name} has dtype {vector.dtype}; a steering vector must have numbers")
    vector = np.asarray(vector, np.float32)
    if not vector.size or not np.isfinite(vector).all():
        raise ValueError(f"{file.name} has shape {vector.shape} and NaN, infinity or no values; it cannot be added")
    return vector


def _parity_module() -> ModuleType:
    with needs_extra("parity", "parity needs"):
        from gemma3_jax import parity
    import transformers

    transformers.logging.disable_progress_bar()
    return parity


def _demo_parity() -> None:
    try:
        module = _parity_module()
    except ImportError as error:
        console.print(f"Not compared with Hugging Face: {escape(str(error))}")
        return
    report = module.parity(gemma3_jax.TINY)
    worst = max(report.rows, key=lambda row: row.ratio)
    verdict = "equal to Hugging Face" if report.passed else "[red]NOT equal to Hugging Face[/red]"
    console.print(
        f"{len(report.rows)} kinds of sites and gradients: [b]{verdict}[/b]. From float64 the port is at most "
        f"{worst.ratio:.1f} times as far, at {worst.kind}."
    )


def _size(params: Params) -> str:
    import jax

    leaves = jax.tree.leaves(params)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return f"{count:,} parameters, {size / 1e6:,.1f} MB"
