"""Edits and captures inside a scan over layers: at each step, those of the layer that runs.

Inside a scan, one traced site serves several layers: `names[i]` is its canonical name at step i, or None if that layer
has no edit or capture. Axes: n layers with a name.
"""

import functools
from collections.abc import Callable, Hashable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.types import PyTree

Names = Sequence[str | None]
# From the name and the whole value of a site to what is captured: arrays, or a pytree that a reduction returned.
Reduce = Callable[[str, jax.Array], PyTree]


@flax.struct.dataclass
class Rows:
    """The captures of a scan at one site of its body, in groups of layers with the same shape.

    Attributes:
        groups: for each group, arrays [n, ...] in the order of its `names`. If the scan has more steps than names,
            there is one more row, which is unused.
        names: for each group, the canonical names.
    """

    groups: tuple[PyTree, ...]
    names: tuple[tuple[str, ...], ...] = flax.struct.field(pytree_node=False)

    def by_name(self) -> dict[str, PyTree]:
        """The captured values, by canonical name."""
        return {
            name: jax.tree.map(lambda rows, i=i: rows[i], group)
            for group, names in zip(self.groups, self.names, strict=True)
            for i, name in enumerate(names)
        }


def edited_at(
    step: jax.Array, names: Names, edited: Callable[[str, jax.Array], jax.Array], value: jax.Array
) -> jax.Array:
    """`edited(name, value)` with the name of the step; the value itself if the name is None."""
    present = [name for name in names if name is not None]
    if not present:
        return value
    branches: list[Callable[[jax.Array], jax.Array]] = [functools.partial(edited, name) for name in present]
    branches.append(lambda value: value)
    return jax.lax.switch(_place(step, present, names), branches, value)


def no_rows(names: Names, reduce: Reduce, value: jax.Array) -> Rows:
    """Rows of zeros for the captures `reduce(name, value)`, arrays or pytrees, of all names."""
    alike: dict[Hashable, list[str]] = {}
    shapes = {name: jax.eval_shape(functools.partial(reduce, name), value) for name in names if name is not None}
    for name, shape in shapes.items():
        leaves, structure = jax.tree.flatten(shape)
        alike.setdefault((structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)), []).append(name)

    def zeros(group: Sequence[str]) -> PyTree:
        rows = len(group) + any(name not in group for name in names)
        return jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), shapes[group[0]])

    return Rows(tuple(map(zeros, alike.values())), tuple(map(tuple, alike.values())))


def written_at(
    step: jax.Array, names: Names, reduce: Reduce, whole: Callable[[str], bool], rows: Rows, value: jax.Array
) -> Rows:
    """The rows with `reduce(name, value)` written at the step's name; `whole(name)` names captures of whole values."""

    def written(group: PyTree, present: tuple[str, ...]) -> PyTree:
        at = _place(step, present, names)
        if all(map(whole, present)):
            new = reduce(present[0], value)  # the same for all layers
        else:
            branches: list[Callable[[jax.Array], PyTree]] = [functools.partial(reduce, name) for name in present]
            branches.append(lambda _: jax.tree.map(lambda row: jnp.zeros(row.shape[1:], row.dtype), group))
            new = jax.lax.switch(at, branches, value)
        return jax.tree.map(lambda row, new: jax.lax.dynamic_update_index_in_dim(row, new, at, axis=0), group, new)

    return Rows(tuple(map(written, rows.groups, rows.names)), rows.names)


def _place(step: jax.Array, present: Sequence[str], names: Names) -> jax.Array:
    """[] int32: the index of the step's name in `present`, or the number of `present` names if it is not there."""
    return jnp.asarray([present.index(name) if name in present else len(present) for name in names])[step]
