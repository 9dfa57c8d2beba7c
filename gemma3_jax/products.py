"""Matrix products: their precision, and the form in which XLA reads each layout of weights once.

A product of few rows, as in decoding, costs what reading its weights costs, unless XLA:CPU copies or transposes them
first. Each function here has the form that was measured to avoid that; `python -m benchmarks` shows what comes of it.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary. Rows are the b * p vectors of x.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Up to so many rows, copying a weight by heads into one matrix costs more than moving what comes out of a product for
# each head (512 rows: 0.9x to 5x as long; 2048 rows: 0.8x).
FEW_ROWS = 512
# Up to so many rows, a product that names the embedding first reads it once, in place of packing it.
ROWS_BEHIND = 16


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


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, i] by w [i, o]: [b, p, o]."""
    return matmul("bpi,io->bpo", _not_alone(x), w)[:, : x.shape[1]]


def heads_in(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e]."""
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return matmul("bpd,nde->bpne", x, w)
    rows = _not_alone(x)
    # [n, b, p, d] x [n, d, e] -> [n, b, p, e]
    out = matmul("nbpd,nde->nbpe", jnp.broadcast_to(rows, (w.shape[0], *rows.shape)), w)
    # [b, p, n, e]
    return jnp.moveaxis(out, 0, 2)[:, : x.shape[1]]


def heads_out(z: jax.Array, w: jax.Array) -> jax.Array:
    """z [b, p, n, e] by w [n, e, d]: [b, p, d], summed over heads."""
    n, e, d = w.shape
    # [b, p, n * e] x [n * e, d] -> [b, p, d]: neither reshape moves anything
    return linear(z.reshape(*z.shape[:2], n * e), w.reshape(n * e, d))


def unembed(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d]: logits [b, p, V] float32."""
    if x.shape[0] * x.shape[1] <= ROWS_BEHIND and x.dtype == jnp.float32:
        # [V, d] x [b, p, d] -> [V, b, p] -> [b, p, V]; the barrier keeps XLA from turning the product around again
        return jnp.moveaxis(jax.lax.optimization_barrier(matmul("vd,bpd->vbp", embedding, x)), 0, 2)
    # [b, p, d] x [V, d] -> [b, p, V]
    return matmul("bpd,vd->bpv", _not_alone(x), embedding, jnp.float32)[:, : x.shape[1]]


def _not_alone(x: jax.Array) -> jax.Array:
    """x [b, p, i]; where that is one row of less than float32, with a second one of zeros behind it, [1, 2, i].

    XLA:CPU has no fast product of a single narrow row: with two rows it is four to six times as fast.
    """
    alone = x.shape[0] * x.shape[1] == 1 and x.dtype.itemsize < 4
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))) if alone else x
