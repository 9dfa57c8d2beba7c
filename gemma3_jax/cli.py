"""The `gemma3-jax` command: thin, every line of it calls the library, on both its sides."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gemma3_jax
from gemma3_jax.sites import SITES

app = typer.Typer(
    help="Gemma 3 in JAX, open at every site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# A table that goes to a file or a pipe should not be cut to the width of nobody's terminal.
console = Console(width=None if sys.stdout.isatty() else 130)

Source = Annotated[str, typer.Argument(help="Checkpoint directory or hub id. Default: the model that is shipped.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]


@app.callback()
def options(traceback: Annotated[bool, typer.Option(help="Show where an error came from.")] = False) -> None:
    """Gemma 3 in JAX, open at every site."""
    _keep_compilations()


@app.command()
def demo(picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("induction.png")) -> None:
    """Convert the shipped model, check it against Hugging Face, and find its induction heads."""
    from gemma3_jax import demo as steps

    if not picture.absolute().parent.is_dir():
        raise FileNotFoundError(f"{picture.parent} is no directory; the picture {picture.name} has no place there")
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
def convert(source: str, output: Path, dtype: Dtype = None, revision: Revision = None) -> None:
    """Convert a Hugging Face checkpoint to parameters of the port, in OUTPUT."""
    from conversion import convert_checkpoint, save_params
    from conversion.files import has_tokenizer, locate

    directory = locate(source, revision)
    config, params = convert_checkpoint(directory, dtype)
    save_params(config, params, output, tokenizer=directory if has_tokenizer(directory) else None)
    console.print(f"{output}: {_size(params)}.")


@app.command()
def export(source: Path, output: Path, dtype: Dtype = None) -> None:
    """Write what `convert` wrote as a Hugging Face checkpoint, in OUTPUT."""
    from conversion import export_checkpoint, load_params
    from conversion.files import has_tokenizer

    config, params = load_params(source)
    export_checkpoint(config, params, output, dtype, tokenizer=source if has_tokenizer(source) else None)
    console.print(f"{output}: {_size(params)}.")


@app.command()
def parity(
    source: Source = str(gemma3_jax.TINY),
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there too.")] = None,
    revision: Revision = None,
) -> None:
    """Compare a checkpoint with Hugging Face, site by site. Exit code 1 if any row fails."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{json_file.parent} is no directory; the report {json_file.name} has no place there")
    report = _parity_module().parity(source, dtype, tokens, revision)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    table = Table("site", "worst layer", "max abs", "relative", "bar", "cosine", "", title=escape(report.source))
    table.columns[0].no_wrap = True
    for row in report.rows:
        layer = "" if row.layer is None else str(row.layer)
        verdict = "pass" if row.passed else "[red]FAIL[/red]"
        numbers = f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.bar:.1e}", f"{row.cosine:.7f}"
        table.add_row(row.kind, layer, *numbers, verdict)
    console.print(table)
    failed = sum(not row.passed for row in report.rows)
    console.print(
        f"{report.dtype}, {report.tokens} tokens, {report.platform}: {failed} of {len(report.rows)} rows fail."
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def generate(
    source: Source = str(gemma3_jax.TINY),
    prompt: Annotated[str, typer.Option(help="The text to continue; with --chat, the user's turn.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens with this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    steer: Annotated[Path | None, typer.Option(help="A vector to add: .npy, or .safetensors with one tensor.")] = None,
    site: Annotated[str | None, typer.Option(help="Where to add it, such as blocks.5.hook_resid_post.")] = None,
    alpha: Annotated[float | None, typer.Option(help="How much of it to add. Default: 1.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
) -> None:
    """Continue a text, token by token as it is written; with --steer, under a steering vector."""
    if not prompt:
        raise ValueError("there is no text to continue; give --prompt")
    if (steer is None) != (site is None):
        raise ValueError("--steer and --site belong together: the vector, and where to add it")
    if steer is None and alpha is not None:
        raise ValueError("--alpha says how much of a vector to add; give the vector too, as --steer with --site")
    alpha = 1.0 if alpha is None else alpha
    if not np.isfinite(alpha):
        raise ValueError(f"--alpha is {alpha}; it must be a finite number")
    hooks = [] if steer is None or site is None else [(site, gemma3_jax.edits.Add(_vector(steer), alpha))]
    model = gemma3_jax.HookedGemma3.from_pretrained(source, dtype, revision)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given: Any = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = model.generate_stream(given, max_new_tokens, fwd_hooks=hooks, **how)
    if not chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def sites(markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False) -> None:
    """List every hook site: its names, its shape, what it holds and what an edit there reaches."""
    if markdown:
        print(sites_markdown(), end="")
        return
    table = Table("names: canonical, legacy, Hugging Face", "shape, dtype", "holds", "an edit reaches", show_lines=True)
    table.columns[0].no_wrap = True
    for row in SITES:
        names = "\n".join(filter(None, (f"[b]{row.name}[/b]", row.legacy, row.hf)))
        table.add_row(names, f"{row.axes}\n{row.dtype}", row.holds, row.reaches)
    console.print(table)


def sites_markdown() -> str:
    """The table of sites in Markdown."""
    header = ["site", "legacy name", "Hugging Face", "shape", "dtype", "holds", "an edit reaches"]
    rows = [[s.name, s.legacy or "", s.hf or "", s.axes, s.dtype, s.holds, s.reaches] for s in SITES]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, ["---"] * len(header), *rows])


@app.command()
def info(source: Source = str(gemma3_jax.TINY), revision: Revision = None) -> None:
    """Describe a checkpoint from its config and file headers; no weights are read."""
    from conversion.files import locate, read_config, read_headers

    directory = locate(source, revision)
    config = read_config(directory)
    stored = read_headers(directory)
    kinds = ", ".join(f"{config.layer_types.count(k)} {k}" for k in sorted(set(config.layer_types)))
    table = Table("", "", title=escape(str(source)), show_header=False)
    for name, value in config.to_hf().items():
        table.add_row(name, kinds if name == "layer_types" else escape(json.dumps(value)))
    table.add_row("stored tensors", str(len(stored)))
    table.add_row("stored dtypes", ", ".join(sorted({tensor.dtype for tensor in stored.values()})))
    table.add_row("files", ", ".join(sorted({tensor.file.name for tensor in stored.values()})))
    console.print(table)


def main() -> None:
    """Run the command. An error is one line; its exit code is 1, or 2 where the command line itself is at fault."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        # Of a command line that cannot be parsed, typer's own error knows how to put it.
        usage = getattr(error, "format_message", None)
        said = [usage() if usage else str(error), *getattr(error, "__notes__", [])]
        message = " ".join(" ".join(said).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if usage else 1)


def _keep_compilations() -> None:
    """What takes a second or more to compile is kept for the next command, unless JAX was told where, or not to."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined] # missing in jax's stubs
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "gemma3-jax"))


def _vector(file: Path) -> Any:
    """The one array of a file, in float32."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{file.name} is neither .npy nor .safetensors")
    from safetensors.flax import load_file

    try:
        tensors = {"": np.load(file, allow_pickle=False)} if file.suffix == ".npy" else load_file(file)
    except Exception as error:
        raise ValueError(f"{file.name} cannot be read as {file.suffix} ({error}); write it again") from error
    if len(tensors) != 1:
        raise ValueError(f"{file.name} has {len(tensors)} tensors ({', '.join(tensors)}); a steering vector is one")
    [vector] = tensors.values()
    if not np.issubdtype(vector.dtype, np.number) and vector.dtype != "bfloat16":
        raise ValueError(f"{file.name} holds {vector.dtype}; a steering vector is of numbers")
    vector = np.asarray(vector, np.float32)
    if not vector.size or not np.isfinite(vector).all():
        raise ValueError(f"{file.name} has shape {vector.shape} and holds NaN, infinity or nothing; it cannot be added")
    return vector


def _parity_module() -> Any:
    try:
        from conversion import parity
    except ImportError as error:
        raise ImportError(f"parity runs torch ({error}): pip install 'gemma3-jax[parity]'") from error
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
    worst = max(report.rows, key=lambda row: row.relative)
    verdict = "equal to Hugging Face" if report.passed else "[red]NOT equal to Hugging Face[/red]"
    console.print(
        f"{len(report.rows)} kinds of sites and gradients: [b]{verdict}[/b]; "
        f"the largest relative error is {worst.relative:.1e}, at {worst.kind}."
    )


def _size(params: Any) -> str:
    import jax

    leaves = jax.tree.leaves(params)
    count, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    return f"{count:,} parameters, {size / 1e6:,.1f} MB"
