"""Ready-made edits: callable pytrees whose arrays are traced, so changing their values does not trigger recompilation.

An edit is computed in float32 and cast to the site's dtype once. Several edits of one site run in order, and the result
is cast once after the last. Values broadcast against the site's value from the right: a vector [d] applies to every
position of a [b, p, d] site, and an array [p, 1] scales each position by its own factor. `only` restricts an edit,
ready-made or your own, to layers, positions, heads, batch rows, features or keys; these indices are traced too.

An edit of your own can say what it needs, as these do: see `gemma3_jax.hooks.needs`.

Axes: b batch, p position, k key position, h query heads, g key/value heads, d and e features.
"""

import zlib
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import call_text
from gemma3_jax.hooks.interception import Hook
from gemma3_jax.hooks.restrictions import Only, as_index, axes_of, check_range, only
from gemma3_jax.inputs import as_array
from gemma3_jax.positions import Extent
from gemma3_jax.sites.table import site
from gemma3_jax.types import PyTree

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
    "only",
]


class ReadyMade:
    """An edit that reads only its own arrays, so it does not have to be traced at every call."""

    __repr__ = call_text

    def depends_on_length(self, axes: Sequence[str]) -> bool:
        """Whether its result at a token depends on the number of columns, at a site with these axes."""
        return False


class OfValues(ReadyMade):
    """An edit whose arrays are values that broadcast against the site's value from the right."""

    def values(self) -> PyTree:
        """The arrays that broadcast; by default all of them."""
        return self

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
        """Raise ValueError at token ids, which the arithmetic in float32 would round."""
        if not self.has_ids():
            _refuse_ids(names)

    def has_ids(self) -> bool:
        """Whether its values may be token ids."""
        return False

    def varies_by_position(self, axes: Sequence[str]) -> bool:
        """Whether it has values for single positions of a site with these axes."""
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(self.values())]
        # zip stops at the shorter sequence: values do not have more axes than the site.
        return any(
            size > 1 and axis in ("p", "k")
            for shape in shapes
            for axis, size in zip(reversed(axes), reversed(shape), strict=False)
        )

    def depends_on_length(self, axes: Sequence[str]) -> bool:
        """Values for single positions have the shape of the input."""
        return self.varies_by_position(axes)


@flax.struct.dataclass(repr=False)
class Add(OfValues):
    """`value + scale * vector`: steering. With `relative`, the vector is first scaled to the norm of the value.

    With `relative`, `scale` 0.1 moves each value [..., d] by a tenth of its length along `vector`. In bfloat16 the
    sum is rounded: entries between 256 and 512 are multiples of 2, so part of a small step is lost. A step of 1/500 of
    a Gaussian value's norm moves the value by about 80 % of the step. Longer steps lose almost nothing, nor do values
    that one massive feature dominates. Source: activation addition (arXiv 2308.10248).

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import edits
    >>> edits.Add(jnp.ones(3), scale=2.0)(jnp.zeros((1, 2, 3)), None).tolist()
    [[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]]
    """

    vector: ArrayLike
    scale: ArrayLike = 1.0
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        x, step = _wide(value), _wide(self.vector)
        if self.relative:
            step = _unit(_of_features(step, x)) * _norm(x)
        return (x + self.scale * step).astype(value.dtype)


@flax.struct.dataclass(repr=False)
class Scale(OfValues):
    """`factor * value`; `factor` may be an array that broadcasts."""

    factor: ArrayLike

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The product, in the shape and dtype of `value`."""
        return (_wide(self.factor) * _wide(value)).astype(value.dtype)


@flax.struct.dataclass(repr=False)
class Replace(OfValues):
    """Replace the value; with `where`, only at its true entries.

    `Replace(0.0)` is zero ablation; `Replace(mean)`, with a mean over a dataset, is mean ablation.
    """

    value: ArrayLike
    where: ArrayLike = True

    def has_ids(self) -> bool:
        """Whether the values are integers."""
        return jnp.issubdtype(jnp.result_type(as_array(self.value)), jnp.integer)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The replacement, in the shape and dtype of `value`."""
        return jnp.where(self.where, jnp.asarray(self.value, value.dtype), value)


