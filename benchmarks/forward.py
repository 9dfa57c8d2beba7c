"""Forward passes against Hugging Face, in one run: plain, with activations kept, and the price of a new capture set.

    python -m benchmarks.forward --json benchmarks/results/forward-cpu.json --markdown docs/benchmarks.md

Every ratio is the peer's median over the port's: above 1 the port is faster. Random weights; `--size` picks the shape.
"""

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import typer
from rich.console import Console

from benchmarks.timing import interleaved, machine, once
from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, forward

RESIDUALS = "blocks.*.hook_resid_post"
EVERY_SITE = "**"
console = Console(stderr=True)


def hf_model(config: Gemma3Config, dtype: str, attention: str) -> Any:
    """A random Hugging Face model, on the GPU if torch has one."""
    fields = {key: value for key, value in config.to_hf().items() if key not in ("model_type", "architectures")}
    hf_config = transformers.Gemma3TextConfig(**fields, attn_implementation=attention)
    model = transformers.Gemma3ForCausalLM._from_config(hf_config, dtype=getattr(torch, dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def keep_outputs(model: Any, names: set[str] | None) -> tuple[dict[str, Any], list[Any]]:
    """Forward hooks that keep what the named modules (None: all of them) return, as a Hugging Face user would."""
    kept: dict[str, Any] = {}

    def hook(name: str, module: Any, args: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    chosen = [(name, module) for name, module in model.named_modules() if names is None or name in names]
    return kept, [module.register_forward_hook(functools.partial(hook, name)) for name, module in chosen]


def run_torch(model: Any, tokens: torch.Tensor) -> Any:
    """One forward pass, waited for."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
        if logits.is_cuda:
            torch.cuda.synchronize()
    return np.float32(logits[0, -1, 0].item())


@functools.partial(jax.jit, static_argnames=("config", "capture"))
def run_port(config: Gemma3Config, params: Any, tokens: jax.Array, capture: str | tuple[str, ...] = ()) -> Any:
    """One forward pass with captures."""
    logits, cache = forward(config, params, tokens, capture)
    return logits, dict(cache)


def measure(
    config: Gemma3Config, dtype: str, shape: tuple[int, int], rounds: int, with_captures: bool
) -> dict[str, Any]:
    """Every figure for one dtype and input shape."""
    ids = np.random.default_rng(0).integers(3, config.vocab_size, shape)
    eager = hf_model(config, dtype, "eager")
    params = convert_state_dict(eager.state_dict(), config)
    tokens, torch_tokens = jnp.asarray(ids), torch.from_numpy(ids).to(eager.device)
    sdpa = hf_model(config, dtype, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    compiled = torch.compile(sdpa)
    plain = interleaved(
        {
            "port": lambda: run_port(config, params, tokens)[0],
            "HF eager": lambda: run_torch(eager, torch_tokens),
            "HF SDPA": lambda: run_torch(sdpa, torch_tokens),
            "HF torch.compile": lambda: run_torch(compiled, torch_tokens),
        },
        rounds,
    )
    captures = {}
    if with_captures:
        captures = {
            "residuals": _measure_capture(config, params, tokens, torch_tokens, sdpa, RESIDUALS, rounds),
            "every site": _measure_capture(config, params, tokens, torch_tokens, eager, EVERY_SITE, rounds),
        }
    new = ("blocks.3.attn.hook_pattern", "blocks.*.mlp.hook_post")
    lowered_and_compiled = once(lambda: run_port.lower(config, params, tokens, new).compile() and None)
    return {"dtype": dtype, "shape": shape, "seconds": plain, "captures": captures, "new capture": lowered_and_compiled}


def _measure_capture(config, params, tokens, torch_tokens, model, wanted, rounds) -> dict[str, float]:
    """Plain and capturing in the same turns, for the port and for hooks on Hugging Face."""
    names = {f"model.layers.{i}" for i in range(config.num_hidden_layers)} if wanted == RESIDUALS else None

    def hooked() -> Any:
        kept, handles = keep_outputs(model, names)
        logit = run_torch(model, torch_tokens)
        for handle in handles:
            handle.remove()
        return logit, len(kept)

    peers = {
        "port, plain": lambda: run_port(config, params, tokens)[0],
        "port": lambda: run_port(config, params, tokens, wanted),
        "HF, plain": lambda: run_torch(model, torch_tokens),
        "HF hooks": hooked,
    }
    return interleaved(peers, rounds)


def as_markdown(report: dict[str, Any]) -> str:
    """The table of the documentation."""
    where = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Generated by `{report['command']}`. Model shape: {report['size']}, random weights.",
        f"Machine: {where}. Medians of interleaved rounds ({report['rounds']} for the shapes in turn).",
        "",
        "## Forward",
        "",
        "Seconds of one forward pass with logits at every position, and the port's speed relative to each peer "
        "(above 1 the port is faster).",
        "",
        "| dtype | batch x tokens | port | HF eager | HF SDPA | HF torch.compile | port / best HF |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["results"]:
        s = dict(row["seconds"])
        port = s.pop("port")
        cells = [f"{value:.3f} ({value / port:.2f}x)" for value in s.values()]
        best = min(s.values()) / port
        b, p = row["shape"]
        lines.append(f"| {row['dtype']} | {b} x {p} | {port:.3f} | {' | '.join(cells)} | {best:.2f}x |")
    lines += [
        "",
        "## Capture",
        "",
        "What keeping activations adds to a forward pass: in the port, and with forward hooks on Hugging Face (which "
        "keep module outputs only; the port's every-site set also holds scores, per-head results and per-head inputs).",
        "",
        "| dtype | batch x tokens | captured | port adds | HF hooks add | HF hooked / port |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["results"]:
        for name, s in row["captures"].items():
            ours, theirs = s["port"] / s["port, plain"] - 1, s["HF hooks"] / s["HF, plain"] - 1
            b, p = row["shape"]
            ratio = s["HF hooks"] / s["port"]
            lines.append(f"| {row['dtype']} | {b} x {p} | {name} | {ours:+.1%} | {theirs:+.1%} | {ratio:.2f}x |")
    lines += [
        "",
        "## Compile time of a new capture set",
        "",
        "| dtype | batch x tokens | seconds |",
        "| --- | --- | --- |",
    ]
    for row in report["results"]:
        b, p = row["shape"]
        lines.append(f"| {row['dtype']} | {b} x {p} | {row['new capture']:.1f} |")
    if report["note"]:
        lines += ["", f"Note: {report['note']}"]
    return "\n".join(lines) + "\n"


def main(
    size: str = "270m",
    dtypes: str = "float32,bfloat16",
    shapes: str = "1x128,4x512",
    rounds: Annotated[str, typer.Option(help="Interleaved rounds, for each of the shapes.")] = "5,2",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown: Path | None = None,
    note: Annotated[str, typer.Option(help="What a reader of the table should know of the run.")] = "",
) -> None:
    config = Gemma3Config.preset(size)
    results = []
    for dtype in dtypes.split(","):
        for shape, turns in zip(shapes.split(","), rounds.split(","), strict=True):
            b, p = map(int, shape.split("x"))
            console.print(f"{dtype} {b} x {p} ...")
            # Every site of a long batch is several gigabytes: the first shape shows what captures cost.
            results.append(measure(config, dtype, (b, p), int(turns), with_captures=shape == shapes.split(",")[0]))
            jax.clear_caches()
    command = f"python -m benchmarks.forward --size {size} --dtypes {dtypes} --shapes {shapes} --rounds {rounds}"
    report = {
        "command": command,
        "size": size,
        "rounds": rounds,
        "machine": machine(),
        "note": note,
        "results": results,
    }
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if markdown:
        markdown.write_text(as_markdown(report))
    print(as_markdown(report))


if __name__ == "__main__":
    typer.run(main)
