"""Turns numbers in a jaxpr into inputs, so that a loop over a coefficient compiles once.

XLA simplifies constants: x ** 0.5 becomes a square root, and log(2.0) is computed at compile time. A number becomes an
input only if its operation, and everything computed from it alone, gives the same bits either way.
"""

from collections.abc import Callable

import jax.extend.core as jex
import numpy as np

from gemma3_jax.hooks.structure import aval_of

# Operations that XLA computes in the same way for a constant operand and for an input.
_ALIKE = frozenset(
    [
        *("add", "sub", "mul", "div", "neg", "max", "min", "clamp", "select_n", "lt", "le", "gt", "ge", "eq", "ne"),
        *("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "copy"),
    ]
)
_CALLS = ("jit", "pjit")


def with_numbers_as_inputs(jaxpr: jex.Jaxpr) -> tuple[jex.Jaxpr, list[np.ndarray]]:
    """The jaxpr with the floating-point literals of its equations as inputs, and their values.

    Its first inputs are the constants that it had, then these numbers.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: 2.0 * x + x ** 0.3)(1.0).jaxpr
    >>> [number.item() for number in with_numbers_as_inputs(jaxpr)[1]]
    [2.0]
    """
    fixed = _fixed(jaxpr, set())
    return _lifted(jaxpr, lambda equation, i, x: _is_number(x) and _may_change(equation, i, fixed))


def with_integers_as_inputs(jaxpr: jex.Jaxpr) -> tuple[jex.Jaxpr, list[np.ndarray]]:
    """The jaxpr with the integer literals of its equations as its first inputs, and their values.

    Arithmetic of integers has the same bits in either form. Indices that are inputs can no longer be checked.
    """
    return _lifted(jaxpr, lambda equation, i, x: aval_of(x).dtype.kind in "iu" and aval_of(x).shape == ())


def _lifted(
    jaxpr: jex.Jaxpr, may_change: Callable[[jex.JaxprEqn, int, jex.Literal], bool]
) -> tuple[jex.Jaxpr, list[np.ndarray]]:
    variables: list[jex.Var] = []
    numbers: list[np.ndarray] = []
    equations = []
    for equation in jaxpr.eqns:
        operands = list(equation.invars)
        for i, x in enumerate(operands):
            if isinstance(x, jex.Literal) and may_change(equation, i, x):
                variable = jex.Var(x.aval)
                operands[i] = variable
                variables.append(variable)
                numbers.append(np.asarray(x.val, aval_of(x).dtype))
        equations.append(equation.replace(invars=operands))
    return jaxpr.replace(eqns=equations, constvars=[], invars=[*jaxpr.constvars, *variables, *jaxpr.invars]), numbers


def _is_number(x: jex.Literal) -> bool:
    aval = aval_of(x)
    return aval.dtype.kind in "fV" and aval.shape == ()


def _may_change(equation: jex.JaxprEqn, operand: int, fixed: set[jex.Var]) -> bool:
    """Whether an operand may become an input; results of the jaxpr in `fixed` must stay constants."""
    if equation.primitive.name in _CALLS:
        inner = equation.params["jaxpr"].jaxpr
        x = inner.invars[operand]
        inside = _fixed(inner, {x})
        return x not in inside and not any(out in inside for out in inner.outvars if isinstance(out, jex.Var))
    return equation.primitive.name in _ALIKE and not any(out in fixed for out in equation.outvars)


def _fixed(jaxpr: jex.Jaxpr, constants: set[jex.Var]) -> set[jex.Var]:
    """The variables that follow only from constants and that an operation may simplify."""
    constants = set(constants)
    for equation in jaxpr.eqns:
        if all(isinstance(x, jex.Literal) or x in constants for x in equation.invars):
            constants.update(equation.outvars)
    fixed = {x for x in jaxpr.outvars if not isinstance(x, jex.Literal) and x in constants}
    for equation in reversed(jaxpr.eqns):
        operands = [x for x in equation.invars if not isinstance(x, jex.Literal) and x in constants]
        alike = equation.primitive.name in _ALIKE and not any(out in fixed for out in equation.outvars)
        if not alike:
            fixed.update(operands)
    return fixed
