"""The clean run of patching and attribution corresponds to the corrupted one, token by token."""

import functools

import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, analysis, patching

SHORT_SECOND, SHORT_FIRST = ["ba ke lo", "ba ke"], ["ba ke", "ba ke lo"]
NEEDED = analysis.attribution.nodes.sites_written


@functools.cache
def model():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def metric(logits):
    return logits[0, -1, 9]


ANALYSES = {
    "patching": lambda corrupted, clean, **options: patching.get_act_patch_resid_pre(
        model(), corrupted, clean, metric, progress=False, **options
    ),
    "attribution": lambda corrupted, clean, **options: analysis.attribution_patching(
        model(), corrupted, clean, metric, "resid_pre", ("layer", "pos"), **options
    ),
    "edges": lambda corrupted, clean, **options: analysis.edge_attribution(
        model(), corrupted, clean, metric, **options
    ),
    "paths": lambda corrupted, clean, **options: analysis.path_patching(
        model(), corrupted, clean, metric, [("logits",)], [("embed",)], progress=False, **options
    ),
}


@functools.cache
def everything(*texts):
    names = [*NEEDED(model().config), "blocks.*.hook_in"]
    return model().run_with_cache(list(texts), names, return_type=None)[1]


@pytest.mark.parametrize("run", ANALYSES.values(), ids=ANALYSES)
def test_runs_with_padding_in_different_places_are_refused(run):
    """The clean texts ran with the mask of the corrupted ones, so that padding was text and a token was hidden."""
    for corrupted in (SHORT_SECOND, ["ba ke lo", "ba ke ti"]):
        with pytest.raises(ValueError, match="padding of the clean run"):
            run(corrupted, SHORT_FIRST)
        with pytest.raises(ValueError, match="padding of the clean run"):
            run(corrupted, everything(*SHORT_FIRST))
    assert np.isfinite(run(SHORT_FIRST, everything(*SHORT_FIRST))).all()  # control


@pytest.mark.parametrize("run", ANALYSES.values(), ids=ANALYSES)
def test_a_cache_of_another_shape_is_refused(run):
    """One position, one row or no batch axis broadcast to the corrupted run's shape."""
    whole = everything("ba ke lo")
    for cache in (whole.sliced(positions=-1), whole.remove_batch_dim()):
        with pytest.raises(ValueError, match="clean cache has shape"):
            run("ba ke ti", cache)
    with pytest.raises(ValueError, match="clean cache has shape"):
        run(["ba ke ti", "ba ke so"], whole)


def test_a_mask_that_is_given_is_that_of_both_runs():
    """An explicit mask overrides what the ids look like, in both runs."""
    ids = np.asarray(model().to_tokens(SHORT_SECOND))
    other = np.where(ids == 0, ids, np.roll(ids, 1, 0) * 0 + 7)
    ones = np.ones(ids.shape, int)
    assert np.isfinite(ANALYSES["patching"](ids, other, attention_mask=ones)).all()
    with pytest.raises(ValueError, match="padding of the clean run"):
        ANALYSES["patching"](ids, np.where(ids == 0, 7, ids))


def test_documents_of_one_run_alone_are_refused():
    """The clean run would not be packed, while the corrupted one is."""
    ids = np.array([[2, 10, 20, 2, 30, 10]])
    packed = {"input_ids": ids, "segment_ids": np.array([[0, 0, 0, 1, 1, 1]])}
    with pytest.raises(ValueError, match="segment_ids of the clean run"):
        ANALYSES["attribution"](packed, ids + 1)
    ANALYSES["attribution"](packed, {**packed, "input_ids": ids + 1})  # control


def test_a_result_of_another_shape_is_not_resumed():
    """A transposed grid has as many values, at other places."""
    corrupted, clean = "ba ke ti ba", "ba ke lo ba"
    grid = ANALYSES["patching"](corrupted, clean)
    with pytest.raises(ValueError, match="resume has shape"):
        ANALYSES["patching"](corrupted, clean, resume=grid.T)
    np.testing.assert_array_equal(ANALYSES["patching"](corrupted, clean, resume=grid), grid)
