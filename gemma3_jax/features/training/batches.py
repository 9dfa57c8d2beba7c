"""Batches of activations for training, from what a caller has: arrays, batches, a store, or caches of a model.

Axes: n tokens, d features of a site, l layers of a dictionary of several, whose values are side by side; m tokens of a
piece, which may be any number.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np

from gemma3_jax.cache.activations import ActivationCache, Name
from gemma3_jax.inputs import as_array

_BATCH = 1024  # where the caller does not say

# A token's values at the sites that are read and at those that are written; of an autoencoder, the first alone.
Values: TypeAlias = tuple[np.ndarray | jax.Array, ...]
# Canonical names of the sites that are read, and of those that are written; in each, one for every layer.
Sites = tuple[tuple[str, ...], ...]


@runtime_checkable
class Store(Protocol):
    """What training reads of a `gemma3_jax.harvest.ActivationStore`."""

    @property
    def sites(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def shuffled(
        self, batch: int, seed: int = 0, *, sites: list[Name] | None = None, epoch: int = 0
    ) -> Iterable[object]: ...


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


def source_of(activations: object, sites: Sites, batch: int | None, seed: int) -> Source:
    """Where batches come from.

    Args:
        activations: see `train`.
        sites: see there; one tuple, for an autoencoder.
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


def _of_store(store: Store, sites: Sites, batch: int, seed: int) -> Source:
    def passes(number: int) -> Iterator[Values]:
        names: list[Name] = list(dict.fromkeys(itertools.chain(*sites)))
        shuffled = store.shuffled(batch, seed, sites=names, epoch=number)
        return (_as_values(piece, sites) for piece in shuffled)

    return Source(passes, len(store), batch)


def _of_batches(activations: Iterable[object], sites: Sites, batch: int | None) -> Source:
    """Of an iterable, of which the first element says how large batches are."""
    again = iter(activations)
    first = next(again, None)
    if first is None:
        raise ValueError("activations has no batch")
    rows = len(_as_values(first, sites)[0])
    rest: Iterator[object] = itertools.chain([first], again)

    def passes(number: int) -> Iterator[Values]:
        pieces = rest if number == 0 else iter(activations)
        return (_as_values(piece, sites) for piece in pieces)

    total = None
    if isinstance(activations, list | tuple):
        total = sum(len(_as_values(piece, sites)[0]) for piece in activations)
    elif isinstance(activations, Sized):
        total = len(activations) * rows
    return Source(passes, total, batch or max(rows, 1))


def _as_values(piece: Any, sites: Sites) -> Values:
    """The values [m, d] of some tokens at the sites; [m, l d] of a dictionary of several layers.

    Raises:
        ValueError: they are not such arrays.
    """
    if isinstance(piece, Mapping):
        return _of_mapping(piece, sites)
    found = tuple(map(as_array, piece if isinstance(piece, tuple | list) else (piece,)))
    if len(found) != len(sites):
        wanted = "arrays, or give site_out=" if len(sites) == 1 else "pairs (x, y), values of site_in and of site_out"
        raise ValueError(f"a batch of activations has {len(found)} arrays; give {wanted}")
    layers = len(sites[0])
    shapes, axes = [np.shape(each) for each in found], 2 if layers == 1 else 3
    if any(len(shape) != axes for shape in shapes) or len({shape[-2] for shape in shapes}) != 1:
        wanted = "[n, d], of real tokens" if layers == 1 else f"[{layers}, n, d], of real tokens"
        raise ValueError(f"activations have shapes {', '.join(map(str, shapes))}; they must be {wanted}")
    if layers > 1:
        if any(len(each) != layers for each in found):
            raise ValueError(f"activations have shapes {', '.join(map(str, shapes))}, for {layers} layers")
        # [l, m, d] -> [m, l d]
        found = tuple(np.moveaxis(np.asarray(each), 0, 1).reshape(shapes[0][1], -1) for each in found)
    return tuple(each if isinstance(each, jax.Array) else np.asarray(each) for each in found)


def _of_mapping(piece: Any, sites: Sites) -> Values:
    """The values of real tokens by site, without the first of each text, whose norm is far from others'."""
    names = list(dict.fromkeys(itertools.chain(*sites)))
    values: dict[str, Any]
    if isinstance(piece, ActivationCache):
        values = {name: piece.real(name) for name in names}
        tokens, mask = np.asarray(piece.tokens), np.asarray(piece.attention_mask)
        kept = ((np.cumsum(mask, axis=1) > 1) & (tokens != piece.config.bos_token_id))[mask > 0]
    else:
        values, kept = {name: as_array(piece[name]) for name in names}, np.asarray(piece.positions) > 0
    for name, value in values.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{name} was reduced to {', '.join(value)}; training needs the values of the site")
    flat = {name: np.asarray(value).reshape(len(value), -1)[kept] for name, value in values.items()}
    return tuple(flat[one[0]] if len(one) == 1 else np.concatenate([flat[name] for name in one], 1) for one in sites)
