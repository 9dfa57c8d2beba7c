"""Where the time of a forward pass goes: its matrix products alone, its attention alone, and the rest.

The products are also timed in torch, with the modules of a Hugging Face model. A forward pass in torch is not faster
than its products, so they bound a peer whose whole forward pass would take too long.

Every weight is multiplied once, by random rows. The results are summed, so the compiler cannot drop any of them.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, f intermediate_size, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import peers
from benchmarks.attention import random_qkv
from benchmarks.forward import cases, logits_of, row_of
from benchmarks.rows import Figure, Row, Settings
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config
from gemma3_jax.compute.attention import SHORT, attend, dense
from gemma3_jax.compute.projections import heads_in, heads_out, linear, unembed
from gemma3_jax.model.masks import mask_of


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype and shape."""
    for dtype in settings.dtypes:
        for shape, everywhere in cases(settings):
            yield _row(settings, dtype, shape, everywhere)
            jax.clear_caches()


@functools.partial(jax.jit, static_argnames=("config", "everywhere"))
def products(config: Gemma3Config, params: Any, x: jax.Array, everywhere: bool) -> jax.Array:
    """[b, p or 1, V] of x [b, p, d]: the products of the port, in the forms of `gemma3_jax.compute.projections`."""
    for i in range(config.num_hidden_layers):
        attn, mlp = params[f"blocks_{i}"]["attn"], params[f"blocks_{i}"]["mlp"]
        q, k, v = (heads_in(x, attn[name]["weight"]) for name in "qkv")
        # [b, p, d] + one number of the keys and values, so that the compiler cannot drop them
        x = heads_out(q, attn["o"]["weight"]) + (k + v)[0, 0, 0, 0]
        x = linear(linear(x, mlp["gate"]["weight"]) + linear(x, mlp["in"]["weight"]), mlp["out"]["weight"])
    x = x if everywhere else x[:, -1:]
    return (
        unembed(x, params["embed"]["weight"]) if config.tie_word_embeddings else linear(x, params["unembed"]["weight"])
    )


@functools.partial(jax.jit, static_argnames="config")
def attention(config: Gemma3Config, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[b, p, n, e]: the attention of all layers in sequence. The output of one layer is the queries of the next."""
    scale, columns = config.query_pre_attn_scalar**-0.5, jnp.arange(q.shape[1])
    for kind in config.layer_types:
        mask = mask_of(config, kind, q.shape[1], None)
        short = q.shape[1] < SHORT
        q = dense(q, k, v, scale, mask.seen(columns, columns)) if short else attend(q, k, v, scale, mask)
    return q


def torch_products(model: Any, x: torch.Tensor, everywhere: bool) -> Any:
    """The same products with the modules of a Hugging Face model; returns one number after all of them."""
    with torch.inference_mode():
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            x = attn.o_proj(attn.q_proj(x)) + (attn.k_proj(x) + attn.v_proj(x))[0, 0, 0]
            x = mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))
        logits = model.lm_head(x if everywhere else x[:, -1:])
        return logits[0, -1, 0].item()


def inputs(config: Gemma3Config, model: Any, dtype: str, shape: tuple[int, int]) -> tuple[jax.Array, torch.Tensor]:
    """Random rows [b, p, d], the same for JAX and torch."""
    x = jax.random.normal(jax.random.key(0), (*shape, config.hidden_size))
    return x.astype(dtype), torch.tensor(x.tolist(), dtype=getattr(torch, dtype), device=model.device)


def _row(settings: Settings, dtype: str, shape: tuple[int, int], everywhere: bool) -> Row:
    config = settings.config
    model, params, _, ids = peers.pair(config, dtype, shape)
    tokens, at = jnp.asarray(ids), None if everywhere else jnp.int32(-1)
    x, torch_x = inputs(config, model, dtype, shape)
    qkv = random_qkv(config, shape, dtype)
    runs = {
        "port": functools.partial(logits_of, config, params, tokens, at),
        "port, products": functools.partial(products, config, params, x, everywhere),
        "port, attention": functools.partial(attention, config, *qkv),
        "torch, products": functools.partial(torch_products, model, torch_x, everywhere),
    }
    seconds = interleaved(runs, settings.rounds)
    whole, multiplied, attended, theirs = (seconds[name] for name in runs)
    figures = (
        Figure("products", multiplied / whole, percent=True),
        Figure("attention", attended / whole, percent=True),
        Figure("the rest", 1 - (multiplied + attended) / whole, percent=True),
        Figure("torch's products / port's", theirs / multiplied),
        Figure("torch's products / port", theirs / whole),
    )
    return row_of(config, dtype, shape, everywhere, seconds, figures)
