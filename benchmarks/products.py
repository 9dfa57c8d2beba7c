"""The matrix products of a forward pass and nothing else, in the port and in torch: what is left of a difference.

Every weight is multiplied once, by random rows; the results are added up, so that none can be left out.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, f intermediate_size, V vocabulary.
"""

import functools
from typing import Any

import jax
import torch

from gemma3_jax import Gemma3Config
from gemma3_jax.products import heads_in, heads_out, linear, unembed


@functools.partial(jax.jit, static_argnames=("config", "everywhere"))
def port(config: Gemma3Config, params: Any, x: jax.Array, everywhere: bool) -> jax.Array:
    """[b, p or 1, V] of x [b, p, d]: the products of the port, in the forms that `gemma3_jax.products` gives them."""
    for i in range(config.num_hidden_layers):
        attn, mlp = params[f"blocks_{i}"]["attn"], params[f"blocks_{i}"]["mlp"]
        q, k, v = (heads_in(x, attn[name]["weight"]) for name in "qkv")
        # [b, p, d] + a number of the keys and values, which cannot be left out then
        x = heads_out(q, attn["o"]["weight"]) + (k + v)[0, 0, 0, 0]
        x = linear(linear(x, mlp["gate"]["weight"]) + linear(x, mlp["in"]["weight"]), mlp["out"]["weight"])
    x = x if everywhere else x[:, -1:]
    return (
        unembed(x, params["embed"]["weight"]) if config.tie_word_embeddings else linear(x, params["unembed"]["weight"])
    )


def peer(model: Any, x: torch.Tensor, everywhere: bool) -> Any:
    """The same products by the modules of a Hugging Face model; one number, once all are done."""
    with torch.inference_mode():
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            x = attn.o_proj(attn.q_proj(x)) + (attn.k_proj(x) + attn.v_proj(x))[0, 0, 0]
            x = mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))
        logits = model.lm_head(x if everywhere else x[:, -1:])
        return logits[0, -1, 0].item()


def inputs(config: Gemma3Config, model: Any, dtype: str, shape: tuple[int, int]) -> tuple[jax.Array, torch.Tensor]:
    """The same random rows [b, p, d] for both."""
    x = jax.random.normal(jax.random.key(0), (*shape, config.hidden_size))
    return x.astype(dtype), torch.tensor(x.tolist(), dtype=getattr(torch, dtype), device=model.device)
