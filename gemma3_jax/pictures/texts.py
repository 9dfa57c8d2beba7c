"""Pictures of values on texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from gemma3_jax.pictures.data import Passage
from gemma3_jax.pictures.labels import check_tokens
from gemma3_jax.pictures.numbers import check_shape, numbers
from gemma3_jax.pictures.scale import fitting_scale
from gemma3_jax.pictures.token_flow import TokenFlow


def token_values(
    tokens: Sequence[str],
    values: ArrayLike,
    *,
    title: str = "Values of tokens",
    quantity: str = "value",
    vmin: float | None = None,
    vmax: float | None = None,
) -> TokenFlow:
    """A text with each token coloured by its value: a loss, a feature's activation, an attribution.

    White is 0, blue is above 0 and red is below 0. Values that are not finite are grey.

    Args:
        tokens: [p].
        values: [p].
        quantity: name of the values, for the colour bar.
        vmin: the lowest value with a colour of its own; None: the negative of the largest magnitude, or 0 if no value
            is negative.
        vmax: the highest value with a colour of its own.

    Raises:
        ValueError: the number of values is not the number of tokens, or vmin is not below vmax.

    >>> from gemma3_jax import pictures
    >>> pictures.token_values(["ba", "ke"], [0.5, -1.0], title="Loss by token")
    TokenFlow('Loss by token')
    """
    passage = _passage("", tokens, values)
    return TokenFlow(title, [passage], fitting_scale(quantity, numbers(values), vmin, vmax))


def feature_on_texts(
    texts: Sequence[Sequence[str]],
    values: Sequence[ArrayLike],
    *,
    title: str = "A feature on texts",
    quantity: str = "activation",
    vmin: float | None = None,
    vmax: float | None = None,
) -> TokenFlow:
    """One feature on several texts, each token coloured by its value: the text with the largest value comes first.

    Args:
        texts: the tokens [p] of each text; the lengths may differ.
        values: [p] for each text.
        quantity: name of the values, for the colour bar.
        vmin: as in `token_values`; all texts share the scale.
        vmax: as in `token_values`.

    Raises:
        ValueError: the numbers of texts, tokens and values differ, or vmin is not below vmax.

    >>> from gemma3_jax import pictures
    >>> picture = pictures.feature_on_texts([["ba", "ke"], ["lo"]], [[0.5, 0.0], [2.0]])
    >>> [passage.heading for passage in picture.passages]
    ['text 1: at most 2', 'text 0: at most 0.5']
    """
    if len(texts) != len(values):
        raise ValueError(f"there are {len(texts)} texts and values for {len(values)}; pass values for each text")
    passages = [_passage(f"text {i}", *pair) for i, pair in enumerate(zip(texts, values, strict=True))]
    passages.sort(key=_largest, reverse=True)
    headed = [dataclasses.replace(each, heading=f"{each.heading}: at most {_largest(each):.4g}") for each in passages]
    every = np.concatenate([np.zeros(0), *map(numbers, values)])
    return TokenFlow(title, headed, fitting_scale(quantity, every, vmin, vmax))


def generated_values(
    prompt: Sequence[str],
    continuation: Sequence[str],
    values: ArrayLike,
    *,
    title: str = "Generation",
    quantity: str = "log-probability",
    vmin: float | None = None,
    vmax: float | None = None,
) -> TokenFlow:
    """A prompt, and below it the new tokens, each coloured by its value.

    Args:
        prompt: its tokens.
        continuation: [n], the new tokens.
        values: [n], such as a row of `Generation.log_probs`.
        quantity: name of the values, for the colour bar.
        vmin: as in `token_values`.
        vmax: as in `token_values`.

    Raises:
        ValueError: the number of values is not the number of new tokens, or vmin is not below vmax.

    >>> from gemma3_jax import TINY, HookedGemma3, generation, pictures
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> tokens = model.to_tokens("ba ke lo ba ke")
    >>> written = generation.generate(model.config, model.params, tokens, 2)
    >>> strings = model.to_str_tokens(written.tokens[0])
    >>> pictures.generated_values(strings[:-2], strings[-2:], written.log_probs[0])
    TokenFlow('Generation')
    """
    passages = [Passage("prompt", check_tokens(prompt), None), _passage("continuation", continuation, values)]
    return TokenFlow(title, passages, fitting_scale(quantity, numbers(values), vmin, vmax))


def _largest(passage: Passage) -> float:
    """The largest value of a passage; minus infinity if it has none."""
    values = np.array(passage.values)
    return float(np.max(values, initial=-np.inf, where=~np.isnan(values)))


def _passage(heading: str, tokens: Sequence[str], values: ArrayLike) -> Passage:
    array = numbers(values)
    check_shape("values", array.shape, (len(tokens),), f"{len(tokens)} tokens")
    return Passage(heading, check_tokens(tokens), array)
