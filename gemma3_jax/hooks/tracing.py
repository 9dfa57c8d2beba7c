"""Traces users' functions at every call: the computation becomes part of a program, and the arrays become its inputs.

JAX identifies a function by its identity. `jax.jit` and `jax.make_jaxpr` reuse the first trace, even if the globals,
closure cells or attributes that the function reads have changed. This module traces a function again at every call, for
the shapes of its inputs, and compares the result by content. A changed constant gives a new program. A changed array,
or a new lambda with the same code, uses the existing program. Numbers that only scale, shift or bound values become
inputs too.
"""

import contextlib
import gc
import reprlib
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence

import flax.struct
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike

from gemma3_jax.hooks.indices import Bad, bad_index, is_index, is_of_library, line_of, reads_indices
from gemma3_jax.hooks.lifting import with_numbers_as_inputs
from gemma3_jax.hooks.structure import aval_of, structure
from gemma3_jax.inputs import as_array
from gemma3_jax.types import PyTree


class Computation:
    """The computation of a traced function. Computations with equal content are the same object.

    Attributes:
        jaxpr: takes the arrays, then the leaves of the inputs.
        results: pytree structure of the results.
        indexed: whether an index in it could be out of range.
        holds_trace: whether its derivative rules keep JAX's trace alive, as a leaked value would.
    """

    def __init__(self, jaxpr: jex.Jaxpr, results: PyTreeDef, key: Hashable, holds_trace: bool):
        self.jaxpr = jaxpr
        self.results = results
        self.indexed = reads_indices(jaxpr)
        self.holds_trace = holds_trace
        self._key = key  # keeps objects alive that are compared by identity


_computations: weakref.WeakValueDictionary[Hashable, Computation] = weakref.WeakValueDictionary()
_tracing = threading.RLock()
_uncached = jax.make_user_context(None)  # under a new value of it, JAX does not find any earlier trace


@flax.struct.dataclass
class Traced:
    """A traced function; a pytree of the arrays that it reads.

    Attributes:
        arrays: arrays that it reads in addition to its inputs.
        computation: its computation (static).
    """

    arrays: tuple[ArrayLike, ...]
    computation: Computation = flax.struct.field(pytree_node=False)

    def __call__(self, *inputs: PyTree) -> PyTree:
        """The results of the function, for inputs with the traced shapes."""
        values = [jnp.asarray(x) for x in (*self.arrays, *jax.tree.leaves(inputs))]
        avals = map(aval_of, self.computation.jaxpr.invars)
        expected = [(aval.shape, aval.dtype) for aval in avals]
        shapes = [(x.shape, x.dtype) for x in values]
        if shapes != expected:
            raise ValueError(f"the function was traced for {expected}, but it is called with {shapes}")
        results = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.computation.jaxpr, []))(*values)
        return jax.tree.unflatten(self.computation.results, results)

    @property
    def results(self) -> PyTree:
        """The shapes and dtypes of the results."""
        avals = map(aval_of, self.computation.jaxpr.outvars)
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        return jax.tree.unflatten(self.computation.results, shapes)


def traced(
    function: Callable[..., PyTree],
    *inputs: PyTree,
    where: str,
    call: Callable[..., PyTree] = lambda function, *inputs: function(*inputs),
    moment: object = None,
) -> Traced:
    """Trace a function in its present state, for inputs of given shapes.

    Args:
        function: any callable. If it is a pytree (a `jax.tree_util.Partial`, a `flax.struct.dataclass`), its leaves
            become inputs too, including Python numbers.
        *inputs: pytrees of `jax.ShapeDtypeStruct`.
        where: name of the function for messages: "the edit at blocks.3.hook_out".
        call: calls the function and checks its result.
        moment: an object that the traces of one run share. Other functions that a function calls through JAX are traced
            once at each moment; by default at every call.

    Raises:
        TypeError: it is not callable; or it needs concrete numbers of a traced value, or stores a traced value.
        ValueError: an index is out of range.

    >>> import jax
    >>> scale = 2.0
    >>> double = traced(lambda x: scale * x, jax.ShapeDtypeStruct((3,), "float32"), where="the example")
    >>> scale = 3.0
    >>> triple = traced(lambda x: scale * x, jax.ShapeDtypeStruct((3,), "float32"), where="the example")
    >>> float(triple(jax.numpy.ones(3)).sum()), triple.computation is double.computation
    (9.0, True)
    """
    check_callable(where, function)
    leaves, inputs_tree = jax.tree.flatten(inputs)
    parts, function_tree = jax.tree.flatten(function)
    parts = [as_array(part) for part in parts]
    data = {i: part for i, part in enumerate(parts) if _is_data(part)}
    watched: list[weakref.ref[object]] = []

    def flat(data: dict[int, ArrayLike], leaves: Sequence[jax.Array]) -> PyTree:
        if leaves:
            watched[:] = [weakref.ref(leaves[0]), weakref.ref(jex.find_top_trace(leaves))]
        now = jax.tree.unflatten(function_tree, [data.get(i, part) for i, part in enumerate(parts)])
        return jax.tree.map(jnp.asarray, call(now, *jax.tree.unflatten(inputs_tree, leaves)))

    with _tracing, _in_words(where), _torch_as_arrays():
        closed, results = jax.make_jaxpr(flat, return_shape=True)(data, leaves)
        if _calls_functions(closed.jaxpr):
            with _uncached(object() if moment is None else moment):
                closed, results = jax.make_jaxpr(lambda *inputs: flat(*inputs), return_shape=True)(data, leaves)
        for const in closed.consts:
            if isinstance(const, jax.core.Tracer):
                jnp.negative(const)  # raises if the constant is from a finished trace
        jaxpr, numbers = with_numbers_as_inputs(closed.jaxpr)
        arrays = (*map(_plain, closed.consts), *numbers, *data.values())
        computation = _computation(jaxpr, jax.tree.structure(results), where, watched)
    _check_indices(computation, arrays, where)
    return Traced(arrays, computation)


