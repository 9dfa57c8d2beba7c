"""Matrix products and their precision.

XLA:CPU adds the terms of a float32 product one after the other (for some shapes, on CPUs with AVX-512, in pieces of
512), so its rounding error grows with the square root of their number, and is more than twice that of torch. So on a
CPU the products of prompts add their terms in chunks, and then add the sums of the chunks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from gemma3_jax.compute.platforms import on_one_cpu

# On a CPU, at most CHUNK float32 terms are added one after the other, and FINE_CHUNK under
# `jax.default_matmul_precision("highest")`. docs/accuracy.md has the errors and the costs.
CHUNK, FINE_CHUNK = 512, 128


# Jitted, so that products of one shape are traced once: tracing `einsum` takes a fifth of the model's tracing time.
@functools.partial(jax.jit, static_argnames=("pattern", "dtype"), inline=True)
def matmul(
    pattern: str, x: Float[Array, "..."], w: Float[Array, "..."], dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    """Einsum of two operands, accumulated in float32 and cast once, to `dtype` or to the dtype of `x`.

    Float32 operands are multiplied in float32 on every platform (a GPU or TPU would use TF32 or bfloat16 passes),
    unless `jax.default_matmul_precision` sets another precision.
    """
    asked_for = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined] # missing in jax's stubs
    exact = x.dtype == jnp.float32 and not asked_for
    precision = jax.lax.Precision.HIGHEST if exact else None
    out = jnp.einsum(pattern, x, w, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(x.dtype if dtype is None else dtype)


def per_head_matmul(pattern: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """`matmul` with a separate product for every head, cast to the dtype of `x`.

    XLA:CPU (jax 0.10 and 0.11) fails on such a batch of bfloat16 products with a float32 result when the head is not
    the leading axis. Converting bfloat16 operands to float32 is exact, so the result is the same.
    """
    return chunked_matmul(pattern, x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype)


def chunked_matmul(
    pattern: str, x: Float[Array, "..."], w: Float[Array, "..."], dtype: DTypeLike | None = None
) -> Float[Array, "..."]:
    """`matmul` for a pattern that sums over one axis. A CPU sums float32 in chunks, except in derivatives."""
    terms = dict(zip(pattern.split(",")[0], x.shape, strict=True))[_summed_axis(pattern)]
    chunks = _chunks(terms) if x.dtype == w.dtype == jnp.float32 else 1
    if chunks == 1:
        return matmul(pattern, x, w, dtype)
    return _product_by_chunks(pattern, chunks)(x, w).astype(x.dtype if dtype is None else dtype)


@functools.cache
def _product_by_chunks(pattern: str, chunks: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function for this einsum in float32, which on a CPU adds the sums of `chunks` chunks."""
    plain, axis = functools.partial(matmul, pattern), _summed_axis(pattern)
    (left, right), result = _inputs(pattern), pattern.split("->")[1]
    # Behind the axes that both operands have: XLA:CPU would copy weights to bring it in front of them.
    at = next(i for i, letter in enumerate(result) if letter not in left or letter not in right)
    # "nbpd,nde->nbpe" becomes "nbpzd,nzde->nzbpe", z being the chunks
    pattern_of_chunks = f"{pattern.split('->')[0].replace(axis, f'z{axis}')}->{result[:at]}z{result[at:]}"

    def by_chunks(x: Float32[Array, "..."], w: Float32[Array, "..."]) -> Float32[Array, "..."]:
        x, w = _split(x, left.index(axis), chunks), _split(w, right.index(axis), chunks)
        parts = matmul(pattern_of_chunks, x, w)
        # one by one, as a sum over an axis would go down its columns
        return functools.reduce(jnp.add, [jax.lax.index_in_dim(parts, i, at, keepdims=False) for i in range(chunks)])

    @jax.custom_jvp
    @functools.partial(jax.jit, inline=True)
    def product(x: Float32[Array, "..."], w: Float32[Array, "..."]) -> Float32[Array, "..."]:
        return on_one_cpu(by_chunks, plain, x, w)

    product.defjvps(lambda dx, _, x, w: plain(dx, w), lambda dw, _, x, w: plain(x, dw))
    return product


def _split(x: Float[Array, "..."], axis: int, chunks: int) -> Float[Array, "..."]:
    """That axis as two, [..., chunks, terms of a chunk, ...]."""
    return x.reshape(*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :])


def _summed_axis(pattern: str) -> str:
    [axis] = set.intersection(*map(set, _inputs(pattern))) - set(pattern.split("->")[1])
    return axis


def _inputs(pattern: str) -> list[str]:
    return pattern.split("->")[0].split(",")


def _chunks(terms: int) -> int:
    """The number of equal chunks to split a sum of `terms` terms into; 1 if only very small chunks would divide it."""
    asked_for = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined] # missing in jax's stubs
    most = {None: CHUNK, "highest": FINE_CHUNK, "float32": FINE_CHUNK}.get(asked_for, terms)
    fewest = -(-terms // most)
    return next((chunks for chunks in range(fewest, 4 * fewest) if terms % chunks == 0), 1)
