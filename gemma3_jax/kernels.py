"""Attention as pure functions: all at once, in a band along the diagonal, or a few queries at a time.

All three compute the same thing. `dense` holds every score at once; `banded` and `chunked` never do, forward or
backward, and never build the mask at full size. `attend` picks one of these two.

Axes: b batch, p query position, k key position, h query heads, g key/value heads, r = h / g, e head_dim; n blocks of
c queries.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.products import matmul

# Measured on a CPU at the 270m and 1b shapes, in float32 and bfloat16.
CHUNK = 128  # queries whose scores are computed together: these stay in its cache
STRIPES = 4  # parts of a prompt that leave out the keys behind them: more compute less, and compile longer
SHORT = 512  # tokens below which one dense computation is as fast


@flax.struct.dataclass
class Mask:
    """Which keys a query sees: the real ones from `before` columns before it to `after` columns after it.

    Attributes:
        before: how many columns (static).
        after: how many columns (static).
        real: [b, k] bool, whether a key is that of a real token; None where all are.
    """

    before: int = flax.struct.field(pytree_node=False)
    after: int = flax.struct.field(pytree_node=False)
    real: jax.Array | None = None

    def seen(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """[1 or b, p, k] bool for queries in columns [p] and keys in columns [k], to which `real` belongs.

        >>> columns = jnp.arange(3)
        >>> Mask(before=1, after=0).seen(columns, columns).astype(int)[0].tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        """
        # [p, k]
        distance = queries[:, None] - keys
        near = (distance <= self.before) & (distance >= -self.after)
        return near[None] if self.real is None else near & self.real[:, None]


@flax.struct.dataclass
class OneOf:
    """One of several masks for the same keys, chosen by data: layers of several types, run by one program.

    Attributes:
        which: [] int32, the place of the mask that holds.
        masks: all of them.
    """

    which: jax.Array
    masks: tuple[Mask, ...]

    def seen(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """As `Mask.seen`."""
        return jax.lax.select_n(self.which, *(mask.seen(queries, keys) for mask in self.masks))


def scores(q: jax.Array, k: jax.Array, scale: float, seen: jax.Array) -> jax.Array:
    """[b, h, p, k] float32: `q . k * scale`, and the lowest float32 where `seen` [1 or b, p, k] is false.

    q [b, p, h, e]; k [b, k, g, e], of which each serves h / g consecutive query heads.
    """
    b, p, h, e = q.shape
    # [b, p, g, r, e] x [b, k, g, e] -> [b, g, r, p, k]
    dots = matmul("bpgre,bkge->bgrpk", q.reshape(b, p, k.shape[2], -1, e), k, jnp.float32)
    # [b, h, p, k]
    return jnp.where(seen[:, None], dots.reshape(b, h, p, -1) * scale, jnp.finfo(jnp.float32).min)


def mix(pattern: jax.Array, v: jax.Array) -> jax.Array:
    """[b, p, h, e]: what each query takes from v [b, k, g, e] under pattern [b, h, p, k]."""
    return mixed(pattern, v).astype(v.dtype)


def mixed(pattern: jax.Array, v: jax.Array) -> jax.Array:
    """`mix` in float32."""
    b, h, p, k = pattern.shape
    # [b, g, r, p, k] x [b, k, g, e] -> [b, p, g, r, e]
    grouped = pattern.reshape(b, v.shape[2], -1, p, k).astype(v.dtype)
    return matmul("bgrpk,bkge->bpgre", grouped, v, jnp.float32).reshape(b, p, h, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask | OneOf) -> jax.Array:
    """[b, p, h, e]: attention of q [b, p, h, e] over k and v [b, p, g, e] that never holds all scores.

    What is several windows long is `banded`, the rest `chunked`; below `SHORT` tokens `dense` is as fast. A query that
    sees no key, in padding, takes the mean of all values.

    >>> q = jax.random.normal(jax.random.key(0), (1, 600, 2, 4))
    >>> kv = jax.random.normal(jax.random.key(1), (1, 600, 1, 4))
    >>> near, columns = Mask(before=9, after=0), jnp.arange(600)
    >>> slow = dense(q, kv, kv, 0.5, near.seen(columns, columns))
    >>> bool(jnp.allclose(attend(q, kv, kv, 0.5, near), slow, atol=1e-6))
    True
    """
    if isinstance(mask, OneOf):
        branches = [functools.partial(attend, scale=scale, mask=each) for each in mask.masks]
        return jax.lax.switch(mask.which, branches, q, k, v)
    several = q.shape[1] > 2 * (mask.before + mask.after + CHUNK)
    return (banded if several else chunked)(q, k, v, scale, mask)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, seen: jax.Array) -> jax.Array:
    """[b, p, h, e]: attention with all scores at once, under `seen` [1 or b, p, k]; memory b h p k."""
    return mix(jax.nn.softmax(scores(q, k, scale, seen), axis=-1), v)


@functools.partial(jax.jit, static_argnames=("scale", "chunk"))
def banded(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask, chunk: int = CHUNK) -> jax.Array:
    """`attend` in time and memory that are linear in the length: each block of queries with the blocks it sees.

    Scores of one block exist at a time, b h c (before + after + c), rounded up to whole blocks; the gradient computes
    them again. Arguments as in `attend`; `chunk` is c.
    """
    p = q.shape[1]
    left, right = -(-mask.before // chunk) * chunk, -(-mask.after // chunk) * chunk
    rest = -p % chunk
    real = jnp.ones((1, p), bool) if mask.real is None else mask.real
    # [b, left + n * c + right, ...]: blocks beyond the ends have no real key.
    sources = tuple(_padded(x, left, rest + right) for x in (k, v, real))
    queries, keys = left + jnp.arange(chunk), jnp.arange(left + chunk + right)

    def step(held, new):
        block, *sources = new
        # [b, left + c + right, ...]
        near_k, near_v, near_real = near = [jnp.concatenate(pair, axis=1) for pair in zip(held, sources, strict=True)]
        z = dense(block, near_k, near_v, scale, dataclasses.replace(mask, real=near_real).seen(queries, keys))
        return tuple(x[:, chunk:] for x in near), z

    held = tuple(x[:, : left + right] for x in sources)
    blocks = [_blocks(x, chunk) for x in (_padded(q, 0, rest), *(x[:, left + right :] for x in sources))]
    _, z = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), held, blocks)
    return _or_mean(_joined(z, p), v, mask)


@functools.partial(jax.jit, static_argnames=("scale", "chunk"))
def chunked(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask, chunk: int = CHUNK) -> jax.Array:
    """`attend` in memory that is linear in the length: c queries at a time, each with all keys that they may see.

    Scores of c queries exist at a time, b h c p; the gradient computes them again. Arguments as in `attend`; `chunk`
    is c. The prompt is cut into stripes, and each leaves out the keys that none of its queries sees.
    """
    p = q.shape[1]
    everything = min(mask.before, mask.after) >= p - 1
    stripe = p if everything else -(-p // (STRIPES * chunk)) * chunk
    parts = []
    for start in range(0, p, stripe):
        first = max(start - mask.before, 0)
        near = slice(first, start + stripe + mask.after)
        part = mask if mask.real is None else dataclasses.replace(mask, real=mask.real[:, near])
        parts.append(_stripe(q[:, start : start + stripe], k[:, near], v[:, near], scale, part, start - first, chunk))
    return _or_mean(jnp.concatenate(parts, axis=1), v, mask)


def _stripe(q, k, v, scale: float, mask: Mask, start: int, chunk: int) -> jax.Array:
    """Attention of q [b, p, h, e], of which the first is in column `start` of the keys, c queries at a time."""
    p = q.shape[1]
    blocks = _blocks(_padded(q, 0, -p % chunk), chunk)
    starts = start + chunk * jnp.arange(len(blocks))

    def step(block):
        start, q = block
        return dense(q, k, v, scale, mask.seen(start + jnp.arange(chunk), jnp.arange(k.shape[1])))

    return _joined(jax.lax.map(jax.checkpoint(step, prevent_cse=False), (starts, blocks)), p)


def _padded(x: jax.Array, left: int, right: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (left, right)] + [(0, 0)] * (x.ndim - 2))


def _blocks(x: jax.Array, chunk: int) -> jax.Array:
    # [b, n * c, ...] -> [n, b, c, ...]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _joined(blocks: jax.Array, p: int) -> jax.Array:
    # [n, b, c, h, e] -> [b, p, h, e]
    _, b, _, h, e = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, -1, h, e)[:, :p]


def _or_mean(z: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """z [b, p, h, e], and for a query that sees no key what `dense` gives: equal weight to every key there is."""
    if mask.real is None:
        return z
    b, p, h, _ = z.shape
    # [b, p + 1]: real keys before each column
    count = jnp.pad(jnp.cumsum(mask.real, axis=1), [(0, 0), (1, 0)])
    columns = np.arange(p)
    behind, ahead = np.maximum(columns - mask.before, 0), np.minimum(columns + mask.after + 1, p)
    sees = count[:, ahead] > count[:, behind]
    # [b, 1, h, e]
    mean = mix(jnp.full((b, h, 1, p), 1 / p), v)
    return jnp.where(sees[..., None, None], z, mean)
