"""What a search remembers of each feature, on the device: its largest values and where they are, and a histogram.

Nothing of it grows with the number of tokens. The bins of a histogram are equally wide. They begin at 0, and end at a
power of two that is above all values so far: as it grows, neighbouring bins are added up, so counts stay exact.

Axes: n tokens of a batch, d features of the site, f features of the dictionary, c features of a chunk, k largest
values, s bins, m features that are read for a chunk, a features that are counted together with others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.features.activations import TopK, group_of
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.largest import CHUNK
from gemma3_jax.features.parts import restricted_to

BINS = 32
VALUES = 2**24  # values of features in memory at once
_CARRY = 24  # bits of a count in its lower part: the sum of all bins and of a batch is below 2**31
_LEAST = -100  # 2**_LEAST is the end of an empty histogram
_GROUP = 16  # tokens of which first only the largest value is compared

Reader = SparseAutoencoder | Transcoder
# The k largest features of each token and their indices, of a dictionary that keeps no others; both [n, k].
Kept = tuple[jax.Array, jax.Array]


class Tally(NamedTuple):
    """What is known of some features.

    Attributes:
        values: [c, k] float32, the largest first; 0 where there are fewer.
        batches: [c, k] int32, the number of the batch that has the value; -1 where there is none.
        places: [c, k] int32, the token of the batch.
        counts: [2, c, s] int32: how many values are in each bin, as upper and lower part.
        exponents: [c] int32: bins end at 2**exponent, which is above all values.
        together: [2, c, a] int32: on how many tokens it is active with each of some features, as upper and lower part.
    """

    values: jax.Array
    batches: jax.Array
    places: jax.Array
    counts: jax.Array
    exponents: jax.Array
    together: jax.Array


class Chunk(NamedTuple):
    """Features that are counted together.

    Attributes:
        read: [m] int32, the features that are computed for them.
        columns: [c] int32, where the features are among these.
    """

    read: np.ndarray
    columns: np.ndarray


def chunks(reader: Reader, indices: np.ndarray, tokens: int) -> list[Chunk]:
    """Features [n] in chunks, so that their values for so many tokens are no more than VALUES. Groups stay whole."""
    group = group_of(reader.activation)
    c = max(1, min(VALUES // (tokens * group), CHUNK // group)) * group
    found = []
    for start in range(0, len(indices), c):
        own = indices[start : start + c]
        # [groups, 1] + [group] -> [m]
        read = (np.unique(own // group)[:, None] * group + np.arange(group)).reshape(-1)
        found.append(Chunk(read.astype(np.int32), np.searchsorted(read, own).astype(np.int32)))
    return found


def empty(c: int, k: int, a: int = 0) -> Tally:
    """The tally of c features before the first token, with which `a` others are counted."""
    none = jnp.full((c, k), -1, jnp.int32)
    exponents = jnp.full(c, _LEAST, jnp.int32)
    counts, together = (jnp.zeros((2, c, size), jnp.int32) for size in (BINS, a))
    return Tally(jnp.zeros((c, k)), none, none + 0, counts, exponents, together)


def kept_of(reader: Reader, x: jax.Array) -> Kept | None:
    """The features of tokens [n, d] that a dictionary keeps of all; None if each depends on itself or its group."""
    if not isinstance(reader.activation, TopK):
        return None
    return reader.encode_topk(x, min(reader.activation.k, reader.width))


def values_of(reader: Reader, x: jax.Array, kept: Kept | None, chunk: Chunk) -> jax.Array:
    """The values [n, c] of the features of a chunk for tokens [n, d]."""
    if kept is None:
        # [n, m] -> [n, c]
        return restricted_to(reader, jnp.asarray(chunk.read)).encode(x)[:, chunk.columns]
    values, indices = kept
    m = len(chunk.read)
    # [f]: the column of each feature, m for those of other chunks, which are dropped
    columns = jnp.full(reader.width, m, jnp.int32).at[chunk.read].set(jnp.arange(m, dtype=jnp.int32))
    found = jnp.zeros((len(values), m)).at[jnp.arange(len(values))[:, None], columns[indices]].set(values, mode="drop")
    return found[:, chunk.columns]


@jax.jit
def active(reader: Reader, x: jax.Array, chunk: Chunk) -> jax.Array:
    """[n, c] float32: 1 where the features of a chunk are active on tokens [n, d], and 0 elsewhere."""
    return (values_of(reader, x, kept_of(reader, x), chunk) > 0).astype(jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def added(
    tally: Tally,
    reader: Reader,
    x: jax.Array,
    kept: Kept | None,
    chunk: Chunk,
    real: jax.Array,
    batch: jax.Array,
    active: jax.Array | None = None,
) -> Tally:
    """The tally after tokens [n, d] more, of which the first `real` [] count. `batch` [] is their number.

    `active` [n, a] is 1 where the features are active that are counted together with others, and 0 elsewhere.
    """
    f = values_of(reader, x, kept, chunk)
    f = jnp.where((jnp.arange(len(f)) < real)[:, None] & (f > 0), f, 0.0)
    k = tally.values.shape[1]
    values, places = _largest(f, k)
    # [c, k] and [c, k] -> [c, 2 k] -> [c, k]; of equal values the first, which are those of earlier batches
    values, order = jax.lax.top_k(jnp.concatenate([tally.values, values], 1), k)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.concatenate([old, new], 1), order, axis=1)

    batches = merged(tally.batches, jnp.full(places.shape, batch, jnp.int32))
    counts, exponents = _counted(tally, f)
    together = tally.together
    if active is not None:
        # [n, c] x [n, a] -> [c, a]; exact in any precision: terms are 0 or 1, and their number is below 2**24
        more = jnp.einsum("nc,na->ca", (f > 0).astype(jnp.float32), active, preferred_element_type=jnp.float32)
        together = _carried(together[0], together[1] + more.astype(jnp.int32))
    return Tally(values, batches, merged(tally.places, places), counts, exponents, together)


def _counted(tally: Tally, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The counts and exponents of a tally after values [n, c] more."""
    most = f.max(axis=0)
    exponents = jnp.maximum(tally.exponents, jnp.where(most > 0, jnp.frexp(most)[1], _LEAST))
    features = jnp.arange(f.shape[1])
    # [c, s]: the bins that the old ones become
    bins = jnp.arange(BINS) >> jnp.minimum(exponents - tally.exponents, 31)[:, None]
    upper, lower = jnp.zeros_like(tally.counts).at[:, features[:, None], bins].add(tally.counts)
    # [n, c]; exact, since bins are as wide as a power of two; values of 0 are in no bin
    bins = (f * jnp.ldexp(1.0, BINS.bit_length() - 1 - exponents)).astype(jnp.int32)
    lower = lower.at[features, jnp.where(f > 0, bins, BINS)].add(1, mode="drop")
    return _carried(upper, lower), exponents


