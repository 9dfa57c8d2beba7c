"""Results of many runs: NumPy arrays that know what their axes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from numpy.typing import ArrayLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Description
from gemma3_jax.processes import to_host


class Grid(np.ndarray):
    """An array that says at the prompt, and in a notebook, what its axes are, and where its extremes are.

    It is a NumPy array in every other way; `print` shows the numbers. Arithmetic that keeps its shape keeps the names.
    Slices, sorted and saved arrays do not have them. `pictures.patching_heatmap` draws it without other arguments.

    Args:
        values: the numbers.
        axes: a name for each axis.
        what: what was measured, such as "patching z".
        labels: for some axes, a label for each index.
        tokens: the texts of the tokens, for axes of positions; or None.
        config: the model's config, or None.

    >>> grid = Grid([[0.5, 2.0], [-1.0, 0.0]], ("layer", "head"), "patching z")
    >>> grid
    patching z: layer x head, [2, 2] float32
      highest   2  layer 0, head 1
      lowest   -1  layer 1, head 0
    >>> (grid / 2).max(), (grid / 2).axes, grid[0].axes
    (np.float32(1.0), ('layer', 'head'), ())
    """

    axes: tuple[str, ...] = ()
    what: str = ""
    labels: Mapping[str, Sequence[str]] = {}
    tokens: Sequence[str] | None = None
    config: Gemma3Config | None = None

    def __new__(
        cls,
        values: ArrayLike,
        axes: Sequence[str],
        what: str,
        labels: Mapping[str, Sequence[str]] | None = None,
        tokens: Sequence[str] | None = None,
        config: Gemma3Config | None = None,
    ) -> Self:
        self = np.array(values, np.float32).view(cls)
        self.axes, self.what, self.labels, self.tokens, self.config = tuple(axes), what, labels or {}, tokens, config
        return self

    def __array_wrap__(self, array: np.ndarray, context: object = None, return_scalar: bool = False) -> Any:
        """The result of arithmetic, with the names if it has the same shape."""
        if array.shape != self.shape or array.dtype.kind != "f":  # a reduction, or a comparison
            return array[()] if return_scalar else array
        result = array.view(Grid)
        result.__dict__.update(self.__dict__)
        return result

    def __repr__(self) -> str:
        return str(self._description()) if self.axes else repr(np.asarray(self))

    def _repr_html_(self) -> str | None:
        return self._description().html() if self.axes else None  # a notebook then shows the other

    def _description(self) -> Description:
        values = np.asarray(self)
        finite = np.isfinite(values)
        rows: list[tuple[str, ...]] = []
        if finite.any():
            extremes = ("highest", np.nanargmax, -np.inf), ("lowest", np.nanargmin, np.inf)
            ends = [(name, int(find(np.where(finite, values, other)))) for name, find, other in extremes]
            texts = [f"{values.flat[at]:.4g}" for _, at in ends]
            width = max(map(len, texts))
            rows = [(name, text.rjust(width), self._place(at)) for (name, at), text in zip(ends, texts, strict=True)]
        if not finite.all():
            rows.append(("not finite", f"{(~finite).sum():,} of {values.size:,}"))
        return Description(f"{self.what}: {' x '.join(self.axes)}, {list(self.shape)} {self.dtype}", tuple(rows))

    def _place(self, at: int) -> str:
        """The names and labels of the indices of an entry, which is the `at`th."""
        indices = np.unravel_index(at, self.shape)
        return ", ".join(f"{axis} {self._label(axis, int(i))}" for axis, i in zip(self.axes, indices, strict=True))

    def _label(self, axis: str, i: int) -> str:
        if axis in self.labels:
            return self.labels[axis][i]
        return f"{i} {self.tokens[i]!r}" if self.tokens is not None and axis in ("pos", "src_pos") else str(i)


def named_grid(
    values: np.ndarray | jax.Array,
    axes: Sequence[str],
    what: str,
    labels: Mapping[str, Sequence[str]] | None = None,
    tokens: Sequence[str] | None = None,
    config: Gemma3Config | None = None,
) -> np.ndarray:
    """The `Grid` of these values, in host memory; inside `jit`, where no values are known, the values as they are.

    >>> named_grid(jax.numpy.ones(2), ("layer",), "scores").axes
    ('layer',)
    """
    if isinstance(values, jax.core.Tracer):
        return values  # type: ignore[return-value]  # JAX accepts it wherever it accepts an array
    return Grid(to_host(values), axes, what, labels, tokens, config)
