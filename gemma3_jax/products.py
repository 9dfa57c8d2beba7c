"""Matrix products: their precision, and the form in which XLA reads each layout of weights once.

A product of few rows, as in decoding, costs what reading its weights costs, unless XLA:CPU copies or transposes them
first. Each function here has the form that was measured to avoid that; `python -m benchmarks` shows what comes of it.

A single row has a form of its own on a CPU. XLA:CPU has no product of one bfloat16 row: it writes a float32 copy of the
weights first, which makes 2 GB a second of 20 to 30. So have the few rows of a batch that is decoded, by large weights:
XLA:CPU packs weights as for many rows, which leaves a sixth of its rate of operations.

Axes: b batch, p position, d hidden_size, n heads, e head_dim, V vocabulary. Rows are the b * p vectors of x.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Up to so many rows, copying a weight by heads into one matrix costs more than moving what comes out of a product for
# each head (512 rows: 0.9x to 5x as long; 2048 rows: 0.8x).
FEW_ROWS = 512
# So many products of one row are added up before anything is written. XLA:CPU takes at most 15 into one loop; every
# width of Gemma 3 is a multiple of 8.
LANES = 8
# Up to so many rows, XLA:CPU's products cost more by packing the weights than by multiplying: measured at 2 to 16.
FEWEST_ROWS = 16
# The loop that takes their place adds up so many terms in a turn, for about so many outputs, by blocks of so many
# columns, whose weights stay in the first cache for all rows. (These are bounds; divisors of the sizes are taken.)
TERMS, OUTPUTS, COLUMNS = 12, 8192, 384
# It costs 40 ms to compile. 1b's MLP gives that back within some fifteen tokens; weights of 270m and of 1b's attention
# take fifty to a hundred, and some of them, in bfloat16, never do.
LARGE = 4 * 2**20
# So many rows of the embedding stay in the caches, as float32.
TOKENS = 1024
# From jax 0.11 on, XLA:CPU copies what is transposed in front of a barrier.
COPIES_BEFORE_BARRIERS = jax.__version_info__ >= (0, 11)


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
    form = _form_on_cpu(x, w)
    if form is None:
        return by_rows(x, w)
    # [b, 1, i] x [1, i, o] -> [b, 1, 1, o] -> [b, 1, o]
    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: form(x, w[None], dtype)[:, :, 0], default=by_rows)


def heads_in(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, p, d] by w [n, d, e]: [b, p, n, e]."""
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return matmul("bpd,nde->bpne", x, w)
    form = _form_on_cpu(x, w)
    if form is None:
        return _by_heads(x, w)
    return jax.lax.platform_dependent(x, w, cpu=form, default=_by_heads)


def heads_out(z: jax.Array, w: jax.Array) -> jax.Array:
    """z [b, p, n, e] by w [n, e, d]: [b, p, d], summed over heads."""
    n, e, d = w.shape
    # [b, p, n * e] x [n * e, d] -> [b, p, d]: neither reshape moves anything
    return linear(z.reshape(*z.shape[:2], n * e), w.reshape(n * e, d))


def unembed(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d]: logits [b, p, V] float32."""
    rows = x.shape[0] * x.shape[1]
    if rows <= FEWEST_ROWS and x.dtype == jnp.float32:
        # [b, p, V]; the barrier keeps XLA from turning the product around again
        return jnp.moveaxis(jax.lax.optimization_barrier(_embedding_first(x, embedding)), 0, 2)
    # [b, p, d] x [V, d] -> [b, p, V]
    by_rows = functools.partial(matmul, "bpd,vd->bpv", dtype=jnp.float32)
    if rows == 1 and not COPIES_BEFORE_BARRIERS:
        return jax.lax.platform_dependent(x, embedding, cpu=_one_row_of_logits, default=by_rows)
    if rows <= FEWEST_ROWS and x.dtype == jnp.bfloat16 and embedding.size >= LARGE:
        return jax.lax.platform_dependent(x, embedding, cpu=_few_rows_of_logits, default=by_rows)
    return by_rows(x, embedding)


def looked_up(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding [V, d] at tokens [b, p]: [b, p, d]. An id outside the vocabulary gives NaN.

    XLA:CPU reads bfloat16 rows from a float32 copy, which a loop over tokens would write in full before its first turn.
    """
    embedding, tokens = _together(embedding, tokens)
    return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _form_on_cpu(x: jax.Array, w: jax.Array) -> Callable[..., jax.Array] | None:
    """What a CPU does with rows x [b, p, i] and w [..., i, o] in place of the usual product, if anything."""
    (b, p, i), rows = x.shape, x.shape[0] * x.shape[1]
    if i % LANES:
        return None
    if rows == 1:
        return _one_row
    decoded = p == 1 and b <= FEWEST_ROWS and x.dtype in (jnp.float32, jnp.bfloat16)
    return _few_rows if decoded and w.size >= LARGE else None


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


