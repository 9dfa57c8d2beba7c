"""What is done to a dictionary's input before anything else, and undone on its output.

Each is a pytree and a callable, `normalization(x) -> (normalized, mean, scale)`; the output is `y * scale + mean`.

Axes: d features of the input; `...` tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["LayerNorm", "Normalization", "UnitNorm"]


@flax.struct.dataclass
class UnitNorm:
    """x sqrt(d) / |x|: SAELens' constant_norm_rescale."""

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., d] float32 -> [..., d], [..., 1], [..., 1]."""
        scale = jnp.linalg.norm(x, axis=-1, keepdims=True) / jnp.sqrt(jnp.float32(x.shape[-1]))
        return x / scale, jnp.zeros_like(scale), scale


@flax.struct.dataclass
class LayerNorm:
    """(x - mean) / (std + eps), with the unbiased standard deviation: SAELens' layer_norm."""

    eps: float = flax.struct.field(pytree_node=False, default=1e-5)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., d] float32 -> [..., d], [..., 1], [..., 1]."""
        mean = jnp.mean(x, axis=-1, keepdims=True)
        std = jnp.std(x - mean, axis=-1, keepdims=True, ddof=1)
        return (x - mean) / (std + self.eps), mean, std


Normalization = UnitNorm | LayerNorm
