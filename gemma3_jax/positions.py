"""Positions of tokens, and the documents that share a row.

A row may hold several documents, packed one after the other. `segment_ids` then numbers them, and positions restart
at each. Axes: b batch, p position, n chosen positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.types import ArrayLike, Integers

# The remedy for an argument with one token per position, when several documents of a row have that position.
BY_COLUMN = "leave it out and slice the result by column, as in logits[:, columns] or cache[name][:, columns]"


@dataclasses.dataclass(frozen=True, eq=False)
class Extent:
    """The shape and the known positions of an input before it runs.

    Attributes:
        rows: b.
        columns: p; None if any number is possible.
        attention_mask: [b, p], or None.
        positions: [b, p] integers, or None for the default ones.
        segment_ids: [b, p] integers, or None.
    """

    rows: int
    columns: int | None
    attention_mask: Integers | None = None
    positions: Integers | None = None
    segment_ids: Integers | None = None

    @functools.cached_property
    def known_positions(self) -> frozenset[int] | None:
        """The positions of tokens, counted from both ends of their documents; None if they are not known.

        >>> sorted(Extent(1, 4, np.array([[0, 1, 1, 1]])).known_positions)
        [-3, -2, -1, 0, 1, 2]
        """
        arrays = (self.attention_mask, self.positions, self.segment_ids)
        if self.columns is None or any(isinstance(array, jax.core.Tracer) for array in arrays):
            return None
        if all(array is None for array in arrays):
            return frozenset(range(-self.columns, self.columns))
        with jax.ensure_compile_time_eval():  # the known values are not part of a current trace
            mask, given, segment_ids = (None if array is None else jnp.asarray(array) for array in arrays)
            documents = packed_documents(segment_ids, given, mask)
            positions = default_positions((self.rows, self.columns), mask, documents) if given is None else given
            # [b, p]
            counted_back = positions - _ends(positions, mask, documents)
        real = np.ones(positions.shape, bool) if mask is None else np.asarray(mask, bool)
        return frozenset(np.asarray(positions)[real].tolist()) | frozenset(np.asarray(counted_back)[real].tolist())


def check_mask(mask: ArrayLike) -> None:
    """Raise ValueError for a mask [b, p] that is not 1 at real tokens and 0 at padding; a traced mask is not checked.

    Raises:
        ValueError: the mask has other values, such as segment numbers; or it has floats that are 0 in a whole row, like
            an additive mask that hides nothing.
    """
    if isinstance(mask, jax.core.Tracer):
        return
    array = np.asarray(mask)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(
            "attention_mask must be 1 at real tokens and 0 at padding; it has other values. To number the documents "
            "that are packed into a row, pass segment_ids"
        )
    if jnp.issubdtype(array.dtype, jnp.floating) and not array.any(axis=-1).all():
        raise ValueError(
            f"attention_mask is {array.dtype} and 0 in a whole row; it must be 1 at real tokens, where an additive "
            "mask has 0"
        )


def packed_documents(
    segment_ids: Integers | None,
    positions: Integers | None = None,
    attention_mask: Integers | None = None,
    past: object = None,
) -> jax.Array | None:
    """[b, p] int32: the number of each token's document in its row, from 0; None if each row is one text.

    With `segment_ids`, a document is a run of equal ids. Without them, documents are inferred from `positions` as
    Hugging Face does (`find_packed_sequence_indices` in `transformers.masking_utils`): a document begins where
    a position is not the previous position plus 1, unless there is a mask or a past.

    Args:
        segment_ids: [b, p] integers, or None.
        positions: [b, p] integers, or None for the default ones.
        attention_mask: [b, p], or None.
        past: the KV cache of the text that the tokens continue, or None.

    Raises:
        ValueError: `segment_ids` and `past` are both given.

    >>> packed_documents(None, jnp.array([[0, 1, 2, 0, 1]])).tolist()
    [[0, 0, 0, 1, 1]]
    >>> packed_documents(jnp.array([[7, 7, 3, 7, 7]])).tolist()
    [[0, 0, 1, 2, 2]]
    """
    if segment_ids is not None:
        if past is not None:
            raise ValueError("segment_ids cannot be combined with past: a KV cache continues one text in each row")
        begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    elif positions is None or attention_mask is not None or past is not None:
        return None
    else:
        begins = positions[:, 1:] - positions[:, :-1] != 1
    return jnp.pad(jnp.cumsum(begins, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])


def over_documents(reduce: Callable[..., jax.Array], values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[b, p]: for each token, the result of `reduce` over the values of its document.

    Args:
        reduce: `jax.ops.segment_min` or a similar function.
        values: [b, p].
        segment_ids: [b, p] integers from 0 to p - 1.
    """
    p = segment_ids.shape[1]
    return jax.vmap(lambda values, ids: reduce(values, ids, p)[ids])(values, segment_ids)


