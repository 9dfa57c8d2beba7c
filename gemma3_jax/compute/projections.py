"""The projections of the model: by weights with and without heads, and by the embedding.

Each is written so that XLA reads its weights only once. On one CPU device, products of few rows have the forms in
`compute.cpu`.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary. Rows are the b * p vectors of x.
"""

import functools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer

from gemma3_jax.compute.cpu import form_of_logits, form_of_projection, together
from gemma3_jax.compute.matmul import chunked_matmul, matmul
from gemma3_jax.compute.platforms import on_one_cpu
from gemma3_jax.types import Integers

# Up to this many rows, copying the weights of all heads into one matrix takes longer than transposing the results of
# one product per head (512 rows: 0.9x to 5x as long; 2048 rows: 0.8x).
MOST_ROWS_BY_HEAD = 512


def linear(x: Float[Array, "b p i"], w: Float[Array, "i o"], dtype: DTypeLike | None = None) -> Float[Array, "b p o"]:
    """x [b, p, i] by w [i, o]: [b, p, o], of `dtype` or the dtype of x."""
    # One position, as in decoding, is limited by reading the weights: chunks would only add work.
    product = chunked_matmul if x.shape[1] > 1 else matmul
    by_rows = functools.partial(product, "bpi,io->bpo", dtype=dtype)
    form = form_of_projection(x, w)
    if form is None:
        return by_rows(x, w)
    # [b, 1, i] x [1, i, o] -> [b, 1, 1, o] -> [b, 1, o]
    return on_one_cpu(lambda x, w: form(x, w[None], dtype)[:, :, 0], by_rows, x, w)


def heads_in(x: Float[Array, "b p d"], w: Float[Array, "n d e"]) -> Float[Array, "b p n e"]:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e]."""
    if x.shape[0] * x.shape[1] > MOST_ROWS_BY_HEAD:
        return chunked_matmul("bpd,nde->bpne", x, w)
    form = form_of_projection(x, w)
    if form is None:
        return _by_heads(x, w)
    return on_one_cpu(form, _by_heads, x, w)


def heads_out(z: Float[Array, "b p n e"], w: Float[Array, "n e d"]) -> Float[Array, "b p d"]:
    """z [b, p, n, e] by w [n, e, d]: [b, p, d], summed over heads."""
    n, e, d = w.shape
    # [b, p, n * e] x [n * e, d] -> [b, p, d]: the reshapes do not move data
    return linear(z.reshape(*z.shape[:2], n * e), w.reshape(n * e, d))


def unembed(x: Float[Array, "b p d"], embedding: Float[Array, "V d"]) -> Float32[Array, "b p V"]:
    """x [b, p, d] by the embedding [V, d]: logits [b, p, V] float32."""
    # [b, p, d] x [V, d] -> [b, p, V]
    by_rows = functools.partial(matmul, "bpd,vd->bpv", dtype=jnp.float32)
    form = form_of_logits(x, embedding)
    if form is not None:
        return on_one_cpu(form, by_rows, x, embedding)
    return by_rows(x, embedding)


def embed_lookup(embedding: Float[Array, "V d"], tokens: Integer[Integers, "b p"]) -> Float[Array, "b p d"]:
    """Rows of the embedding [V, d] at tokens [b, p]: [b, p, d]. An id outside the vocabulary gives NaN.

    XLA:CPU reads bfloat16 rows from a float32 copy of the embedding. `together` stops a decode loop from making that
    copy before its first turn.
    """
    weight, ids = together(embedding, tokens)
    return weight.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _by_heads(x: Float[Array, "b p d"], w: Float[Array, "n d e"]) -> Float[Array, "b p n e"]:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e], as a product for each head."""
    # [n, b, p, d] x [n, d, e] -> [n, b, p, e]
    product = chunked_matmul if x.shape[1] > 1 else matmul
    out = product("nbpd,nde->nbpe", jnp.broadcast_to(x, (w.shape[0], *x.shape)), w)
    # [b, p, n, e]
    return jnp.moveaxis(out, 0, 2)
