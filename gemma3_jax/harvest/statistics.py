"""Mean, variance and norm of every site: kept with each unit, and merged in the order of the units.

What a unit keeps follows from its values alone, so the result does not depend on how many processes harvested, or how
often they were stopped.

Axes: n rows; `...` the shape of a value.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.hooks.reductions import Int8Values
from gemma3_jax.types import PyTree

PREFIX = "statistics"
_BLOCK, _ROWS = 2**18, 2**10  # entries that stay in a core's cache, and rows whose float32 sums are exact enough


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the values at a site, float64.

    Attributes:
        count: the number of values.
        mean: [...], of each entry.
        variance: [...], of each entry: the mean squared distance from its mean.
        norm: [...] without the last axis: the mean Euclidean norm of the vectors along it.
    """

    count: int
    mean: np.ndarray
    variance: np.ndarray
    norm: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each entry, [...]."""
        return np.asarray(np.sqrt(self.variance))


class Moments(NamedTuple):
    """What a unit keeps of a site: mean and sum of squared distances [2, ...]; sum of the norms [1, ...]."""

    both: np.ndarray
    norms: np.ndarray


def assembled(name: str, parts: Mapping[str, np.ndarray]) -> PyTree:
    """The value of a site from its arrays by key: the only one; for `Int8` float32 again; else a mapping of results."""
    if list(parts) == [name]:
        return parts[name]
    named = {key.removeprefix(f"{name}/"): value for key, value in parts.items()}
    if set(named) == set(Int8Values._fields) and named["int8"].dtype == np.int8:
        return named["int8"].astype(np.float32) * named["scales"]
    return named


def keys_of(name: str) -> tuple[str, str]:
    """The names of the arrays of `Moments` in a unit."""
    return f"{PREFIX}/{name}/moments", f"{PREFIX}/{name}/norms"


def moments_of(name: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by key that a unit keeps of the values of a site; none if these are not floats [n, ...]."""
    values = assembled(name, parts)
    if not (isinstance(values, np.ndarray) and jnp.issubdtype(values.dtype, jnp.floating)):
        return {}
    shape = values.shape[1:]
    entries = int(np.prod(shape, dtype=int))
    rows = min(_ROWS, max(1, _BLOCK // max(1, entries)))
    room = np.empty((2, rows, entries), np.float32)  # memory that is new takes longer than the sums
    nothing = _Sums(0, np.zeros(shape), np.zeros(shape), np.zeros(shape[:-1]))
    blocks = (_block(values[at : at + rows], room) for at in range(0, len(values), rows))
    merged = functools.reduce(_added, blocks, nothing)
    return dict(zip(keys_of(name), (np.stack([merged.mean, merged.squares]), merged.norms[None]), strict=True))


class _Sums(NamedTuple):
    n: int
    mean: np.ndarray
    squares: np.ndarray
    norms: np.ndarray


def _block(values: np.ndarray, room: np.ndarray) -> _Sums:
    """Sums of a few rows: float32 is enough for distances from their mean, and blocks are added in float64."""
    n, *shape = values.shape
    x, away = room[:, :n]
    np.copyto(x, values.reshape(n, -1), casting="unsafe")
    mean = x.mean(axis=0)
    vectors = x.reshape(values.shape) if shape else x
    norms = np.sqrt(np.vecdot(vectors, vectors)).sum(axis=0, dtype=np.float64)
    np.subtract(x, mean, out=away)
    # The mean in float32 is off by a rounding error; `squares` is the sum about the exact one.
    off = away.mean(axis=0).astype(np.float64)
    squares = np.einsum("nd,nd->d", away, away).astype(np.float64) - n * off**2
    return _Sums(n, (mean + off).reshape(shape), squares.reshape(shape), norms)


def _added(one: _Sums, other: _Sums) -> _Sums:
    n = one.n + other.n
    share, away = other.n / max(1, n), other.mean - one.mean
    squares = one.squares + other.squares + away**2 * (one.n * share)
    return _Sums(n, one.mean + away * share, squares, one.norms + other.norms)


def statistics_of(units: Iterable[tuple[int, Moments]]) -> Statistics:
    """The statistics of some units, from the number of values of each and what it keeps."""
    sums = functools.reduce(_added, (_Sums(n, kept.both[0], kept.both[1], kept.norms[0]) for n, kept in units))
    n = max(1, sums.n)
    return Statistics(sums.n, sums.mean, sums.squares / n, sums.norms / n)


class Scaling(NamedTuple):
    """What is subtracted from the values of a site, and what they are multiplied by, float32 [...]."""

    shift: np.ndarray | jax.Array
    factor: np.ndarray | jax.Array

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The values [n, ...], float32."""
        return np.asarray((values.astype(np.float32) - self.shift) * self.factor)


def scaling_of(statistics: Statistics, center: bool, scale: str | None) -> Scaling:
    """How values are centred and scaled: see `Site.normalized`."""
    shift = statistics.mean if center else np.zeros_like(statistics.mean)
    if scale is None:
        factor = np.ones(())
    elif scale == "std":
        factor = _inverse(statistics.std)
    else:
        squares = statistics.variance if center else statistics.variance + statistics.mean**2
        factor = _inverse(np.sqrt(squares.mean(axis=-1, keepdims=squares.ndim > 0)))
    return Scaling(shift.astype(np.float32), factor.astype(np.float32))


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 1 for what is always 0."""
    return np.where(x > 0, 1 / np.where(x > 0, x, 1), 1)
