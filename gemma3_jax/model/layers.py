"""Norm, projections, embedding and unembedding.

Axes: b batch, p position, d hidden_size, h query heads, g key/value heads, n either of them, e head_dim,
f intermediate_size, V vocabulary.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer

from gemma3_jax.compute.matmul import per_head_matmul
from gemma3_jax.compute.projections import embed_lookup, heads_in, heads_out, linear, unembed
from gemma3_jax.config import PAST_FLOAT16, RUN_DTYPES
from gemma3_jax.hooks.interception import HookPoint
from gemma3_jax.types import Integers

_INIT = nn.initializers.normal(0.02)


def parameter(
    module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """`module.param`, but an existing parameter's initializer is not traced: a third of the model's tracing time."""
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value: jax.Array = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        where = "/".join((*module.path, name))
        raise ValueError(f"the parameter {where} has shape {jnp.shape(value)}; the config requires {shape}")
    return value


@functools.partial(jax.jit, static_argnames="eps", inline=True)
def root_mean_square(x: Float[Array, "*b d"], eps: float) -> Float32[Array, "*b 1"]:
    """`sqrt(mean(x^2) + eps)` over the last axis of x [..., d]: [..., 1] float32."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, in float32, cast to the dtype of `x` once.

    `weight` [d] float32 is Hugging Face's `1 + w` (`Gemma3RMSNorm`); rounding it to bfloat16 would be wrong.
    """

    dim: int
    eps: float

    def setup(self) -> None:
        self.weight = parameter(self, "weight", nn.initializers.ones, (self.dim,))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.hook_scale(self.scale(x))
        normalized = self.hook_normalized(x.astype(jnp.float32) / scale)
        return (normalized * self.weight).astype(x.dtype)

    def unhooked(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The same norm of another value, without hooks."""
        return (x.astype(jnp.float32) / self.scale(x) * self.weight).astype(x.dtype)

    def scale(self, x: Float[Array, "*b d"]) -> Float32[Array, "*b 1"]:
        """[..., 1] float32, the root mean square by which `x` [..., d] is divided."""
        return root_mean_square(x, self.eps)


class Linear(nn.Module):
    """[b, p, in] @ weight [in, out]."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "b p i"]) -> Float[Array, "b p o"]:
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
    def __call__(self, x: Float[Array, "b p d"] | Float[Array, "b p n d"]) -> Float[Array, "b p _ e"]:
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

    `hook_result`, if given, sees the result [b, p, h, d] of every head. The output is the sum of these results only if
    the site is `edited`, because a capture must not change the computation.
    """

    shape: tuple[int, int, int]
    use_bias: bool

    @nn.compact
    def __call__(
        self, z: Float[Array, "b p h e"], hook_result: HookPoint | None = None, edited: bool = False
    ) -> Float[Array, "b p d"]:
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

    Floating-point input [b, p, d] is already an embedding (`inputs_embeds`) and is returned unchanged. An id outside
    the vocabulary gives NaN, not another row.

    The weight's dtype is the dtype of the residual stream and of the run. Raises a ValueError if its range is smaller
    than that of bfloat16.
    """

    shape: tuple[int, int]

    def setup(self) -> None:
        self.weight = parameter(self, "weight", _INIT, self.shape)
        dtype = self.weight.dtype
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).max < jnp.finfo(jnp.bfloat16).max:
            why = f", as {PAST_FLOAT16}" if dtype == jnp.float16 else ""
            raise ValueError(
                f"the embedding is {dtype}, the dtype of the whole run, but the model cannot compute in it{why}; cast "
                f"the parameters to {' or '.join(RUN_DTYPES)}"
            )

    def __call__(self, tokens: Integer[Integers, "b p"] | Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return jnp.asarray(tokens, self.weight.dtype)
        factor = jnp.asarray(self.shape[1] ** 0.5, self.weight.dtype)
        # [V, d] at [b, p] -> [b, p, d]
        return embed_lookup(self.weight, tokens) * factor


class Unembed(nn.Module):
    """[b, p, d] to logits [b, p, V] in float32, by weight [d, V], or by the embedding [V, d] when that is given."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p d"], embedding: Float[Array, "V d"] | None = None
    ) -> Float32[Array, "b p V"]:
        if embedding is not None:
            # [b, p, d] x [V, d] -> [b, p, V]
            return unembed(x, embedding)
        # [b, p, d] x [d, V] -> [b, p, V]
        return linear(x, parameter(self, "weight", _INIT, self.shape), jnp.float32)
