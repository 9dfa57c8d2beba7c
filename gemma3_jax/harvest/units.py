"""Units: the numbered parts of a corpus. A unit is a pure function of corpus, settings and number.

One pass over the corpus, which turns every document into ids, finds where each unit begins: the plan, 24 bytes a unit.
Everything else about a unit follows from its documents.

Axes: b row, p column, n real tokens in the corpus' order.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gemma3_jax.harvest.documents import bos_of, documents
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.packing import Extent, Pack, Piece, fill
from gemma3_jax.harvest.sources import Corpus
from gemma3_jax.hooked.buckets import bucket
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.inputs import Inputs, special_id

Keep = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a corpus becomes units, and which tokens are kept; `harvest` describes the fields."""

    rows: int
    length: int
    seed: int
    pack: Pack
    drop_bos: bool
    sample: int | None
    keep: Keep | None

    def __post_init__(self) -> None:
        if self.pack not in (True, False, "cut"):
            raise StoreError(f"pack is {self.pack!r}; it must be True, False or 'cut'")
        wrong = [name for name in ("rows", "length") if getattr(self, name) < 1]
        if wrong or self.length < 2 or (self.sample is not None and self.sample < 1):
            raise StoreError(
                f"rows is {self.rows}, length {self.length} and sample {self.sample}; rows and sample must be at least "
                "1, and length at least 2"
            )


class Plan(NamedTuple):
    """Where each unit begins, [units + 1, 3] int64: its first document, the token of it, and the real tokens before."""

    bounds: np.ndarray

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """The number of real tokens in all units."""
        return int(self.bounds[-1, 2])

    def tokens_of(self, number: int) -> int:
        """The number of real tokens in a unit."""
        return int(self.bounds[number + 1, 2] - self.bounds[number, 2])


@dataclasses.dataclass(frozen=True)
class Unit:
    """The input of a run, and the tokens of it that are kept.

    Attributes:
        inputs: tokens, mask and documents [b, p].
        rows: [n] int32, the row of each kept token.
        columns: [n] int32.
        arrays: of the kept tokens, each [n]: what the store has beside activations; see `KEPT`.
        documents: [b] int64, the document of each row that has one, without padding rows; None if documents share rows.
    """

    inputs: Inputs
    rows: np.ndarray
    columns: np.ndarray
    arrays: dict[str, np.ndarray]
    documents: np.ndarray | None


# By name, the dtype of what a store has of each token.
KEPT = {
    "tokens": np.int32,  # ids
    "documents": np.int64,  # number of its document in the corpus
    "offsets": np.int32,  # place in its document, from 0; -1 for a BOS in front of a later piece of it
    "positions": np.int32,  # position that the model saw, from 0 in each piece
    "rows": np.int32,  # row of the unit
    "segment_ids": np.int32,  # number of the piece in its row
}


def make_plan(model: Model, corpus: Corpus, layout: Layout, show: Callable[[int], object] = lambda done: None) -> Plan:
    """The plan of a corpus, in one pass over it; `show` is called with the number of documents read so far."""
    waiting: collections.deque[Extent] = collections.deque()
    capacity, held, bounds, total = layout.rows * layout.length, 0, [(0, 0, 0)], 0

    def begin_next() -> None:
        nonlocal held, total
        pieces, (document, start) = fill(list(waiting), layout.rows, layout.length, layout.pack)
        total += sum(piece.extent.size for piece in pieces)
        bounds.append((document, start, total))
        while waiting and waiting[0].document < document:
            held -= waiting.popleft().size
        if waiting and start:
            rest = waiting[0]._replace(start=start)
            held -= waiting[0].size - rest.size
            waiting[0] = rest

    for extent in _extents(model, corpus, 0, 0, len(corpus)):
        waiting.append(extent)
        held += extent.size
        while held >= capacity and (layout.pack or len(waiting) > layout.rows):
            begin_next()
        show(extent.document + 1)
    while waiting:
        begin_next()
    if not total:
        raise StoreError("the corpus has no tokens")
    return Plan(np.asarray(bounds, np.int64))


def _extents(model: Model, corpus: Corpus, first: int, start: int, end: int) -> Iterator[Extent]:
    """What there is of each document; `start` is a token of the first."""
    bos = bos_of(model)
    for number, ids in enumerate(documents(model, corpus, first, end), first):
        lead = _lead(ids, bos)
        yield Extent(number, start if number == first else 0, len(ids) - lead, lead)


def _lead(ids: np.ndarray, bos: int | None) -> int:
    return int(bool(len(ids)) and ids[0] == bos)