def default_positions(
    shape: Sequence[int], attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """[b, p] int32: the column of each token, counted from its document's first real token; 0 before that.

    Padding at the ends of a row does not change the position of a token. Padding between tokens counts, as in Hugging
    Face's forward pass, which numbers the columns.

    Args:
        shape: (b, p).
        attention_mask: [b, p], 1 at real tokens; None if all tokens are real.
        segment_ids: as `packed_documents` returns them; None if each row is one text.

    >>> default_positions((1, 6), jnp.array([[0, 1, 1, 0, 1, 0]])).tolist()
    [[0, 0, 1, 2, 3, 4]]
    """
    b, p = shape
    columns = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), (b, p))
    if attention_mask is None and segment_ids is None:
        return columns
    real_columns = columns if attention_mask is None else jnp.where(attention_mask.astype(bool), columns, p)
    if segment_ids is None:
        # [b, 1]
        first = jnp.min(real_columns, axis=1, keepdims=True)
    else:
        # [b, p]
        first = over_documents(jax.ops.segment_min, real_columns, segment_ids)
    return jnp.maximum(columns - first, 0)


def at_positions(
    wanted: jax.Array,
    positions: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """[b, n, p] bool: the real tokens whose positions are `wanted`, in every document of a row that has them.

    Args:
        wanted: [], [n] or [b, n] integers. Negative ones count back from the position of each document's last real
            token, which is -1. A position on padding between tokens does not match a token.
        positions: [b, p] integers.
        attention_mask: [b, p], 1 at real tokens: padding has positions too, but never matches.
        segment_ids: as `packed_documents` returns them; None if each row is one text.

    >>> packed = jnp.array([[0, 0, 0, 1, 1]])
    >>> at_positions(jnp.array(-1), jnp.array([[0, 1, 2, 0, 1]]), None, packed).astype(int)[0, 0].tolist()
    [0, 0, 1, 0, 1]
    """
    real = jnp.ones_like(positions, bool) if attention_mask is None else attention_mask.astype(bool)
    end = _ends(positions, attention_mask, segment_ids)
    wanted = jnp.atleast_1d(wanted)
    # [n] or [b, n] -> [b, n, 1]
    wanted = jnp.broadcast_to(wanted, (len(positions), wanted.shape[-1]))[:, :, None]
    # [b, n, 1 or p]
    wanted = jnp.where(wanted < 0, wanted + end[:, None, :], wanted)
    # [b, n, p]
    return (wanted == positions[:, None, :]) & real[:, None, :]


def _ends(
    positions: jax.Array, attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """[b, 1 or p]: the position after the last real token of each row, or of each token's document."""
    real_positions = positions if attention_mask is None else jnp.where(attention_mask.astype(bool), positions, -1)
    if segment_ids is None:
        return jnp.max(real_positions, axis=1, keepdims=True) + 1
    return over_documents(jax.ops.segment_max, real_positions, segment_ids) + 1


def columns_at(
    wanted: jax.Array,
    positions: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The column [b, n] of the token at each position, and whether there is exactly one such token [b, n].

    Arguments as in `at_positions`.

    Raises:
        ValueError: several tokens of a row have one of the positions. Traced arrays do not raise; the second result
            is then False.
    """
    # [b, n, p]
    chosen = at_positions(wanted, positions, attention_mask, segment_ids)
    # [b, n]
    count = jnp.sum(chosen, axis=-1)
    if not isinstance(count, jax.core.Tracer):
        for row, i in np.argwhere(np.asarray(count) > 1):
            position = np.broadcast_to(np.atleast_1d(wanted), count.shape)[row, i]
            raise ValueError(
                f"position {position} is that of {count[row, i]} tokens of row {row}, but logits_at and reductions.At "
                f"need exactly one; {BY_COLUMN}"
            )
    return jnp.argmax(chosen, axis=-1), count == 1


def rows_at(
    x: jax.Array,
    wanted: jax.Array,
    positions: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """[b, n, d]: the rows of x [b, p, d] at the positions `wanted`; NaN where there is not exactly one token.

    The other arguments are those of `columns_at`.
    """
    columns, known = columns_at(wanted, positions, attention_mask, segment_ids)
    return jnp.where(known[..., None], jnp.take_along_axis(x, columns[..., None], axis=1), jnp.nan)
