"""Find heads that attend like a previous-token head, a duplicate-token head or an induction head.

Axes: L layers, b batch, h query heads, p query position, k key position.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma3_jax.grids import named_grid
from gemma3_jax.hooked.buckets import longest
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.positions import default_positions, packed_documents
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import run
from gemma3_jax.run.request import Request
from gemma3_jax.sites.names import block
from gemma3_jax.types import Integers, IntegersLike, Params

HeadKind = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
ErrorMeasure = Literal["mul", "abs"]


def detect_heads(
    model: HookedGemma3,
    input: Input,
    pattern: HeadKind | ArrayLike,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    attention_mask: IntegersLike | None = None,
) -> np.ndarray:
    """How well each head's attention pattern agrees with a given one: [L, h] float32, averaged over the batch.

    The result is a NumPy array that shows its extremes; inside `jit`, a JAX array.
    The score of a row does not depend on its padding or on the other rows. Source: TransformerLens' `detect_head`,
    which has the same scores (rounded to three digits under "abs").

    Args:
        model: the model.
        input: text, texts, or token ids.
        pattern: a kind of head, see `detection_pattern`, or a pattern to compare with, [p, p], query by key.
        exclude_bos: leave out the attention to each row's first token, to which inactive heads attend.
        exclude_current_token: leave out the attention of each token to itself.
        error_measure: "mul" or "abs". "mul" is the share of the head's attention that is on the pattern (of zeros and
            ones): 0 to 1, and NaN if the exclusions leave no attention. "abs" is 1 minus the mean over queries of the
            sum of absolute differences: 1 if the patterns are equal, -1 if they do not overlap.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.

    Memory: that of the forward pass. Its largest value is one layer's attention pattern, 4 * b * h * p * p bytes, which
    is reduced to b * h numbers on the device before the pattern of the next layer is computed.

    Raises:
        ValueError: an unknown kind or measure; a pattern of another shape, or one with attention to later tokens,
            which a causal model cannot have.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import detect_heads
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> scores = detect_heads(model, "ba ke lo mu ti so re ba ke lo mu ti so re", "induction_head", exclude_bos=True)
    >>> scores.shape, (scores.max(axis=1) > 0.5).tolist()  # this model has them in layer 1
    ((4, 4), [False, True, False, False])
    """
    if error_measure not in get_args(ErrorMeasure):
        raise ValueError(f"error_measure is {error_measure!r}; it must be 'mul' or 'abs'")
    request = request_of(model, model.inputs(input, attention_mask), block("*", "attn.hook_pattern"), return_type=None)
    wide, extra = longest(model.params, request)
    tokens = jnp.asarray(wide.source)
    mask = None if wide.attention_mask is None else jnp.asarray(wide.attention_mask)
    documents = packed_documents(wide.segment_ids, wide.positions, mask)
    if isinstance(pattern, str):
        expected = detection_pattern(pattern, tokens, mask, documents)
    else:
        expected = _checked(pattern, request.source, model.config.use_bidirectional_attention)
        expected = jnp.pad(expected, ((0, 0), (0, extra), (0, extra))) if extra else expected
    compared = _compared(tokens, mask, documents, exclude_bos, exclude_current_token)
    scores = run_compiled(_scores, model.params, wide, expected, compared, error_measure=error_measure)
    what = pattern if isinstance(pattern, str) else "attention on a pattern"
    return named_grid(scores, ("layer", "head"), what, config=model.config)


def detection_pattern(
    kind: HeadKind,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """[b, p, k] float32, 1 where a head of that kind attends, always within one document.

    Args:
        kind: "previous_token_head" attends to the token before; "duplicate_token_head" to every earlier occurrence of
            the same token; "induction_head" to the token after every earlier occurrence of the same token.
        tokens: [b, p] ids.
        attention_mask: [b, p], 1 at real tokens.
        segment_ids: [b, p] integers, the document of each token.

    Raises:
        ValueError: unknown kind.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax.analysis import detection_pattern
    >>> detection_pattern("induction_head", jnp.array([[7, 8, 7]]))[0, 2].tolist()
    [0.0, 1.0, 0.0]
    """
    if kind not in get_args(HeadKind):
        raise ValueError(f"there is no head kind {kind!r}; the kinds are {', '.join(get_args(HeadKind))}")
    pairs = _pairs(_real(tokens, attention_mask), segment_ids)
    if kind == "previous_token_head":
        attends = jnp.eye(tokens.shape[1], k=-1, dtype=bool)[None]
    else:
        # [b, p, k]
        attends = jnp.tril((tokens[:, :, None] == tokens[:, None, :]) & pairs, k=-1)
    if kind == "induction_head":
        attends = jnp.pad(attends, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    return (attends & pairs).astype(jnp.float32)


def _scores(
    params: Params, request: Request, expected: jax.Array, compared: jax.Array, *, error_measure: ErrorMeasure
) -> jax.Array:
    _, cache = run(params, request)
    # [b, p] -> [b, 1]
    real = _real(request.source, request.attention_mask)
    queries = jnp.sum(real, axis=1, dtype=jnp.float32)[:, None]

    def agreement(pattern: jax.Array) -> jax.Array:
        # [b, h, p, k] over [b, 1, p, k] -> [b, h]
        if error_measure == "mul":
            return _sum(pattern * expected[:, None], compared) / _sum(pattern, compared)
        return 1 - _sum(jnp.abs(pattern - expected[:, None]), compared) / queries

    return jnp.stack([jnp.mean(agreement(pattern), axis=0) for pattern in cache.values()])


def _sum(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(-2, -1), where=where[:, None])


def _compared(
    tokens: jax.Array,
    attention_mask: jax.Array | None,
    documents: jax.Array | None,
    exclude_bos: bool,
    exclude_current_token: bool,
) -> jax.Array:
    """[b, p, k] bool: which entries of a pattern count."""
    compared = _pairs(_real(tokens, attention_mask), documents)
    if exclude_bos:
        # [b, 1, k]
        compared &= default_positions(tokens.shape, attention_mask, documents)[:, None] > 0
    return compared & ~jnp.eye(tokens.shape[1], dtype=bool) if exclude_current_token else compared


def _checked(pattern: ArrayLike, tokens: Integers, bidirectional: bool) -> jax.Array:
    length = tokens.shape[1]
    if np.shape(pattern) != (length, length):
        raise ValueError(
            f"the pattern has shape {np.shape(pattern)}; the input of {length} tokens needs {length, length}"
        )
    if not bidirectional and not isinstance(pattern, jax.core.Tracer) and np.triu(pattern, k=1).any():
        raise ValueError("the pattern has attention to later tokens (above the diagonal); rows are queries")
    return jnp.asarray(pattern, jnp.float32)[None]


def _real(tokens: Integers, attention_mask: Integers | None) -> jax.Array:
    """[b, p] bool"""
    return jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)


def _pairs(real: jax.Array, documents: jax.Array | None) -> jax.Array:
    """[b, p, k] bool: query and key are real tokens of one document."""
    # [b, p, 1] with [b, 1, k]
    pairs = real[:, :, None] & real[:, None, :]
    return pairs if documents is None else pairs & (documents[:, :, None] == documents[:, None, :])
