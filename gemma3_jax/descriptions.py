"""What objects say of themselves at the prompt: a title and rows, as text, and as a table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclasses.dataclass(frozen=True)
class Description:
    """A title, and rows of cells.

    >>> print(Description("Cache: 2 sites", (("embed", "[1, 2]"), ("blocks.0", "[3]"))))
    Cache: 2 sites
      embed     [1, 2]
      blocks.0  [3]
    >>> Description("a < b", (("c",),)).html()  # doctest: +ELLIPSIS
    '<table ...><caption ...>a &lt; b</caption><tr><td>c</td></tr></table>'
    """

    title: str
    rows: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        columns = itertools.zip_longest(*(row[:-1] for row in self.rows), fillvalue="")
        widths = [max(map(len, column)) for column in columns]
        lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in self.rows]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])

    def html(self) -> str:
        """A small table, without script; every text is escaped."""
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows]
        caption = f'<caption style="text-align:left;font-weight:bold">{html.escape(self.title)}</caption>'
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        style = "font-family:monospace;text-align:left;white-space:pre;border-spacing:1em 0"
        return f'<table style="{style}">{caption}{body}</table>'


class Described:
    """An object that shows its `Description` at the prompt and in a notebook."""

    def _description(self) -> Description:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self._description())

    def _repr_html_(self) -> str:
        return self._description().html()


def fields_of(obj: Dataclass) -> tuple[tuple[str, str], ...]:
    """The name of each field of a dataclass and what it holds; arrays by shape and dtype. Fields that are None are left
    out.
    """
    values = [(field.name, getattr(obj, field.name)) for field in dataclasses.fields(obj)]
    return tuple((name, arrays_text(value)) for name, value in values if value is not None)


def call_text(obj: Dataclass) -> str:
    """A dataclass as the call that makes it, with long arrays by shape and dtype; without flags as they are by default.

    >>> @dataclasses.dataclass
    ... class Scale:
    ...     factor: object
    ...     heads: object = None
    >>> call_text(Scale(np.ones(100))), call_text(Scale(2.0, np.array([0, 2])))
    ('Scale(factor=[100] float64)', 'Scale(factor=2.0, heads=[0, 2])')
    """
    fields = [(field, getattr(obj, field.name)) for field in dataclasses.fields(obj)]
    left_out = [isinstance(value, bool | None) and value is field.default for field, value in fields]
    shown = [f"{field.name}={_value_text(x)}" for (field, x), out in zip(fields, left_out, strict=True) if not out]
    return f"{type(obj).__name__}({', '.join(shown)})"


def _value_text(value: object) -> str:
    """A value in one line: numbers, up to eight of an array, and the shape and dtype of more."""
    if isinstance(value, Described):
        return f"<{value._description().title}>"
    if isinstance(value, Mapping):
        return f"<{len(value)} entries>"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_text, value))}]" if len(value) <= 8 else f"<{len(value)} entries>"
    if not hasattr(value, "shape"):
        return repr(value)
    if (
        isinstance(value, np.ndarray)
        or (isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_fully_addressable)
    ) and not (value.size > 8 or jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)):
        return repr(np.asarray(value).tolist())
    return arrays_text(value)


def arrays_text(value: object) -> str:
    """The shapes and dtypes of the arrays of a pytree.

    >>> arrays_text(np.zeros((2, 3), np.float32))
    '[2, 3] float32'
    """
    leaves = jax.tree.leaves(value)
    shown = [f"{list(np.shape(leaf))} {getattr(leaf, 'dtype', type(leaf).__name__)}" for leaf in leaves]
    return " and ".join(shown)


def size_text(n: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> size_text(12), size_text(1536), size_text(3 * 2**30)
    ('12 bytes', '1.5 KiB', '3.0 GiB')
    """
    if n < 1024:
        return f"{n:.0f} bytes"
    exponent = min(3, int(math.log2(n)) // 10)
    return f"{n / 1024**exponent:,.1f} {'KMG'[exponent - 1]}iB"
