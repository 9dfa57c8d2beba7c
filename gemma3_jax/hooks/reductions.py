"""Reductions: functions of a captured value that run before it leaves the device, `function(value, hook) -> arrays`.

To capture reduced values, pass a mapping from names or globs to reductions. A reduction runs inside the compiled
program, after the edits of its site, so the whole value is never written to memory. Like an edit, a reduction may be
any callable, and the arrays that it reads are traced: another projection matrix does not trigger recompilation. A list
of reductions runs in order:

    >>> import numpy as np
    >>> from gemma3_jax import TINY, HookedGemma3, reductions
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> W_enc, b_enc = np.ones((model.config.hidden_size, 100), np.float32), np.zeros(100, np.float32)  # of an SAE

    >>> def encode(x, hook):
    ...     return jax.nn.relu(x @ W_enc + b_enc)
    >>> sae = [encode, reductions.TopK(32)]
    >>> _, cache = model.run_with_cache("ba ke lo", {"blocks.1.hook_resid_post": sae})
    >>> cache["resid_post", 1].indices.shape
    (1, 4, 32)

Axes: b batch, p position, d features, n kept positions or directions, k kept features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.descriptions import call_text
from gemma3_jax.hooks.interception import Hook, as_pytree, at_least_float32, check_callable
from gemma3_jax.hooks.restrictions import Index, as_index, check_range
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.inputs import as_array, integer, lists_as_arrays
from gemma3_jax.positions import Extent, columns_at
from gemma3_jax.sites.names import Match
from gemma3_jax.sites.table import token_axis
from gemma3_jax.types import PyTree

__all__ = ["At", "Cast", "Int8", "Int8Values", "Mean", "Project", "TopK", "TopValues"]

Reduction = Callable[[jax.Array, Hook], PyTree]


@flax.struct.dataclass(repr=False)
class At:
    """The value at some positions: [b, n, ...] of [b, p, ...]. For scores and patterns these are positions of queries.

    `positions` are [], [n] or [b, n] integers, as in `Hook.positions`: they count from each row's first real token, and
    -1 is the last. A position that a row does not have gives NaN, or -1 at sites with integers. A position that several
    tokens of a row have, as in packed documents, is an error; if it is traced, it gives NaN or -1 too.

    >>> from gemma3_jax import TINY, HookedGemma3, reductions
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> _, cache = model.run_with_cache("ba ke lo", {"blocks.*.hook_resid_post": reductions.At([0, -1])})
    >>> cache["resid_post", 0].shape == (1, 2, model.config.hidden_size)
    True
    """

    __repr__ = call_text

    positions: Index

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[b, n, ...], in the dtype of `value`."""
        axis = _token_axis(value, hook)
        # [b, n]
        columns, known = columns_at(jnp.asarray(self.positions), hook.positions, hook.attention_mask, hook.segment_ids)
        # [b, n], at its place among the value's axes
        place = [1] * value.ndim
        place[0], place[axis] = columns.shape
        absent = jnp.nan if jnp.issubdtype(value.dtype, jnp.floating) else -1
        return jnp.where(known.reshape(place), jnp.take_along_axis(value, columns.reshape(place), axis), absent)


@flax.struct.dataclass(repr=False)
class Mean:
    """The mean over the real tokens of each row: [b, ...] float32 of [b, p, ...].

    It is NaN for a row without real tokens. In a row with several documents, it is the mean over all of them.
    """

    __repr__ = call_text

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[b, ...] float32."""
        axis = _token_axis(value, hook)
        place = [1] * value.ndim
        place[0], place[axis] = hook.positions.shape
        mask = hook.attention_mask
        real = jnp.ones(place, bool) if mask is None else mask.astype(bool).reshape(place)
        return jnp.mean(value, axis=axis, dtype=jnp.float32, where=real)


@flax.struct.dataclass(repr=False)
class Project:
    """Products with n directions: [..., n] float32 of [..., d] and `matrix` [d, n]. Accumulated in float32.

    >>> import jax.numpy as jnp
    >>> Project(jnp.eye(3, 2))(jnp.asarray([[[1.0, 2.0, 3.0]]]), None).tolist()
    [[[1.0, 2.0]]]
    """

    __repr__ = call_text

    matrix: ArrayLike

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[..., n] float32."""
        matrix = jnp.asarray(self.matrix)
        if matrix.ndim != 2 or matrix.shape[0] != value.shape[-1]:
            raise ValueError(f"matrix has shape {matrix.shape}; it must be [{value.shape[-1]}, n]")
        wide = jnp.promote_types(value.dtype, matrix.dtype)
        # [..., d] x [d, n] -> [..., n]
        return matmul("...d,dn->...n", value.astype(wide), matrix.astype(wide), jnp.float32)


