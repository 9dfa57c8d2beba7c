"""Activations of many batches: those of single runs, started ahead, in bounded memory, and safe to leave."""

import gc
import weakref

import jax
import numpy as np
import pytest

from gemma3_jax import TINY, ActivationCache, HookedGemma3, UnknownSite, reductions
from gemma3_jax.hooked import runs
from tests.helpers.programs import programs
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import same, small

ROWS = random_tokens((10, 9))
RESID = "blocks.*.hook_resid_post"
CAPTURES = {
    "whole": [RESID, "blocks.1.attn.hook_pattern"],
    "reduced": {RESID: [reductions.At(-1), reductions.TopK(3)], "blocks.0.attn.hook_z": reductions.Mean()},
    "predicate": lambda name: name.endswith("hook_q"),
}


def batches(rows=ROWS, size=4):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def leaves(cache):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache)}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
def test_batches_give_what_single_runs_give(capture):
    """In order, in host memory, the last and shorter one too; and no batch compiles after the first."""
    model, compiled = HookedGemma3(*small()), None
    found = []
    for cache in model.activations(iter(batches()), capture):
        compiled = programs() if compiled is None else compiled
        found.append(cache)
    assert programs() == compiled
    assert len(found) == 3
    for cache, batch in zip(found, batches(), strict=True):
        expected = leaves(model.run_with_cache(batch, capture)[1])
        assert list(leaves(cache)) == list(expected)
        for path, leaf in leaves(cache).items():
            assert isinstance(leaf, np.ndarray)
            assert same(leaf, expected[path])
    assert not same(*(list(leaves(cache).values())[-1] for cache in found[:2]))  # control: batches differ


def test_batches_of_many_lengths_share_programs():
    """Also where a longer batch has fewer rows than one before it."""
    model, before = HookedGemma3(*small()), programs()
    several = [ROWS[:b, :p] for b, p in ((3, 5), (2, 4), (1, 3), (3, 2))]
    found = list(model.activations(several, RESID))
    assert programs() - before <= 1
    for cache, batch in zip(found, several, strict=True):
        assert cache["resid_post", 1].shape[:2] == batch.shape
        assert same(cache["resid_post", 1], model.run_with_cache(batch, RESID)[1]["resid_post", 1])


