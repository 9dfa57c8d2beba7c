"""Ready-made edits: callable pytrees whose arrays are traced, so that new values compile nothing.

Each is computed in float32 and cast to the site's dtype once; several on one site run in order, and are cast once
after the last. Values broadcast against the site's, from the right: a vector [d] reaches every position of a
[b, p, d] site, an array [p, 1] scales each position by its own number. `only` restricts any edit, ready-made or your
own, to layers, positions, heads, batch rows, features or keys, all of them data.

Axes: b batch, p position, k key position, h query heads, g key/value heads, d and e features.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks import Edit, Hook, InLayout, Phase
from gemma3_jax.positions import Shape
from gemma3_jax.restrictions import Only, as_index, axes_of, check_only, check_range, has_booleans, only
from gemma3_jax.sites import site

__all__ = [
    "Add",
    "Clamp",
    "FromCache",
    "FromRow",
    "Mean",
    "Noise",
    "Only",
    "ProjectOut",
    "Replace",
    "Scale",
    "check",
    "in_layout",
    "only",
]


@flax.struct.dataclass
class Add:
    """`value + scale * vector`: steering. With `relative`, the vector is first given the norm of the value.

    With `relative`, `scale` 0.1 moves each value [..., d] by a tenth of its own length along `vector`. A bfloat16 site
    rounds the sum: entries of 256 to 512 lie 2 apart, so that of a step 500 times shorter than a Gaussian value about
    80 % arrives; of longer ones, and beside one massive feature, nearly all. Source: activation addition
    (arXiv 2308.10248).

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import edits
    >>> edits.Add(jnp.ones(3), scale=2.0)(jnp.zeros((1, 2, 3)), None).tolist()
    [[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]]
    """

    vector: jax.Array
    scale: jax.Array | float = 1.0
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        x, step = _wide(value), _wide(self.vector)
        if self.relative:
            step = _unit(step) * _norm(x)
        return (x + self.scale * step).astype(value.dtype)


@flax.struct.dataclass
class Scale:
    """`factor * value`; an array of factors scales each place by its own."""

    factor: jax.Array | float

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The product, in the shape and dtype of `value`."""
        return (_wide(self.factor) * _wide(value)).astype(value.dtype)


@flax.struct.dataclass
class Replace:
    """Another value in place of the site's; where `where` is given, only at its true entries.

    `Replace(0.0)` is zero ablation; `Replace(mean)`, with a mean over a dataset, is mean ablation.
    """

    value: jax.Array | float
    where: jax.Array | bool = True

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The replacement, in the shape and dtype of `value`."""
        return jnp.where(self.where, jnp.asarray(self.value, value.dtype), value)


@flax.struct.dataclass
class Mean:
    """Mean ablation by the batch itself: each value becomes the mean over the real tokens of all rows.

    For sites with positions on their second axis, [b, p, ...]. Restricted by `only`, it is still the mean over all.
    """

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The mean [...] at every [b, p]."""
        if axes_of(hook.name, value.ndim)[:2] != ["b", "p"]:
            raise ValueError(f"{hook.name} has axes {site(hook.name).axes}; a mean over tokens needs b p first")
        mask = jnp.ones(value.shape[:2], bool) if hook.attention_mask is None else hook.attention_mask.astype(bool)
        real = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
        mean = jnp.mean(_wide(value), axis=(0, 1), keepdims=True, where=real)
        return jnp.broadcast_to(mean, value.shape).astype(value.dtype)


@flax.struct.dataclass
class ProjectOut:
    """Remove the component along `direction` [..., d]: `value - (value . u) u`, with u of length 1 along it.

    A direction of zeros removes nothing. Source: directional ablation (arXiv 2406.11717).
    """

    direction: jax.Array

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value [..., d], orthogonal to `direction`."""
        x, unit = _wide(value), _unit(_wide(self.direction))
        return (x - _along(x, unit) * unit).astype(value.dtype)


@flax.struct.dataclass
class Clamp:
    """Hold the component `value . u` between `low` and `high`, with u of length 1 along `direction` [..., d].

    The rest of the value stays. Bounds are numbers, or arrays that broadcast against the components [..., 1].
    """

    direction: jax.Array
    low: jax.Array | float = -jnp.inf
    high: jax.Array | float = jnp.inf

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value [..., d], moved along `direction` where its component was out of bounds."""
        x, unit = _wide(value), _unit(_wide(self.direction))
        component = _along(x, unit)
        return (x + (jnp.clip(component, self.low, self.high) - component) * unit).astype(value.dtype)


