"""Batches of activations for training, from what a caller has: arrays, batches, a store, or caches of a model.

Axes: n tokens, d features of a site; m tokens of a piece, which may be any number.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.inputs import as_array

_BATCH = 1024  # where the caller does not say

# A token's values at the site that is read and at the one that is written; of an autoencoder, the first alone.
Values = tuple[Any, ...]


@runtime_checkable
class Store(Protocol):
    """What training reads of a `gemma3_jax.harvest.ActivationStore`."""

    @property
    def sites(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def shuffled(self, batch: int, seed: int = 0, *, sites: Any = None, epoch: int = 0) -> Iterable[Any]: ...


class Source(NamedTuple):
    """Where batches come from.

    Attributes:
        passes: the pieces of a pass over the data, by the number of the pass.
        rows: tokens of a pass, or None if that is not known; an estimate, if some are left out.
        batch: tokens of a batch.
    """

    passes: Callable[[int], Iterator[Values]]
    rows: int | None
    batch: int


def source_of(activations: Any, sites: tuple[str, ...], batch: int | None, seed: int) -> Source:
    """Where batches come from.

    Args:
        activations: see `train`.
        sites: canonical names of the sites that are read and written; one, for an autoencoder.
        batch: tokens of a batch, or None.
        seed: of the order of arrays and stores.

    Raises:
        TypeError, ValueError: the activations are not what `train` takes.
    """
    if isinstance(activations, Store):
        return _of_store(activations, sites, batch or min(_BATCH, len(activations)), seed)
    if hasattr(activations, "shape") or (isinstance(activations, tuple) and len(sites) == 2):
        values = _as_values(activations, sites)
        return _of_arrays(tuple(map(np.asarray, values)), batch or min(_BATCH, len(values[0])), seed)
    if not isinstance(activations, Iterable) or isinstance(activations, str | Mapping):
        raise TypeError(
            f"activations is a {type(activations).__name__}; give an array [n, d], an iterable of such batches, an "
            "ActivationStore, or what model.activations returns"
        )
    return _of_batches(activations, sites, batch)


def batches(source: Source, once: bool) -> Iterator[Values]:
    """Batches of as many tokens each; the tokens at the end that do not fill one are left out.

    Args:
        source: where they come from.
        once: stop after one pass; else there are passes until one has nothing.
    """
    return _regrouped(_pieces(source, once), source.batch)


def _pieces(source: Source, once: bool) -> Iterator[Values]:
    for number in itertools.count():
        empty = True
        for piece in source.passes(number):
            empty = empty and not len(piece[0])
            yield piece
        if once or empty:
            return


def _regrouped(pieces: Iterator[Values], batch: int) -> Iterator[Values]:
    held: Values | None = None
    for piece in pieces:
        if held is not None:
            piece = tuple(np.concatenate(pair) for pair in zip(held, piece, strict=True))
        n = len(piece[0])
        for start in range(0, n - n % batch, batch):
            yield tuple(values[start : start + batch] for values in piece) if n > batch else piece
        held = tuple(values[n - n % batch :] for values in piece) if n % batch else None


def _of_arrays(values: Values, batch: int, seed: int) -> Source:
    def passes(number: int) -> Iterator[Values]:
        order = np.random.default_rng((seed, number)).permutation(len(values[0]))
        for start in range(0, len(order), batch):
            yield tuple(each[order[start : start + batch]] for each in values)

    return Source(passes, len(values[0]), batch)


def _of_store(store: Store, sites: tuple[str, ...], batch: int, seed: int) -> Source:
    def passes(number: int) -> Iterator[Values]:
        shuffled = store.shuffled(batch, seed, sites=list(dict.fromkeys(sites)), epoch=number)
        return (_as_values(piece, sites) for piece in shuffled)

    return Source(passes, len(store), batch)


def _of_batches(activations: Iterable[Any], sites: tuple[str, ...], batch: int | None) -> Source:
    """Of an iterable, of which the first element says how large batches are."""
    again = iter(activations)
    first = next(again, None)
    if first is None:
        raise ValueError("activations has no batch")
    rows = len(_as_values(first, sites)[0])
    rest: Iterator[Any] = itertools.chain([first], again)

    def passes(number: int) -> Iterator[Values]:
        pieces = rest if number == 0 else iter(activations)
        return (_as_values(piece, sites) for piece in pieces)

    total = None
    if isinstance(activations, list | tuple):
        total = sum(len(_as_values(piece, sites)[0]) for piece in activations)
    elif isinstance(activations, Sized):
        total = len(activations) * rows
    return Source(passes, total, batch or max(rows, 1))


def _as_values(piece: Any, sites: tuple[str, ...]) -> Values:
    """The values [m, d] of some tokens at the sites.

    Raises:
        ValueError: they are not such arrays.
    """
    if isinstance(piece, Mapping):
        return _of_mapping(piece, sites)
    found = tuple(map(as_array, piece if isinstance(piece, tuple | list) else (piece,)))
    if len(found) != len(sites):
        wanted = "arrays, or give site_out=" if len(sites) == 1 else "pairs (x, y), values of site_in and of site_out"
        raise ValueError(f"a batch of activations has {len(found)} arrays; give {wanted}")
    shapes = [np.shape(each) for each in found]
    if any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"activations have shapes {', '.join(map(str, shapes))}; they must be [n, d], of real tokens")
    return tuple(each if isinstance(each, jax.Array) else np.asarray(each) for each in found)


def _of_mapping(piece: Any, sites: tuple[str, ...]) -> Values:
    """The values of real tokens by site, without the first of each text, whose norm is far from others'."""
    if isinstance(piece, ActivationCache):
        values: list[Any] = [piece.real(name) for name in sites]
        tokens, mask = np.asarray(piece.tokens), np.asarray(piece.attention_mask)
        kept = ((np.cumsum(mask, axis=1) > 1) & (tokens != piece.config.bos_token_id))[mask > 0]
    else:
        values, kept = [as_array(piece[name]) for name in sites], np.asarray(piece.positions) > 0
    for name, value in zip(sites, values, strict=True):
        if isinstance(value, Mapping):
            raise ValueError(f"{name} was reduced to {', '.join(value)}; training needs the values of the site")
    return tuple(np.asarray(value).reshape(len(value), -1)[kept] for value in values)
