"""Which tokens a unit has: all of the corpus, each once, in order, and documents that fit a row uncut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax.harvest.packing import Extent, fill

LENGTH = 16


def units_of(lengths, rows, pack, lead=1):
    """The pieces of every unit of documents with these lengths."""
    document, start, units = 0, 0, []
    while document < len(lengths):
        rest = [Extent(i, start if i == document else 0, n, lead) for i, n in enumerate(lengths)][document:]
        pieces, following = fill(rest, rows, LENGTH, pack)
        assert following > (document, start)
        (document, start), _ = following, units.append(pieces)
    return units


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sampled_from([True, False, "cut"]),
    st.integers(0, 1),
)
def test_units_have_every_token_once(lengths, rows, pack, lead):
    """In the corpus' order; no two pieces overlap; only documents that are longer than a row are cut."""
    units = units_of(lengths, rows, pack, lead)
    pieces = [piece for unit in units for piece in unit]
    tokens = [(p.extent.document, i) for p in pieces for i in range(p.extent.start, p.extent.stop)]
    assert tokens == [(document, i) for document, n in enumerate(lengths) for i in range(n)]
    for unit in units:
        cells = np.zeros((rows, LENGTH), int)
        for (_, start, stop, each), row, column in unit:
            assert column + stop - start + each <= LENGTH
            cells[row, column : column + stop - start + each] += 1
        assert cells.max(initial=0) <= 1
        assert pack or len({piece.row for piece in unit}) == len(unit)
    cut = {p.extent.document for p in pieces if p.extent.stop - p.extent.start < lengths[p.extent.document]}
    assert pack == "cut" or all(lengths[document] + lead > LENGTH for document in cut)
    if pack == "cut":  # but for a last cell that only BOS would fit
        assert all(sum(piece.extent.size for piece in unit) >= rows * (LENGTH - 1) for unit in units[:-1])


@pytest.mark.parametrize(("shortest", "longest"), [(1, 20), (50, 300), (1, 512), (1, 20_000)])
def test_there_is_little_padding(shortest, longest):
    """Below 2 % at 64 x 1,024, whatever the lengths, unless most documents take more than half of a row."""
    generator, total, held = np.random.default_rng(0), 0, 0
    for _ in range(3):
        lengths = generator.integers(shortest, longest, 70_000 // max(1, longest // 2) + 60)
        pieces, _ = fill([Extent(i, 0, int(n), 1) for i, n in enumerate(lengths)], 64, 1024, True)
        total, held = total + 64 * 1024, held + sum(piece.extent.size for piece in pieces)
    assert 0.98 < held / total <= 1
