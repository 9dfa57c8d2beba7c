"""A grid of activation patching (residual stream by layer and position) against loops of forward passes, in one run.

    python -m benchmarks.patching --json benchmarks/results/patching-cpu.json --markdown docs/benchmarks-patching.md

Peers run one forward pass for each place, as their users do; of the grid they run a sample, spread evenly over it, and
their time for the whole grid is the median of the sample times the number of places. TransformerLens takes part
where it is installed beside torch and transformers. Ratios are the peer's seconds over the port's.
"""

import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.forward import hf_model
from benchmarks.timing import interleaved, machine
from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3, forward
from gemma3_jax.analysis.attribution import attribution_patching
from gemma3_jax.analysis.patching import get_act_patch_resid_pre

console = Console(stderr=True)
ANSWER = 1234


def metric(logits: jax.Array) -> jax.Array:
    """The logit of one token at the last position."""
    return logits[0, -1, ANSWER]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


class HuggingFaceLoop:
    """One hooked forward pass for each place."""

    def __init__(self, model: Any, corrupted: np.ndarray, clean: np.ndarray, last_logits: bool):
        self.model = model
        self.options = {"logits_to_keep": 1} if last_logits else {}
        self.corrupted = torch.from_numpy(corrupted).to(model.device)
        self.clean: dict[int, torch.Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(functools.partial(self._keep, i))
            for i, layer in enumerate(model.model.layers)
        ]
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(clean).to(model.device), use_cache=False)
        for handle in handles:
            handle.remove()

    def _keep(self, layer: int, module: Any, args: Any) -> None:
        self.clean[layer] = args[0].clone()

    def __call__(self, layer: int, position: int) -> float:
        def patch(module: Any, args: Any) -> Any:
            hidden = args[0].clone()
            hidden[:, position] = self.clean[layer][:, position]
            return (hidden, *args[1:])

        handle = self.model.model.layers[layer].register_forward_pre_hook(patch)
        with torch.inference_mode():
            logits = self.model(input_ids=self.corrupted, use_cache=False, **self.options).logits
        handle.remove()
        return float(logits[0, -1, ANSWER])


