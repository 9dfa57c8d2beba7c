"""Finds out-of-range indices in the jaxpr of a function.

JAX cannot raise at run time: for an index out of range, it reads the nearest entry, or drops the update. If the index
is a constant, or comes from an array that is known when the function is called, the jaxpr shows the mistake. This
module follows integers in NumPy from there to the operations that index with them.
"""

import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode
from jax.typing import ArrayLike

from gemma3_jax.hooks.structure import Atom, aval_of

Parameters: TypeAlias = Mapping[str, Any]  # of an equation

# Larger integer arrays are data rather than indices that a user wrote.
_MOST = 4096


class Bad(NamedTuple):
    """An index out of range: the index, the size of its axis, and the line of the user's code."""

    entry: int
    size: int
    line: str


def bad_index(jaxpr: jex.Jaxpr, known: Mapping[jex.Var, np.ndarray]) -> Bad | None:
    """The first index out of range that follows from constants and from `known` variables of the jaxpr, or None.

    Reading with `mode="fill"` is intended, so it is not an error.

    >>> import jax.numpy as jnp
    >>> bad_index(jax.make_jaxpr(lambda x: x[5])(jnp.zeros(3)).jaxpr, {})[:2]
    (5, 3)
    """
    return next(_bad_indices(jaxpr, {variable: value for variable, value in known.items() if is_index(value)}), None)


