"""What edits and captures do in the body of a scan over layers: at each step, those of the layer that it runs.

A body is traced once for all its steps, so that a site of it has a name for each of them, or None where nobody edits,
or captures, that layer. Axes: n layers with a name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Names = Sequence[str | None]


@flax.struct.dataclass
class Rows:
    """What a scan has captured at one site of its body, in groups of layers for which that has the same shape.

    Attributes:
        groups: of each, arrays [n, ...] for its `names`, in order; one more row, that nobody asked for, where the scan
            has more steps.
        names: of each, the canonical names.
    """

    groups: tuple[Any, ...]
    names: tuple[tuple[str, ...], ...] = flax.struct.field(pytree_node=False)

    def by_name(self) -> dict[str, Any]:
        """What was captured, by canonical name."""
        return {
            name: jax.tree.map(lambda rows, i=i: rows[i], group)
            for group, names in zip(self.groups, self.names, strict=True)
            for i, name in enumerate(names)
        }


def edited_at(step: jax.Array, names: Names, edited: Callable[[str, Any], Any], value: Any) -> Any:
    """The value, by `edited(name, value)` with the name that the step has; None leaves it as it is."""
    there = [name for name in names if name is not None]
    if not there:
        return value
    branches: list[Callable[..., Any]] = [functools.partial(edited, name) for name in there]
    branches.append(lambda value: value)
    return jax.lax.switch(_place(step, there, names), branches, value)


def no_rows(names: Names, kept: Callable[[str, Any], Any], value: Any) -> Rows:
    """Rows of zeros for `kept(name, value)`, an array or pytree, of every name."""
    alike: dict[Any, list[str]] = {}
    shapes = {name: jax.eval_shape(functools.partial(kept, name), value) for name in names if name is not None}
    for name, shape in shapes.items():
        leaves, structure = jax.tree.flatten(shape)
        alike.setdefault((structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)), []).append(name)

    def zeros(group: Sequence[str]) -> Any:
        rows = len(group) + any(name not in group for name in names)
        return jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), shapes[group[0]])

    return Rows(tuple(map(zeros, alike.values())), tuple(map(tuple, alike.values())))


def written_at(
    step: jax.Array, names: Names, kept: Callable[[str, Any], Any], whole: Callable[[str], bool], rows: Rows, value: Any
) -> Rows:
    """The rows with `kept(name, value)` at the name that the step has; a name that keeps the `whole` has `value`."""

    def written(group: Any, there: tuple[str, ...]) -> Any:
        at = _place(step, there, names)
        new = value
        if not all(map(whole, there)):
            branches: list[Callable[..., Any]] = [functools.partial(kept, name) for name in there]
            branches.append(lambda _: jax.tree.map(lambda row: jnp.zeros(row.shape[1:], row.dtype), group))
            new = jax.lax.switch(at, branches, value)
        return jax.tree.map(lambda row, new: jax.lax.dynamic_update_index_in_dim(row, new, at, axis=0), group, new)

    return Rows(tuple(map(written, rows.groups, rows.names)), rows.names)


def _place(step: jax.Array, there: Sequence[str], names: Names) -> jax.Array:
    """[] int32: which of `there` the step has; behind the last where it has none of them."""
    return jnp.asarray([there.index(name) if name in there else len(there) for name in names])[step]
