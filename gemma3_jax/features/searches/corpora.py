"""What a search reads: batches of the values of a dictionary's sites, from texts or from a store.

Batches are numbered, and so are the tokens of each, in the order of the corpus. A token is looked up by these two
numbers, so nothing of the texts is kept.

Axes: b row, p column, n tokens of a batch, w tokens of a window, d features of the site.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np

from gemma3_jax.harvest.documents import bos_of
from gemma3_jax.harvest.manifest import first_ids
from gemma3_jax.harvest.sources import as_corpus, digest_of
from gemma3_jax.harvest.store import ActivationStore
from gemma3_jax.harvest.units import Layout, Unit, make_plan, make_unit
from gemma3_jax.hooked.buckets import bucket
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.inputs import Inputs

BEFORE, AFTER = 16, 8  # tokens that a window has beside its own
_STORED = 16384  # tokens of a store that are a batch
_PIECE = ("documents", "offsets", "positions")
_UNITS = 32  # units whose ids are kept while examples are looked at


class Batch(NamedTuple):
    """Tokens that are encoded together; all batches of a corpus have the same n.

    Attributes:
        number: of the batch.
        real: how many of the tokens count; they come first.
        values: by site, [n, ...].
    """

    number: int
    real: int
    values: dict[str, np.ndarray]


class Window(NamedTuple):
    """A token among those around it that the model saw together.

    Attributes:
        tokens: [w] int32 ids.
        at: which of them is the token.
        document: number of the document in the corpus.
        offset: place of the token in it.
    """

    tokens: np.ndarray
    at: int
    document: int
    offset: int


class Source(Protocol):
    """What texts and stores have."""

    documents: int

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches from that number on, in order."""

    def digest(self) -> str:
        """The digest of what is read."""

    @property
    def tokens(self) -> int:
        """n, of every batch."""

    def window(self, number: int, place: int) -> Window:
        """The window around a token."""

    def values(self, name: str, where: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        """The values [w, ...] of a site in the windows around tokens."""


class Texts:
    """A corpus that the model runs on."""

    def __init__(self, model: HookedGemma3, corpus: object, names: list[str], rows: int, length: int):
        self._model, self._names = model, names
        self._corpus = as_corpus(corpus, bos_of(model))
        self.documents = len(self._corpus)
        self._layout = Layout(rows, length, 0, True, False, None, functools.partial(_counts, model))
        self._plan = make_plan(model, self._corpus, self._layout)
        most = max(map(self._plan.tokens_of, range(self._plan.units)))
        self.tokens = bucket(most)
        self.unit = functools.lru_cache(maxsize=_UNITS)(self._unit)

    def digest(self) -> str:
        """The digest of the corpus, and of the ids of its first documents, which another tokenizer would change."""
        return f"{digest_of(self._corpus)} {first_ids(self._model, self._corpus)}"

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches from that number on, in order."""
        inputs = (self.unit(number).inputs for number in range(first, self._plan.units))
        for number, cache in enumerate(self._model.activations(inputs, self._names), first):
            unit = self.unit(number)
            values = {name: np.asarray(cache[name])[unit.rows, unit.columns] for name in self._names}
            yield Batch(number, len(unit.rows), {name: _filled(each, self.tokens) for name, each in values.items()})

    def window(self, number: int, place: int) -> Window:
        """The window around a token."""
        unit = self.unit(number)
        chosen = _window(unit, place)
        arrays = {name: array[chosen] for name, array in unit.arrays.items()}
        at = place - chosen.start
        return Window(arrays["tokens"], at, int(arrays["documents"][at]), int(arrays["offsets"][at]))

    def values(self, name: str, where: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        """The values [w, ...] of a site in the windows around tokens: what they see runs again, each in its own row."""
        seen = [_seen(self.unit(number), place) for number, place in where]
        if not seen:
            return []
        lengths = np.asarray([len(ids) for ids, _ in seen])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
        tokens = np.zeros_like(mask)
        tokens[mask > 0] = np.concatenate([ids for ids, _ in seen])
        cache = next(iter(self._model.activations([Inputs(tokens, mask)], name)))
        return [value[columns] for value, (_, columns) in zip(np.asarray(cache[name]), seen, strict=True)]

    def _unit(self, number: int) -> Unit:
        unit = make_unit(self._model, self._corpus, self._plan, number, self._layout)
        if self._plan.units > 1:
            return unit
        # A small corpus does not run at the size of a large one.
        b, p = int(unit.rows.max(initial=0)) + 1, bucket(int(unit.columns.max(initial=0)) + 1)
        inputs = jax.tree.map(lambda part: part[:b, :p], unit.inputs)
        return Unit(inputs, unit.rows, unit.columns, unit.arrays, unit.documents)


class Stored:
    """A store that has the sites."""

    def __init__(self, model: HookedGemma3, store: ActivationStore, names: list[str]):
        self._model, self._store, self._names = model, store, names
        self.documents = store.manifest["corpus"]["documents"]
        self.tokens = min(_STORED, bucket(len(store)))
        for name in names:
            if not isinstance(store[name].rows(0, 1), np.ndarray):
                raise ValueError(f"the store has a reduction of {name}; a search needs the values, so harvest the site")

    def digest(self) -> str:
        """The digest of the manifest, and of which units are there."""
        described = json.dumps([self._store.manifest, [int(number) for number in self._store.missing]])
        return hashlib.sha256(described.encode()).hexdigest()

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches from that number on, in order."""
        for number in range(first, -(-len(self._store) // self.tokens)):
            rows = self._rows(number)
            values = {name: _filled(self._store[name].take(rows), self.tokens) for name in self._names}
            yield Batch(number, len(rows), values)

    def window(self, number: int, place: int) -> Window:
        """The window around a token."""
        row = int(self._rows(number)[place])
        rows = self._window(row)
        found = {key: self._store.take(key, rows) for key in ("tokens", "documents", "offsets")}
        at = int(np.searchsorted(rows, row))
        return Window(found["tokens"], at, int(found["documents"][at]), int(found["offsets"][at]))

    def values(self, name: str, where: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        """The values [w, ...] of a site in the windows around tokens."""
        rows = (int(self._rows(number)[place]) for number, place in where)
        return [self._store[name].take(self._window(row)) for row in rows]

    def _rows(self, number: int) -> np.ndarray:
        """The rows of the store that count, of a batch."""
        start = number * self.tokens
        tokens = self._store.tokens(start, start + self.tokens)
        return start + np.flatnonzero(_counts(self._model, tokens))

    def _window(self, row: int) -> np.ndarray:
        """The rows of the window around a row."""
        start, stop = max(0, row - BEFORE), min(row + AFTER + 1, len(self._store))
        arrays = {key: self._store.read(key, start, stop) for key in _PIECE}
        same = _same_piece(arrays, row - start)
        return start + np.flatnonzero(same & _counts(self._model, self._store.tokens(start, stop)))


def source_of(model: HookedGemma3, corpus: object, names: list[str], rows: int, length: int) -> Source:
    """The source of texts or of a store."""
    if isinstance(corpus, ActivationStore):
        return Stored(model, corpus, names)
    return Texts(model, corpus, names, rows, length)


def _counts(model: HookedGemma3, tokens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """[n] bool: which tokens are neither BOS nor padding."""
    return ~np.isin(tokens, [each for each in (bos_of(model), model.config.pad_token_id) if each is not None])


def _window(unit: Unit, place: int) -> slice:
    """The tokens of a unit around one of them, of the same piece of a document."""
    start, stop = max(0, place - BEFORE), place + AFTER + 1
    same = np.flatnonzero(_same_piece({key: unit.arrays[key][start:stop] for key in _PIECE}, place - start))
    return slice(start + int(same[0]), start + int(same[-1]) + 1)


def _seen(unit: Unit, place: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a piece of a document from its beginning to the end of a window; where in them the window is."""
    row, columns = unit.rows[place], unit.columns[_window(unit, place)]
    segments = np.asarray(unit.inputs.segment_ids)[row]
    start = int(np.argmax(segments == segments[columns[0]]))
    return np.asarray(unit.inputs.tokens)[row, start : columns[-1] + 1], columns - start


def _same_piece(arrays: Mapping[str, np.ndarray], at: int) -> np.ndarray:
    """[w] bool: which tokens are of the same piece of a document as that at `at`; others it does not see."""
    starts = arrays["offsets"] - arrays["positions"]
    return (arrays["documents"] == arrays["documents"][at]) & (starts == starts[at])


def _filled(values: np.ndarray, n: int) -> np.ndarray:
    """Values [m, ...] as [n, ...], with zeros."""
    return np.pad(values, ((0, n - len(values)), *[(0, 0)] * (values.ndim - 1)))