def _few_rows(x: jax.Array, w: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x [b, 1, i] by w [n, i, o]: [b, 1, n, o]."""
    return _in_turns(x, w).astype(x.dtype if dtype is None else dtype)


@jax.custom_jvp
@jax.jit
def _in_turns(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [b, 1, i] by w [n, i, o]: [b, 1, n, o] float32, in turns that add a few inputs to every output.

    A turn is a loop over elements, which XLA:CPU vectorizes; its weights come from memory for the first row and from
    the cache for the others. The inputs are dealt to g groups, so that a turn has work enough.
    """
    b, (n, i, o) = x.shape[0], w.shape
    terms, columns = _divisor(i, TERMS), _divisor(o, COLUMNS)
    groups = _divisor(i // terms, -(-OUTPUTS // (n * o)))
    # [g, a, b], where i = g * a
    x32 = x[:, 0].astype(jnp.float32).T.reshape(groups, i // groups, b)

    def turn(k: jax.Array, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, w = _together(*carried)
        # [n, g, a, c, m], where o = c * m; shaped here, as XLA:CPU copies weights with axes of 1 into a loop
        blocks = _as_bits(w).reshape(n, groups, i // groups, o // columns, columns)
        products = []
        for a in range(terms):
            at = functools.partial(
                jax.lax.dynamic_index_in_dim, index=terms * k + a, keepdims=False, allow_negative_indices=False
            )
            # [g, 1, b, 1] * [n, g, c, 1, m] -> [n, g, c, b, m]
            products.append(at(x32, axis=1)[:, None, :, None] * _from_bits(at(blocks, axis=2))[:, :, :, None])
        # two sums, as an addition waits for the one before it
        evens, odds = (functools.reduce(jnp.add, products[first::2]) for first in (0, 1))
        return out + (evens + odds), w

    nothing = jnp.zeros((n, groups, o // columns, b, columns), jnp.float32)
    out, _ = jax.lax.fori_loop(0, i // groups // terms, turn, (nothing, w))
    # [n, g, c, b, m] -> [n, c, b, m]
    out = functools.reduce(jnp.add, [out[:, group] for group in range(groups)])
    # [b, n, c, m] -> [b, 1, n, o]
    return jnp.moveaxis(out, 2, 0).reshape(b, 1, n, o)


# A loop has no derivative backwards without everything that it carried.
_in_turns.defjvps(
    lambda dx, _, x, w: matmul("bpi,nio->bpno", dx, w, jnp.float32),
    lambda dw, _, x, w: matmul("bpi,nio->bpno", x, dw, jnp.float32),
)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def _as_bits(w: jax.Array) -> jax.Array:
    """bfloat16 as uint16: XLA:CPU takes bfloat16 from changing places by way of float32, in a loop of its own."""
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w


def _from_bits(w: jax.Array) -> jax.Array:
    """Float32 of what `_as_bits` gave: bfloat16 is the upper half of float32."""
    if w.dtype != jnp.uint16:
        return w.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)


@jax.jit
def _one_row_of_logits(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [1, 1, d] by the embedding [V, d]: [1, 1, V] float32, by a loop over tokens."""
    x, embedding = _together(x, embedding)
    # [d, V]; behind the barrier XLA:CPU cannot turn the product back into one of a float32 copy
    columns = jax.lax.optimization_barrier(embedding.T)
    # [d, V] x [d] -> [V]
    return matmul("dv,d->v", columns.astype(jnp.float32), x[0, 0].astype(jnp.float32))[None, None]


@jax.custom_jvp
@jax.jit
def _few_rows_of_logits(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d]: [b, p, V] float32, by products of a few of its rows, in float32.

    A product of all rows would keep a transposed copy of the embedding, and still read it at a third of the rate.
    """
    x32, tokens = x.astype(jnp.float32), min(TOKENS, len(embedding))

    def turn(k: jax.Array, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits, embedding = _together(*carried)
        # the last turn begins early enough to be whole
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


def _embedding_first(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """x [b, p, d] by the embedding [V, d], float32: [V, b, p], which reads it once, in place of packing it."""
    return matmul("vd,bpd->vbp", embedding, x)


def _together(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both unchanged. A loop in which one of them changes will then not convert the other before its first turn.

    XLA moves what a loop repeats out of it: a float32 copy of every bfloat16 weight, kept while the loop runs.
    """
    return jax.lax.optimization_barrier((x, y))