@flax.struct.dataclass(repr=False)
class Mean(ReadyMade):
    """Mean ablation with the mean of the batch: each value becomes the mean over the real tokens of all rows.

    The site must have positions on its second axis, [b, p, ...]. If `only` restricts the edit, the mean is still over
    all tokens.
    """

    needs_whole_text = True
    depends_on_layout = True

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
        """Raise ValueError at token ids, which have no mean."""
        _refuse_ids(names)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The mean [...] at every [b, p]."""
        if axes_of(hook.name, value.ndim)[:2] != ["b", "p"]:
            raise ValueError(f"{hook.name} has axes {site(hook.name).axes}; a mean over tokens needs b p first")
        mask = jnp.ones(value.shape[:2], bool) if hook.attention_mask is None else hook.attention_mask.astype(bool)
        real = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
        mean = jnp.mean(_wide(value), axis=(0, 1), keepdims=True, where=real)
        return jnp.broadcast_to(mean, value.shape).astype(value.dtype)


@flax.struct.dataclass(repr=False)
class ProjectOut(OfValues):
    """Remove the component along `direction` [..., d]: `value - (value . u) u`, with u of length 1 along it.

    A direction of zeros removes nothing. Source: directional ablation (arXiv 2406.11717).
    """

    direction: ArrayLike

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value [..., d], orthogonal to `direction`."""
        x = _wide(value)
        unit = _unit(_of_features(_wide(self.direction), x))
        return (x - _along(x, unit) * unit).astype(value.dtype)


@flax.struct.dataclass(repr=False)
class Clamp(OfValues):
    """Clamp the component `value . u` to `low` and `high`, with u of length 1 along `direction` [..., d].

    The rest of the value does not change. Bounds are numbers, or arrays that broadcast against the components [..., 1].
    """

    direction: ArrayLike
    low: ArrayLike = -jnp.inf
    high: ArrayLike = jnp.inf

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
        """Raise ValueError if there are no bounds, or one is above the other; traced bounds are not checked."""
        super().check(names, config, extent, new)
        if isinstance(self.low, jax.core.Tracer) or isinstance(self.high, jax.core.Tracer):
            return
        low, high = (np.asarray(as_array(bound), np.float32) for bound in (self.low, self.high))
        if (np.isneginf(low) & np.isposinf(high)).all():
            raise ValueError(f"edits.Clamp at {names[0]} has no bounds; give low or high")
        if (low > high).any():
            raise ValueError(f"edits.Clamp at {names[0]} has low {self.low} above high {self.high}")

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value [..., d], moved along `direction` where its component was out of bounds."""
        x = _wide(value)
        unit = _unit(_of_features(_wide(self.direction), x))
        component = _along(x, unit)
        return (x + (jnp.clip(component, self.low, self.high) - component) * unit).astype(value.dtype)


@flax.struct.dataclass(repr=False)
class FromCache(ReadyMade):
    """The activation of another run at the same site: one edit for every site in the cache.

    `cache` is the `ActivationCache` of that run, or any mapping from canonical names to arrays of the sites' shapes.
    Source: activation patching, also called causal tracing (arXiv 2202.05262).
    """

    cache: Mapping[str, jax.Array]

    needs_whole_text = True
    depends_on_layout = True

    def varies_by_position(self, axes: Sequence[str]) -> bool:
        """The other run has a value for each position."""
        return True

    def depends_on_length(self, axes: Sequence[str]) -> bool:
        """The other run's shape is that of the input."""
        return True

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The other run's activation, in the dtype of `value`."""
        if hook.name not in self.cache:
            raise ValueError(f"the cache has no {hook.name}; capture it in the other run")
        other = self.cache[hook.name]
        if other.shape != value.shape:
            raise ValueError(f"the cache has shape {other.shape} at {hook.name}; this run has {value.shape}")
        return other.astype(value.dtype)


