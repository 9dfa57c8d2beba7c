"""Generation against Hugging Face's `generate` in one run: plain, steered, with residual streams captured, and sampled.

Axes: b batch, p tokens of the prompt, n new tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings, added, forward_flops
from benchmarks.timing import interleaved
from gemma3_jax import edits
from gemma3_jax.generation.kv_cache import cache_bytes
from gemma3_jax.generation.loop import generate

RESIDUALS = "blocks.*.hook_resid_post"


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype and batch; a quick run has the first."""
    n, p = (5, 8) if settings.quick else (33, 16)
    for dtype in settings.dtypes:
        for b in (1,) if settings.quick else (1, 8):
            yield measure(settings, dtype, b, p, n)
            jax.clear_caches()


def measure(settings: Settings, dtype: str, b: int, p: int, n: int) -> Row:
    """Seconds to generate n tokens after a prompt of p tokens, prefill included, with the calls that users write.

    Hugging Face also runs with a static cache and a compiled forward pass, except in a quick run.
    """
    config = settings.config
    hf, params, torch_ids, ids = peers.pair(config, dtype, (b, p))
    layer = config.num_hidden_layers // 2
    vector = np.random.default_rng(1).standard_normal(config.hidden_size).astype(np.float32)
    steer = {f"blocks.{layer}.hook_resid_post": edits.Add(jnp.asarray(vector))}

    def port(**options: Any) -> Callable[[], Any]:
        return lambda: generate(config, params, ids, n, stop_at_eos=False, **options).tokens

    def hooked(hooks: Any) -> Callable[[], Any]:
        def run() -> Any:
            with hooks():
                return written(hf, torch_ids, n)

        return run

    runs = {
        "port": port(),
        "port, steered": port(edits=steer),
        "port, residuals kept": port(capture=RESIDUALS),
        "port, top-p": port(temperature=1.0, top_p=0.9),
        "HF": lambda: written(hf, torch_ids, n),
        "HF, steered": hooked(lambda: peers.steered(hf, layer, vector)),
        "HF, residuals kept": hooked(lambda: residuals_kept(hf, config.num_hidden_layers)),
    }
    if not settings.quick:
        runs["HF static, compiled"] = lambda: written(hf, torch_ids, n, **static_and_compiled())
    seconds = interleaved(runs, settings.rounds)
    # Each token reads every weight once, and at most the whole KV cache.
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    read = n * (weights + cache_bytes(config, b, p + n, dtype)["total"])
    # The prompt's last logits give the first new token; the model does not run on the last token.
    flops = forward_flops(config, b, p, 1) + (n - 1) * forward_flops(config, b, 1)
    best = min(seconds[name] for name in seconds if name in ("HF", "HF static, compiled"))
    figures = (
        Figure("tokens per second", b * n / seconds["port"]),
        Figure("best peer / port", best / seconds["port"], 1.5 if b == 1 else None),
        added("a steering edit adds", seconds["port, steered"], seconds["port"], 0.03),
        added("keeping residuals adds", seconds["port, residuals kept"], seconds["port"]),
        added("sampling with top-p adds", seconds["port, top-p"], seconds["port"]),
    )
    return Row(f"batch {b}, {p} tokens and {n} new", dtype, seconds, figures, flops, read, 0.7)


def written(model: Any, ids: torch.Tensor, n: int, **options: Any) -> np.ndarray:
    """n tokens that Hugging Face generates greedily, without stopping at an end-of-text token."""
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    if out.shape[1] != ids.shape[1] + n:
        raise RuntimeError(f"Hugging Face wrote {out.shape[1] - ids.shape[1]} tokens of {n}")
    return out.cpu().numpy()


def static_and_compiled() -> dict[str, Any]:
    """Options with which `generate` compiles its forward pass on every device."""
    compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
    compile_config._compile_all_devices = True  # transformers' own switch: it compiles on a GPU only by default
    return {"cache_implementation": "static", "compile_config": compile_config}


@contextlib.contextmanager
def residuals_kept(model: Any, layers: int) -> Iterator[None]:
    """Forward hooks that store the output of every layer for every token, and concatenate it at the end."""
    kept: list[torch.Tensor] = []
    handles = [
        model.model.layers[i].register_forward_hook(
            lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        for i in range(layers)
    ]
    try:
        yield
        for i in range(layers):
            torch.cat(kept[i::layers], dim=1)
    finally:
        for handle in handles:
            handle.remove()
