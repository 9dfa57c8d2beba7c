"""A grid of activation patching (residual stream by layer and position) against loops of forward passes.

Peers run one forward pass for each place, as their users do. They run only a sample, spread evenly over the grid. Their
time for the whole grid is the median time of the sample times the number of places.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings
from benchmarks.timing import interleaved
from gemma3_jax import HookedGemma3, forward
from gemma3_jax.analysis.attribution import attribution_patching
from gemma3_jax.analysis.patching import get_act_patch_resid_pre

console = Console(stderr=True)
ANSWER = 123


def metric(logits: jax.Array) -> jax.Array:
    """The logit of one token at the last position."""
    return logits[0, -1, ANSWER]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
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
        self.bridge = peers.bridge(model)
        self.corrupted = torch.from_numpy(corrupted)
        with torch.inference_mode():
            _, self.clean = self.bridge.run_with_cache(
                torch.from_numpy(clean), names_filter=lambda name: name.endswith("hook_resid_pre")
            )

    def __call__(self, layer: int, position: int) -> float:
        name = f"blocks.{layer}.hook_resid_pre"

        def patch(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[:, position] = self.clean[name][:, position]
            return value

        with torch.inference_mode():
            logits = self.bridge.run_with_hooks(self.corrupted, fwd_hooks=[(name, patch)])
        return float(logits[0, -1, ANSWER])


def sample_of(layers: int, positions: int, count: int) -> list[tuple[int, int]]:
    """Places spread evenly over the grid."""
    at = np.linspace(0, layers * positions - 1, count).astype(int)
    return [(int(i) // positions, int(i) % positions) for i in at]


def rows(settings: Settings) -> Iterator[Row]:
    """The grid, and attribution at every residual site, in float32."""
    tokens = 12 if settings.quick else 64
    hf, params, _, _ = peers.pair(settings.config, "float32", (1, tokens))
    model = HookedGemma3(settings.config, params)
    rng = np.random.default_rng(0)
    clean, corrupted = (rng.integers(3, model.config.vocab_size, (1, tokens)) for _ in range(2))
    yield _grid(model, hf, clean, corrupted, 6 if settings.quick else 36, 1 if settings.quick else 3)
    yield _attribution(model, jnp.asarray(clean), jnp.asarray(corrupted), settings.rounds)


def _grid(model: HookedGemma3, hf: Any, clean: np.ndarray, corrupted: np.ndarray, sample: int, rounds: int) -> Row:
    """Seconds of the whole grid: measured for the port, and extrapolated from the sample for each peer."""
    loops: dict[str, Callable[[int, int], float]] = {
        "HF hooks": HuggingFaceLoop(hf, corrupted, clean, last_logits=False),
        "HF hooks, last logits": HuggingFaceLoop(hf, corrupted, clean, last_logits=True),
    }
    if peers.installed("transformer_lens"):
        loops["TransformerLens"] = TransformerLensLoop(hf, corrupted, clean)
    layers, tokens = model.config.num_hidden_layers, clean.shape[1]
    places = sample_of(layers, tokens, sample)

    def grid() -> np.ndarray:
        return get_act_patch_resid_pre(model, corrupted, clean, metric, logits_at=-1, progress=False)

    ours = grid()
    seconds: dict[str, list[float]] = {"port": []}
    worst = 0.0
    for turn in range(rounds):
        seconds["port"].append(timed(grid)[0])
        for name, loop in loops.items():
            for place in places[turn::rounds]:
                elapsed, value = timed(lambda loop=loop, place=place: loop(*place))
                seconds.setdefault(name, []).append(elapsed * ours.size)
                worst = max(worst, abs(ours[place] - value))
        console.print(f"patching: turn {turn + 1} of {rounds}")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    figures = [
        Figure(f"{name} / port", medians[name] / medians["port"], 5.0 if name == "HF hooks" else None) for name in loops
    ]
    figures.append(Figure("largest difference of results", float(worst)))
    figures.append(Figure("span of results", float(np.ptp(ours))))
    return Row(f"grid of {layers} x {tokens}", "float32", medians, tuple(figures))


def _attribution(model: HookedGemma3, clean: jax.Array, corrupted: jax.Array, rounds: int) -> Row:
    """Attribution at every residual site, all logits computed, beside a forward pass."""
    plain = jax.jit(lambda params, tokens: forward(model.config, params, tokens)[0])
    sites = ("resid_pre", "resid_mid", "resid_post")
    seconds = interleaved(
        {
            "port": lambda: attribution_patching(model, corrupted, clean, metric, sites, ("layer", "pos")),
            "port, forward": functools.partial(plain, model.params, corrupted),
        },
        rounds,
    )
    passes = Figure("forward passes", seconds["port"] / seconds["port, forward"], 4.0, at_least=False)
    return Row(f"attribution at {3 * model.config.num_hidden_layers} sites", "float32", seconds, (passes,))
