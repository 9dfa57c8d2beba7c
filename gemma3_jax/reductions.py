"""Reductions: what of a captured value leaves the device. Each is a callable pytree, `function(value, hook) -> arrays`.

Wherever sites are captured, a mapping from names or globs to such functions keeps what they return in place of the
value. They run inside the compiled program, behind the edits of their site, so that the whole value is never written
out. Like an edit, a function is a plain one, which is compiled in by identity, or a callable pytree, whose array leaves
are traced: a new projection compiles nothing. A list of them runs in order:

    >>> import numpy as np
    >>> from gemma3_jax import TINY, HookedGemma3, reductions
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> W_enc, b_enc = np.ones((model.config.hidden_size, 100), np.float32), np.zeros(100, np.float32)  # of an SAE

    >>> def encode(W_enc, b_enc, x, hook):
    ...     return jax.nn.relu(x @ W_enc + b_enc)
    >>> sae = [jax.tree_util.Partial(encode, W_enc, b_enc), reductions.TopK(32)]
    >>> _, cache = model.run_with_cache("ba ke lo", {"blocks.1.hook_resid_post": sae})
    >>> cache["resid_post", 1].indices.shape
    (1, 4, 32)

Axes: b batch, p position, d features, n kept positions or directions, k kept features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.hooks import Hook, as_pytree
from gemma3_jax.positions import Shape, at_positions
from gemma3_jax.products import matmul
from gemma3_jax.restrictions import as_index, check_range
from gemma3_jax.sites import Match, site

__all__ = ["At", "Cast", "Mean", "Project", "TopK", "TopValues"]

Reduction = Callable[[jax.Array, Hook], Any]


@flax.struct.dataclass
class At:
    """The value at some positions only: [b, n, ...] of [b, p, ...]; of scores and patterns, at these queries.

    `positions` are [], [n] or [b, n] integers: the tokens' positions as `Hook.positions` has them, counted over each
    row's real tokens, -1 the last. One that a row does not have gives NaN, or -1 where the site holds integers.

    >>> from gemma3_jax import TINY, HookedGemma3, reductions
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> _, cache = model.run_with_cache("ba ke lo", {"blocks.*.hook_resid_post": reductions.At([0, -1])})
    >>> cache["resid_post", 0].shape == (1, 2, model.config.hidden_size)
    True
    """

    positions: Any

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[b, n, ...], in the dtype of `value`."""
        axis = _token_axis(value, hook)
        # [b, n, p]
        chosen = at_positions(jnp.asarray(self.positions), hook.positions, hook.attention_mask)
        index, found = jnp.argmax(chosen, axis=-1), jnp.any(chosen, axis=-1)
        # [b, n], at its place among the value's axes
        place = [1] * value.ndim
        place[0], place[axis] = index.shape
        absent = jnp.nan if jnp.issubdtype(value.dtype, jnp.floating) else -1
        return jnp.where(found.reshape(place), jnp.take_along_axis(value, index.reshape(place), axis), absent)


@flax.struct.dataclass
class Mean:
    """The mean over the real tokens of each row: [b, ...] float32 of [b, p, ...]. NaN in a row that has none."""

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[b, ...] float32."""
        axis = _token_axis(value, hook)
        place = [1] * value.ndim
        place[0], place[axis] = hook.positions.shape
        mask = hook.attention_mask
        real = jnp.ones(place, bool) if mask is None else mask.astype(bool).reshape(place)
        return jnp.mean(value, axis=axis, dtype=jnp.float32, where=real)


@flax.struct.dataclass
class Project:
    """Products with n directions: [..., n] float32 of [..., d], by `matrix` [d, n]. Accumulated in float32.

    >>> import jax.numpy as jnp
    >>> Project(jnp.eye(3, 2))(jnp.asarray([[[1.0, 2.0, 3.0]]]), None).tolist()
    [[[1.0, 2.0]]]
    """

    matrix: jax.Array

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """[..., n] float32."""
        matrix = jnp.asarray(self.matrix)
        if matrix.ndim != 2 or matrix.shape[0] != value.shape[-1]:
            raise ValueError(f"matrix has shape {matrix.shape}; it must be [{value.shape[-1]}, n]")
        wide = jnp.promote_types(value.dtype, matrix.dtype)
        # [..., d] x [d, n] -> [..., n]
        return matmul("...d,dn->...n", value.astype(wide), matrix.astype(wide), jnp.float32)


@flax.struct.dataclass
class Cast:
    """The value in another dtype: `Cast("bfloat16")` halves a float32 capture, and keeps its range.

    What is too large for the dtype becomes infinite: Gemma's residual stream can pass float16's 65,504.
    """

    dtype: Any = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The value, rounded to `dtype`."""
        return value.astype(self.dtype)


