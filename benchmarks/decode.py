"""Generation against Hugging Face's `generate`, in one run: plain, steered, and with the residual stream kept.

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

from benchmarks.forward import RESIDUALS, hf_model
from benchmarks.timing import interleaved
from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, edits
from gemma3_jax.generation.generate import generate
from gemma3_jax.generation.kv_cache import cache_bytes

READ = 2**29  # bytes of the matrix whose product with a vector measures the memory's bandwidth


def measure(config: Gemma3Config, dtype: str, b: int, p: int, n: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Seconds by peer of writing n tokens behind a prompt of p, the same for all; and what bounds them.

    Every peer's call is the one that its users write, prompt included. `compiled` adds Hugging Face with a static cache
    and a compiled forward pass. "memory" is one read of `READ` bytes, in the same turns.
    """
    hf = hf_model(config, dtype, "sdpa")
    params = convert_state_dict(hf.state_dict(), config)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (b, p))
    torch_ids = torch.from_numpy(ids).to(hf.device)
    layer = config.num_hidden_layers // 2
    vector = np.random.default_rng(1).standard_normal(config.hidden_size).astype(np.float32)
    steer = {f"blocks.{layer}.hook_resid_post": edits.Add(jnp.asarray(vector))}

    def port(**options: Any) -> Callable[[], Any]:
        return lambda: generate(config, params, ids, n, stop_at_eos=False, **options).tokens

    def peer(**options: Any) -> Callable[[], Any]:
        return lambda: written(hf, torch_ids, n, **options)

    def under(hooks: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with hooks():
                return written(hf, torch_ids, n)

        return run

    matrix, ones = jnp.ones((2**14, READ // 2**16)), jnp.ones(READ // 2**16)
    product = jax.jit(jnp.matmul)
    peers = {
        "memory": lambda: product(matrix, ones),
        "port": port(),
        "port, steered": port(edits=steer),
        "port, residuals kept": port(capture=RESIDUALS),
        "HF": peer(),
        "HF, steered": under(lambda: steered(hf, layer, vector)),
        "HF, residuals kept": under(lambda: residuals_kept(hf, config.num_hidden_layers)),
    }
    if compiled:
        peers["HF static, compiled"] = peer(**static_and_compiled())
    seconds = interleaved(peers, rounds)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Each token reads every weight once, and the keys and values that its layers hold (at most these).
    work = n * (weights + cache_bytes(config, b, p + n, dtype)["total"])
    return {"dtype": dtype, "batch": b, "prompt": p, "new": n, "seconds": seconds, "bytes": work, "read": READ}


def written(model: Any, ids: torch.Tensor, n: int, **options: Any) -> np.ndarray:
    """n tokens by Hugging Face, greedily, none of which ends the text."""
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    if out.shape[1] != ids.shape[1] + n:
        raise RuntimeError(f"Hugging Face wrote {out.shape[1] - ids.shape[1]} tokens of {n}")
    return out.cpu().numpy()


def static_and_compiled() -> dict[str, Any]:
    """Options of `generate` that compile its forward pass, on every device."""
    compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
    compile_config._compile_all_devices = True  # transformers' own switch: it compiles on a GPU only by default
    return {"cache_implementation": "static", "compile_config": compile_config}


@contextlib.contextmanager
def steered(model: Any, layer: int, vector: np.ndarray) -> Iterator[None]:
    """A forward hook that adds a vector to what a layer returns."""
    step = torch.from_numpy(vector).to(model.device, model.dtype)

    def add(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + step, *output[1:]) if isinstance(output, tuple) else output + step

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def residuals_kept(model: Any, layers: int) -> Iterator[None]:
    """Forward hooks that keep what every layer returns for every token, and put it together at the end."""
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
