"""The rules of operations on axes that may become longer: see `gemma3_jax.hooks.axes`.

An operation without a rule makes every axis that it touches fixed, and so does, for example, a mean over the axis of
tokens.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.extend.core as jex
import numpy as np
from jax.lax import GatherScatterMode

from gemma3_jax.hooks.axes import Axes
from gemma3_jax.hooks.indices import value_of
from gemma3_jax.hooks.structure import aval_of


def follow(equation: jex.JaxprEqn, axes: Axes) -> None:
    """Apply the rule of an equation.

    Raises:
        DependsOnLength: an axis would have to grow, and not.
    """
    axes.at(equation)
    rule = RULES.get(equation.primitive.name)
    if rule is None:
        for x in (*equation.invars, *equation.outvars):
            axes.fix(axes.of(x))
    else:
        rule(equation, axes)
    axes.compute(equation)


def _elementwise(equation: jex.JaxprEqn, axes: Axes) -> None:
    """Operands have the axes of the result; an axis of size 1 may stand for a longer one, and scalars have none."""
    [out] = equation.outvars
    for x in equation.invars:
        if axes.of(x):
            for axis, size, place, longest in zip(
                axes.of(x), aval_of(x).shape, axes.of(out), aval_of(out).shape, strict=True
            ):
                if size == longest:
                    axes.same(axis, place)
                else:
                    axes.fix([axis])


def _all(equation: jex.JaxprEqn, axes: Axes, dropped: Sequence[int] = ()) -> None:
    """All operands have the same axes, and so have all results, without the `dropped` ones."""
    first, *others = map(axes.of, equation.invars)
    for other in others:
        _each(axes, other, first)
    for out in equation.outvars:
        _each(axes, axes.of(out), [axis for i, axis in enumerate(first) if i not in dropped])


def _each(axes: Axes, some: Sequence[int], others: Sequence[int]) -> None:
    for a, b in zip(some, others, strict=True):
        axes.same(a, b)


def _reduce(equation: jex.JaxprEqn, axes: Axes) -> None:
    reduced = equation.params["axes"]
    axes.fix([axes.of(equation.invars[0])[axis] for axis in reduced])
    _all(equation, axes, reduced)


def _cumulative(equation: jex.JaxprEqn, axes: Axes) -> None:
    """From the start, an entry depends on those before it; from the end, on the others."""
    if equation.params["reverse"]:
        axes.fix([axes.of(equation.invars[0])[equation.params["axis"]]])
    _all(equation, axes)


def _on_fixed(parameter: str) -> Callable[[jex.JaxprEqn, Axes], None]:
    """The rule of operations along the axes in a parameter, which must not grow in operands or results."""

    def rule(equation: jex.JaxprEqn, axes: Axes) -> None:
        along = np.atleast_1d(equation.params[parameter])
        fixed = [axes.of(x)[axis] for x in (*equation.invars, *equation.outvars) for axis in along]
        axes.fix(fixed)
        _all(equation, axes)

    return rule


def _iota(equation: jex.JaxprEqn, axes: Axes) -> None:
    """It counts from the start, so it may grow."""
    axes.of(equation.outvars[0])


def _broadcast(equation: jex.JaxprEqn, axes: Axes) -> None:
    """A new axis may grow, because all its entries are the same."""
    [x, *_], [out] = equation.invars, equation.outvars
    sizes = aval_of(x).shape
    for axis, size, place in zip(axes.of(x), sizes, equation.params["broadcast_dimensions"], strict=True):
        if size == aval_of(out).shape[place]:
            axes.same(axis, axes.of(out)[place])
        else:
            axes.fix([axis])


def _transpose(equation: jex.JaxprEqn, axes: Axes) -> None:
    before = axes.of(equation.invars[0])
    _each(axes, axes.of(equation.outvars[0]), [before[axis] for axis in equation.params["permutation"]])


def _reshape(equation: jex.JaxprEqn, axes: Axes) -> None:
    """An axis keeps its place if as many entries are before it, and it has as many itself."""
    [x], [out] = equation.invars, equation.outvars
    places = _places(aval_of(out).shape)
    after = {place: axis for place, axis in zip(places, axes.of(out), strict=True) if place[1] > 1}
    for place, axis in zip(_places(aval_of(x).shape), axes.of(x), strict=True):
        if place in after:
            axes.same(axis, after.pop(place))
        else:
            axes.fix([axis])
    axes.fix(list(after.values()))
    axes.fix([axis for place, axis in zip(places, axes.of(out), strict=True) if place[1] == 1])


def _places(shape: Sequence[int]) -> list[tuple[int, int]]:
    """For each axis, the number of entries in the axes before it, and its size."""
    return [(int(np.prod(shape[:axis], dtype=np.int64)), size) for axis, size in enumerate(shape)]


def _squeeze(equation: jex.JaxprEqn, axes: Axes) -> None:
    dropped = equation.params["dimensions"]
    axes.fix([axes.of(equation.invars[0])[axis] for axis in dropped])
    _all(equation, axes, dropped)


def _slice(equation: jex.JaxprEqn, axes: Axes) -> None:
    """A part may be read as up to a fixed place, or as up to a place before the end."""
    [x], [out], params = equation.invars, equation.outvars, equation.params
    for i, (whole, part) in enumerate(zip(axes.of(x), axes.of(out), strict=True)):
        start, limit, size = params["start_indices"][i], params["limit_indices"][i], aval_of(x).shape[i]
        if (start, limit) == (0, size) and _stride(equation, i) == 1:
            axes.same(whole, part)
        elif _stride(equation, i) == 1 and limit - start > 1:
            axes.part(part, whole, to_the_end=limit == size)
        else:
            axes.fix([part])


def _stride(equation: jex.JaxprEqn, axis: int) -> int:
    strides = equation.params["strides"]
    return 1 if strides is None else int(strides[axis])


def _pad(equation: jex.JaxprEqn, axes: Axes) -> None:
    for i, (low, high, inside) in enumerate(equation.params["padding_config"]):
        before, after = axes.of(equation.invars[0])[i], axes.of(equation.outvars[0])[i]
        if low >= 0 and high == 0 and inside == 0:
            axes.same(before, after)
        else:
            axes.fix([before, after])


def _concatenate(equation: jex.JaxprEqn, axes: Axes) -> None:
    """Only the last operand may grow along the axis: entries may only come in at the end."""
    along = equation.params["dimension"]
    axes.fix([axes.of(x)[along] for x in equation.invars[:-1]])
    out = axes.of(equation.outvars[0])
    axes.same(axes.of(equation.invars[-1])[along], out[along])
    for x in equation.invars:
        for i, (a, b) in enumerate(zip(axes.of(x), out, strict=True)):
            if i != along:
                axes.same(a, b)


def _dot(equation: jex.JaxprEqn, axes: Axes) -> None:
    (summed, batched), out = equation.params["dimension_numbers"], axes.of(equation.outvars[0])
    sides = [axes.of(x) for x in equation.invars]
    for side, which in zip(sides, summed, strict=True):
        axes.fix([side[axis] for axis in which])
    shared = [[side[axis] for axis in which] for side, which in zip(sides, batched, strict=True)]
    _each(axes, *shared)
    free = [[axis for i, axis in enumerate(side) if i not in (*summed[k], *batched[k])] for k, side in enumerate(sides)]
    _each(axes, out, [*shared[0], *free[0], *free[1]])


def _dynamic_slice(equation: jex.JaxprEqn, axes: Axes) -> None:
    [x, *starts], [out] = equation.invars, equation.outvars
    for i, size in enumerate(aval_of(x).shape):
        whole, part = axes.of(x)[i], axes.of(out)[i]
        if aval_of(out).shape[i] == size:  # from 0, wherever it is asked to start
            axes.same(whole, part)
        else:
            axes.fix([part])
            axes.need(equation, whole, None, axes.is_constant(starts[i]))


def _dynamic_update_slice(equation: jex.JaxprEqn, axes: Axes) -> None:
    [x, update, *starts], [out] = equation.invars, equation.outvars
    _each(axes, axes.of(x), axes.of(out))
    for i, size in enumerate(aval_of(x).shape):
        whole, part = axes.of(x)[i], axes.of(update)[i]
        if aval_of(update).shape[i] == size:
            axes.same(whole, part)
        else:
            axes.fix([part])
            axes.need(equation, whole, None, axes.is_constant(starts[i]))


def _gather(equation: jex.JaxprEqn, axes: Axes) -> None:
    """Reads of a growing axis at constant indices, which were checked, or of all of it."""
    [x, indices], [out], params = equation.invars, equation.outvars, equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    places = [axis for axis in range(len(axes.of(out))) if axis not in numbers.offset_dims]
    shared = dict(zip(range(len(places)), (axes.of(out)[axis] for axis in places), strict=True))
    for i, axis in shared.items():
        axes.same(axes.of(indices)[i], axis)
    axes.fix(axes.of(indices)[-1:])
    for axis, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        axes.same(axes.of(x)[axis], axes.of(indices)[place])
    absent = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [axis for axis in range(len(sizes)) if axis not in absent]
    offsets = dict(zip(window, (axes.of(out)[axis] for axis in numbers.offset_dims), strict=True))
    checked = axes.is_constant(indices) and params["mode"] != GatherScatterMode.FILL_OR_DROP
    for i, whole in enumerate(axes.of(x)):
        indexed = i in numbers.start_index_map
        if i in numbers.operand_batching_dims:
            continue
        if i in offsets and not indexed and sizes[i] == aval_of(x).shape[i]:
            axes.same(whole, offsets[i])
            continue
        axes.fix([offsets[i]] if i in offsets else [])
        axes.need(equation, whole, None, checked or not indexed)


def _scatter(equation: jex.JaxprEqn, axes: Axes) -> None:
    """Writes to a growing axis at constant indices, which were checked, to all of it, or from some place to its end."""
    [x, indices, updates], [out], numbers = equation.invars, equation.outvars, equation.params["dimension_numbers"]
    _each(axes, axes.of(x), axes.of(out))
    batched = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
    for axis, place in zip(*batched, strict=True):
        axes.same(axes.of(x)[axis], axes.of(indices)[place])
    # More indices would be more writes, unless each writes to its own part.
    axes.fix([axis for i, axis in enumerate(axes.of(indices)) if i not in batched[1]])
    places = [axis for i, axis in enumerate(axes.of(updates)) if i not in numbers.update_window_dims]
    _each(axes, places, axes.of(indices)[:-1])
    absent = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [axis for axis in range(len(axes.of(x))) if axis not in absent]
    parts = dict(zip(window, numbers.update_window_dims, strict=True))
    for i, whole in enumerate(axes.of(x)):
        indexed, size = i in numbers.scatter_dims_to_operand_dims, aval_of(x).shape[i]
        if i in numbers.operand_batching_dims:
            continue
        if i not in parts:
            axes.need(equation, whole, None, axes.is_constant(indices) or not indexed)
            continue
        part, length = axes.of(updates)[parts[i]], aval_of(updates).shape[parts[i]]
        if not indexed and length == size:
            axes.same(whole, part)
        elif indexed and _start(axes, equation, i) == size - length:
            axes.part(part, whole, to_the_end=True)
            axes.need(equation, whole, part, axes.is_constant(indices))
        else:
            axes.fix([part])
            axes.need(equation, whole, None, axes.is_constant(indices) or not indexed)


def _start(axes: Axes, equation: jex.JaxprEqn, axis: int) -> int | None:
    """The only place along an axis where a scatter writes, if it is known."""
    indices = value_of(equation.invars[1], axes.known)
    if indices is None or indices.ndim != 1:
        return None
    return int(indices[equation.params["dimension_numbers"].scatter_dims_to_operand_dims.index(axis)])


# Operations whose result at an entry depends on the operands at that entry, or on scalars.
_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter", "integer_pow", "square", "neg"),
    *("sign", "abs", "floor", "ceil", "round", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "logistic"),
    *("erf", "erfc", "erf_inv", "lgamma", "digamma", "is_finite", "eq", "ne", "lt", "le", "gt", "ge"),
    *("and", "or", "not", "xor", "shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count"),
    *("select_n", "clamp", "convert_element_type", "reduce_precision", "copy", "stop_gradient"),
)
RULES: Mapping[str, Callable[[jex.JaxprEqn, Axes], None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter,
    "rev": _on_fixed("dimensions"),
    "sort": _on_fixed("dimension"),
    "split": _on_fixed("axis"),
    "top_k": _on_fixed("axis"),
}
