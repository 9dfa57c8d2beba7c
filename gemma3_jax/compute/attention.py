"""Attention as pure functions: all at once, in a band along the diagonal, or a few queries at a time.

All three compute the same function. `dense` stores all scores at once. `banded` and `chunked` never store all scores,
forward or backward, and never build the full mask. `attend` picks one of these two.

Axes: b batch, p query position, k key position, h query heads, g key/value heads, r = h / g, e head_dim; n blocks of
c queries.
"""

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Shaped

from gemma3_jax.compute.masks import Mask, MaskChoice
from gemma3_jax.compute.matmul import chunked_matmul, matmul
from gemma3_jax.meshes import placed
from gemma3_jax.positions import over_documents

# Keys and values [b, k, g, e] and their mask.
Sources: TypeAlias = tuple[jax.Array, jax.Array, Mask]

# Measured on a CPU at the 270m and 1b shapes, in float32 and bfloat16.
CHUNK = 128  # queries whose scores are computed together, so that the scores stay in the CPU's cache
STRIPES = 4  # parts of a prompt, each without the keys after it: more parts compute less and compile longer
SHORT = 512  # tokens below which one dense computation is as fast


def scores(
    q: Float[Array, "b p h e"], k: Float[Array, "b k g e"], scale: float, seen: Bool[Array, "#b p k"]
) -> Float32[Array, "b h p k"]:
    """[b, h, p, k] float32: `q . k * scale`, and the lowest float32 where `seen` [1 or b, p, k] is false.

    q [b, p, h, e]; k [b, k, g, e]; each key head serves h / g consecutive query heads.
    """
    b, p, h, e = q.shape
    # XLA would else cut k as finely as the query heads, which the weights of k are not, and gather it again.
    k = placed(k, "b k g e")
    # [b, p, g, r, e] x [b, k, g, e] -> [b, g, r, p, k]
    dots = chunked_matmul("bpgre,bkge->bgrpk", q.reshape(b, p, k.shape[2], -1, e), k, jnp.float32)
    # [b, h, p, k]
    return jnp.where(seen[:, None], dots.reshape(b, h, p, -1) * scale, jnp.finfo(jnp.float32).min)


def mix(pattern: Float[Array, "b h p k"], v: Float[Array, "b k g e"]) -> Float[Array, "b p h e"]:
    """[b, p, h, e]: the values v [b, k, g, e] weighted by pattern [b, h, p, k]."""
    return mixed(pattern, v).astype(v.dtype)


def mixed(pattern: Float[Array, "b h p k"], v: Float[Array, "b k g e"]) -> Float32[Array, "b p h e"]:
    """`mix` in float32."""
    b, h, p, k = pattern.shape
    # as k in `scores`
    v = placed(v, "b k g e")
    # [b, g, r, p, k] x [b, k, g, e] -> [b, p, g, r, e]
    grouped = pattern.reshape(b, v.shape[2], -1, p, k).astype(v.dtype)
    return matmul("bgrpk,bkge->bpgre", grouped, v, jnp.float32).reshape(b, p, h, -1)


def attend(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b p g e"],
    v: Float[Array, "b p g e"],
    scale: float,
    mask: Mask | MaskChoice,
) -> Float[Array, "b p h e"]:
    """[b, p, h, e]: attention of q [b, p, h, e] over k and v [b, p, g, e] that never stores all scores.

    If the input is several windows long, it uses `banded`, otherwise `chunked`. Below `SHORT` tokens, `dense` is as
    fast. A query in padding that attends to no key gets the mean of all values (of those that are present).

    >>> q = jax.random.normal(jax.random.key(0), (1, 600, 2, 4))
    >>> kv = jax.random.normal(jax.random.key(1), (1, 600, 1, 4))
    >>> near, columns = Mask(before=9, after=0), jnp.arange(600)
    >>> slow = dense(q, kv, kv, 0.5, near.seen(columns, columns))
    >>> bool(jnp.allclose(attend(q, kv, kv, 0.5, near), slow, atol=1e-6))
    True
    """
    if isinstance(mask, MaskChoice):
        branches = [functools.partial(attend, scale=scale, mask=each) for each in mask.masks]
        return jax.lax.switch(mask.which, branches, q, k, v)
    several = q.shape[1] > 2 * (mask.before + mask.after + CHUNK)
    return (banded if several else chunked)(q, k, v, scale, mask)


def dense(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b k g e"],
    v: Float[Array, "b k g e"],
    scale: float,
    seen: Bool[Array, "#b p k"],
) -> Float[Array, "b p h e"]:
    """[b, p, h, e]: attention with all scores at once, under `seen` [1 or b, p, k]; memory b h p k."""
    return mix(jax.nn.softmax(scores(q, k, scale, seen), axis=-1), v)