@flax.struct.dataclass
class FromCache:
    """The activation that another run had at the same site: one edit for every site that the cache holds.

    `cache` is the `ActivationCache` of that run, or any mapping from canonical names to arrays of the sites' shapes.
    Source: activation patching, also called causal tracing (arXiv 2202.05262).
    """

    cache: Mapping[str, jax.Array]

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The other run's activation, in the dtype of `value`."""
        if hook.name not in self.cache:
            raise ValueError(f"the cache has no {hook.name}; capture it in the other run")
        other = self.cache[hook.name]
        if other.shape != value.shape:
            raise ValueError(f"the cache has shape {other.shape} at {hook.name}; this run has {value.shape}")
        return other.astype(value.dtype)


@flax.struct.dataclass
class FromRow:
    """The activation of another row of the same batch: of `row`, or with [b] rows, of each row's own partner.

    Place by place of the array: rows that are padded differently do not line up. A traced row that the batch does not
    have gives NaN.
    """

    row: jax.Array | int

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The other rows' activations, in the shape and dtype of `value`."""
        # [b, ...] at [1] or [b]
        other = value.at[jnp.atleast_1d(self.row)].get(mode="fill")
        return jnp.broadcast_to(other, value.shape)


@flax.struct.dataclass
class Noise:
    """`value + scale * n`, with n standard normal. Each site draws its own, from `key` and its name.

    With `relative`, `scale` is in units of each value's root mean square over its last axis.
    """

    key: jax.Array
    scale: jax.Array | float
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        x = _wide(value)
        noise = jax.random.normal(jax.random.fold_in(self.key, zlib.crc32(hook.name.encode())), x.shape)
        if self.relative:
            noise = noise * _norm(x) / x.shape[-1] ** 0.5
        return (x + self.scale * noise).astype(value.dtype)


# All that these hold are values, but for the key of noise and the place of a replacement.
_OF_VALUES = Add | Scale | Replace | ProjectOut | Clamp | Noise


def with_arrays(edit: Edit) -> Edit:
    """A ready-made edit with its plain numbers as float32 arrays: `jit` compiles for each kind of number anew."""
    if isinstance(edit, Only):
        return edit.replace(edit=with_arrays(edit.edit))  # type: ignore[attr-defined] # flax adds it
    if not isinstance(edit, _OF_VALUES):
        return edit
    return jax.tree.map(lambda leaf: jnp.float32(leaf) if _is_number(leaf) else leaf, edit)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int | float | np.integer | np.floating) and not isinstance(leaf, bool)


def in_layout(edit: Edit, layout: str) -> Edit:
    """The edit for a site whose value it sees in another layout, `layout` as in `InLayout`.

    Restrictions, and edits that speak of a site's axes or name, keep to the table's layout; what is restricted, and
    any other edit, sees the other one.
    """
    if isinstance(edit, Only):
        return edit.replace(edit=in_layout(edit.edit, layout))  # type: ignore[attr-defined] # flax adds it
    return edit if isinstance(edit, Mean | FromCache) else InLayout(edit, layout)


