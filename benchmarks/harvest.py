"""Activations of a corpus to disk: tokens a second beside the bare forward pass, and beside hooks on Hugging Face.

The bare forward pass is that of the same batches up to the same layer, without captures and without logits. Hugging
Face's loop runs the same batches without logits, keeps the same residual streams, and writes a file for each batch.
Documents fill their rows, so that all tokens are real. A harvest also has a start, which is the same for any number of
units: the digest of the parameters, the shapes of the results, and the comparison of manifests. It is measured by a
harvest that has nothing to do, and left out of the ratios: a real harvest has thousands of units.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings
from benchmarks.timing import interleaved
from gemma3_jax import HookedGemma3
from gemma3_jax.harvest import harvest

OF_FORWARD, OF_HOOKS = 0.95, 1.7  # goals: times of the others over ours


def rows(settings: Settings) -> Iterator[Row]:
    """One, four and all layers, in float32."""
    (b, p), units = ((2, 32), 2) if settings.quick else ((8, 512), 4)
    hf, params, _, ids = peers.pair(settings.config, "float32", (b * units, p))
    model, layers = HookedGemma3(settings.config, params), settings.config.num_hidden_layers
    for chosen in ([layers - 1], list(range(layers))[-4:], list(range(layers))):
        with tempfile.TemporaryDirectory() as folder:
            runs = {
                "port": _port(model, ids, chosen, (b, p), Path(folder) / "port"),
                "port, forward alone": _forward(model, ids, chosen[-1] + 1, b),
                "port, start": _port(model, ids, chosen, (b, p), Path(folder) / "port", again=True),
                "HF hooks": _hooks(hf, ids, chosen, b, Path(folder)),
            }
            seconds = interleaved(runs, settings.rounds)
        units_alone = max(seconds["port"] - seconds["port, start"], 1e-3)
        figures = (
            Figure("forward alone / port", seconds["port, forward alone"] / units_alone, OF_FORWARD),
            Figure("HF hooks / port", seconds["HF hooks"] / units_alone, OF_HOOKS),
            Figure("tokens a second", ids.size / units_alone),
        )
        yield Row(f"{len(chosen)} layers, {units} units of {b} x {p}", "float32", seconds, figures)
    jax.clear_caches()


def _port(
    model: HookedGemma3, ids: np.ndarray, layers: list[int], shape: tuple[int, int], out: Path, again: bool = False
) -> Callable[[], None]:
    def run() -> None:
        if not again:
            shutil.rmtree(out, ignore_errors=True)
        sites = [f"blocks.{layer}.hook_resid_post" for layer in layers]
        harvest(model, ids, sites, out, *shape)

    return run


def _forward(model: HookedGemma3, ids: np.ndarray, stop: int, b: int) -> Callable[[], None]:
    inputs = {"attention_mask": np.ones_like(ids[:b]), "segment_ids": np.zeros_like(ids[:b])}

    def run() -> None:
        for at in range(0, len(ids), b):
            batch = {"input_ids": ids[at : at + b], **inputs}
            jax.block_until_ready(model(batch, stop_at_layer=stop, return_type="logits"))

    return run


def _hooks(hf: Any, ids: np.ndarray, layers: list[int], b: int, folder: Path) -> Callable[[], None]:
    def run() -> None:
        for at in range(0, len(ids), b):
            with torch.inference_mode(), peers.kept_outputs(hf, layers_only=True) as kept:
                hf.model(input_ids=torch.from_numpy(ids[at : at + b]).to(hf.device), use_cache=False)
            arrays = {str(layer): kept[str(layer)].cpu().numpy() for layer in layers}
            np.savez(folder / f"{at}.npz", **arrays)

    return run
