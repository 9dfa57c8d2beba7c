"""Integers that do not fit 32 bits are refused, at every entry: a cast would wrap 2**32 + 1 to 1."""

import functools

import numpy as np
import pytest

from gemma3_jax import HookedGemma3, analysis, edits, reductions
from gemma3_jax.inputs import as_int32
from tests.helpers.small_model import TOKENS, small

WIDE = np.int64(2**32 + 1)
SITE, HEADS = "blocks.1.hook_out", "blocks.1.attn.hook_z"


@functools.cache
def model():
    return HookedGemma3(*small())


def hooked(site, edit):
    return model().run_with_hooks(TOKENS, [(site, edit)])


ENTRIES = {
    "positions": lambda wide: model()(TOKENS, positions=np.arange(TOKENS.shape[1]) + np.zeros_like(TOKENS) + wide),
    "segment_ids": lambda wide: model()(TOKENS, segment_ids=np.where(TOKENS > 50, wide, 1)),
    "logits_at": lambda wide: model()(
        TOKENS, positions=np.arange(TOKENS.shape[1]) + np.zeros_like(TOKENS), logits_at=wide
    ),
    "positions of an edit": lambda wide: hooked(SITE, edits.only(edits.Scale(0.0), positions=wide)),
    "heads of an edit": lambda wide: hooked(HEADS, edits.only(edits.Scale(0.0), heads=[wide])),
    "row of another run": lambda wide: hooked(SITE, edits.FromRow(wide)),
    "reductions.At": lambda wide: model().run_with_cache(TOKENS, {SITE: reductions.At(wide)}),
    "items": lambda wide: analysis.sweep(
        model(),
        TOKENS,
        lambda item: {SITE: edits.only(edits.Scale(0.0), positions=item)},
        np.asarray([wide]),
        lambda logits: logits[0, -1, 5],
        progress=False,
    ),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_wide_integer_is_refused(entry):
    """Each of these ran with 1 in its place; `segment_ids` joined the documents."""
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        entry(WIDE)
    entry(np.int64(1))  # control


def test_the_ends_of_32_bits_fit():
    """The check refuses nothing that fits."""
    ends = np.array([-(2**31), 2**31 - 1])
    np.testing.assert_array_equal(as_int32("ends", ends), ends)
    with pytest.raises(ValueError, match="ends has -2147483649"):
        as_int32("ends", ends - 1)
