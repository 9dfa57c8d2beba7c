"""What is done to a dictionary's input before anything else, and undone on an autoencoder's output.

Each is a callable: `normalization(x)`, and `normalization.undone(y, x)` for the output of the input x.

Axes: d features of the input; `...` tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["LayerNorm", "Normalization", "UnitNorm"]


@flax.struct.dataclass
class UnitNorm:
    """x sqrt(d) / norm(x): SAELens' constant_norm_rescale.

    >>> UnitNorm()(jnp.asarray([0.0, 5.0, 0.0, 0.0])).tolist()
    [0.0, 2.0, 0.0, 0.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] float32."""
        return x / self._scale(x)

    def undone(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """[..., d] float32."""
        return y * self._scale(x)

    def _scale(self, x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5


@flax.struct.dataclass
class LayerNorm:
    """(x - mean) / (std + eps), with the unbiased standard deviation: SAELens' layer_norm. Undone without eps.

    >>> LayerNorm()(jnp.asarray([1.0, 2.0, 3.0])).round(3).tolist()
    [-1.0, 0.0, 1.0]
    """

    eps: float = flax.struct.field(pytree_node=False, default=1e-5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] float32."""
        return (x - jnp.mean(x, axis=-1, keepdims=True)) / (self._std(x) + self.eps)

    def undone(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """[..., d] float32."""
        return y * self._std(x) + jnp.mean(x, axis=-1, keepdims=True)

    def _std(self, x: jax.Array) -> jax.Array:
        return jnp.std(x, axis=-1, keepdims=True, ddof=1)


Normalization = UnitNorm | LayerNorm