def check(edit: Any, names: Sequence[str], config: Gemma3Config, shape: Shape, new: int = 0) -> None:
    """Refuse an edit that would act nowhere or out of range. Of what is being traced, only the shape can be checked.

    Args:
        edit: any edit; ready-made ones are checked.
        names: canonical names of the sites where it is placed.
        config: of the model.
        shape: (b, p) of the input; p is None where positions were given, which may be any.
        new: how many tokens that are written behind it will be run, each of which an edit sees alone.

    Raises:
        ValueError: naming the edit or restriction, its value and the site.
    """
    if not _phases(edit):
        raise ValueError(f"an edit at {names[0]} is kept to both phases at once, and so never acts")
    if isinstance(edit, Only):
        new = new if "generation" in _phases(edit) else 0
        check_only(edit, names, config, shape, new)
        check(edit.edit, names, config, shape, new)
    if new and isinstance(edit, Mean | FromCache):
        raise ValueError(
            f"{type(edit).__name__} at {names[0]} needs a whole text, and new tokens come one by one; "
            'keep it to the prompt: edits.only(edit, phase="prompt")'
        )
    if isinstance(edit, FromRow):
        row = as_index("row", edit.row, booleans=False)
        if row.shape not in ((), (1,), shape[:1]):
            raise ValueError(f"row has shape {row.shape}; it takes one row, or one for each of the {shape[0]}")
        check_range("row", row, shape[0], names[0])


def check_generation(edit: Any, name: str, shortest: int, new: int, moved: bool) -> None:
    """Refuse an edit whose values are for places that move, and one kept to written tokens that none of them sees.

    Args:
        edit: an edit at the site `name`.
        name: canonical name.
        shortest: tokens of the prompt's shortest row.
        new: how many tokens that are written will be run; the last never is.
        moved: whether the prompt's rows were moved to end together.

    Raises:
        ValueError: naming the site and the remedy.
    """
    if moved and _speaks_of_places(edit, site(name).axes.split()):
        raise ValueError(
            f"an edit at {name} has values for the places of the prompt, whose rows are moved to end together; pad "
            'them on the left, as `to_tokens(texts, padding_side="left")` does'
        )
    if _phases(edit) != {"generation"}:
        return
    if not new:
        raise ValueError(
            f"an edit at {name} is kept to written tokens, and with max_new_tokens=1 none of them is run; ask for more"
        )
    while isinstance(edit, Only | InLayout):
        wanted = edit.positions if isinstance(edit, Only) else None
        if wanted is not None and as_index("positions", wanted).max() < shortest:
            raise ValueError(
                f"the positions of an edit at {name} lie within the prompt, and it is kept to written tokens; positions"
                f" count from the start of the text: the first written token has {shortest} or more"
            )
        edit = edit.edit


def _phases(edit: Any) -> set[str]:
    """The phases in which an edit acts."""
    inner = _phases(edit.edit) if isinstance(edit, Only | InLayout) else set(get_args(Phase))
    return inner & {edit.phase} if isinstance(edit, Only) and edit.phase else inner


def _speaks_of_places(edit: Any, axes: Sequence[str]) -> bool:
    """Whether a ready-made edit of a value with these axes has values for its places, which must then stay as given."""
    if isinstance(edit, Only):
        return has_booleans(edit) or _speaks_of_places(edit.edit, axes)
    if isinstance(edit, InLayout):
        return _speaks_of_places(edit.edit, edit.axes(axes))
    if not isinstance(edit, _OF_VALUES):
        return isinstance(edit, FromCache | FromRow)
    # Values broadcast from the right; the key of noise is no value.
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(edit.scale if isinstance(edit, Noise) else edit)]
    # zip stops at the shorter: values have fewer axes than the site, or as many.
    return any(
        size > 1 and axis in ("p", "k")
        for shape in shapes
        for axis, size in zip(reversed(axes), reversed(shape), strict=False)
    )


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _norm(x: jax.Array) -> jax.Array:
    """[..., 1], the length of x [..., d]; its gradient is 0, not NaN, where x is."""
    return optax.safe_norm(x, 0.0, axis=-1, keepdims=True)


def _unit(x: jax.Array) -> jax.Array:
    """x [..., d] at length 1, zero where it has none; gradients are finite there too."""
    # Scaled first, so that no square over- or underflows; a constant factor changes neither result nor gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    length = _norm(x)
    return x / jnp.where(length > 0, length, 1)


def _along(x: jax.Array, unit: jax.Array) -> jax.Array:
    # [..., d] . [..., d] -> [..., 1], a sum of float32 products on every platform
    return jnp.sum(x * unit, axis=-1, keepdims=True)
