"""Ready-made edits: callable pytrees whose arrays are traced, so that new values compile nothing.

Each is computed in float32 and cast to the site's dtype once. Values broadcast against the site's, from the right: a
vector [d] reaches every position of a [b, p, d] site, an array [p, 1] scales each position by its own number.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.hooks import Hook


@flax.struct.dataclass
class Add:
    """`value + scale * vector`: steering.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import edits
    >>> edits.Add(jnp.ones(3), scale=2.0)(jnp.zeros((1, 2, 3)), None).tolist()
    [[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]]
    """

    vector: jax.Array
    scale: jax.Array | float = 1.0

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        moved = value.astype(jnp.float32) + self.scale * jnp.asarray(self.vector, jnp.float32)
        return moved.astype(value.dtype)


@flax.struct.dataclass
class Scale:
    """`factor * value`; a factor of 0 ablates, an array of factors ablates where it is 0."""

    factor: jax.Array | float

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The product, in the shape and dtype of `value`."""
        return (jnp.asarray(self.factor, jnp.float32) * value.astype(jnp.float32)).astype(value.dtype)


@flax.struct.dataclass
class Replace:
    """Another value in place of the site's; where `where` is given, only at its true entries."""

    value: jax.Array
    where: jax.Array | bool = True

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The replacement, in the shape and dtype of `value`."""
        return jnp.where(self.where, jnp.asarray(self.value, value.dtype), value)
