"""Traced functions for a prompt that masked columns follow, if the results for the prompt do not depend on them.

A function is traced for the prompt alone, as the user sees it. Its computation is then built again for more columns: in
every value, the axes of tokens become longer, and what was there before stays the same. `gemma3_jax.hooks.axes` decides
whether that is so. Functions for prompts of several lengths thus have the same computation, and share programs.

Axes: b batch, c column.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma3_jax.hooks.axes import Axes, DependsOnLength
from gemma3_jax.hooks.axis_rules import RULES, follow
from gemma3_jax.hooks.indices import called, may_index
from gemma3_jax.hooks.interception import Hook
from gemma3_jax.hooks.lifting import with_integers_as_inputs, with_numbers_as_inputs
from gemma3_jax.hooks.structure import Atom, aval_of, only_equation
from gemma3_jax.hooks.tracing import Computation, Traced, as_computation
from gemma3_jax.types import Integers, PyTree

Growing = tuple[tuple[bool, ...], ...]  # for each value, which of its axes grow


@flax.struct.dataclass
class Longer:
    """An edit or a reduction that was traced for a prompt, in a run with more columns.

    Attributes:
        function: its computation for more columns.
        present: [1, c] bool, the columns of the prompt; an edit does not change the others, whose values the model
            reads with a weight of 0, so they must stay finite. None for a reduction.
        axes: axes of the value with columns (static).
        has_mask: whether the function sees a mask (static).
    """

    function: Traced
    present: Integers | None
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    has_mask: bool = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> PyTree:
        """The result, of which the entries of the prompt are those of the function for the prompt alone."""
        hook = hook if self.has_mask else dataclasses.replace(hook, attention_mask=None)
        result = self.function(value, hook)
        if self.present is None:
            return result
        return only_present(self.present, self.axes, result, value)


@flax.struct.dataclass
class LongerMetric:
    """A metric that was traced for a prompt, of an output with more columns, whose gradient is 0 in those.

    Attributes:
        function, present, axes: as in `Longer`.
    """

    function: Traced
    present: Integers
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, out: jax.Array) -> jax.Array:
        """The metric of the prompt's output."""
        result: jax.Array = self.function(only_present(self.present, self.axes, out, jnp.zeros_like(out)))
        return result


