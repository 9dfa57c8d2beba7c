"""Rotary position embedding.

Axes: b batch, p position, n heads, e head_dim.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from gemma3_jax.config import Rope

# Cosines and sines.
Tables: TypeAlias = tuple[Float32[Array, "b p e"], Float32[Array, "b p e"]]


def rope_tables(
    rope: Rope, positions: Integer[Array, "b p"], head_dim: int
) -> tuple[Float32[Array, "b p {head_dim}"], Float32[Array, "b p {head_dim}"]]:
    """Cosines and sines, each [b, p, e] float32, of the rotary embedding at `positions` [b, p].

    Source: RoFormer (arXiv 2104.09864); `Gemma3RotaryEmbedding`, whose frequencies are reproduced bit for bit if
    the power is rounded correctly; a difference in the last bit would grow with the position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers / np.float32(rope.factor)
    # [b, p, 1] x [e / 2] -> [b, p, e / 2]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    # [b, p, e]; concatenated last, because XLA:CPU would otherwise recompute the cosines in every layer
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (jnp.cos(angles), jnp.sin(angles)))
    return cos, sin


@functools.partial(jax.jit, inline=True)
def rotate(
    x: Float[Array, "b p n e"], cos: Float32[Array, "#b p e"], sin: Float32[Array, "#b p e"]
) -> Float[Array, "b p n e"]:
    """Rotate x [b, p, n, e] by the tables [1 or b, p, e], pairing feature i with i + e/2, in float32, cast once."""
    x32 = x.astype(jnp.float32)
    # [b, p, n, 2, e / 2]: (first, second) -> (-second, first); a flip, because XLA:CPU does not fuse a concatenation
    halves = x32.reshape(*x.shape[:-1], 2, -1)
    turned = (jnp.flip(halves, -2) * np.array([[-1], [1]], np.float32)).reshape(x.shape)
    # [b, p, n, e] * [b, p, 1, e]
    return (x32 * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