def test_padding_of_texts_and_of_masks():
    """Texts of different lengths, and tokenizers' mappings, have the activations of `run_with_cache`."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    texts = [["ba", "ba ke lo mu"], ["lo mu ti so", "ke lo"], ["re"]]
    found = list(model.activations(texts, RESID))
    for cache, batch in zip(found, texts, strict=True):
        assert same(cache["resid_post", 1], model.run_with_cache(batch, RESID)[1]["resid_post", 1])
    tokens, mask = model.encode(texts[0])
    (cache,) = model.activations([{"input_ids": np.asarray(tokens), "attention_mask": np.asarray(mask)}], RESID)
    np.testing.assert_array_equal(cache["resid_post", 1], found[0]["resid_post", 1])
    fewer = np.asarray(mask) * (np.arange(tokens.shape[1]) > 0)
    with pytest.raises(ValueError, match="attention_mask must be 1"):
        list(model.activations([{"input_ids": np.asarray(tokens), "attention_mask": np.asarray(mask) / 2}], RESID))
    given = [{"input_ids": ids, "attention_mask": fewer} for ids in (texts[0], tokens)]
    of_texts, of_ids = model.activations(given, RESID)
    assert same(of_texts["resid_post", 1], of_ids["resid_post", 1])
    assert not same(of_texts["resid_post", 1], found[0]["resid_post", 1])  # control: texts may have a mask of their own
    # Ids alone are masked where they are padded; unmasked they differ (the control).
    (ids_alone,) = model.activations([{"input_ids": np.asarray(tokens)}], {RESID: reductions.At(-1)})
    (masked,) = model.activations(texts[:1], {RESID: reductions.At(-1)})
    assert same(ids_alone["resid_post", 1], masked["resid_post", 1])
    everything = {"input_ids": np.asarray(tokens), "attention_mask": np.ones(tokens.shape, int)}
    (unmasked,) = model.activations([everything], {RESID: reductions.At(0)})
    (masked,) = model.activations(texts[:1], {RESID: reductions.At(0)})
    assert not same(unmasked["resid_post", 1], masked["resid_post", 1])


class Recorded:
    """Notes in what order batches are started, and read; and how many are on the device."""

    def __init__(self, monkeypatch):
        self.events, self.alive, self.most = [], [], 0
        started, read = runs._run, ActivationCache.numpy

        def run(model, *arguments):
            out = started(model, *arguments)
            self.events.append("start")
            self.alive.append(weakref.ref(out[1]))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            return out

        def numpy(cache, **options):
            self.events.append("read")
            return read(cache, **options)

        monkeypatch.setattr(runs, "_run", run)
        monkeypatch.setattr(ActivationCache, "numpy", numpy)


def test_the_next_batch_is_started_before_one_is_read(monkeypatch):
    """Two at most are on the device, and one while the caller works."""
    seen = Recorded(monkeypatch)
    for i, _ in enumerate(HookedGemma3(*small()).activations(iter(batches()), RESID)):
        seen.events.append(f"use {i}")
        gc.collect()
        assert sum(ref() is not None for ref in seen.alive) == (1 if i < 2 else 0)
    assert seen.events == ["start", "start", "read", "use 0", "start", "read", "use 1", "read", "use 2"]
    assert seen.most == 2


def test_leaving_and_interrupting(monkeypatch):
    """Batches are requested one ahead; leaving the loop, or an interruption anywhere, leaves nothing behind."""
    seen, model = Recorded(monkeypatch), HookedGemma3(*small())
    asked = []

    def endless():
        for i in range(10**9):
            asked.append(i)
            if i == 3:
                raise KeyboardInterrupt
            yield ROWS[:4]

    caches = model.activations(endless(), RESID)
    next(caches)
    assert asked == [0, 1]
    next(caches)
    with pytest.raises(KeyboardInterrupt):
        next(caches)
    assert next(caches, None) is None
    caches = model.activations(endless(), RESID)
    next(caches)
    caches.close()
    del caches
    gc.collect()
    assert not any(ref() for ref in seen.alive)
    (cache,) = model.activations([ROWS[:4]], RESID)
    assert same(cache["resid_post", 1], model.run_with_cache(ROWS[:4], RESID)[1]["resid_post", 1])


def test_names_may_come_from_an_iterator():
    """Which can be read once, and must serve every batch."""
    model = HookedGemma3(*small())
    found = list(model.activations(batches(), (name for name in ["blocks.1.hook_out"])))
    assert [list(cache) for cache in found] == [["blocks.1.hook_out"]] * 3


@pytest.mark.parametrize("failing", ["batch", "source"])
def test_what_came_before_an_error_is_handed_over(failing):
    """All of it, the batch that had been started too."""

    def source():
        yield from batches()[:2]
        if failing == "source":
            raise OSError("the disk is gone")
        yield ROWS[:4] + 1000

    found, caches = [], HookedGemma3(*small()).activations(source(), RESID)
    with pytest.raises(OSError if failing == "source" else ValueError, match=r"gone|outside the vocabulary"):
        found.extend(caches)
    assert len(found) == 2


def test_errors():
    """Wrong names at once, wrong batches with their number, and functions that mix rows before anything runs."""
    model = HookedGemma3(*small())
    with pytest.raises(UnknownSite, match="nearest names"):
        model.activations([ROWS], "blocks.0.hook_uot")
    with pytest.raises(ValueError, match="does not match a site"):
        model.activations([ROWS], [])
    with pytest.raises(TypeError, match="one batch"):
        model.activations("red moon", RESID)
    with pytest.raises(ValueError, match="outside the vocabulary") as error:
        list(model.activations([ROWS, ROWS + 1000], RESID))
    assert "in batch 1" in error.value.__notes__[-1]
    for wrong, said in (
        ([[3, 4], [5]], "different lengths"),
        (ROWS[:0], "at least one token"),
        ({"ids": ROWS}, "input_ids"),
    ):
        with pytest.raises(ValueError, match=said):
            list(model.activations([ROWS, wrong], RESID))
    for mixed in (lambda value, hook: value.mean((0, 1)), lambda value, hook: value.reshape(-1, 48)):
        with pytest.raises(ValueError, match="must have the rows on their first axis"):
            list(model.activations([ROWS], {RESID: mixed}))
    with pytest.raises(ValueError, match=r"positions has 9"):
        list(model.activations([ROWS], {RESID: reductions.At(9)}))