def make_unit(model: Model, corpus: Corpus, plan: Plan, number: int, layout: Layout) -> Unit:
    """The unit of that number."""
    (first, start, _), (last, stop, _) = plan.bounds[number : number + 2].tolist()
    bos, end = bos_of(model), last + (stop > 0)
    texts = dict(enumerate(documents(model, corpus, first, end), first))
    leads = {document: _lead(ids, bos) for document, ids in texts.items()}
    extents = [
        Extent(document, start if document == first else 0, len(ids) - leads[document], leads[document])
        for document, ids in texts.items()
    ]
    pieces, _ = fill(extents, layout.rows, layout.length, layout.pack)
    widest = max(piece.extent.size for piece in pieces)
    width = layout.length if layout.pack else min(layout.length, bucket(widest))
    arrays, columns = _arrays(pieces, texts)
    inputs = _inputs(arrays, columns, (layout.rows, width), special_id(model.config, "pad_token_id"), layout.pack)
    kept = np.flatnonzero(_kept(arrays, texts, leads, layout))
    of_rows = None if layout.pack else np.asarray([piece.extent.document for piece in pieces], np.int64)
    chosen = {name: array[kept] for name, array in arrays.items()}
    return Unit(inputs, chosen["rows"], columns[kept], chosen, of_rows)


def _arrays(pieces: list[Piece], texts: dict[int, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of `KEPT` [n] of all real tokens, and their columns [n]."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in KEPT}
    columns: list[np.ndarray] = []
    before: collections.Counter[int] = collections.Counter()
    numbers: dict[tuple[int, int], int] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.row, piece.column)):
        numbers[piece.row, piece.column] = before[piece.row]
        before[piece.row] += 1
    for (document, start, stop, lead), row, column in pieces:
        offsets = np.arange(start + lead, stop + lead)
        # A later piece of a document begins with a BOS that the document does not have there.
        offsets = np.concatenate([[0 if start == 0 else -1][:lead], offsets]).astype(np.int32)
        n = len(offsets)
        found = {
            "tokens": texts[document][np.maximum(offsets, 0)],
            "documents": np.full(n, document),
            "offsets": offsets,
            "positions": np.arange(n),
            "rows": np.full(n, row),
            "segment_ids": np.full(n, numbers[row, column]),
        }
        for name, array in found.items():
            parts[name].append(array)
        columns.append(column + np.arange(n, dtype=np.int32))
    return {name: np.concatenate(arrays).astype(KEPT[name]) for name, arrays in parts.items()}, np.concatenate(columns)


def _inputs(
    arrays: dict[str, np.ndarray], columns: np.ndarray, shape: tuple[int, int], padding: int, pack: Pack
) -> Inputs:
    """Tokens, mask, and in packed rows positions and documents, each [b, p]. An empty row runs with a padding token."""
    at = arrays["rows"], columns
    tokens, mask, positions = (np.full(shape, value, np.int32) for value in (padding, 0, 0))
    documents = np.full(shape, -1, np.int32)
    tokens[at], mask[at] = arrays["tokens"], 1
    documents[at], positions[at] = arrays["segment_ids"], arrays["positions"]
    mask[~mask.any(axis=1), 0] = 1
    # With one document a row, positions count from its first token by themselves, and reductions may choose them.
    return Inputs(tokens, mask, positions, documents) if pack else Inputs(tokens, mask)


def _kept(
    arrays: dict[str, np.ndarray], texts: dict[int, np.ndarray], leads: dict[int, int], layout: Layout
) -> np.ndarray:
    """[n] bool: which tokens are kept."""
    offsets, numbers = arrays["offsets"], arrays["documents"]
    kept = np.ones(len(offsets), bool)
    if layout.drop_bos:
        kept &= offsets >= np.asarray([leads[number] for number in numbers.tolist()])
    if layout.sample is not None:
        chosen = {document: _sample(layout, document, leads[document], len(ids)) for document, ids in texts.items()}
        kept &= (offsets >= 0) & np.asarray(
            [chosen[number][offset] for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)]
        )
    if layout.keep is not None:
        wanted = np.asarray(layout.keep(arrays["tokens"], arrays["positions"]))
        if wanted.shape != kept.shape or wanted.dtype != bool:
            raise StoreError(
                f"keep returns {wanted.dtype} of shape {list(wanted.shape)} for {len(kept)} tokens; it must return one "
                "bool for each"
            )
        kept &= wanted
    return kept


def _sample(layout: Layout, document: int, lead: int, size: int) -> np.ndarray:
    """[size] bool: a few tokens of a document, by chance; never its BOS."""
    chosen = np.zeros(size, bool)
    assert layout.sample is not None
    generator = np.random.default_rng((layout.seed, document))
    chosen[lead + generator.permutation(size - lead)[: layout.sample]] = True
    return chosen
