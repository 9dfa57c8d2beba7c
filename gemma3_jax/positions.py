"""Positions of tokens: counted over the real tokens of each row, so that padding on either side shifts nothing.

Axes: b batch, p position, n wanted positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of an input, (b, p); p is None where the positions are not those of 0 to p.
Shape = tuple[int, int | None] | tuple[int, ...]


def check_mask(mask: Any) -> None:
    """Refuse a mask [b, p] that is not 1 at real tokens and 0 at padding, unless it is being traced.

    Raises:
        ValueError: it has other values, such as numbers of segments; or floats that are 0 throughout a row, which an
            additive mask has where it hides nothing.
    """
    if isinstance(mask, jax.core.Tracer):
        return
    given = np.asarray(mask)
    if not np.isin(given, (0, 1)).all():
        raise ValueError("attention_mask must be 1 at real tokens and 0 at padding; it has something else")
    if jnp.issubdtype(given.dtype, jnp.floating) and not given.any(axis=-1).all():
        raise ValueError(
            f"attention_mask is {given.dtype} and 0 throughout a row; it must be 1 at real tokens, where an additive "
            "mask has 0"
        )


def default_positions(shape: Sequence[int], attention_mask: jax.Array | None) -> jax.Array:
    """[b, p] int32: 0, 1, 2, ... over the real tokens of each row."""
    b, p = shape
    if attention_mask is None:
        return jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), (b, p))
    return jnp.maximum(jnp.cumsum(attention_mask.astype(bool), axis=-1, dtype=jnp.int32) - 1, 0)


def at_positions(wanted: jax.Array, positions: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """[b, n, p] bool: where the real tokens stand whose positions are `wanted`; nowhere in a row that has no such one.

    Args:
        wanted: [], [n] or [b, n] integers; negative ones count from the end of each row, -1 its last real token.
        positions: [b, p] integers.
        attention_mask: [b, p], 1 at real tokens: padding shares its neighbour's position and is never meant.
    """
    real = jnp.ones_like(positions, bool) if attention_mask is None else attention_mask.astype(bool)
    # [b, 1]
    end = jnp.max(jnp.where(real, positions, -1), axis=1, keepdims=True) + 1
    wanted = jnp.atleast_1d(wanted)
    # [n] or [b, n] -> [b, n]
    wanted = jnp.broadcast_to(wanted, (len(positions), wanted.shape[-1]))
    wanted = jnp.where(wanted < 0, wanted + end, wanted)
    # [b, n, 1] == [b, 1, p]
    return (wanted[:, :, None] == positions[:, None, :]) & real[:, None, :]
