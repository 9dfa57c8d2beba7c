"""The weights under TransformerLens' names; a part of `HookedGemma3`.

Axes: L layers, d hidden_size, V vocabulary, h query heads, g key/value heads, e head_dim, f intermediate_size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config
from gemma3_jax.stacking import layer_params


class Weights:
    """Reads the parameter pytree."""

    config: Gemma3Config
    params: Any

    def tokens_to_residual_directions(self, tokens: Any) -> jax.Array:
        """The unembedding's direction of each token: [..., d] of ids [...].

        A final residual stream's product with it, behind the final norm, is the token's logit.
        """
        # [d, V] at [...] -> [d, ...] -> [..., d]
        return jnp.moveaxis(self.W_U.at[:, jnp.asarray(tokens)].get(mode="fill", fill_value=jnp.nan), 0, -1)

    @property
    def W_E(self) -> jax.Array:
        """[V, d] embedding as stored: the model multiplies its rows by sqrt(d)."""
        return self.params["embed"]["weight"]

    @property
    def W_U(self) -> jax.Array:
        """[d, V] unembedding; the transposed embedding where they are tied."""
        return self.W_E.T if self.config.tie_word_embeddings else self.params["unembed"]["weight"]

    @property
    def W_Q(self) -> jax.Array:
        """[L, h, d, e], stacked over layers afresh at each access, as are all below."""
        return self._stacked("attn", "q")

    @property
    def W_K(self) -> jax.Array:
        """[L, g, d, e]: one per key/value head."""
        return self._stacked("attn", "k")

    @property
    def W_V(self) -> jax.Array:
        """[L, g, d, e]: one per key/value head."""
        return self._stacked("attn", "v")

    @property
    def W_O(self) -> jax.Array:
        """[L, h, e, d]."""
        return self._stacked("attn", "o")

    @property
    def W_gate(self) -> jax.Array:
        """[L, d, f]."""
        return self._stacked("mlp", "gate")

    @property
    def W_in(self) -> jax.Array:
        """[L, d, f]: the up projection."""
        return self._stacked("mlp", "in")

    @property
    def W_out(self) -> jax.Array:
        """[L, f, d]."""
        return self._stacked("mlp", "out")

    def _stacked(self, part: str, name: str) -> jax.Array:
        layers = range(self.config.num_hidden_layers)
        return jnp.stack([layer_params(self.config, self.params, i, part, name, "weight") for i in layers])
