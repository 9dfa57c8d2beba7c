"""The time that captures add to a forward pass: whole residuals, every site, and residuals reduced on the device.

Captures leave the compiled function and stay on the device: the transfer to the host is not measured.

On a CPU, the results of every site of a long batch take gigabytes. In every run, glibc takes this memory from the
kernel page by page and gives it back. With `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_ARENA_MAX=1` in the
environment it keeps the memory, and the figures show the cost of the capture itself.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings, added
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config, HookedGemma3
from gemma3_jax.hooks.reductions import At, Cast, Project, TopK

RESIDUALS = "blocks.*.hook_resid_post"
# Each capture, and the largest time that it may add to a plain forward pass.
GOALS = {
    "residuals": 0.03,
    "every site": 0.25,
    "residuals at 8 positions": 0.05,
    "residuals projected to 64": 0.05,
    "residuals cast to bfloat16": 0.05,
    "residuals' top 32": 0.05,
}


def capture_sets(config: Gemma3Config) -> dict[str, Any]:
    """The captures in the form that `run_with_cache` takes."""
    matrix = np.random.default_rng(1).standard_normal((config.hidden_size, 64), np.float32)
    reductions = [At(np.arange(-8, 0)), Project(jnp.asarray(matrix)), Cast("bfloat16"), TopK(32)]
    reduced = [{RESIDUALS: reduction} for reduction in reductions]
    return dict(zip(GOALS, [RESIDUALS, "**", *reduced], strict=True))


def rows(settings: Settings) -> Iterator[Row]:
    """A row of the port for each shape, in float32, and a row of the time that hooks add to the peers."""
    for shape in ((1, 16),) if settings.quick else ((1, 128), (4, 512)):
        hf, params, torch_ids, ids = peers.pair(settings.config, "float32", shape)
        yield _port(settings, HookedGemma3(settings.config, params), shape, ids)
        if shape[0] == 1:
            yield _peers(settings, HookedGemma3(settings.config, params), hf, torch_ids, ids)
        jax.clear_caches()


def _port(settings: Settings, model: HookedGemma3, shape: tuple[int, int], ids: np.ndarray) -> Row:
    def keep(names_filter: Any) -> None:
        # Nothing is returned, so the results are freed at once: those of every site take gigabytes.
        jax.block_until_ready(model.run_with_cache(ids, names_filter))

    sets = {"port": (), **capture_sets(settings.config)}
    seconds = interleaved({name: functools.partial(keep, each) for name, each in sets.items()}, settings.rounds)
    figures = tuple(added(name, seconds[name], seconds["port"], goal) for name, goal in GOALS.items())
    kept = {"port" if name == "port" else f"port, {name}": value for name, value in seconds.items()}
    return Row(f"{shape[0]} x {shape[1]}", "float32", kept, figures)


def _peers(settings: Settings, model: HookedGemma3, hf: Any, torch_ids: Any, ids: np.ndarray) -> Row:
    def hooked() -> Any:
        with peers.kept_outputs(hf, layers_only=True):
            return peers.run_torch(hf, torch_ids)

    runs = {
        "port": lambda: model.run_with_cache(ids, RESIDUALS)[0],
        "HF hooks": hooked,
        "HF, plain": lambda: peers.run_torch(hf, torch_ids),
    }
    if peers.installed("nnsight"):
        runs["nnsight"] = peers.nnsight_residuals(hf, torch_ids)
    if peers.installed("transformer_lens"):
        runs["TransformerLens"] = _transformer_lens(hf, torch_ids)
    seconds = interleaved(runs, settings.rounds)
    hooks = [name for name in seconds if not name.startswith("port") and name != "HF, plain"]
    figures = [added("hooks add to HF", seconds["HF hooks"], seconds["HF, plain"])]
    figures += [Figure(f"{name} / port", seconds[name] / seconds["port"]) for name in hooks]
    return Row(f"residuals beside peers, {ids.shape[0]} x {ids.shape[1]}", "float32", seconds, tuple(figures))


def _transformer_lens(hf: Any, torch_ids: Any) -> Callable[[], Any]:
    bridge = peers.bridge(hf)

    def run() -> Any:
        with torch.inference_mode():
            logits, _ = bridge.run_with_cache(torch_ids, names_filter=lambda name: name.endswith("hook_resid_post"))
        return np.float32(logits[0, -1, 0].item())

    return run
