"""The structure of a jaxpr as a hashable value: two functions that compute the same thing have equal structures.

JAX compares jaxprs by identity, and their printed form leaves out constants and derivative rules. This module compares
everything that affects the computation. Unknown objects are compared by identity. This may treat equal functions as
different, but never different functions as equal.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

Atom: TypeAlias = jex.Var | jex.Literal
Shape: TypeAlias = jax.ShapeDtypeStruct


def aval_of(x: Atom) -> jax.core.ShapedArray:
    """The shape and dtype of an operand or a result."""
    return cast(jax.core.ShapedArray, x.aval)


def structure(jaxpr: jex.Jaxpr) -> Hashable:
    """The structure of a jaxpr: inputs by shape and dtype, each operation with its parameters, outputs."""
    return _jaxpr(jaxpr, ())


def only_equation(jaxpr: jex.Jaxpr, equation: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """A jaxpr of one equation of `jaxpr`; its inputs are the equation's variables, each once."""
    inputs = list(dict.fromkeys(x for x in equation.invars if isinstance(x, jex.Var)))
    alone = jaxpr.replace(constvars=[], invars=inputs, outvars=list(equation.outvars), eqns=[equation])
    return jex.ClosedJaxpr(alone, [])


def _jaxpr(jaxpr: jex.Jaxpr, rules: tuple[Hashable, ...]) -> Hashable:
    """The structure; `rules` are the functions whose derivative rules are open: a rule may call its own function."""
    places: dict[jex.Var, int] = {}

    def place(variable: jex.Var) -> Hashable:
        return places.setdefault(variable, len(places))

    def operand(x: Atom) -> Hashable:
        if isinstance(x, jex.Literal):
            return (_array(np.asarray(x.val)), x.aval)
        return place(x)

    inputs = tuple((place(x), x.aval) for x in (*jaxpr.constvars, *jaxpr.invars))
    equations = []
    for equation in jaxpr.eqns:
        operands = tuple(map(operand, equation.invars))
        results = tuple((place(x), x.aval) for x in equation.outvars)
        equations.append((equation.primitive, operands, results, equation.ctx, *_parameters(jaxpr, equation, rules)))
    return inputs, tuple(equations), tuple(map(operand, jaxpr.outvars))


def _parameters(jaxpr: jex.Jaxpr, equation: jex.JaxprEqn, rules: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """The parameters of an equation. A derivative rule is a new object at every trace, so its jaxpr is compared."""
    differentiate = _DERIVATIVES.get(equation.primitive.name)
    if differentiate is None:
        return tuple((name, _value(value, rules)) for name, value in sorted(equation.params.items()))
    call = equation.params["call_jaxpr"]
    function = equation.primitive.name, _value(call, rules)
    if function in rules:
        return function
    return *function, _jaxpr(differentiate(only_equation(jaxpr, equation)).jaxpr, (*rules, function))


def _jvp(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The jaxpr of a function with its forward derivative."""
    function, inputs = _with_inputs(closed)
    return jax.make_jaxpr(lambda x, dx: jax.jvp(function, x, dx))(inputs, tuple(map(_tangent, inputs)))


def _vjp(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The jaxpr of a function with its backward derivative."""
    function, inputs = _with_inputs(closed)
    outputs = tuple(map(_tangent, jax.eval_shape(function, *inputs)))
    return jax.make_jaxpr(lambda x, dy: jax.vjp(function, *x)[1](dy))(inputs, outputs)


_DERIVATIVES = {"custom_jvp_call": _jvp, "custom_vjp_call": _vjp}


def _with_inputs(closed: jex.ClosedJaxpr) -> tuple[Callable[..., tuple[jax.Array, ...]], tuple[Shape, ...]]:
    call = jex.jaxpr_as_fun(closed)
    avals = map(aval_of, closed.jaxpr.invars)
    return lambda *x: tuple(call(*x)), tuple(Shape(aval.shape, aval.dtype) for aval in avals)


def _tangent(x: Shape) -> Shape:
    continuous = jnp.issubdtype(x.dtype, jnp.inexact)
    return Shape(x.shape, x.dtype if continuous else jax.dtypes.float0)


def _value(value: object, rules: tuple[Hashable, ...]) -> Hashable:
    """A parameter of an equation."""
    if isinstance(value, jex.ClosedJaxpr):
        return _jaxpr(value.jaxpr, rules), tuple(_value(const, rules) for const in value.consts)
    if isinstance(value, jex.Jaxpr):
        return _jaxpr(value, rules)
    if isinstance(value, Mapping):
        return tuple((key, _value(item, rules)) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return type(value), tuple(_value(item, rules) for item in value)
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asarray(value))
    if isinstance(value, jax.Array) or not isinstance(value, Hashable):
        return _Same(value)
    # 1, 1.0 and True are equal in Python, and 0.0 and -0.0.
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _array(value: np.ndarray) -> Hashable:
    return value.shape, value.dtype, value.tobytes()


class _Same:
    """An object that equals itself alone. Holds it, so that no other object takes its identity."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
