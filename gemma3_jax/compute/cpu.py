"""Forms of products for few rows on a CPU, where the usual product reads the weights more than once.

A product of few rows, as in decoding, takes the time to read its weights, unless XLA:CPU copies or transposes them
first. XLA:CPU has no fast bfloat16 matrix-vector product: it first converts the weights to float32, at 2 GB/s instead
of 20 to 30 GB/s. For small decode batches with large weights, it packs the weights as for many rows, which leaves a
sixth of its rate of operations.

`form_of_projection` and `form_of_logits` choose a form; `python -m benchmarks` measures what each of them gains.

| product | rows | form |
| --- | --- | --- |
| projection | 1 | `_one_row` |
| projection | 2 to 16 decoded rows, large weights | `_few_rows` |
| logits | 1 to 16, float32 | `_few_rows_of_logits_in_float32` |
| logits | 1, bfloat16 | `_one_row_of_logits` (before jax 0.11) |
| logits | 1 to 16, bfloat16, large embedding | `_few_rows_of_logits` |

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary. Rows are the b * p vectors of x.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.types import Integers

# Number of products of one row that are summed before a result is written. XLA:CPU fuses at most 15 into one loop;
# every width of Gemma 3 is a multiple of 8.
LANES = 8
# Up to this many rows, XLA:CPU spends more time on packing the weights than on multiplying (measured with 2 to 16
# rows).
MOST_ROWS = 16
# The loop that replaces XLA's products adds TERMS terms per turn, for about OUTPUTS outputs, in blocks of COLUMNS
# columns, whose weights stay in the L1 cache for all rows. (These are upper bounds; the loop uses divisors of the
# sizes.)
TERMS, OUTPUTS, COLUMNS = 12, 8192, 384
# Only weights of at least this size use the loop, which takes 40 ms to compile. The MLP of the 1b regains that time
# within about 15 tokens; weights of the 270m and of the 1b's attention need 50 to 100 tokens, and some of them never
# regain it in bfloat16.
LARGE = 4 * 2**20
# This many rows of the embedding, in float32, stay in the CPU's caches.
TOKENS = 1024
# From jax 0.11 on, XLA:CPU copies an array that is transposed before a barrier.
COPIES_BEFORE_BARRIERS = jax.__version_info__ >= (0, 11)


def form_of_projection(x: Float[Array, "b p i"], w: Float[Array, "*n i o"]) -> Callable[..., jax.Array] | None:
    """The special form on a CPU for rows x [b, p, i] and w [..., i, o], or None for the usual product."""
    (b, p, i), rows = x.shape, x.shape[0] * x.shape[1]
    if i % LANES:
        return None
    if rows == 1:
        return _one_row
    decoded = p == 1 and b <= MOST_ROWS and x.dtype in (jnp.float32, jnp.bfloat16)
    return _few_rows if decoded and w.size >= LARGE else None


@functools.partial(jax.jit, static_argnames="dtype")
def _one_row(
    x: Float[Array, "1 1 i"], w: Float[Array, "n i o"], dtype: DTypeLike | None = None
) -> Float[Array, "1 1 n o"]:
    """x [1, 1, i] by w [n, i, o]: [1, 1, n, o], with a loop over elements, which XLA:CPU vectorizes."""
    x, w = together(x, w)
    n, i, o = w.shape
    # [LANES, a, 1], where i = LANES * a
    x32 = x.astype(jnp.float32).reshape(LANES, i // LANES, 1)
    # [n, LANES, a, o]
    terms = w.astype(jnp.float32).reshape(n, LANES, i // LANES, o) * x32
    # [n, a, o]; added one by one, because a sum over an axis would run down columns
    added = functools.reduce(jnp.add, [terms[:, lane] for lane in range(LANES)])
    # [n, a] x [n, a, o] -> [n, o]; a product with ones, for the same reason
    out = matmul("na,nao->no", jnp.ones((n, i // LANES)), added)
    return out.astype(x.dtype if dtype is None else dtype)[None, None]


def _few_rows(
    x: Float[Array, "b 1 i"], w: Float[Array, "n i o"], dtype: DTypeLike | None = None
) -> Float[Array, "b 1 n o"]:
    """x [b, 1, i] by w [n, i, o]: [b, 1, n, o]."""
    return _in_turns(x, w).astype(x.dtype if dtype is None else dtype)


@jax.custom_jvp
@jax.jit
def _in_turns(x: Float[Array, "b 1 i"], w: Float[Array, "n i o"]) -> Float32[Array, "b 1 n o"]:
    """x [b, 1, i] by w [n, i, o]: [b, 1, n, o] float32, in turns that each add a few inputs to every output.

    A turn is a loop over elements, which XLA:CPU vectorizes. It reads its weights from memory for the first row and
    from the cache for the others. The inputs are split into g groups, so that a turn has enough work.
    """
    b, (n, i, o) = x.shape[0], w.shape
    terms, columns = _divisor(i, TERMS), _divisor(o, COLUMNS)
    groups = _divisor(i // terms, -(-OUTPUTS // (n * o)))
    # [g, a, b], where i = g * a
    x32 = x[:, 0].astype(jnp.float32).T.reshape(groups, i // groups, b)

    def turn(k: jax.Array, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, w = together(*carried)
        # [n, g, a, c, m], where o = c * m; reshaped inside, because XLA:CPU copies weights with axes of size 1 into a
        # loop
        blocks = _as_bits(w).reshape(n, groups, i // groups, o // columns, columns)
        products = []
        for a in range(terms):
            at = functools.partial(
                jax.lax.dynamic_index_in_dim, index=terms * k + a, keepdims=False, allow_negative_indices=False
            )
            # [g, 1, b, 1] * [n, g, c, 1, m] -> [n, g, c, b, m]
            products.append(at(x32, axis=1)[:, None, :, None] * _from_bits(at(blocks, axis=2))[:, :, :, None])
        # two independent sums, because an addition waits for the one before it
        evens, odds = (functools.reduce(jnp.add, products[first::2]) for first in (0, 1))
        return out + (evens + odds), w

    nothing = jnp.zeros((n, groups, o // columns, b, columns), jnp.float32)
    out, _ = jax.lax.fori_loop(0, i // groups // terms, turn, (nothing, w))
    # [n, g, c, b, m] -> [n, c, b, m]
    out = functools.reduce(jnp.add, [out[:, group] for group in range(groups)])
    # [b, n, c, m] -> [b, 1, n, o]
    return jnp.moveaxis(out, 2, 0).reshape(b, 1, n, o)


# The backward derivative of a loop would need all the values that it carried.
_in_turns.defjvps(
    lambda dx, _, x, w: matmul("bpi,nio->bpno", dx, w, jnp.float32),
    lambda dw, _, x, w: matmul("bpi,nio->bpno", x, dw, jnp.float32),
)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def _as_bits(w: Float[Array, "*s"]) -> Shaped[Array, "*s"]:
    """bfloat16 as uint16: XLA:CPU would read slices of bfloat16 by way of float32, in a separate loop."""
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w


def _from_bits(w: Shaped[Array, "*s"]) -> Float32[Array, "*s"]:
    """Float32 of the result of `_as_bits`: bfloat16 is the upper half of float32."""
    if w.dtype != jnp.uint16:
        return w.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)


@jax.jit
def _one_row_of_logits(x: Float[Array, "1 1 d"], embedding: Float[Array, "V d"]) -> Float32[Array, "1 1 V"]:
    """x [1, 1, d] by the embedding [V, d]: [1, 1, V] float32, with a loop over tokens."""
    x, embedding = together(x, embedding)
    # [d, V]; the barrier stops XLA:CPU from using a float32 copy
    columns = jax.lax.optimization_barrier(embedding.T)
    # [d, V] x [d] -> [V]
    return matmul("dv,d->v", columns.astype(jnp.float32), x[0, 0].astype(jnp.float32))[None, None]


@jax.custom_jvp
@jax.jit
def _few_rows_of_logits(x: Float[Array, "b p d"], embedding: Float[Array, "V d"]) -> Float32[Array, "b p V"]:
    """x [b, p, d] by the embedding [V, d]: [b, p, V] float32, with products of a few of its rows, in float32.

    A product of all rows would store a transposed copy of the embedding, and read it at only a third of the rate.
    """
    x32, tokens = x.astype(jnp.float32), min(TOKENS, len(embedding))

    def turn(k: jax.Array, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, embedding = together(*carried)
        # the last turn begins early enough to be complete
        first = jnp.minimum(k * tokens, len(embedding) - tokens)
        piece = jax.lax.dynamic_slice_in_dim(embedding, first, tokens).astype(jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(logits, _embedding_first(x32, piece), first, 0), embedding

    nothing = jnp.zeros((len(embedding), *x.shape[:2]), jnp.float32)
    logits, _ = jax.lax.fori_loop(0, -(-len(embedding) // tokens), turn, (nothing, embedding))
    # [b, p, V]
    return jnp.moveaxis(logits, 0, 2)


_few_rows_of_logits.defjvps(
    lambda dx, _, x, embedding: matmul("bpd,vd->bpv", dx, embedding, jnp.float32),
    lambda change, _, x, embedding: matmul("bpd,vd->bpv", x, change, jnp.float32),
)


def _few_rows_of_logits_in_float32(
    x: Float32[Array, "b p d"], embedding: Float[Array, "V d"]
) -> Float32[Array, "b p V"]:
    """x [b, p, d] by the embedding [V, d]: [b, p, V] float32."""
    # [b, p, V]; the barrier stops XLA from swapping the operands back
    return jnp.moveaxis(jax.lax.optimization_barrier(_embedding_first(x, embedding)), 0, 2)


def _embedding_first(x: Float32[Array, "b p d"], embedding: Float[Array, "V d"]) -> Float32[Array, "V b p"]:
    """x [b, p, d] by the embedding [V, d], float32: [V, b, p]. This form reads the embedding once, unpacked."""
    return matmul("vd,bpd->vbp", embedding, x)


def together(x: Shaped[Array, "*x"], y: Shaped[Integers, "*y"]) -> tuple[Shaped[Array, "*x"], Shaped[Array, "*y"]]:
    """Both arrays, unchanged. Stops XLA from hoisting a float32 copy of one array out of a loop that changes the other.

    Otherwise XLA would store a float32 copy of every bfloat16 weight while the loop runs.
    """
    return jax.lax.optimization_barrier((x, y))


def form_of_logits(x: Float[Array, "b p d"], embedding: Float[Array, "V d"]) -> Callable[..., jax.Array] | None:
    """The special form on a CPU for rows x [b, p, d] and the embedding [V, d], or None for the usual product."""
    rows = x.shape[0] * x.shape[1]
    if rows <= MOST_ROWS and x.dtype == jnp.float32:
        return _few_rows_of_logits_in_float32
    if rows == 1 and not COPIES_BEFORE_BARRIERS:
        return _one_row_of_logits
    few = rows <= MOST_ROWS and x.dtype == jnp.bfloat16 and embedding.size >= LARGE
    return _few_rows_of_logits if few else None
