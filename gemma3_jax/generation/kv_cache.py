"""The keys and values of what has been read: all of them in global layers, a ring of the last window in local ones.

Rows are aligned at their ends: a row that is shorter than others begins with padding. A token's place, counted from
the left with padding, is its column; column c lies in slot c % s of a layer with s slots. Global layers have a slot
for every column, and keep them all; local ones have `sliding_window` slots, of which a new token takes the one whose
column has just left the window.

Axes: b batch, c columns of the whole text, p new columns, s slots, n heads with keys and values, e head_dim.
"""

from collections.abc import Container, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gemma3_jax.attention import Past
from gemma3_jax.config import Gemma3Config, LayerType


@flax.struct.dataclass
class KVCache:
    """What decoding needs to know of the text so far; a pytree, without hidden state.

    Attributes:
        keys: for each layer [b, s, n, e], after RoPE.
        values: for each layer [b, s, n, e].
        start: [b] int32, the column of each row's first real token.
        length: [] int32, how many columns have been read; each row has `length - start` real tokens.
        capacity: how many columns there may be (static).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    start: jax.Array
    length: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)


def slots(config: Gemma3Config, layer_type: LayerType, capacity: int) -> int:
    """How many slots a layer of that type has, for a text of at most `capacity` columns."""
    return min(config.sliding_window, capacity) if layer_type == "sliding_attention" else capacity


def cache_bytes(config: Gemma3Config, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> dict[str, int]:
    """The memory that a cache takes, by layer type, before anything is allocated.

    Args:
        config: shape of the model.
        batch: rows.
        capacity: columns of prompt and new tokens together.
        dtype: of the parameters, which keys and values have too.

    Returns:
        Bytes of "full_attention" and "sliding_attention" layers, their "total", and "per_token": what one more column
        costs while it is beyond the window, which only global layers pay for. A layer whose `hook_attn_in` is edited
        takes h / g times as much: every query head has keys and values of its own there. One whose scores or pattern
        are edited takes as much as a global one.

    >>> cache_bytes(Gemma3Config.preset("1b"), batch=1, capacity=32_768, dtype="bfloat16")
    {'full_attention': 134217728, 'sliding_attention': 11534336, 'total': 145752064, 'per_token': 4096}
    """
    slot = 2 * batch * config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize
    kinds: tuple[LayerType, ...] = ("full_attention", "sliding_attention")
    sizes: dict[str, int] = {
        kind: slot * config.layer_types.count(kind) * slots(config, kind, capacity) for kind in kinds
    }
    return {**sizes, "total": sum(sizes.values()), "per_token": slot * config.layer_types.count("full_attention")}


def empty_cache(
    config: Gemma3Config,
    start: jax.Array,
    capacity: int,
    keys: Sequence[jax.Array] | None = None,
    dtype: DTypeLike = jnp.float32,
    whole: Container[int | None] = (),
) -> KVCache:
    """A cache without a token in it.

    Args:
        config: shape of the model.
        start: [b], the padding that each row will begin with.
        capacity: columns that it will hold.
        keys: of every layer [b, p, n, e], whose heads and dtype the cache takes. Default: those of the model.
        dtype: of keys and values, without `keys`.
        whole: layers that keep every column, as global ones do: an edit of the pattern may look behind the window.
    """

    def zeros(layer: int) -> jax.Array:
        s = capacity if layer in whole else slots(config, config.layer_types[layer], capacity)
        if keys is not None:
            return jnp.zeros((start.shape[0], s, *keys[layer].shape[2:]), keys[layer].dtype)
        return jnp.zeros((start.shape[0], s, config.num_key_value_heads, config.head_dim), dtype)

    layers = range(config.num_hidden_layers)
    return KVCache(tuple(map(zeros, layers)), tuple(map(zeros, layers)), start, jnp.int32(0), capacity)


def append(cache: KVCache, keys: Sequence[jax.Array], values: Sequence[jax.Array]) -> KVCache:
    """The cache with the keys and values of p more columns, for each layer [b, p, n, e]."""

    def write(kept: jax.Array, new: jax.Array) -> jax.Array:
        s, p = kept.shape[1], new.shape[1]
        # Of more columns than slots, only the last have a place.
        first = max(p - s, 0)
        at = (cache.length + first) % s
        if p == 1:
            return jax.lax.dynamic_update_slice_in_dim(kept, new, at, axis=1)
        return kept.at[:, (at + jnp.arange(p - first)) % s].set(new[:, first:])

    return cache.replace(  # type: ignore[attr-defined]
        keys=tuple(map(write, cache.keys, keys)),
        values=tuple(map(write, cache.values, values)),
        length=cache.length + keys[0].shape[1],
    )


def past(config: Gemma3Config, cache: KVCache, p: int) -> tuple[Past, ...]:
    """For each layer what p new columns see of the cache."""
    # [p]
    queries = cache.length + jnp.arange(p)

    def of_layer(kind: LayerType, keys: jax.Array, values: jax.Array) -> Past:
        s = keys.shape[1]
        # The last column written to each slot, negative where none is: [s]
        held = cache.length - 1 - (cache.length - 1 - jnp.arange(s)) % s
        seen = _visible(config, kind, queries, held, cache.start)
        return Past(keys, values, seen, held, cache.start, cache.length, cache.capacity)

    return tuple(map(of_layer, config.layer_types, cache.keys, cache.values))


def _visible(config: Gemma3Config, kind: LayerType, queries: jax.Array, held: jax.Array, start: jax.Array) -> jax.Array:
    """[b, p, s] bool: whether a query column sees a held column."""
    # [b, s] real keys of each row, [p, s] within the window
    real = (held >= start[:, None]) & (held >= 0)
    near = queries[:, None] - held[None, :] < config.sliding_window
    near = near if kind == "sliding_attention" else jnp.ones_like(near)
    return real[:, None, :] & near[None]


def positions(cache: KVCache, p: int) -> jax.Array:
    """[b, p] int32: the positions of p more columns, counted over each row's real tokens."""
    return jnp.maximum(cache.length + jnp.arange(p) - cache.start[:, None], 0)
