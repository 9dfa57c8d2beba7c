"""Arrays that stand at several places of a result leave a compiled function once.

Many sites hold the same value: a block's output is the next one's input, a norm's output is what q, k and v read. XLA
returns every result in a buffer of its own, so that a jitted function with all of them as results copies a third.
"""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Shared:
    """A pytree as its distinct leaves, and which of them stands at each place."""

    leaves: list[Any]
    places: tuple[int, ...] = flax.struct.field(pytree_node=False)
    structure: Any = flax.struct.field(pytree_node=False)


def shared(tree: Any) -> Shared:
    """The pytree, each leaf once. Inside the compiled function, where leaves that are the same object are one value.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones(3)
    >>> len(shared({"a": x, "b": x, "c": 2 * x}).leaves), unshared(shared({"a": x, "b": x}))["b"] is x
    (2, True)
    """
    leaves, structure = jax.tree.flatten(tree)
    distinct = {id(leaf): leaf for leaf in leaves}
    place = {key: i for i, key in enumerate(distinct)}
    return Shared(list(distinct.values()), tuple(place[id(leaf)] for leaf in leaves), structure)


def unshared(tree: Shared) -> Any:
    """The pytree that `shared` was given."""
    return jax.tree.unflatten(tree.structure, [tree.leaves[place] for place in tree.places])
