"""Which tokens of which documents a unit has, and where.

A unit has consecutive documents of the corpus, so that the store is in the corpus' order and a unit needs no more than
its place in the corpus. Inside a unit, documents are packed by best fit, the longest first. A document that fits a row
is never cut: all its tokens see what they would see alone. One that is longer than a row has to be cut, and is cut
where it fills the rows. Each of its pieces is a text of its own: it begins with BOS, if the document does, and does not
see the pieces before. If most documents take more than half of a row, this leaves holes; the alternative is to cut
documents wherever a row ends.

Lengths count the tokens after BOS; `lead` is 1 if there is a BOS, and 0 otherwise.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

Pack: TypeAlias = bool | Literal["cut"]


class Extent(NamedTuple):
    """What a unit may take of a document: its tokens from `start` to `stop`, after `lead` tokens of BOS."""

    document: int
    start: int
    stop: int
    lead: int

    @property
    def size(self) -> int:
        """Tokens in a row."""
        return self.stop - self.start + self.lead


class Piece(NamedTuple):
    """An extent in one row, from a column on."""

    extent: Extent
    row: int
    column: int


def fill(extents: Sequence[Extent], rows: int, length: int, pack: Pack) -> tuple[list[Piece], tuple[int, int]]:
    """The pieces of a unit, in the corpus' order; and where the next unit begins: a document, and a token of it.

    Args:
        extents: the documents that come next, with at least as many tokens as the unit holds, if there are so many. As
            many of them are taken as fit; the last may be cut, if it is longer than a row.
        rows: rows of the unit.
        length: tokens of a row.
        pack: whether documents share rows; "cut" fills each row, and cuts documents at its end.

    >>> pieces, following = fill([Extent(i, 0, n, 0) for i, n in enumerate([3, 5, 5, 3, 9])], 2, 8, True)
    >>> [(p.extent.document, p.row, p.column) for p in pieces], following
    ([(0, 0, 5), (1, 0, 0), (2, 1, 0), (3, 1, 5)], (4, 0))
    """
    if pack is not True:
        return _in_order(extents, rows, length, share=bool(pack))
    room, most = rows * length, 0
    while most < len(extents) and room > 0:
        room -= extents[most].size
        most += 1
    if room < 0 and extents[most - 1].size <= length:
        most -= 1
    for count in range(most, 0, -1):
        pieces = place(extents[:count], rows, length)
        if pieces is not None:
            return pieces, _after(extents[count - 1], pieces)
    raise AssertionError("one document always fits")


def _after(last: Extent, pieces: Sequence[Piece]) -> tuple[int, int]:
    """The document and the token that come after these pieces; `last` is the last extent that was taken."""
    stop = pieces[-1].extent.stop if pieces and pieces[-1].extent.document == last.document else last.stop
    return (last.document, stop) if stop < last.stop else (last.document + 1, 0)


def place(extents: Sequence[Extent], rows: int, length: int) -> list[Piece] | None:
    """The pieces of these documents, in the corpus' order; None if they do not fit. The last one may be cut.

    Best fit, the longest first; then those that are longer than a row, in the largest holes.
    """
    holes = [(length, row) for row in range(rows)]  # in the order of their sizes
    found: dict[int, list[Piece]] = {}
    for i in sorted(range(len(extents)), key=lambda i: (-extents[i].size, i)):
        if 0 < extents[i].size <= length:
            piece = _placed(extents[i], holes, length)
            if piece is None:
                return None
            found[i] = [piece]
    for i, extent in enumerate(extents):
        if extent.size > length:
            found[i], rest = _cut(extent, holes, length)
            if rest.size > rest.lead and (i < len(extents) - 1 or not found[i]):
                return None
    return [piece for i in range(len(extents)) for piece in found.get(i, [])]


def _placed(extent: Extent, holes: list[tuple[int, int]], length: int) -> Piece | None:
    """The extent in the smallest hole that it fits."""
    at = bisect.bisect_left(holes, (extent.size, -1))
    if at == len(holes):
        return None
    free, row = holes.pop(at)
    if free > extent.size:
        bisect.insort(holes, (free - extent.size, row))
    return Piece(extent, row, length - free)


def _cut(extent: Extent, holes: list[tuple[int, int]], length: int) -> tuple[list[Piece], Extent]:
    """The pieces of an extent in the largest holes, and what is left of it. Small holes stay empty."""
    pieces, least = [], extent.lead + max(1, length // 64)
    while extent.stop > extent.start:
        if extent.size <= length and (piece := _placed(extent, holes, length)):
            pieces.append(piece)
            return pieces, extent._replace(start=extent.stop)
        if not holes or holes[-1][0] < least:
            break
        stop = extent.start + holes[-1][0] - extent.lead
        piece = _placed(extent._replace(stop=stop), holes, length)
        assert piece is not None
        pieces.append(piece)
        extent = extent._replace(start=stop)
    return pieces, extent


def _in_order(extents: Sequence[Extent], rows: int, length: int, share: bool) -> tuple[list[Piece], tuple[int, int]]:
    """Row after row; each piece has a row of its own, or else begins where the last one ended."""
    pieces: list[Piece] = []
    row, column = 0, 0
    for extent in extents:
        rest = extent
        while rest.size > 0:
            if column and (not share or length - column <= rest.lead):
                row, column = row + 1, 0
            if row == rows:
                return pieces, (rest.document, rest.start)
            stop = min(rest.stop, rest.start + length - column - rest.lead)
            pieces.append(Piece(rest._replace(stop=stop), row, column))
            column += pieces[-1].extent.size
            if stop == rest.stop:
                break
            rest = rest._replace(start=stop)
    return pieces, (extents[-1].document + 1, 0)
