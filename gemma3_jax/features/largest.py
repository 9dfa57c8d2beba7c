"""The largest features of each token, without all features in memory: the width goes by in chunks.

On a mesh that is set, each device goes through its own features, and only its largest ones are compared with others'.

Axes: d features of the input, f features of the dictionary, k largest ones, m devices over which f is cut, c features
of a chunk; `...` tokens.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.features.activations import Activation, group_of
from gemma3_jax.meshes import MODEL, auto_mesh, part

CHUNK = 16384

Best = tuple[jax.Array, jax.Array]


def largest(x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation, k: int) -> Best:
    """The k largest features of each token, the largest first, and their indices: [..., k] float32 and int32.

    Args:
        x: [..., d] float32, as it enters the encoder.
        W_enc: [d, f].
        b_enc: [f].
        activation: of the dictionary.
        k: at most f.

    Memory: a chunk of the products and of `W_enc`.
    """
    f, mesh = W_enc.shape[-1], auto_mesh()
    n = part("f", f, mesh)
    if mesh is None or n == f or n % group_of(activation):
        values, indices = _of_part(x, W_enc, b_enc, activation, k)
    else:
        # m x [..., k] -> [..., m, k] -> [..., k]
        found = _of_devices(x, W_enc, b_enc, activation, min(k, n), mesh)
        values, indices = (jnp.moveaxis(each, 0, -2).reshape(*x.shape[:-1], -1) for each in found)
        values, indices = _largest_of(values, indices, k)
    if activation.limit is not None:
        values = jnp.where(jnp.arange(k) < activation.limit, values, 0.0)
    return values, indices


def _of_devices(
    x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation, k: int, mesh: jax.sharding.AbstractMesh
) -> Best:
    """The k largest features on each device of "model": [m, ..., k]."""

    def local(x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation) -> Best:
        values, indices = _of_part(x, W_enc, b_enc, activation, k)
        return values[None], indices[None] + jax.lax.axis_index(MODEL) * W_enc.shape[-1]

    whole, cut = PartitionSpec(), PartitionSpec(MODEL)
    of_activation = jax.tree.map(lambda leaf: cut if leaf.ndim else whole, activation)
    specs = whole, PartitionSpec(None, MODEL), cut, of_activation
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=cut, axis_names={MODEL}, check_vma=False)
    return mapped(x, W_enc, b_enc, activation)


def _of_part(x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation, k: int) -> Best:
    """The k largest features, of those on this device."""
    f, group = W_enc.shape[-1], group_of(activation)
    c = max(CHUNK // group, 1) * group
    if f <= c:
        return _of_chunk(x, W_enc, b_enc, activation, k)

    def merged(best: Best, start: jax.Array | int, c: int) -> Best:
        """The best of those so far and of a chunk."""
        W, b, act = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, c, -1) if leaf.ndim else leaf,
            (W_enc, b_enc, activation),
        )
        values, indices = _of_chunk(x, W, b, act, min(k, c))
        values, indices = jnp.concatenate([best[0], values], -1), jnp.concatenate([best[1], indices + start], -1)
        return _largest_of(values, indices, k)

    shape = (*x.shape[:-1], k)
    best = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    best, _ = jax.lax.scan(lambda best, i: (merged(best, i * c, c), None), best, jnp.arange(f // c))
    return merged(best, f - f % c, f % c) if f % c else best


def _of_chunk(x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation, k: int) -> Best:
    # [..., d] x [d, c] -> [..., c]
    z = matmul("...d,dc->...c", x, W_enc.astype(jnp.float32)) + b_enc.astype(jnp.float32)
    values, indices = jax.lax.top_k(activation.each(z), k)
    return values, indices


def _largest_of(values: jax.Array, indices: jax.Array, k: int) -> Best:
    """The k largest of some values, and their indices; of equal values, the first."""
    values, order = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, order, axis=-1)
