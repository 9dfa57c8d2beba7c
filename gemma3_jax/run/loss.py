"""The language model's loss.

Axes: b batch, p position, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax.inputs import as_array
from gemma3_jax.positions import check_mask
from gemma3_jax.types import Integers, IntegersLike

IGNORED = -100  # the label of a token without a loss, as in torch and Hugging Face


def next_token_loss(
    logits: jax.Array,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    per_row: bool = False,
) -> jax.Array:
    """Mean cross-entropy [] float32, in nats, of the tokens under the logits one position before them.

    It is NaN if no pair of tokens counts.

    Args:
        logits: [b, p, V].
        tokens: [b, p] integer ids, or other labels in their columns; the loss of a label -100 does not count. The
            first label of a row is not checked, because nothing predicts it.
        attention_mask: [b, p], 1 at real tokens; a pair counts when both its tokens are real.
        segment_ids: [b, p] integers; a pair counts when both its tokens have the same id.
        per_row: return the mean of each row, [b].

    Raises:
        ValueError: shapes do not match, the mask has values other than 0 and 1, or a token other than -100 is outside
            the vocabulary. If tokens are traced, the loss is NaN instead.

    >>> logits = jnp.zeros((1, 3, 4))
    >>> float(next_token_loss(logits, jnp.array([[0, 1, -100]]))) == float(jnp.log(jnp.float32(4)))
    True
    """
    logits, tokens, attention_mask, segment_ids = cast(
        Any, map(as_array, (logits, tokens, attention_mask, segment_ids))
    )
    _check(logits, tokens=tokens, attention_mask=attention_mask, segment_ids=segment_ids)
    check_labels(tokens, logits.shape[-1])
    _, _, labels = counted_labels(tokens, logits.shape[-1])
    # [b, p - 1]
    losses = cross_entropy(jnp.asarray(logits[:, :-1], jnp.float32), labels)
    return mean_loss(losses, tokens, logits.shape[-1], attention_mask, segment_ids, per_row=per_row)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each label: [...] float32 of logits [..., V] float32 and ids [...]."""
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses


def mean_loss(
    losses: jax.Array,
    tokens: jax.Array,
    vocabulary: int,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    per_row: bool,
) -> jax.Array:
    """The mean of the losses [b, p - 1] of the tokens after the first; the other arguments as in `next_token_loss`."""
    counted, known, _ = counted_labels(tokens, vocabulary)
    if attention_mask is not None:
        real = attention_mask.astype(bool)
        counted = counted & real[:, :-1] & real[:, 1:]
    if segment_ids is not None:
        counted = counted & (segment_ids[:, :-1] == segment_ids[:, 1:])
    return jnp.mean(jnp.where(known, losses, jnp.nan), axis=1 if per_row else None, where=counted)


def _check(logits: jax.Array, **arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != logits.shape[:-1]:
            raise ValueError(f"{name} has shape {array.shape}; logits {logits.shape} need {logits.shape[:-1]}")
    if arrays["attention_mask"] is not None:
        check_mask(arrays["attention_mask"])


def check_labels(labels: IntegersLike, vocabulary: int) -> None:
    """Check labels [b, p] after the first column, unless they are traced.

    Raises:
        ValueError: one is neither an id of the vocabulary nor -100.
    """
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)[:, 1:]
    wrong = values[((values < 0) | (values >= vocabulary)) & (values != IGNORED)]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is outside the vocabulary of {vocabulary}; a token whose loss should not count "
            f"has label {IGNORED}"
        )


def counted_labels(labels: Integers, vocabulary: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of labels [b, p] after the first: which count, which are ids of the vocabulary, and the ids; each [b, p - 1]."""
    # JAX wraps a number to the dtype of the array that it is compared with: in uint8, -100 is 156.
    ids = jnp.asarray(labels[:, 1:])
    ids = ids if ids.dtype.itemsize >= 4 else ids.astype(jnp.int32)
    known = (ids >= 0) & (ids < vocabulary)
    return ids != IGNORED, known, jnp.where(known, ids, 0)