def _carried(upper: jax.Array, lower: jax.Array) -> jax.Array:
    """[2, ...] of both parts of counts, of which the lower one may have become too large."""
    return jnp.stack([upper + (lower >> _CARRY), lower & (2**_CARRY - 1)])


def totals(counts: np.ndarray) -> np.ndarray:
    """[c, ...] int64, of counts [2, c, ...]."""
    return (counts[0].astype(np.int64) << _CARRY) + counts[1]


def _largest(f: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The largest values over tokens of f [n, c], at most k, and their tokens: [c, k]; of equal values the first.

    They are in the k groups of tokens with the largest values, so only those are compared: a few hundred tokens.
    """
    n, c = f.shape
    if n % _GROUP or n // _GROUP <= k:
        values, places = jax.lax.top_k(f.T, min(n, k))
        return values, places
    # [n / group, group, c] -> [c, n / group] -> [c, k]
    _, groups = jax.lax.top_k(f.reshape(-1, _GROUP, c).max(axis=1).T, k)
    # [c, k, group] -> [c, k group], in the order of the tokens
    tokens = (jnp.sort(groups)[..., None] * _GROUP + jnp.arange(_GROUP)).reshape(c, -1)
    values, order = jax.lax.top_k(f[tokens, jnp.arange(c)[:, None]], k)
    return values, jnp.take_along_axis(tokens, order, axis=1)
