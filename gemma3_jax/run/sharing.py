"""Pass each distinct array of arguments or results once; XLA would otherwise copy aliases.

Many sites have the same value: the output of a block is the input of the next, and q, k and v read the output of a
norm. XLA returns every result in a separate buffer, so a jitted function that returns all sites would copy a third of
them. Likewise, a user's function that edits every layer reads the same weights each time.
"""

from collections.abc import Hashable

import flax.struct
import jax
import numpy as np
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike

from gemma3_jax.types import PyTree


@flax.struct.dataclass
class Shared:
    """A pytree as its distinct leaves, and the index of the leaf at each place."""

    leaves: list[ArrayLike]
    places: tuple[int, ...] = flax.struct.field(pytree_node=False)
    structure: PyTreeDef = flax.struct.field(pytree_node=False)


def shared(tree: PyTree) -> Shared:
    """The pytree with each array once. Arrays are the same if they are the same object, or the same NumPy memory.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones(3)
    >>> len(shared({"a": x, "b": x, "c": 2 * x}).leaves), unshared(shared({"a": x, "b": x}))["b"] is x
    (2, True)
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = [_identity(i, leaf) for i, leaf in enumerate(leaves)]
    distinct = dict(zip(keys, leaves, strict=True))
    place = {key: i for i, key in enumerate(distinct)}
    return Shared(list(distinct.values()), tuple(place[key] for key in keys), structure)


def unshared(tree: Shared) -> PyTree:
    """The original pytree: the inverse of `shared`."""
    return jax.tree.unflatten(tree.structure, [tree.leaves[place] for place in tree.places])


def _identity(place: int, leaf: object) -> Hashable:
    if isinstance(leaf, np.ndarray) and leaf.ndim:
        return leaf.__array_interface__["data"], leaf.shape, leaf.strides, leaf.dtype
    # Small Python numbers are the same object, even if they are unrelated.
    return id(leaf) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else (place,)