def check_callable(where: str, function: object) -> None:
    """Raise TypeError for what is given in the place of a function."""
    if not callable(function):
        raise TypeError(f"{where} is {reprlib.repr(function)}; it must be a function")


def _calls_functions(jaxpr: jex.Jaxpr) -> bool:
    """Whether a jaxpr calls functions that the user wrote, such as the body of a `lax.scan`, or one under `jax.jit`.

    JAX keeps their traces by their identity, so they may be those of an earlier state. The caller is then run a second
    time, without JAX's caches. That takes 3 to 25 ms more on a CPU, and JAX keeps 30 to 120 kB of it.
    """
    return any(
        not is_of_library(inner.debug_info.func_filename) or _calls_functions(inner)
        for equation in jaxpr.eqns
        for inner in jex.jaxprs_in_params(equation.params)
    )


def _is_data(part: object) -> bool:
    return isinstance(part, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _plain(const: ArrayLike) -> ArrayLike:
    return np.asarray(const) if isinstance(const, np.ndarray) else const


def as_computation(jaxpr: jex.Jaxpr, results: PyTreeDef) -> Computation:
    """The unique computation of a jaxpr that was not traced from a function."""
    return _computation(jaxpr, results, "", ())


def _computation(
    jaxpr: jex.Jaxpr, results: PyTreeDef, where: str, watched: Sequence[weakref.ref[object]]
) -> Computation:
    """The unique computation with that content, after a check for leaked values."""
    key = structure(jaxpr), results
    known = _computations.get(key)
    holds_trace = bool(watched) and watched[1]() is not None
    suspicious = bool(watched) and watched[0]() is not None
    if suspicious or (holds_trace and not (known and known.holds_trace)):
        _check_leaks(watched[1](), jaxpr, where)
    if known is None:
        known = _computations.setdefault(key, Computation(jaxpr, results, key, holds_trace))
    return known


def _check_leaks(trace: object, jaxpr: jex.Jaxpr, where: str) -> None:
    """Raise TypeError if a function has stored a traced value that outlives the trace.

    The closure of a host callback may hold such values, because it may only read their shapes.
    """
    leaked = not _calls_back(jaxpr) and _is_held(trace)
    if leaked:
        gc.collect()  # unreachable cycles hold values too
        leaked = _is_held(trace)
    if leaked:
        raise TypeError(
            f"{where} stores its value, or a value computed from it, as `saved.append(value)` does. It runs inside a "
            "compiled program, where values are symbols without numbers: return the value, and name the sites "
            "to capture in names_filter (in `forward`: capture)"
        )


def _calls_back(jaxpr: jex.Jaxpr) -> bool:
    return any(
        "callback" in equation.primitive.name or any(map(_calls_back, jex.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _is_held(trace: object) -> bool:
    return any(isinstance(holder, jax.core.Tracer) for holder in gc.get_referrers(trace))


def _check_indices(computation: Computation, arrays: Sequence[ArrayLike], where: str) -> None:
    if not computation.indexed:
        return
    pairs = zip(computation.jaxpr.invars, arrays, strict=False)
    bad = bad_index(computation.jaxpr, {x: np.asarray(array) for x, array in pairs if is_index(array)})
    if bad is not None:
        raise ValueError(bad_index_message(bad, where))


def bad_index_message(bad: Bad, where: str) -> str:
    """The error message for an index out of range."""
    return (
        f"{where} has index {bad.entry} on an axis of size {bad.size} ({bad.line}); JAX would read the nearest entry, "
        "or drop the update"
    )


@contextlib.contextmanager
def _in_words(where: str) -> Iterator[None]:
    """Replace JAX's errors about abstract values by an error with the remedy."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise TypeError(
            f"{where} uses a value from another compiled program, which has no numbers; capture values with "
            "names_filter (in `forward`: capture)"
        ) from error
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(
            f"{where} needs the numbers of a value ({line_of(error.__traceback__)}). It runs inside a compiled "
            "program, where values are symbols without numbers: use jnp.where(condition, a, b) in place of `if`, "
            "jax.numpy in place of NumPy and .item(), and names_filter (in `forward`: capture) to capture values"
        ) from error


@contextlib.contextmanager
def _torch_as_arrays() -> Iterator[None]:
    """Let JAX's operators accept torch tensors while a function is traced."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor is None or hasattr(tensor, "__jax_array__"):
        yield
        return
    tensor.__jax_array__ = lambda self: jnp.asarray(as_array(self))
    try:
        yield
    finally:
        del tensor.__jax_array__
