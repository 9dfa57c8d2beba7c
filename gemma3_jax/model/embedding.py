"""The embedding head: pools the final states of a text's tokens into one vector.

Axes: b batch, p position, d hidden_size, n size of the vector.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from gemma3_jax.compute.projections import linear
from gemma3_jax.config import EmbeddingHead
from gemma3_jax.model.layers import parameter

_SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


class MeanPooling(nn.Module):
    """The mean over real tokens, in float32 (`sentence_transformers` `Pooling` in mode "mean")."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p d"], attention_mask: Shaped[Array, "b p"] | None = None
    ) -> Float32[Array, "b d"]:
        real = jnp.ones(x.shape[:2], bool) if attention_mask is None else attention_mask.astype(bool)
        # [b, p, d] -> [b, d]
        total = jnp.sum(x.astype(jnp.float32), axis=1, where=real[..., None])
        # A row without real tokens gives zeros.
        return total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)


class Dense(nn.Module):
    """[b, in] @ weight [in, out] in float32 (`Dense` without bias or activation)."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self, x: Float32[Array, "b i"]) -> Float32[Array, "b o"]:
        weight = parameter(self, "weight", nn.initializers.normal(0.02), self.shape)
        # [b, in] -> [1, b, in] x [in, out] -> [b, out]
        return linear(x[None], weight)[0]


class Normalize(nn.Module):
    """[b, n] divided by its L2 norm, if `active` (`Normalize`)."""

    active: bool

    @nn.compact
    def __call__(self, x: Float32[Array, "b n"]) -> Float32[Array, "b n"]:
        return of_unit_length(x) if self.active else x


def of_unit_length(x: Float[Array, "*a n"]) -> Float[Array, "*a n"]:
    """Vectors [..., n] divided by their L2 norm. A vector of zeros stays, and has a finite gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared, _SMALLEST_NORM**2))


def embedding_of(
    head: EmbeddingHead, x: Float[Array, "b p d"], attention_mask: Shaped[Array, "b p"] | None
) -> Float32[Array, "b n"]:
    """[b, n] float32: the embeddings of texts, from the output of the final norm [b, p, d].

    Its modules are children of the module that calls it.

    Args:
        head: shape of the head.
        x: [b, p, d].
        attention_mask: [b, p], 1 at real tokens; None if all tokens are real.
    """
    x = MeanPooling(name="pooled")(x, attention_mask)
    for j, size in enumerate(head.dense, start=1):
        x = Dense((x.shape[-1], size), name=f"dense_{j}")(x)
    return Normalize(head.normalize, name="embedding")(x)
