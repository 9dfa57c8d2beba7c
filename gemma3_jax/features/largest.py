"""The largest features of each token, without all features in memory: the width goes by in chunks.

Axes: d features of the input, f features of the dictionary, k largest ones, m devices over which f is cut, n features
of each of them, c features of a chunk on each; `...` tokens.
"""

import jax
import jax.numpy as jnp

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.features.activations import Activation
from gemma3_jax.meshes import parts

# Features of a chunk, all devices together.
CHUNK = 8192

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
    f = W_enc.shape[-1]
    m = parts("f", f, W_enc)
    n = f // m
    c = min(n, max(CHUNK // m, 1))
    # [..., f] -> [..., m, n]: each device goes through its own features
    cut = jax.tree.map(
        lambda leaf: leaf.reshape(*leaf.shape[:-1], m, n) if leaf.ndim else leaf, (W_enc, b_enc, activation)
    )

    def merged(best: Best, start: jax.Array | int, c: int) -> Best:
        """The best of those so far and of a chunk."""
        W, b, act = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, c, -1) if leaf.ndim else leaf, cut
        )
        # [..., d] x [d, m, c] -> [..., m, c]
        features = act.each(matmul("...d,dmc->...mc", x, W.astype(jnp.float32)) + b.astype(jnp.float32))
        values, at = jax.lax.top_k(features, min(k, c))
        # [..., m, c] -> the indices in f, [..., m, k]
        return _largest_of((best, (values, at + start + n * jnp.arange(m)[:, None])), min(k, n))

    shape = (*x.shape[:-1], m, min(k, n))
    best = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    best, _ = jax.lax.scan(lambda best, i: (merged(best, i * c, c), None), best, jnp.arange(n // c))
    if n % c:
        best = merged(best, n - n % c, n % c)
    # [..., m, k] -> [..., k]
    values, indices = _largest_of((jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-2], -1), best),), k)
    if activation.limit is not None:
        values = jnp.where(jnp.arange(k) < activation.limit, values, 0.0)
    return values, indices


def _largest_of(pairs: tuple[Best, ...], k: int) -> Best:
    """The k largest of several lists of values and indices; of equal values, the first."""
    values, indices = (jnp.concatenate(arrays, axis=-1) for arrays in zip(*pairs, strict=True))
    values, order = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, order, axis=-1)
