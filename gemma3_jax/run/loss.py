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

IGNORED = -100  # the label of a token without a loss, as in torch and Hugging Face


def next_token_loss(
    logits: jax.Array,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Mean cross-entropy [] float32, in nats, of the tokens under the logits one position before them.

    It is NaN if no pair of tokens counts.

    Args:
        logits: [b, p, V].
        tokens: [b, p] integer ids; the loss of a token -100 does not count. The first token of a row is not checked,
            because it is never a label.
        attention_mask: [b, p], 1 at real tokens; a pair counts when both its tokens are real.
        segment_ids: [b, p] integers; a pair counts when both its tokens have the same id.

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
    labels = tokens[:, 1:]
    counted, known = _labels(labels, logits.shape[-1])
    # [b, p - 1]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits[:, :-1], jnp.float32), jnp.where(known, labels, 0)
    )
    if attention_mask is not None:
        real = attention_mask.astype(bool)
        counted = counted & real[:, :-1] & real[:, 1:]
    if segment_ids is not None:
        counted = counted & (segment_ids[:, :-1] == segment_ids[:, 1:])
    return jnp.mean(jnp.where(known, losses, jnp.nan), where=counted)


def _check(logits: jax.Array, **arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != logits.shape[:-1]:
            raise ValueError(f"{name} has shape {array.shape}; logits {logits.shape} need {logits.shape[:-1]}")
    if arrays["attention_mask"] is not None:
        check_mask(arrays["attention_mask"])


def _labels(labels: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """Whether labels [b, p - 1] count, and whether they are ids of the vocabulary; both [b, p - 1] bool."""
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        wrong = values[((values < 0) | (values >= vocabulary)) & (values != IGNORED)]
        if wrong.size:
            raise ValueError(
                f"label {wrong[0]} is outside the vocabulary of {vocabulary}; a token whose loss should not count "
                f"has label {IGNORED}"
            )
    # JAX wraps a number to the dtype of the array that it is compared with: in uint8, -100 is 156.
    ids = labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
    return ids != IGNORED, (ids >= 0) & (ids < vocabulary)
