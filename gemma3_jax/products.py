"""Matrix products: their precision, and the form in which XLA reads each layout of weights once.

A product of few rows, as in decoding, costs what reading its weights costs, unless XLA:CPU copies or transposes them
first. Each function here has the form that was measured to avoid that; `python -m benchmarks` shows what comes of it.

A single row has a form of its own on a CPU. XLA:CPU has no product of one bfloat16 row: it writes a float32 copy of the
weights first, which makes 2 GB a second of 20 to 30.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary. Rows are the b * p vectors of x.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Up to so many rows, copying a weight by heads into one matrix costs more than moving what comes out of a product for
# each head (512 rows: 0.9x to 5x as long; 2048 rows: 0.8x).
FEW_ROWS = 512
# Up to so many rows, a product that names the embedding first reads it once, in place of packing it.
ROWS_BEHIND = 16
# So many products of one row are added up before anything is written. XLA:CPU takes at most 15 into one loop; every
# width of Gemma 3 is a multiple of 8.
LANES = 8


# Compiled, so that products of one shape are traced once: `einsum` takes a fifth of the time to trace the model.
@functools.partial(jax.jit, static_argnames=("pattern", "dtype"), inline=True)
def matmul(pattern: str, x: jax.Array, w: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Einsum of two operands, accumulated in float32 and cast once, to `dtype` or to the dtype of `x`.

    Float32 operands are multiplied in float32 on every platform (a GPU or TPU would take TF32 or bfloat16 passes),
    unless `jax.default_matmul_precision` asks for something else.
    """
    asked_for = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined] # missing in jax's stubs
    exact = x.dtype == jnp.float32 and not asked_for
    precision = jax.lax.Precision.HIGHEST if exact else None
    out = jnp.einsum(pattern, x, w, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(x.dtype if dtype is None else dtype)


def per_head_matmul(pattern: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`matmul` where every head has a product of its own, cast to the dtype of `x`.

    XLA:CPU (jax 0.10 and 0.11) fails on such a batch of bfloat16 products with a float32 result when the head is not
    the leading axis. Float32 operands hold the same values, and so give the same result.
    """
    return matmul(pattern, x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype)


def linear(x: jax.Array, w: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x [b, p, i] by w [i, o]: [b, p, o], of `dtype` or the dtype of x."""
    by_rows = functools.partial(matmul, "bpi,io->bpo", dtype=dtype)
    if not _alone(x, w.shape[0]):
        return by_rows(x, w)
    # [1, 1, i] x [1, i, o] -> [1, 1, 1, o] -> [1, 1, o]
    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: _one_row(x, w[None], dtype)[:, :, 0], default=by_rows)


def heads_in(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e]."""
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return matmul("bpd,nde->bpne", x, w)
    if not _alone(x, w.shape[1]):
        return _by_heads(x, w)
    return jax.lax.platform_dependent(x, w, cpu=_one_row, default=_by_heads)


def heads_out(z: jax.Array, w: jax.Array) -> jax.Array:
    """z [b, p, n, e] by w [n, e, d]: [b, p, d], summed over heads."""
    n, e, d = w.shape
    # [b, p, n * e] x [n * e, d] -> [b, p, d]: neither reshape moves anything
    return linear(z.reshape(*z.shape[:2], n * e), w.reshape(n * e, d))


def unembed(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d]: logits [b, p, V] float32."""
    rows = x.shape[0] * x.shape[1]
    if rows <= ROWS_BEHIND and x.dtype == jnp.float32:
        # [V, d] x [b, p, d] -> [V, b, p] -> [b, p, V]; the barrier keeps XLA from turning the product around again
        return jnp.moveaxis(jax.lax.optimization_barrier(matmul("vd,bpd->vbp", embedding, x)), 0, 2)
    # [b, p, d] x [V, d] -> [b, p, V]
    by_rows = functools.partial(matmul, "bpd,vd->bpv", dtype=jnp.float32)
    if rows > 1:
        return by_rows(x, embedding)
    return jax.lax.platform_dependent(x, embedding, cpu=_one_row_of_logits, default=by_rows)


def looked_up(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding [V, d] at tokens [b, p]: [b, p, d]. An id outside the vocabulary gives NaN.

    XLA:CPU reads bfloat16 rows from a float32 copy, which a loop over tokens would write in full before its first turn.
    """
    embedding, tokens = _together(embedding, tokens)
    return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _alone(x: jax.Array, inputs: int) -> bool:
    return x.shape[0] * x.shape[1] == 1 and inputs % LANES == 0


def _by_heads(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e], as a product for each head."""
    # [n, b, p, d] x [n, d, e] -> [n, b, p, e]
    out = matmul("nbpd,nde->nbpe", jnp.broadcast_to(x, (w.shape[0], *x.shape)), w)
    # [b, p, n, e]
    return jnp.moveaxis(out, 0, 2)


@functools.partial(jax.jit, static_argnames="dtype")
def _one_row(x: jax.Array, w: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x [1, 1, i] by w [n, i, o]: [1, 1, n, o], by a loop over elements, which XLA:CPU vectorizes."""
    x, w = _together(x, w)
    n, i, o = w.shape
    # [LANES, a, 1], where i = LANES * a
    x32 = x.astype(jnp.float32).reshape(LANES, i // LANES, 1)
    # [n, LANES, a, o]
    terms = w.astype(jnp.float32).reshape(n, LANES, i // LANES, o) * x32
    # [n, a, o]; added one by one, as a sum over an axis would go down its columns
    added = functools.reduce(jnp.add, [terms[:, lane] for lane in range(LANES)])
    # [n, a] x [n, a, o] -> [n, o]; a product with ones, for the same reason
    out = matmul("na,nao->no", jnp.ones((n, i // LANES)), added)
    return out.astype(x.dtype if dtype is None else dtype)[None, None]


@jax.jit
def _one_row_of_logits(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [1, 1, d] by the embedding [V, d]: [1, 1, V] float32, by a loop over tokens."""
    x, embedding = _together(x, embedding)
    # [d, V]; behind the barrier XLA:CPU cannot turn the product back into one of a float32 copy
    columns = jax.lax.optimization_barrier(embedding.T)
    # [d, V] x [d] -> [V]
    return matmul("dv,d->v", columns.astype(jnp.float32), x[0, 0].astype(jnp.float32))[None, None]


def _together(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both unchanged. A loop in which one of them changes will then not convert the other before its first turn.

    XLA moves what a loop repeats out of it: a float32 copy of every bfloat16 weight, kept while the loop runs.
    """
    return jax.lax.optimization_barrier((x, y))
