"""Which axes of the values in a function may become longer, so that entries that were there before stay the same.

An axis *grows* if the same number of entries can be appended to it, with any numbers, and no other entry of any result
changes. The axis of tokens of a function's input grows when masked tokens are appended to the prompt. The rules of
operations are in `gemma3_jax.hooks.axis_rules`: some axes grow together, others must not grow.

The rules are about one jaxpr, for one length, in which no equation calls another function. Shapes never tell which axis
is which, because two axes may have the same size.
"""

from collections.abc import Sequence, Set
from typing import NamedTuple

import jax.extend.core as jex
import numpy as np

from gemma3_jax.hooks.indices import ON_HOST, computed, is_index, line_of_equation, may_index, value_of
from gemma3_jax.hooks.structure import Atom, aval_of


class DependsOnLength(Exception):
    """An axis of tokens cannot grow; the message names the operation and the line of the user's code."""


class _Needs(NamedTuple):
    """Axis `whole` may grow only if `part` grows too, or if `allowed`."""

    whole: int
    part: int | None
    allowed: bool
    equation: jex.JaxprEqn


class Axes:
    """The axes of all variables of a jaxpr, in classes of axes that grow together.

    Args:
        constant: the inputs with integers that are known when the function is traced.
    """

    def __init__(self, constant: Set[jex.Var]) -> None:
        self._parents: list[int] = []
        self._grows: dict[int, bool] = {}
        self._of: dict[jex.Var, list[int]] = {}
        self._equation: jex.JaxprEqn | None = None
        # (a, b): if axis a grows, so must b
        self._implied: list[tuple[int, int]] = []
        self._preferred: list[tuple[int, int]] = []
        self._needs: list[_Needs] = []
        # Integers that follow from literals, and variables that follow from literals and arrays: checked indices.
        self.known: dict[jex.Var, np.ndarray] = {}
        self.constant = set(constant)

    def of(self, x: Atom) -> list[int]:
        """A number for each axis of a value; literals have no axes."""
        if isinstance(x, jex.Literal):
            return []
        if x not in self._of:
            start = len(self._parents)
            self._of[x] = list(range(start, start + len(aval_of(x).shape)))
            self._parents += self._of[x]
        return self._of[x]

    def same(self, a: int, b: int) -> None:
        """Both axes grow, or none."""
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        self._parents[b] = a
        if b in self._grows:
            self.set(a, self._grows.pop(b))

    def set(self, axis: int, grows: bool) -> None:
        """Whether an axis grows."""
        if self._grows.setdefault(self._root(axis), grows) != grows:
            raise self._error(self._equation)

    def set_all(self, x: Atom, grow: Sequence[bool]) -> None:
        """Whether each axis of a value grows."""
        for axis, grows in zip(self.of(x), grow, strict=True):
            self.set(axis, grows)

    def fix(self, axes: Sequence[int]) -> None:
        """These axes do not grow."""
        for axis in axes:
            self.set(axis, False)

    def part(self, part: int, whole: int, *, to_the_end: bool = False) -> None:
        """`part` is the start of `whole` from some place on: it may grow if `whole` does, and should `to_the_end`."""
        self._implied.append((part, whole))
        if to_the_end:
            self._preferred.append((part, whole))

    def need(self, equation: jex.JaxprEqn, whole: int, part: int | None, allowed: bool) -> None:
        """If the axis `whole` grows, `part` grows or the equation is `allowed`."""
        self._needs.append(_Needs(whole, part, allowed, equation))

    def is_constant(self, x: Atom) -> bool:
        """Whether a value follows from literals and arrays alone, as integers whose use as an index was checked."""
        return is_index(x.val) if isinstance(x, jex.Literal) else x in self.constant

    def at(self, equation: jex.JaxprEqn) -> None:
        """From here on, errors name this equation."""
        self._equation = equation

    def compute(self, equation: jex.JaxprEqn) -> None:
        """Note the results of an equation that are known, or that follow from literals and arrays."""
        self.known |= computed(equation, [value_of(x, self.known) for x in equation.invars])
        on_host = equation.primitive.name in ON_HOST and all(map(self.is_constant, equation.invars))
        if on_host and may_index(aval_of(equation.outvars[0])):
            self.constant.update(equation.outvars)

    def close(self, results: Sequence[tuple[Atom, Sequence[bool]]] | None) -> None:
        """Set the axes of results, decide for the axes that may grow or not, and check what operations need.

        Raises:
            DependsOnLength: an axis would have to grow, and not.
        """
        self._equation = None  # the results
        for x, grow in results or ():
            self.set_all(x, grow)
        self._imply()
        for part, whole in self._preferred:
            if self.grows(whole) and self._known(part) is None:
                self.set(part, True)
                self._imply()
        for need in self._needs:
            whole_part = need.part is not None and self.grows(need.part)
            if self.grows(need.whole) and not need.allowed and not whole_part:
                raise self._error(need.equation)

    def grows(self, axis: int) -> bool:
        """Whether an axis grows."""
        return self._known(axis) is True

    def growing(self, x: Atom) -> tuple[bool, ...]:
        """Whether each axis of a value grows."""
        return tuple(map(self.grows, self.of(x)))

    def _imply(self) -> None:
        changed = True
        while changed:
            changed = False
            for part, whole in self._implied:
                if self.grows(part) and not self.grows(whole):
                    self.set(whole, True)
                    changed = True
                elif self._known(whole) is False and self._known(part) is None:
                    self.set(part, False)
                    changed = True

    def _known(self, axis: int) -> bool | None:
        return self._grows.get(self._root(axis))

    def _root(self, axis: int) -> int:
        while self._parents[axis] != axis:
            self._parents[axis] = self._parents[self._parents[axis]]
            axis = self._parents[axis]
        return axis

    def _error(self, equation: jex.JaxprEqn | None) -> DependsOnLength:
        where = "its result" if equation is None else f"{equation.primitive.name} at {line_of_equation(equation)}"
        return DependsOnLength(where)
