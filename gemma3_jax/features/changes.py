"""What changed features of a dictionary add to its output.

Axes: b batch, p position, d features of a site, n changed features; `...` tokens.
"""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gemma3_jax.features.activations import group_of
from gemma3_jax.features.parts import Feature, Part, reader_of, restricted_to, written
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.inputs import as_array
from gemma3_jax.types import Integers


class Changes(NamedTuple):
    """Changes of n features of one layer: each becomes its value if it is set, and else its old value times a factor.

    Attributes:
        indices: [n] int32.
        values: [n], or [..., n]; 0 where a feature is not set.
        factors: [n]; 0 where it is.
    """

    indices: jax.Array
    values: jax.Array
    factors: jax.Array

    def of(self, part: Part) -> "Changed":
        """These changes in a part."""
        together = part.activation.limit is not None or group_of(part.activation) > 1
        return Changed(self, restricted_to(part, self.indices), part if together else None)


@flax.struct.dataclass
class Changed:
    """A part with changes.

    Attributes:
        changes: the changes, as `changes_of` returns them.
        part: with the changed features alone.
        whole: the part, if all its features together decide which are active; or None.
    """

    changes: Changes
    part: Part
    whole: Part | None

    def __call__(self, x: jax.Array) -> jax.Array:
        """What they add to the output: [..., d] float32, for the input x."""
        x = self.part.flat(x)
        # [..., n]
        indices, values, factors = self.changes
        old = self.part.encode(x) if self.whole is None else self.whole.encode(x)[..., indices]
        return written(self.part, values + (factors - 1) * old, x)


def changes_of(
    sae: Dictionary,
    values: Mapping[Feature, ArrayLike],
    factors: Mapping[Feature, ArrayLike],
    ablated: Sequence[Feature],
) -> dict[int | None, Changes]:
    """The changes of each layer that the dictionary reads; None is the only one of a dictionary of one site.

    Raises:
        ValueError: a feature is not one of the dictionary, or is named twice; or an argument is of another form.
    """
    for name, given in (("set", values), ("scale", factors)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {reprlib.repr(given)}; it maps features to numbers, as in {{1234: 0.0}}")
    if not isinstance(ablated, Iterable) or not getattr(ablated, "ndim", 1):
        raise ValueError(f"ablate is {reprlib.repr(ablated)}; it takes several features, as in [1234]")
    named: list[tuple[Feature, ArrayLike, ArrayLike]] = [(feature, value, 0.0) for feature, value in values.items()]
    named += [(feature, 0.0, factor) for feature, factor in factors.items()]
    named += [(feature, 0.0, 0.0) for feature in ablated]
    by_layer: dict[int | None, list[tuple[Integers, ArrayLike, ArrayLike]]] = {}
    for feature, value, factor in named:
        layer, index = reader_of(sae, feature)
        by_layer.setdefault(layer, []).append((index % sae.width, value, factor))
    changes = {}
    for layer, several in by_layer.items():
        indices, new, scales = zip(*several, strict=True)
        known = [int(index) for index in indices if not isinstance(index, jax.core.Tracer)]
        twice = sorted({index for index in known if known.count(index) > 1})
        if twice:
            raise ValueError(f"feature {twice[0]} is changed twice; name it once in set, scale and ablate")
        changes[layer] = Changes(jnp.stack(list(map(jnp.asarray, indices))), _stacked(new), _stacked(scales))
    return changes


def _stacked(numbers: Sequence[ArrayLike]) -> jax.Array:
    """[..., n] float32, of values that broadcast."""
    arrays = [jnp.asarray(as_array(number), jnp.float32) for number in numbers]
    return jnp.stack(jnp.broadcast_arrays(*arrays), axis=-1)
