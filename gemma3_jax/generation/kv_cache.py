"""The KV cache: all keys and values in global layers, and a ring buffer of the last window in local layers.

Rows are aligned at their ends, so a shorter row begins with padding. The column of a token is its index from the left,
including padding. A layer with s slots stores column c in slot c % s. Global layers have a slot for every column. Local
layers have `sliding_window` slots, and a new token overwrites the slot whose column has just left the window.

Axes: b batch, c columns of the whole text, p new columns, s slots, n heads with keys and values, e head_dim.
"""

import dataclasses
from collections.abc import Container, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.meshes import constrained, part
from gemma3_jax.model.past import Past, positions_after


@flax.struct.dataclass
class KVCache:
    """The keys and values of the text so far; a pytree without hidden state.

    Attributes:
        keys: for each layer [b, s, n, e], after RoPE.
        values: for each layer [b, s, n, e].
        start: [b] int32, the column of each row's first real token.
        length: [] int32, number of columns in the cache; each row has `length - start` real tokens.
        capacity: largest number of columns (static).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    start: jax.Array
    length: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)


def slots(config: Gemma3Config, layer_type: LayerType, capacity: int) -> int:
    """The number of slots in a layer of that type, for a text of at most `capacity` columns."""
    return min(config.sliding_window, capacity) if layer_type == "sliding_attention" else capacity


def cache_bytes(
    config: Gemma3Config,
    batch: int,
    capacity: int,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> dict[str, int]:
    """The memory of a cache by layer type, without allocating it.

    Args:
        config: shape of the model.
        batch: number of rows, at least 1.
        capacity: columns of prompt and new tokens together, at least 1.
        dtype: dtype of the parameters, which is also that of keys and values.
        mesh: the mesh of the model; the bytes are then those of each device.

    Returns:
        Bytes of "full_attention" and "sliding_attention" layers, their "total", and "per_token": the bytes of one more
        column beyond the window, which only global layers store. A layer whose `hook_attn_in` is edited takes h / g
        times the bytes, because each query head has its own keys and values. A layer whose scores or pattern are edited
        takes the bytes of a global layer.

    Raises:
        ValueError: `batch` or `capacity` is not a positive integer.

    >>> cache_bytes(Gemma3Config.preset("1b"), batch=1, capacity=32_768, dtype="bfloat16")
    {'full_attention': 134217728, 'sliding_attention': 11534336, 'total': 145752064, 'per_token': 4096}
    """
    for name, value in (("batch", batch), ("capacity", capacity)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    b, g = part("b", int(batch), mesh), part("g", config.num_key_value_heads, mesh)
    slot = 2 * b * g * config.head_dim * jnp.dtype(dtype).itemsize
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
    """An empty cache.

    Args:
        config: shape of the model.
        start: [b], the padding at the beginning of each row.
        capacity: largest number of columns.
        keys: keys of every layer [b, p, n, e], which set the heads and dtype of the cache. Default: the model's heads.
        dtype: dtype of keys and values if `keys` is None.
        whole: layers that store every column, like global layers: an edit of the pattern may attend beyond the window.
    """

    def zeros(layer: int) -> jax.Array:
        s = capacity if layer in whole else slots(config, config.layer_types[layer], capacity)
        if keys is not None:
            return jnp.zeros((start.shape[0], s, *keys[layer].shape[2:]), keys[layer].dtype)
        return jnp.zeros((start.shape[0], s, config.num_key_value_heads, config.head_dim), dtype)

    layers = range(config.num_hidden_layers)
    return KVCache(tuple(map(zeros, layers)), tuple(map(zeros, layers)), start, jnp.int32(0), capacity)


def append(cache: KVCache, keys: Sequence[jax.Array], values: Sequence[jax.Array]) -> KVCache:
    """The cache after adding the keys and values of p more columns, for each layer [b, p, n, e].

    Raises:
        ValueError: the columns exceed the capacity. If the length is traced, they silently replace the oldest columns.
    """
    p = keys[0].shape[1]
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length) + p > cache.capacity:
        raise ValueError(f"{p} columns after {int(cache.length)} exceed the capacity of {cache.capacity}")

    def write(kept: jax.Array, new: jax.Array) -> jax.Array:
        s, p = kept.shape[1], new.shape[1]
        # If there are more columns than slots, only the last columns are stored.
        first = max(p - s, 0)
        at = (cache.length + first) % s
        if p == 1:
            written = jax.lax.dynamic_update_slice_in_dim(kept, new, at, axis=1)
        else:
            written = kept.at[:, (at + jnp.arange(p - first)) % s].set(new[:, first:])
        return constrained(written, "b s g e")

    return dataclasses.replace(
        cache,
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


def _visible(config: Gemma3Config, kind: LayerType, queries: jax.Array, keys: jax.Array, start: jax.Array) -> jax.Array:
    """[b, p, s] bool: whether a query column attends to a key column."""
    # [b, s] real keys of each row, [p, s] within the window
    real = (keys >= start[:, None]) & (keys >= 0)
    near = queries[:, None] - keys[None, :] < config.sliding_window
    near = near if kind == "sliding_attention" else jnp.ones_like(near)
    return real[:, None, :] & near[None]


def positions(cache: KVCache, p: int) -> jax.Array:
    """[b, p] int32: the positions of the next p columns; they count each row's real tokens."""
    return positions_after(cache.length, cache.start, p)
