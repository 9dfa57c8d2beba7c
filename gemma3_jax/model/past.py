"""The KV cache of a layer as seen by attention.

A slot of the cache holds the key and the value of one column of the text. Local layers reuse slots in turn, so slots
are not in the order of columns. Hooks always see scores and patterns in the order of columns. Axes: b batch, p query
position, h query heads, g key/value heads, e head_dim; s slots of the cache, c columns of the whole text.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer

from gemma3_jax.compute.attention import mixed
from gemma3_jax.hooks.interception import HookPoint


def mix_with_past(
    pattern: Float[Array, "b h p k"], cached: Float[Array, "b s g e"], v: Float[Array, "b p g e"]
) -> Float[Array, "b p h e"]:
    """`mix` of pattern [b, h, p, s + p] with the values of a past [b, s, g, e] and new ones [b, p, g, e]."""
    s = cached.shape[1]
    return (mixed(pattern[..., :s], cached) + mixed(pattern[..., s:], v)).astype(v.dtype)


@flax.struct.dataclass
class Past:
    """A layer's KV cache of the columns before the current ones; see `gemma3_jax.generation.kv_cache`.

    Attributes:
        keys: [b, s, g, e], after RoPE.
        values: [b, s, g, e].
        seen: [b, p, s] bool, whether a query attends to a slot.
        held: [s] int32, the column in each slot; negative for an empty slot.
        start: [b] int32, the column of each row's first real token.
        length: [] int32, the column of the first query.
        capacity: largest number of columns of the text (static).
    """

    keys: Float[Array, "b s g e"]
    values: Float[Array, "b s g e"]
    seen: Bool[Array, "b p s"]
    held: Integer[Array, " s"]
    start: Integer[Array, " b"]
    length: Integer[Array, ""]
    capacity: int = flax.struct.field(pytree_node=False)


def positions_after(length: Integer[Array, ""], start: Integer[Array, " b"], p: int) -> Integer[Array, "b p"]:
    """[b, p] int32: the positions of the p columns after `length`; they count each row's real tokens, from `start`."""
    return jnp.maximum(length + jnp.arange(p) - start[:, None], 0)


def by_column(
    hook: HookPoint, x: Float32[Array, "b h p k"], past: Past | None, fill: float
) -> Float32[Array, "b h p k"]:
    """Pass scores or a pattern through their hook, which sees keys in the order of columns, [b, h, p, c].

    x [b, h, p, s + p] has keys in the order of slots: the s slots of the past, then the p new columns. Columns without
    a slot are `fill`. If the site is edited, every column has a slot.
    """
    if past is None:
        return hook(x)
    s, p = past.held.shape[0], x.shape[2]
    columns = jnp.arange(past.capacity)
    # [c]: the index of each column in x, or s + p if it has none
    place = jnp.where(past.held[columns % s] == columns, columns % s, s + p)
    new = columns - past.length
    place = jnp.where((new >= 0) & (new < p), s + new, place)
    shown = hook(jnp.take(_with_fill(x, fill), place, axis=-1))
    # [s + p]: the column of each index in x, or c if it has none
    column = jnp.concatenate([jnp.where(past.held >= 0, past.held, past.capacity), past.length + jnp.arange(p)])
    return jnp.take(_with_fill(shown, fill), column, axis=-1)


def _with_fill(x: Float32[Array, "b h p k"], fill: float) -> Float32[Array, "b h p k+1"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=fill)