class TopValues(NamedTuple):
    """What `TopK` keeps: values [..., k], the largest first, and indices [..., k] int32 of the features they are at."""

    values: jax.Array
    indices: jax.Array


@flax.struct.dataclass
class TopK:
    """The k largest features and where they are: `TopValues`, each [..., k] of [..., d].

    >>> import jax.numpy as jnp
    >>> TopK(2)(jnp.asarray([0.1, 0.7, 0.4]), None).indices.tolist()
    [1, 2]
    """

    k: int = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> TopValues:
        """`TopValues` in the dtype of `value`."""
        if not 1 <= self.k <= value.shape[-1]:
            raise ValueError(f"k is {self.k}; the last axis has {value.shape[-1]} features")
        # In float32, which keeps the order: XLA:CPU sorts narrower ones whole, which takes 14 times as long.
        narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4
        values, indices = jax.lax.top_k(value.astype(jnp.float32) if narrow else value, self.k)
        return TopValues(values.astype(value.dtype), indices)


@flax.struct.dataclass
class Steps:
    """The reductions of one site in order, checked; under a Hugging Face path they see its layout."""

    steps: tuple[Any, ...]
    layout: str | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, value: jax.Array, hook: Hook) -> Any:
        """What the last of them returns, as a pytree of arrays."""
        kept: Any = value if self.layout is None else einops.rearrange(value, self.layout)
        for step in self.steps:
            kept = _call(step, kept, hook.replace(layout=self.layout))  # type: ignore[attr-defined] # flax adds it
        return jax.tree.map(jnp.asarray, kept)

    def __str__(self) -> str:
        """What reduces, in words."""
        return ", ".join(map(_name_of, self.steps))


def as_steps(given: Reduction | Sequence[Reduction] | None, match: Match, shape: Shape) -> Steps | None:
    """The reductions that a mapping has for a site, as a pytree that can cross into `jit`; None keeps the value.

    `shape` (b, p) is that of the input; p is None where positions are given, which may be any.

    Raises:
        TypeError: what is given is no callable.
        ValueError: positions that the input cannot have.
    """
    if given is None or isinstance(given, Steps):
        return given
    steps = tuple(given) if isinstance(given, Sequence) else (given,)
    if sum(isinstance(step, At | Mean) for step in steps) > 1:
        raise ValueError(f"the reductions at {match.name} choose positions twice; give one At or Mean")
    for step in steps:
        if not callable(step):
            raise TypeError(
                f"the reduction at {match.name} is {step!r}; it must be a callable, function(value, hook) -> arrays, "
                "several in a list, or None to keep the value"
            )
    placed = (_placed(step, match.name, shape) if isinstance(step, At) else as_pytree(step) for step in steps)
    return Steps(tuple(placed), match.layout) if steps else None


def _placed(step: At, name: str, shape: Shape) -> At:
    """With its positions as an array that fits the input."""
    b, p = shape
    index = as_index("positions", step.positions, booleans=False)
    if index.ndim > 2 or (index.ndim == 2 and index.shape[0] != b):
        raise ValueError(f"positions have shape {index.shape}; at {name} they take [], [n] or [{b}, n]")
    if p is not None:
        check_range("positions", index, p, name)
    return step.replace(positions=index)  # type: ignore[attr-defined] # flax adds it


def _call(step: Reduction, value: Any, hook: Hook) -> Any:
    try:
        kept = step(value, hook)
    except Exception as error:
        error.add_note(f"in the reduction {_name_of(step)} at {hook.name}, of {jax.tree.map(jax.typeof, value)}")
        raise
    if kept is None:
        raise TypeError(f"the reduction {_name_of(step)} at {hook.name} returned None; it must return what to keep")
    return kept


def _name_of(step: Any) -> str:
    """The class of a pytree, the name of a function."""
    function = step.func if isinstance(step, jax.tree_util.Partial) else step
    return getattr(function, "__name__", type(function).__name__)


def _token_axis(value: jax.Array, hook: Hook) -> int:
    """The axis of the tokens, of queries where there are two."""
    axes = site(hook.name).axes.split()
    # Of Hugging Face's layouts only one moves it: heads first.
    theirs = hook.layout.split(" -> ")[1].split() if hook.layout else []
    axis = theirs.index("p") if "p" in theirs else axes.index("p" if "p" in axes else "k")
    if value.ndim <= axis or value.shape[axis] != hook.positions.shape[1]:
        raise ValueError(
            f"the value has shape {value.shape}, and the input {hook.positions.shape[1]} positions: positions are "
            "chosen once, by a list's first reductions, or by logits_at"
        )
    return axis