@flax.struct.dataclass(repr=False)
class FromRow(ReadyMade):
    """The activation of another row of the same batch: of `row`, or, with [b] rows, of a different row for each row.

    Rows are matched by array index, so rows with different padding are not aligned. A traced row outside the batch
    gives NaN.
    """

    row: jax.Array | int

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int) -> None:
        """Raise ValueError for a row that the batch does not have."""
        row = as_index("row", self.row, booleans=False)
        if row.shape not in ((), (1,), (extent.rows,)):
            raise ValueError(f"row has shape {row.shape}; it must be one row, or one for each of the {extent.rows}")
        check_range("row", row, extent.rows, names[0])

    def varies_by_position(self, axes: Sequence[str]) -> bool:
        """The other row has a value for each position."""
        return True

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The other rows' activations, in the shape and dtype of `value`."""
        # [b, ...] at [1] or [b]
        other = value.at[jnp.atleast_1d(self.row)].get(mode="fill")
        return jnp.broadcast_to(other, value.shape)


@flax.struct.dataclass(repr=False)
class Noise(OfValues):
    """`value + scale * n`, with n standard normal. Each site has different noise, from `key` and the site's name.

    With `relative`, `scale` is in units of each value's root mean square over its last axis. During generation, every
    new token gets the same noise. A run of another shape gets other noise.
    """

    key: jax.Array
    scale: ArrayLike
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
        """Raise ValueError at token ids, and for something else than a random key."""
        super().check(names, config, extent, new)
        dtype = getattr(self.key, "dtype", np.dtype(object))
        raw = dtype == np.uint32 and self.key.ndim  # as jax.random.PRNGKey makes it
        if not raw and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise ValueError(f"edits.Noise at {names[0]} has key {self.key!r}; it must be jax.random.key(seed)")

    def values(self) -> PyTree:
        """The key is not a value."""
        return self.scale

    def depends_on_length(self, axes: Sequence[str]) -> bool:
        """Another shape has other random numbers."""
        return True

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        x = _wide(value)
        noise = jax.random.normal(jax.random.fold_in(self.key, zlib.crc32(hook.name.encode())), x.shape)
        if self.relative:
            noise = noise * _norm(x) / x.shape[-1] ** 0.5
        return (x + self.scale * noise).astype(value.dtype)


def _refuse_ids(names: Sequence[str]) -> None:
    ids = [name for name in names if site(name).dtype == "int32"]
    if ids:
        raise ValueError(f"{ids[0]} holds token ids: replace them with integers, edits.Replace(ids)")


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _of_features(direction: jax.Array, x: jax.Array) -> jax.Array:
    """The direction [..., d], after a check that it has the d features of x; one feature would broadcast."""
    if direction.shape[-1:] != x.shape[-1:]:
        raise ValueError(f"the direction has shape {direction.shape}; its last axis must be {x.shape[-1]} features")
    return direction


def _norm(x: jax.Array) -> jax.Array:
    """[..., 1], the length of x [..., d]; its gradient is 0, not NaN, where x is 0."""
    return optax.safe_norm(x, 0.0, axis=-1, keepdims=True)


def _unit(x: jax.Array) -> jax.Array:
    """x [..., d] scaled to length 1; 0 where x is 0, with finite gradients."""
    # Scale first, so that squares do not over- or underflow; a constant factor does not change result or gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    length = _norm(x)
    return x / jnp.where(length > 0, length, 1)


def _along(x: jax.Array, unit: jax.Array) -> jax.Array:
    # [..., d] . [..., d] -> [..., 1], a sum of float32 products on every platform
    return jnp.sum(x * unit, axis=-1, keepdims=True)
