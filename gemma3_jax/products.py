"""Matrix products: their precision, and the form in which XLA reads each layout of weights once.

A product of few rows, as in decoding, costs what reading its weights costs, unless XLA:CPU copies or transposes them
first. Each function here has the form that was measured to avoid that; `python -m benchmarks` shows what comes of it.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary; m all rows, b * p.
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
    # [m, i] x [i, o] -> [m, o]
    return _unflat(matmul("mi,io->mo", _rows(x), w), x)


def heads_in(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e]."""
    rows = _rows(x)
    if rows.shape[0] > FEW_ROWS:
        # [m, d] x [n, d, e] -> [m, n, e]
        return _unflat(matmul("md,nde->mne", rows, w), x)
    each = jnp.broadcast_to(rows, (w.shape[0], *rows.shape))
    # [n, m, d] x [n, d, e] -> [n, m, e] -> [m, n, e]
    return _unflat(matmul("nmd,nde->nme", each, w).swapaxes(0, 1), x)


def heads_out(z: jax.Array, w: jax.Array) -> jax.Array:
    """z [b, p, n, e] by w [n, e, d]: [b, p, d], summed over heads."""
    n, e, d = w.shape
    # [b, p, n * e] x [n * e, d] -> [b, p, d]: neither reshape moves anything
    return linear(z.reshape(*z.shape[:2], n * e), w.reshape(n * e, d))


def unembed(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d]: logits [b, p, V] float32."""
    rows = _rows(x)
    if rows.shape[0] <= ROWS_BEHIND and x.dtype == jnp.float32:
        # [V, d] x [m, d] -> [V, m] -> [m, V]; the barrier keeps XLA from turning the product around again
        return _unflat(jax.lax.optimization_barrier(matmul("vd,md->vm", embedding, rows)).T, x)
    # [m, d] x [V, d] -> [m, V]
    return _unflat(matmul("md,vd->mv", rows, embedding, jnp.float32), x)


def _rows(x: jax.Array) -> jax.Array:
    """x [b, p, i] as [m, i]; where that is one row of less than float32, with a second one of zeros.

    XLA:CPU has no fast product of a single narrow row: with two rows it is four to six times as fast.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jnp.pad(rows, ((0, 1), (0, 0))) if rows.shape[0] == 1 and x.dtype.itemsize < 4 else rows


def _unflat(out: jax.Array, x: jax.Array) -> jax.Array:
    """out [m, ...] as [b, p, ...], without a row that `_rows` put there."""
    b, p = x.shape[:2]
    return out[: b * p].reshape(b, p, *out.shape[1:])
