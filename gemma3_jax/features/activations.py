"""Activations of dictionaries: from the encoder's products z to the features f, in float32.

Each is a pytree and a callable. `threshold`, `r_mag`, `b_gate` and `b_mag` are arrays, so other values do not compile
anything. `each` computes some features without the others: groups of them, in `GroupMax`. Of its results, `TopK` keeps
the `limit` largest.

Axes: f features; `...` tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp

__all__ = ["Activation", "Gated", "GroupMax", "JumpRelu", "Relu", "TopK"]


@flax.struct.dataclass
class Relu:
    """max(z, 0).

    >>> Relu()(jnp.asarray([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def each(self, z: jax.Array) -> jax.Array:
        """[..., f] float32, feature by feature."""
        return jax.nn.relu(z)

    __call__ = each

    @property
    def limit(self) -> int | None:
        """The number of features of a token that may be active; None if any may."""
        return None


@flax.struct.dataclass
class JumpRelu:
    """z where z > threshold, strictly, and 0 elsewhere. The gradient is that of z where it is kept.

    Attributes:
        threshold: [f] or [].
        rectify: also set negative z to 0, which matters where a threshold is negative. Google, SAELens and
            dictionary_learning do so; circuit-tracer does not.

    >>> JumpRelu(jnp.asarray(1.0))(jnp.asarray([0.5, 1.0, 2.0])).tolist()
    [0.0, 0.0, 2.0]
    """

    threshold: jax.Array
    rectify: bool = flax.struct.field(pytree_node=False, default=True)

    def each(self, z: jax.Array) -> jax.Array:
        """[..., f] float32, feature by feature."""
        kept = z > self.threshold.astype(jnp.float32)
        if self.rectify:
            kept &= z > 0
        return jnp.where(kept, z, 0.0)

    __call__ = each

    @property
    def limit(self) -> int | None:
        """None: any number of features may be active."""
        return None


@flax.struct.dataclass
class Gated:
    """exp(r_mag) z + b_mag, if that is positive and so is z + b_gate; else 0. The encoder has no bias.

    From https://arxiv.org/abs/2404.16014. `r_mag`, `b_gate` and `b_mag` are [f].
    """

    r_mag: jax.Array
    b_gate: jax.Array
    b_mag: jax.Array

    def each(self, z: jax.Array) -> jax.Array:
        """[..., f] float32, feature by feature."""
        r_mag, b_gate, b_mag = (part.astype(jnp.float32) for part in (self.r_mag, self.b_gate, self.b_mag))
        return jnp.where(z + b_gate > 0, jax.nn.relu(jnp.exp(r_mag) * z + b_mag), 0.0)

    __call__ = each

    @property
    def limit(self) -> int | None:
        """None: any number of features may be active."""
        return None


@flax.struct.dataclass
class TopK:
    """The k largest positive z of each token, and 0 elsewhere. Of equal values the first ones are kept.

    >>> TopK(2)(jnp.asarray([3.0, 1.0, 2.0, -1.0])).tolist()
    [3.0, 0.0, 2.0, 0.0]
    """

    k: int = flax.struct.field(pytree_node=False)

    def each(self, z: jax.Array) -> jax.Array:
        """[..., f] float32: what a feature is if it is among the k largest."""
        return jax.nn.relu(z)

    def __call__(self, z: jax.Array) -> jax.Array:
        """[..., f] float32."""
        f = self.each(z)
        # [..., f] -> [..., k]
        _, indices = jax.lax.top_k(f, min(self.k, f.shape[-1]))
        kept = jnp.put_along_axis(jnp.zeros(f.shape, bool), indices, True, axis=-1, inplace=False)
        return jnp.where(kept, f, 0.0)

    @property
    def limit(self) -> int | None:
        """k."""
        return self.k


@flax.struct.dataclass
class GroupMax:
    """The largest z of each group of `group` neighbouring features, if it is positive, and 0 elsewhere.

    Of equal values the first is kept.

    >>> GroupMax(2)(jnp.asarray([3.0, 4.0, -2.0, -1.0])).tolist()
    [0.0, 4.0, 0.0, 0.0]
    """

    group: int = flax.struct.field(pytree_node=False)

    def each(self, z: jax.Array) -> jax.Array:
        """[..., f] float32, group by group."""
        # [..., f] -> [..., f / group, group]
        groups = jax.nn.relu(z).reshape(*z.shape[:-1], -1, self.group)
        kept = jax.nn.one_hot(jnp.argmax(groups, axis=-1), self.group, dtype=bool)
        return jnp.where(kept, groups, 0.0).reshape(z.shape)

    __call__ = each

    @property
    def limit(self) -> int | None:
        """None: each group has an active feature."""
        return None


def group_of(activation: "Activation") -> int:
    """The number of neighbouring features that are computed together."""
    return activation.group if isinstance(activation, GroupMax) else 1


Activation = GroupMax | Relu | JumpRelu | Gated | TopK
