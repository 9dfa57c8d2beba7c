"""The weights with TransformerLens' names, read from the parameter pytree.

Axes: L layers, d hidden_size, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.cache.components import check_ids, entries
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.model.layout import BLOCKS, is_stacked, layer_params
from gemma3_jax.types import IntegersLike


def tokens_to_residual_directions(model: Model, tokens: IntegersLike) -> jax.Array:
    """The unembedding direction of each token: [..., d] for integer ids [...], in the dtype of the weights.

    The logit of a token is the product of its direction and the output of the final norm.

    Raises:
        ValueError: tokens are not integer ids, or an id is outside the vocabulary. If ids are traced, an id outside
            the vocabulary gives NaN.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> model.tokens_to_residual_directions([3, 4]).shape == (2, model.config.hidden_size)
    True
    """
    ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    check_ids(ids, model.config.vocab_size)

    # [d, V] at [...] -> [d, ...] -> [..., d]
    return jnp.moveaxis(entries(unembedding(model), (slice(None), ids)), 0, -1)


def embedding(model: Model) -> jax.Array:
    """[V, d], as stored."""
    return model.params["embed"]["weight"]


def unembedding(model: Model) -> jax.Array:
    """[d, V]; the transposed embedding if they are tied."""
    return embedding(model).T if model.config.tie_word_embeddings else model.params["unembed"]["weight"]


def stacked(model: Model, part: str, name: str) -> jax.Array:
    """One weight of every layer, [L, ...]: `stacked(model, "attn", "q")` is [L, h, d, e]."""
    if is_stacked(model.params):
        return model.params[BLOCKS][part][name]["weight"]
    layers = range(model.config.num_hidden_layers)
    return jnp.stack([layer_params(model.config, model.params, i, part, name, "weight") for i in layers])