def reads_indices(jaxpr: jex.Jaxpr) -> bool:
    """Whether an operation of the jaxpr could index out of range."""
    return any(
        _check_of(equation) is not None or any(map(reads_indices, jex.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _bad_indices(jaxpr: jex.Jaxpr, values: dict[jex.Var, np.ndarray]) -> Iterator[Bad]:
    """All indices out of range; `values` has the known variables, and the variables that follow are added to it."""
    for equation in jaxpr.eqns:
        inputs = [value_of(x, values) for x in equation.invars]
        check = _check_of(equation)
        wrong = None if check is None else check(equation, inputs)
        if wrong is not None:
            yield Bad(*wrong, line_of_equation(equation))
        inner = called(equation)
        if inner is None:
            for body in jex.jaxprs_in_params(equation.params):  # of a loop or a branch, whose inputs are not followed
                yield from _bad_indices(body, {})
            values |= computed(equation, inputs)
            continue
        inside = {x: value for x, value in zip(inner.invars, inputs, strict=True) if value is not None}
        yield from _bad_indices(inner, inside)
        results = zip(equation.outvars, (value_of(x, inside) for x in inner.outvars), strict=True)
        values |= {out: value for out, value in results if value is not None}


def _shape(x: Atom) -> tuple[int, ...]:
    return aval_of(x).shape


def value_of(x: Atom, values: Mapping[jex.Var, np.ndarray]) -> np.ndarray | None:
    """The integers of an operand, if they are known."""
    if not isinstance(x, jex.Literal):
        return values.get(x)
    value = np.asarray(x.val)
    return value if is_index(value) else None


def may_index(aval: jax.core.ShapedArray) -> bool:
    """Whether an array of that shape and dtype may hold indices."""
    return (jnp.issubdtype(aval.dtype, jnp.integer) or aval.dtype == bool) and aval.size <= _MOST


def is_index(value: ArrayLike) -> bool:
    """Whether an array may hold indices, and its values are known."""
    return not isinstance(value, jax.core.Tracer) and may_index(jax.typeof(value))


def called(equation: jex.JaxprEqn) -> jex.Jaxpr | None:
    """The function that an equation calls once, with the equation's own inputs."""
    if equation.primitive.name not in ("jit", "pjit", "closed_call", "custom_jvp_call", "remat2", "checkpoint"):
        return None
    jaxpr = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
    return getattr(jaxpr, "jaxpr", jaxpr)


def computed(equation: jex.JaxprEqn, inputs: Sequence[np.ndarray | None]) -> dict[jex.Var, np.ndarray]:
    """The result of an equation, if it is known."""
    compute = ON_HOST.get(equation.primitive.name)
    if compute is None or any(value is None for value in inputs):
        return {}
    out = equation.outvars[0]
    aval = aval_of(out)
    if aval.size > _MOST:
        return {}
    with np.errstate(all="ignore"):
        return {out: np.asarray(compute(equation.params, *inputs)).astype(aval.dtype).reshape(aval.shape)}


def _broadcast(params: Parameters, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _iota(params: Parameters) -> np.ndarray:
    axis = params["dimension"]
    shape = [-1 if i == axis else 1 for i in range(len(params["shape"]))]
    return np.broadcast_to(np.arange(params["shape"][axis]).reshape(shape), params["shape"])


# Operations that compute indices.
ON_HOST: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda _, x, y: x + y,
    "sub": lambda _, x, y: x - y,
    "mul": lambda _, x, y: x * y,
    "neg": lambda _, x: -x,
    "max": lambda _, x, y: np.maximum(x, y),
    "min": lambda _, x, y: np.minimum(x, y),
    "clamp": lambda _, low, x, high: np.clip(x, low, high),
    "eq": lambda _, x, y: x == y,
    "ne": lambda _, x, y: x != y,
    "lt": lambda _, x, y: x < y,
    "le": lambda _, x, y: x <= y,
    "gt": lambda _, x, y: x > y,
    "ge": lambda _, x, y: x >= y,
    "and": lambda _, x, y: x & y,
    "or": lambda _, x, y: x | y,
    "not": lambda _, x: ~x,
    "select_n": lambda _, which, *cases: np.choose(which.astype(int), cases),
    "convert_element_type": lambda _, x: x,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda _, x: x,
    "squeeze": lambda _, x: x,
    "expand_dims": lambda _, x: x,
    "concatenate": lambda params, *x: np.concatenate(x, axis=params["dimension"]),
    "iota": _iota,
    "copy": lambda _, x: x,
}


def _outside(start: np.ndarray, length: int, size: int) -> tuple[int, int] | None:
    """The first start from which `length` entries do not fit in `size`, with the size; or None."""
    starts = np.ravel(start)
    wrong = starts[(starts < 0) | (starts > size - length)]
    # JAX has already added the size to a negative index.
    return (int(wrong[0] - size if wrong[0] < 0 else wrong[0]), size) if wrong.size else None


def _first(results: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    return next((each for each in results if each is not None), None)


def _dynamic_slice(equation: jex.JaxprEqn, inputs: Sequence[np.ndarray | None]) -> tuple[int, int] | None:
    lengths, sizes = equation.params["slice_sizes"], _shape(equation.invars[0])
    starts = zip(inputs[1:], lengths, sizes, strict=True)
    return _first([None if start is None else _outside(start, *rest) for start, *rest in starts])


def _dynamic_update_slice(equation: jex.JaxprEqn, inputs: Sequence[np.ndarray | None]) -> tuple[int, int] | None:
    sizes, lengths = map(_shape, equation.invars[:2])
    starts = zip(inputs[2:], lengths, sizes, strict=True)
    return _first([None if start is None else _outside(start, *rest) for start, *rest in starts])


def _gather(equation: jex.JaxprEqn, inputs: Sequence[np.ndarray | None]) -> tuple[int, int] | None:
    indices, params = inputs[1], equation.params
    if indices is None or params["mode"] == GatherScatterMode.FILL_OR_DROP:
        return None
    axes, sizes = params["dimension_numbers"].start_index_map, _shape(equation.invars[0])
    return _first([_outside(indices[..., i], params["slice_sizes"][axis], sizes[axis]) for i, axis in enumerate(axes)])


def _scatter(equation: jex.JaxprEqn, inputs: Sequence[np.ndarray | None]) -> tuple[int, int] | None:
    indices, numbers = inputs[1], equation.params["dimension_numbers"]
    if indices is None:
        return None
    sizes, updates = _shape(equation.invars[0]), _shape(equation.invars[2])
    absent = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [axis for axis in range(len(sizes)) if axis not in absent]
    lengths = dict(zip(window, (updates[axis] for axis in numbers.update_window_dims), strict=True))
    axes = numbers.scatter_dims_to_operand_dims
    return _first([_outside(indices[..., i], lengths.get(axis, 1), sizes[axis]) for i, axis in enumerate(axes)])


def _check_of(equation: jex.JaxprEqn) -> Callable[..., tuple[int, int] | None] | None:
    name = equation.primitive.name
    return _scatter if name.startswith("scatter") else _CHECKS.get(name)


_CHECKS = {"dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice, "gather": _gather}

_SPECS = map(importlib.util.find_spec, ("gemma3_jax", "jax", "flax", "numpy", "einops", "optax"))
_LIBRARIES = tuple(f"{Path(spec.origin).parent}{os.sep}" for spec in _SPECS if spec is not None and spec.origin)


def line_of_equation(equation: jex.JaxprEqn) -> str:
    """The innermost line of user code that made an equation."""
    trace = equation.source_info.traceback
    return line_of(None if trace is None else trace.as_python_traceback())


def line_of(trace: TracebackType | None) -> str:
    """The innermost line of user code in a traceback: "file.py:12, in metric"."""
    for frame in reversed(traceback.extract_tb(trace)):
        if not is_of_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return "an unknown line"


def is_of_library(file: str | None) -> bool:
    """Whether a file of code belongs to this library or to those that it builds on; False if it is not known."""
    return file is not None and file.startswith(_LIBRARIES)
