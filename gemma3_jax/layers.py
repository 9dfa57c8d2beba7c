"""The small parts: norm, projections, embedding, unembedding, rotary embedding.

Axes: b batch, p position, d hidden_size, h query heads, g key/value heads, n either of them, e head_dim,
f intermediate_size, V vocabulary.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.config import Rope
from gemma3_jax.hooks import HookPoint
from gemma3_jax.products import heads_in, heads_out, linear, looked_up, per_head_matmul, unembed

_INIT = nn.initializers.normal(0.02)


def parameter(
    module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """As `module.param`, which would trace the initializer of what is given: a third of the time to trace the model."""
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    given: jax.Array = module.get_variable("params", name)
    if jnp.shape(given) != shape:
        where = "/".join((*module.path, name))
        raise ValueError(f"the parameter {where} has shape {jnp.shape(given)}; the config calls for {shape}")
    return given


@functools.partial(jax.jit, static_argnames="eps", inline=True)
def root_mean_square(x: jax.Array, eps: float) -> jax.Array:
    """`sqrt(mean(x^2) + eps)` over the last axis of x [..., d]: [..., 1] float32."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, cast to the dtype of `x` once.

    `weight` [d] float32 holds Hugging Face's `1 + w` (`Gemma3RMSNorm`): rounded to bfloat16 it would be wrong.
    """

    dim: int
    eps: float

    def setup(self):
        self.weight = parameter(self, "weight", nn.initializers.ones, (self.dim,))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.hook_scale(self.scale(x))
        normalized = self.hook_normalized(x.astype(jnp.float32) / scale)
        return (normalized * self.weight).astype(x.dtype)

    def unhooked(self, x: jax.Array) -> jax.Array:
        """The same norm of another value, through no hook."""
        return (x.astype(jnp.float32) / self.scale(x) * self.weight).astype(x.dtype)

    def scale(self, x: jax.Array) -> jax.Array:
        """[..., 1] float32, the root mean square by which `x` [..., d] is divided."""
        return root_mean_square(x, self.eps)


class Linear(nn.Module):
    """[b, p, in] @ weight [in, out]."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", _INIT, self.shape)
        return linear(x, weight)


class HeadsIn(nn.Module):
    """q, k or v: [b, p, d], or one input per head [b, p, n, d], to [b, p, n, e], by weight [n, d, e].

    An input with more heads than the weight has (`hook_attn_in` under grouped heads) shares each weight within
    its group.
    """

    shape: tuple[int, int, int]
    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", _INIT, self.shape)
        bias = parameter(self, "bias", nn.initializers.zeros, self.shape[::2]) if self.use_bias else None
        if x.ndim == 3:
            # [b, p, d] x [n, d, e] -> [b, p, n, e]
            out = heads_in(x, weight)
        else:
            repeats = x.shape[2] // self.shape[0]
            # [b, p, n, d] x [n, d, e] -> [b, p, n, e]
            out = per_head_matmul("bpnd,nde->bpne", x, jnp.repeat(weight, repeats, axis=0))
            bias = None if bias is None else jnp.repeat(bias, repeats, axis=0)
        return out if bias is None else out + bias


class HeadsOut(nn.Module):
    """o: [b, p, h, e] to [b, p, d], by weight [h, e, d].

    `hook_result` is shown the result [b, p, h, d] of every head, where it is given; the output is their sum, through
    the hook, only where it is `edited`: to look must not change what is computed.
    """

    shape: tuple[int, int, int]
    use_bias: bool

    @nn.compact
    def __call__(self, z: jax.Array, hook_result: HookPoint | None = None, edited: bool = False) -> jax.Array:
        weight = parameter(self, "weight", _INIT, self.shape)
        # [b, p, h, e] x [h, e, d] -> [b, p, d]
        out = heads_out(z, weight)
        if hook_result is not None:
            # [b, p, h, e] x [h, e, d] -> [b, p, h, d]
            result = hook_result(per_head_matmul("bphe,hed->bphd", z, weight))
            if edited:
                out = jnp.sum(result, axis=2, dtype=jnp.float32).astype(z.dtype)
        return out + parameter(self, "bias", nn.initializers.zeros, self.shape[2:]) if self.use_bias else out


class Embed(nn.Module):
    """Token ids [b, p] to [b, p, d]: the row of weight [V, d], times sqrt(d) rounded to the weight's dtype.

    Floating-point input [b, p, d] is an embedding already (`inputs_embeds`) and is returned as it is. An id
    outside the vocabulary gives NaN, not its neighbour's row.
    """

    shape: tuple[int, int]

    def setup(self):
        self.weight = parameter(self, "weight", _INIT, self.shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens.astype(self.weight.dtype)
        factor = jnp.asarray(self.shape[1] ** 0.5, self.weight.dtype)
        # [V, d] at [b, p] -> [b, p, d]
        return looked_up(self.weight, tokens) * factor


class Unembed(nn.Module):
    """[b, p, d] to logits [b, p, V] in float32, by weight [d, V], or by the embedding [V, d] when that is given."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        if embedding is not None:
            # [b, p, d] x [V, d] -> [b, p, V]
            return unembed(x, embedding)
        # [b, p, d] x [d, V] -> [b, p, V]
        return linear(x, parameter(self, "weight", _INIT, self.shape), jnp.float32)


def rope_tables(rope: Rope, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [b, p, e] float32, of the rotary embedding at `positions` [b, p].

    Source: RoFormer (arXiv 2104.09864); `Gemma3RotaryEmbedding`, whose frequencies are reproduced bit for bit where
    the power rounds correctly: a last-bit difference grows with the position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers / np.float32(rope.factor)
    # [b, p, 1] x [e / 2] -> [b, p, e / 2]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    # [b, p, e]; put together last, or XLA:CPU would compute the cosines in every layer again
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (jnp.cos(angles), jnp.sin(angles)))
    return cos, sin


@functools.partial(jax.jit, inline=True)
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [b, p, n, e] by the tables [b, p, e], pairing feature i with i + e/2, in float32, cast back once."""
    x32 = x.astype(jnp.float32)
    # [b, p, n, 2, e / 2]: (first, second) -> (-second, first); a flip, as XLA:CPU fuses no concatenation
    halves = x32.reshape(*x.shape[:-1], 2, -1)
    turned = (jnp.flip(halves, -2) * np.array([[-1], [1]], np.float32)).reshape(x.shape)
    # [b, p, n, e] * [b, p, 1, e]
    return (x32 * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
