"""Which heads attend as a previous-token, a duplicate-token or an induction head does.

Axes: L layers, b batch, h query heads, p query position, k key position.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma3_jax.forward import forward
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.text import Input

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
    attention_mask: Any = None,
) -> jax.Array:
    """How well each head's attention pattern agrees with a given one: [L, h] float32, averaged over the batch.

    Each row of the batch counts as it would alone, without its padding. Source: TransformerLens' `detect_head`, whose
    scores these are (there rounded to three digits under "abs").

    Args:
        model: the model.
        input: text, texts, or token ids.
        pattern: a kind of head, see `detection_pattern`, or the attention looked for, [p, p], query by key.
        exclude_bos: leave out the attention to each row's first token, where idle heads rest.
        exclude_current_token: leave out the attention of each token to itself.
        error_measure: "mul" for the share of the head's attention that is on the pattern (of zeros and ones): 0 to 1,
            and NaN where nothing of the head's attention is left. "abs" for 1 minus the mean over queries of the sum
            of absolute differences: 1 where both are equal, -1 where they share nothing.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.

    Memory: what the forward pass takes; one layer's attention pattern, 4 * b * h * p * p bytes, is its largest value
    and is reduced to b * h numbers on the device, before the next layer's exists.

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
        raise ValueError(f"error_measure is {error_measure!r}; it takes 'mul' and 'abs'")
    tokens, mask = model.encode(input, attention_mask)
    if isinstance(pattern, str):
        wanted = detection_pattern(pattern, tokens, mask)
    else:
        wanted = _given(pattern, tokens, model.config.use_bidirectional_attention)
    compared = _compared(tokens, mask, exclude_bos, exclude_current_token)
    return _scores(model.config, model.params, tokens, mask, wanted, compared, error_measure=error_measure)


def detection_pattern(kind: HeadKind, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
    """[b, p, k] float32, 1 where a head of that kind looks.

    Args:
        kind: "previous_token_head", at the token before; "duplicate_token_head", at every earlier occurrence of the
            same token; "induction_head", at the token after every earlier occurrence of the same token.
        tokens: [b, p] ids.
        attention_mask: [b, p], 1 at real tokens.

    Raises:
        ValueError: there is no such kind.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax.analysis import detection_pattern
    >>> detection_pattern("induction_head", jnp.array([[7, 8, 7]]))[0, 2].tolist()
    [0.0, 1.0, 0.0]
    """
    if kind not in get_args(HeadKind):
        raise ValueError(f"there is no head kind {kind!r}; the kinds are {', '.join(get_args(HeadKind))}")
    real = _real(tokens, attention_mask)
    if kind == "previous_token_head":
        looks = jnp.eye(tokens.shape[1], k=-1, dtype=bool)[None]
    else:
        # [b, p, k]
        looks = jnp.tril((tokens[:, :, None] == tokens[:, None, :]) & _pairs(real), k=-1)
    if kind == "induction_head":
        looks = jnp.pad(looks, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    return (looks & _pairs(real)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "error_measure"))
def _scores(config, params, tokens, attention_mask, wanted, compared, *, error_measure):
    name = "blocks.*.attn.hook_pattern"
    _, cache = forward(config, params, tokens, name, attention_mask=attention_mask, return_type=None)
    # [b, p] -> [b, 1]
    queries = jnp.sum(_real(tokens, attention_mask), axis=1, dtype=jnp.float32)[:, None]

    def agreement(pattern: jax.Array) -> jax.Array:
        # [b, h, p, k] over [b, 1, p, k] -> [b, h]
        if error_measure == "mul":
            return _sum(pattern * wanted[:, None], compared) / _sum(pattern, compared)
        return 1 - _sum(jnp.abs(pattern - wanted[:, None]), compared) / queries

    return jnp.stack([jnp.mean(agreement(pattern), axis=0) for pattern in cache.values()])


def _sum(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=(-2, -1), where=where[:, None])


def _compared(tokens, attention_mask, exclude_bos: bool, exclude_current_token: bool) -> jax.Array:
    """[b, p, k] bool: which entries of a pattern count."""
    real = _real(tokens, attention_mask)
    if exclude_bos:
        first = jnp.argmax(real, axis=1)
        keys = real & (jnp.arange(tokens.shape[1]) != first[:, None])
    else:
        keys = real
    compared = real[:, :, None] & keys[:, None, :]
    return compared & ~jnp.eye(tokens.shape[1], dtype=bool) if exclude_current_token else compared


def _given(pattern: Any, tokens: jax.Array, bidirectional: bool) -> jax.Array:
    length = tokens.shape[1]
    if np.shape(pattern) != (length, length):
        raise ValueError(
            f"the pattern has shape {np.shape(pattern)}; the input of {length} tokens needs {length, length}"
        )
    if not bidirectional and not isinstance(pattern, jax.core.Tracer) and np.triu(pattern, k=1).any():
        raise ValueError("the pattern has attention to later tokens (above the diagonal); rows are queries")
    return jnp.asarray(pattern, jnp.float32)[None]


def _real(tokens: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """[b, p] bool"""
    return jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)


def _pairs(real: jax.Array) -> jax.Array:
    # [b, p], [b, k] -> [b, p, k]
    return real[:, :, None] & real[:, None, :]