class TransformerLensLoop:
    """`run_with_hooks` of TransformerLens, one call for each place."""

    def __init__(self, model: Any, corrupted: np.ndarray, clean: np.ndarray):
        self.bridge = _bridge(model)
        self.corrupted = torch.from_numpy(corrupted)
        with torch.inference_mode():
            names = lambda name: name.endswith("hook_resid_pre")  # noqa: E731
            _, self.clean = self.bridge.run_with_cache(torch.from_numpy(clean), names_filter=names)

    def __call__(self, layer: int, position: int) -> float:
        name = f"blocks.{layer}.hook_resid_pre"

        def patch(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[:, position] = self.clean[name][:, position]
            return value

        with torch.inference_mode():
            logits = self.bridge.run_with_hooks(self.corrupted, fwd_hooks=[(name, patch)])
        return float(logits[0, -1, ANSWER])


def _bridge(model: Any) -> Any:
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from gemma3_jax import TINY

    # It reads the architecture from a config file, and wants a tokenizer, which nothing here uses.
    with tempfile.TemporaryDirectory() as directory:
        model.config.architectures = ["Gemma3ForCausalLM"]
        model.config.save_pretrained(directory)
        return TransformerBridge.boot_transformers(
            directory, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(TINY)
        )


def sample_of(layers: int, positions: int, count: int) -> list[tuple[int, int]]:
    """Places spread evenly over the grid."""
    at = np.linspace(0, layers * positions - 1, count).astype(int)
    return [(int(i) // positions, int(i) % positions) for i in at]


def measure_grid(config: Gemma3Config, tokens: int, sample: int, rounds: int) -> dict[str, Any]:
    """Seconds of the whole grid: the port's, and each peer's from its sample."""
    rng = np.random.default_rng(0)
    clean, corrupted = (rng.integers(3, config.vocab_size, (1, tokens)) for _ in range(2))
    hf = hf_model(config, "float32", "sdpa")
    model = HookedGemma3(config, convert_state_dict(hf.state_dict(), config))
    peers: dict[str, Callable[[int, int], float]] = {
        "HF hooks": HuggingFaceLoop(hf, corrupted, clean, last_logits=False),
        "HF hooks, last logits": HuggingFaceLoop(hf, corrupted, clean, last_logits=True),
    }
    if _version("transformer-lens"):
        peers["TransformerLens"] = TransformerLensLoop(hf, corrupted, clean)
    places = sample_of(config.num_hidden_layers, tokens, sample)

    def grid() -> np.ndarray:
        return get_act_patch_resid_pre(model, corrupted, clean, metric, logits_at=-1, progress=False)

    compiling, ours = timed(grid)
    seconds: dict[str, list[float]] = {"port": []}
    worst = 0.0
    for turn in range(rounds):
        seconds["port"].append(timed(grid)[0])
        console.print(f"port: {seconds['port'][-1]:.1f} s for the grid")
        for name, peer in peers.items():
            for place in places[turn::rounds]:
                elapsed, value = timed(lambda peer=peer, place=place: peer(*place))
                seconds.setdefault(name, []).append(elapsed * ours.size)
                worst = max(worst, abs(ours[place] - value))
            console.print(f"{name}: {np.median(seconds[name]):.1f} s for the grid")
    return {
        "grid": list(ours.shape),
        "sample": sample,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "first call": compiling,
        "worst difference": float(worst),
        "spread": float(np.ptp(ours)),
    }


def measure_attribution(config: Gemma3Config, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of a forward pass and of attribution at every residual site, all logits computed in both."""
    rng = np.random.default_rng(0)
    clean, corrupted = (jnp.asarray(rng.integers(3, config.vocab_size, (1, tokens))) for _ in range(2))
    model = HookedGemma3(config, convert_state_dict(hf_model(config, "float32", "sdpa").state_dict(), config))
    plain = jax.jit(lambda params, tokens: forward(config, params, tokens)[0])
    sites = ("resid_pre", "resid_mid", "resid_post")
    return interleaved(
        {
            "forward": lambda: plain(model.params, corrupted),
            "attribution": lambda: attribution_patching(model, corrupted, clean, metric, sites, ("layer", "pos")),
        },
        rounds,
    )


def as_markdown(report: dict[str, Any]) -> str:
    """The page of the documentation."""
    grid, attribution = report["grid"], report["attribution"]
    where = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    layers, tokens = grid["grid"]
    lines = [
        "# Patching benchmark",
        "",
        f"Generated by `{report['command']}`. Model shape: {report['size']}, float32, random weights; a prompt of "
        f"{tokens} tokens. Machine: {where}.",
        "",
        "## Residual stream by layer and position",
        "",
        f"{layers} x {tokens} = {layers * tokens} runs, each with the clean residual stream at one place; the metric "
        "is a logit of the last position. Peers run one forward pass for each place, and were timed on "
        f"{grid['sample']} places.",
        "",
        "| | seconds for the grid | peer / port |",
        "| --- | --- | --- |",
    ]
    for name, value in grid["seconds"].items():
        lines.append(f"| {name} | {value:.1f} | {value / grid['seconds']['port']:.1f}x |")
    lines += [
        "",
        f"The port's first call, with compilation, took {grid['first call']:.1f} s. At the places that the peers ran, "
        f"the results differ by at most {grid['worst difference']:.1e}, where the grid spans {grid['spread']:.1e}.",
        "",
        "## Attribution",
        "",
        f"Attribution at all {3 * layers} residual sites took {attribution['attribution']:.3f} s, a forward pass "
        f"{attribution['forward']:.3f} s: {attribution['attribution'] / attribution['forward']:.2f} forward passes.",
    ]
    return "\n".join(lines) + "\n"


def main(
    size: str = "270m",
    tokens: int = 64,
    sample: Annotated[int, typer.Option(help="Places of the grid that each peer runs.")] = 36,
    rounds: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown: Path | None = None,
) -> None:
    """Measure, print the page, and write it where asked."""
    config = Gemma3Config.preset(size)
    report = {
        "command": f"python -m benchmarks.patching --size {size} --tokens {tokens} --sample {sample} --rounds {rounds}",
        "size": size,
        "machine": machine() | {"transformer-lens": _version("transformer-lens") or "not installed"},
        "attribution": measure_attribution(config, tokens, rounds),
        "grid": measure_grid(config, tokens, sample, rounds),
    }
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if markdown:
        markdown.write_text(as_markdown(report))
    print(as_markdown(report))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
