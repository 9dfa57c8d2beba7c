"""The same code lowers for CPU, CUDA and TPU: shown from a CPU machine by exporting for all three."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from gemma3_jax import Gemma3, Gemma3Config, forward

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capture", [(), "**"], ids=["plain", "every site"])
@pytest.mark.parametrize("shape", [(2, 16), (1, 1)], ids=["batch", "one token"])
def test_forward_exports_for_every_platform(shape, dtype, capture):
    """The widths of 270m, without weights: the unwatched attention and the one that shows its scores; one token, whose
    products have forms of their own on a CPU. Its first six layers are of both kinds, and the others repeat them."""
    preset = Gemma3Config.preset("270m")
    assert preset.layer_types == 3 * preset.layer_types[:6]
    config = dataclasses.replace(preset, num_hidden_layers=6, layer_types=preset.layer_types[:6])
    abstract = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype if leaf.ndim > 1 else leaf.dtype), abstract
    )
    run = jax.jit(functools.partial(forward, config, capture=capture))
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)

    def plain(params, tokens, attention_mask):
        logits, cache = run(params, tokens, attention_mask=attention_mask)
        return logits, dict(cache)

    exported = export.export(jax.jit(plain), platforms=PLATFORMS)(params, batch, batch)
    assert exported.platforms == PLATFORMS
    assert exported.out_avals[0].shape == (*shape, config.vocab_size)


def test_negative_control_a_platform_bound_function_does_not_export():
    """Export does notice code that one of the platforms cannot run."""

    def cudnn(q):
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn")

    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        export.export(jax.jit(cudnn), platforms=PLATFORMS)(jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16))