@functools.partial(jax.jit, static_argnames=("scale", "chunk"))
def banded(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b p g e"],
    v: Float[Array, "b p g e"],
    scale: float,
    mask: Mask,
    chunk: int = CHUNK,
) -> Float[Array, "b p h e"]:
    """`attend` in time and memory linear in the length: each block of queries with the blocks that it attends to.

    Only the scores of one block exist at a time, b h c (before + after + c), rounded up to whole blocks; the gradient
    recomputes them. Arguments as in `attend`; `chunk` is c.
    """
    p = q.shape[1]
    left, right = -(-mask.before // chunk) * chunk, -(-mask.after // chunk) * chunk
    rest = -p % chunk
    real = jnp.ones((1, p), bool) if mask.real is None else mask.real
    # [b, left + n * c + right, ...]: blocks beyond the ends have no real key.
    sources = jax.tree.map(lambda x: _padded(x, left, rest + right), (k, v, dataclasses.replace(mask, real=real)))
    queries, keys = left + jnp.arange(chunk), jnp.arange(left + chunk + right)

    def step(previous: Sources, new: tuple[jax.Array, Sources]) -> tuple[Sources, jax.Array]:
        block, sources = new
        # [b, left + c + right, ...]
        near_k, near_v, near_mask = near = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), previous, sources)
        z = dense(block, near_k, near_v, scale, near_mask.seen(queries, keys))
        return jax.tree.map(lambda x: x[:, chunk:], near), z

    previous = jax.tree.map(lambda x: x[:, : left + right], sources)
    rows = _padded(q, 0, rest), jax.tree.map(lambda x: x[:, left + right :], sources)
    blocks = jax.tree.map(lambda x: _blocks(x, chunk), rows)
    _, z = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), previous, blocks)
    return _or_mean(_joined(z, p), v, mask)


@functools.partial(jax.jit, static_argnames=("scale", "chunk"))
def chunked(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b p g e"],
    v: Float[Array, "b p g e"],
    scale: float,
    mask: Mask,
    chunk: int = CHUNK,
) -> Float[Array, "b p h e"]:
    """`attend` in memory linear in the length: c queries at a time, each with all keys that they may attend to.

    Only the scores of c queries exist at a time, b h c p; the gradient recomputes them. Arguments as in `attend`;
    `chunk` is c. The prompt is cut into stripes, and each stripe leaves out the keys that its queries cannot attend to.
    """
    p = q.shape[1]
    everything = min(mask.before, mask.after) >= p - 1
    stripe = p if everything else -(-p // (STRIPES * chunk)) * chunk
    parts = []
    for start in range(0, p, stripe):
        first = max(start - mask.before, 0)
        near = slice(first, start + stripe + mask.after)
        part = jax.tree.map(lambda x, near=near: x[:, near], mask)
        parts.append(_stripe(q[:, start : start + stripe], k[:, near], v[:, near], scale, part, start - first, chunk))
    return _or_mean(jnp.concatenate(parts, axis=1), v, mask)


def _stripe(
    q: Float[Array, "b p h e"],
    k: Float[Array, "b k g e"],
    v: Float[Array, "b k g e"],
    scale: float,
    mask: Mask,
    start: int,
    chunk: int,
) -> Float[Array, "b p h e"]:
    """Attention of q [b, p, h, e], c queries at a time; the first query is in column `start` of the keys."""
    p = q.shape[1]
    blocks = _blocks(_padded(q, 0, -p % chunk), chunk)
    starts = start + chunk * jnp.arange(len(blocks))

    def step(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, q = block
        return dense(q, k, v, scale, mask.seen(start + jnp.arange(chunk), jnp.arange(k.shape[1])))

    return _joined(jax.lax.map(jax.checkpoint(step, prevent_cse=False), (starts, blocks)), p)


def _padded(x: Shaped[Array, "b p *rest"], left: int, right: int) -> Shaped[Array, "b p+{left}+{right} *rest"]:
    return jnp.pad(x, [(0, 0), (left, right)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x: Shaped[Array, "b p *rest"], chunk: int) -> Shaped[Array, "n b {chunk} *rest"]:
    # [b, n * c, ...] -> [n, b, c, ...]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _joined(blocks: Float[Array, "n b c h e"], p: int) -> Float[Array, "b {p} h e"]:
    # [n, b, c, h, e] -> [b, p, h, e]
    _, b, _, h, e = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, -1, h, e)[:, :p]


def _or_mean(z: Float[Array, "b p h e"], v: Float[Array, "b p g e"], mask: Mask) -> Float[Array, "b p h e"]:
    """z [b, p, h, e]; a query that attends to no key gets the result of `dense`, the mean of all values."""
    if mask.real is None:
        return z  # each query attends to itself
    b, p, h, _ = z.shape
    sees = _sees_any(mask.real, mask)
    present = jnp.ones((1, p)) if mask.present is None else mask.present.astype(jnp.float32)
    # [b, 1, h, e]
    mean = mix(jnp.broadcast_to(present / jnp.sum(present), (b, h, 1, p)), v)
    return jnp.where(sees[..., None, None], z, mean)


def _sees_any(real: Bool[Array, "b p"], mask: Mask) -> Bool[Array, "b p"]:
    """[b, p] bool: whether each query attends to a real key."""
    p = real.shape[1]
    # [b, p + 1]: real keys before each column
    count = jnp.pad(jnp.cumsum(real, axis=1), [(0, 0), (1, 0)])
    columns = np.arange(p)
    behind, ahead = np.maximum(columns - mask.before, 0), np.minimum(columns + mask.after + 1, p)
    if mask.segment_ids is None:
        return count[:, ahead] > count[:, behind]
    # [b, p]: the first and the last column of each query's document
    ends = jax.ops.segment_min, jax.ops.segment_max
    everywhere = jnp.broadcast_to(columns, real.shape)
    first, last = (over_documents(end, everywhere, mask.segment_ids) for end in ends)
    seen = jnp.maximum(behind, first), jnp.minimum(ahead, last + 1)
    before, until = (jnp.take_along_axis(count, at, axis=1) for at in seen)
    return until > before