@flax.struct.dataclass(repr=False)
class Cast:
    """The value in another dtype: `Cast("bfloat16")` halves a float32 capture, and keeps its range.

    Values that are too large for the dtype become infinite: Gemma's residual stream can exceed float16's 65,504.
    """

    __repr__ = call_text

    dtype: DTypeLike = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value, rounded to `dtype`."""
        if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"Cast({self.dtype!r}) would drop the fractions of {value.dtype}; give a floating-point dtype"
            )
        return value.astype(self.dtype)


class Int8Values(NamedTuple):
    """The result of `Int8`: int8 [..., d], and scales [..., 1] float32; the value is their product."""

    int8: jax.Array
    scales: jax.Array


@flax.struct.dataclass
class Int8:
    """The value in 8 bits, with a scale for each token (for each vector along the last axis): `Int8Values`.

    The scale is the largest magnitude over 127, so the error is at most half of it. An activation store of this takes
    a quarter of float32's bytes, and gives float32 back. A vector with an infinite entry or NaN has NaN as its scale.

    >>> import jax.numpy as jnp
    >>> small = Int8()(jnp.asarray([[1.0, -2.0, 254.0]]), None)
    >>> (small.int8 * small.scales).tolist()
    [[0.0, -2.0, 254.0]]
    """

    def __call__(self, value: jax.Array, hook: Hook) -> Int8Values:
        """`Int8Values`."""
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"Int8 takes floats; the value is {value.dtype}")
        wide = value.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        scales = jnp.where(jnp.isfinite(largest), largest / 127, jnp.nan)
        rounded = jnp.round(wide / jnp.where(scales > 0, scales, 1))
        return Int8Values(jnp.where(jnp.isnan(rounded), 0, rounded).astype(jnp.int8), scales)


class TopValues(NamedTuple):
    """The result of `TopK`: values [..., k], the largest first, and their feature indices [..., k] int32."""

    values: jax.Array
    indices: jax.Array


@flax.struct.dataclass(repr=False)
class TopK:
    """The k largest features and their indices: `TopValues`, each [..., k] of [..., d].

    >>> import jax.numpy as jnp
    >>> TopK(2)(jnp.asarray([0.1, 0.7, 0.4]), None).indices.tolist()
    [1, 2]
    """

    __repr__ = call_text

    k: int = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> TopValues:
        """`TopValues` in the dtype of `value`."""
        if not 1 <= integer("k", self.k) <= value.shape[-1]:
            raise ValueError(f"k is {self.k}; the last axis has {value.shape[-1]} features")
        # Use float32, which keeps the order. XLA:CPU sorts all features of narrower dtypes, which takes 14 times as
        # long.
        values, indices = jax.lax.top_k(value.astype(at_least_float32(value.dtype)), self.k)
        return TopValues(values.astype(value.dtype), indices)


_READY = At, Mean, Project, Cast, Int8, TopK


@flax.struct.dataclass
class Steps:
    """The checked reductions of one site, in order. Under a Hugging Face path, they see Hugging Face's layout."""

    steps: tuple[Reduction, ...]
    layout: str | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, value: jax.Array, hook: Hook) -> PyTree:
        """The result of the last reduction, as a pytree of arrays."""
        result: PyTree = value if self.layout is None else einops.rearrange(value, self.layout)
        for step in self.steps:
            result = _call(step, result, dataclasses.replace(hook, layout=self.layout))
        return jax.tree.map(jnp.asarray, result)

    def __str__(self) -> str:
        """The names of the reductions."""
        return ", ".join(map(_name_of, self.steps))


def as_steps(given: Reduction | Sequence[Reduction] | None, match: Match, extent: Extent) -> Steps | None:
    """The reductions of a site as a pytree that can be passed to `jit`; None captures the whole value.

    `extent` is the extent of the input.

    Raises:
        TypeError: a reduction is not callable.
        ValueError: the input cannot have the positions.
    """
    if given is None or isinstance(given, Steps):
        return given
    steps = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if sum(isinstance(step, At | Mean) for step in steps) > 1:
        raise ValueError(f"the reductions at {match.name} choose positions twice; give one At or Mean")
    for step in steps:
        remedy = "it must be a callable, function(value, hook) -> arrays, several in a list, or None to keep the value"
        check_callable(step, f"reduction at {match.name}", remedy)
    placed = (_placed(step, match.name, extent) if isinstance(step, At) else _as_pytree(step) for step in steps)
    return Steps(tuple(placed), match.layout) if steps else None


def is_ready(steps: Steps | Traced) -> bool:
    """Whether all reductions are those of this module, which read only their own arrays. A subclass may read more."""
    return isinstance(steps, Traced) or all(type(step) in _READY for step in steps.steps)


def _as_pytree(step: Reduction) -> Reduction:
    """The reduction as a pytree, with arrays in place of torch tensors."""
    tree: Reduction = jax.tree.map(as_array, as_pytree(step))
    tree = lists_as_arrays(tree, f"reductions.{_name_of(step)}") if type(step) in _READY else tree
    return tree


def _placed(step: At, name: str, extent: Extent) -> At:
    """The reduction with its positions as an array, after a check against the input."""
    b, p = extent.rows, None if extent.positions is not None else extent.columns
    index = as_index("positions", step.positions, booleans=False)
    if index.ndim > 2 or (index.ndim == 2 and index.shape[0] != b):
        raise ValueError(f"positions have shape {index.shape}; at {name} they must be [], [n] or [{b}, n]")
    if p is not None:
        check_range("positions", index, p, name)
    return dataclasses.replace(step, positions=index)


def _call(step: Reduction, value: PyTree, hook: Hook) -> PyTree:
    try:
        result = step(value, hook)
    except Exception as error:
        error.add_note(f"in the reduction {_name_of(step)} at {hook.name}, of {jax.tree.map(jax.typeof, value)}")
        raise
    if result is None:
        raise TypeError(f"the reduction {_name_of(step)} at {hook.name} returned None; it must return arrays")
    return result


def _name_of(step: Reduction) -> str:
    """The name of a function, or the class of a pytree."""
    function = step.func if isinstance(step, jax.tree_util.Partial) else step
    return getattr(function, "__name__", type(function).__name__)


def _token_axis(value: jax.Array, hook: Hook) -> int:
    """The axis of tokens; for sites with queries and keys, the axis of queries."""
    axis = token_axis(hook.name, hook.layout)
    if value.ndim <= axis or value.shape[axis] != hook.positions.shape[1]:
        raise ValueError(
            f"the value has shape {value.shape}, but the input has {hook.positions.shape[1]} positions: choose "
            "positions once, with the first reduction of a list or with logits_at"
        )
    return axis