def only_present(present: Integers, axes: Sequence[int], x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` in the columns that are present, along all of the axes, and `other` elsewhere."""
    for axis in axes:
        x = jnp.where(jnp.asarray(present[0]).reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, other)
    return x


def longer(
    traced: Traced, growing: Growing, columns: int, results: Growing | None = None, *, derivatives: bool = False
) -> Traced:
    """The traced function for inputs with more columns.

    Args:
        traced: a function, traced for the prompt alone.
        growing: the axes with columns of each leaf of the inputs.
        columns: number of columns that follow the prompt.
        results: the axes with columns of each result; None for any.
        derivatives: whether derivatives are taken, so that functions with rules of their own must stay calls.

    Raises:
        DependsOnLength: a result for the prompt depends on the number of columns, as far as is known.
    """
    if not any(map(any, growing)):
        return traced
    found = _longer(traced.computation, len(traced.arrays), growing, columns, results, derivatives)
    if isinstance(found, str):
        raise DependsOnLength(found)
    computation, numbers = found
    return dataclasses.replace(traced, arrays=(*numbers, *traced.arrays), computation=computation)


@functools.lru_cache(maxsize=256)
def _longer(
    computation: Computation, arrays: int, growing: Growing, columns: int, results: Growing | None, derivatives: bool
) -> tuple[Computation, tuple[ArrayLike, ...]] | str:
    """The computation for more columns, and the numbers that are its first inputs; or why there is none."""
    if computation.jaxpr.effects:
        return "it has effects, such as printing"
    jaxpr = _inlined(computation.jaxpr, derivatives)
    try:
        axes = _solved(jaxpr, arrays, growing, results)
    except DependsOnLength as error:
        return str(error)
    closed = _rebuilt(jaxpr, axes, columns)
    lifted, numbers = with_numbers_as_inputs(closed.jaxpr)
    lifted, integers = with_integers_as_inputs(lifted)
    return as_computation(lifted, computation.results), (*integers, *closed.consts, *numbers)


def _solved(jaxpr: jex.Jaxpr, arrays: int, growing: Growing, results: Growing | None) -> Axes:
    axes = Axes({x for x in jaxpr.invars[:arrays] if may_index(aval_of(x))})
    for x in jaxpr.invars[:arrays]:
        axes.fix(axes.of(x))
    for x, grow in zip(jaxpr.invars[arrays:], growing, strict=True):
        axes.set_all(x, grow)
    for equation in jaxpr.eqns:
        follow(equation, axes)
    axes.close(None if results is None else list(zip(jaxpr.outvars, results, strict=True)))
    return axes


def _inlined(jaxpr: jex.Jaxpr, derivatives: bool) -> jex.Jaxpr:
    """The jaxpr with the bodies of the functions that it calls in place of the calls, with new variables."""
    equations: list[jex.JaxprEqn] = []

    def inline(inner: jex.Jaxpr, operands: Sequence[Atom]) -> list[Atom]:
        values: dict[jex.Var, Atom] = dict(zip(inner.invars, operands, strict=True))

        def operand(x: Atom) -> Atom:
            return x if isinstance(x, jex.Literal) else values[x]

        for equation in inner.eqns:
            inputs, body = list(map(operand, equation.invars)), called(equation)
            has_rule = derivatives and equation.primitive.name == "custom_jvp_call"
            if body is None or body.constvars or has_rule:
                fresh = [jex.Var(x.aval) for x in equation.outvars]
                equations.append(equation.replace(invars=inputs, outvars=fresh))
                values |= dict(zip(equation.outvars, fresh, strict=True))
            else:
                values |= dict(zip(equation.outvars, inline(body, inputs), strict=True))
        return list(map(operand, inner.outvars))

    outputs = inline(jaxpr, jaxpr.invars)
    return jaxpr.replace(eqns=equations, outvars=outputs)


def _rebuilt(jaxpr: jex.Jaxpr, axes: Axes, columns: int) -> jex.ClosedJaxpr:
    """The same equations for longer axes."""

    def shape(x: Atom) -> tuple[int, ...]:
        return tuple(size + columns * grows for size, grows in zip(aval_of(x).shape, axes.growing(x), strict=True))

    def again(equation: jex.JaxprEqn, operands: Sequence[ArrayLike]) -> list[jax.Array]:
        name, longest = equation.primitive.name, shape(equation.outvars[0])
        if name not in RULES:
            return _called_again(only_equation(jaxpr, equation), equation, operands)
        if name in _SHAPES:
            return _bound(equation, operands, **{_SHAPES[name]: longest})
        if name == "gather":
            return _bound(equation, operands, slice_sizes=_window(equation, longest))
        if name == "slice":
            return [_sliced(equation, operands[0], axes, columns, longest)]
        return _bound(equation, operands)

    def run(*inputs: jax.Array) -> list[jax.Array]:
        values: dict[jex.Var, jax.Array] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(x: Atom) -> ArrayLike:
            return x.val if isinstance(x, jex.Literal) else values[x]

        for equation in jaxpr.eqns:
            results = again(equation, list(map(value, equation.invars)))
            values |= dict(zip(equation.outvars, results, strict=True))
        return [jnp.asarray(value(x)) for x in jaxpr.outvars]

    return jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(shape(x), aval_of(x).dtype) for x in jaxpr.invars))


# The parameter with the shape of the result.
_SHAPES = {
    "broadcast_in_dim": "shape",
    "iota": "shape",
    "reshape": "new_sizes",
    "dynamic_slice": "slice_sizes",
}


def _bound(equation: jex.JaxprEqn, operands: Sequence[ArrayLike], **parameters: object) -> list[jax.Array]:
    result = equation.primitive.bind(*operands, **{**equation.params, **parameters})
    return list(result) if equation.primitive.multiple_results else [result]


def _called_again(alone: jex.ClosedJaxpr, equation: jex.JaxprEqn, operands: Sequence[ArrayLike]) -> list[jax.Array]:
    """The results of an equation that does not change, from the jaxpr of it alone."""
    given = {x: value for x, value in zip(equation.invars, operands, strict=True) if isinstance(x, jex.Var)}
    return list(jex.jaxpr_as_fun(alone)(*(given[x] for x in alone.jaxpr.invars)))


def _window(equation: jex.JaxprEqn, longest: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of what a gather reads at each index."""
    numbers, sizes = equation.params["dimension_numbers"], list(equation.params["slice_sizes"])
    absent = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = (axis for axis in range(len(sizes)) if axis not in absent)
    for axis, place in zip(window, numbers.offset_dims, strict=True):
        sizes[axis] = longest[place]
    return tuple(sizes)


def _sliced(equation: jex.JaxprEqn, x: ArrayLike, axes: Axes, columns: int, longest: tuple[int, ...]) -> jax.Array:
    """A part. In an axis that grows, a fixed part begins at an integer that may be an input: one program for all."""
    params, wholes, parts = equation.params, axes.growing(equation.invars[0]), axes.growing(equation.outvars[0])
    strides = params["strides"] or (1,) * jnp.ndim(x)
    starts, limits, first = list(params["start_indices"]), list(params["limit_indices"]), [np.int32(0)] * jnp.ndim(x)
    for axis, (whole, part) in enumerate(zip(wholes, parts, strict=True)):
        if part:
            limits[axis] += columns
        elif whole and strides[axis] == 1:
            first[axis] = np.int32(starts[axis])
            starts[axis], limits[axis] = 0, jnp.shape(x)[axis]
    value = jax.lax.slice(x, starts, limits, strides)
    return value if value.shape == longest else jax.lax.dynamic_slice_p.bind(value, *first, slice_sizes=longest)
