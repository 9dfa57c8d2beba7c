"""`HookedGemma3` and the analyses on packed rows: positions and documents come in at every entry that takes them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, analysis, edits
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import assert_same, same, small

SITE = "blocks.0.hook_out"
LENGTHS = (5, 3, 4)
TOKENS = random_tokens((1, sum(LENGTHS)), seed=4)
IDS = np.repeat([7, 8, 9], LENGTHS)[None]
POSITIONS = np.concatenate([np.arange(n) for n in LENGTHS])[None]
PARTS = np.split(TOKENS, np.cumsum(LENGTHS)[:-1], axis=1)


@functools.cache
def model():
    return HookedGemma3(*small())


GIVEN = {
    "segment_ids": lambda call: call(TOKENS, segment_ids=IDS),
    "positions": lambda call: call(TOKENS, positions=POSITIONS),
    "a mapping with segment_ids": lambda call: call({"input_ids": TOKENS, "segment_ids": IDS}),
    "a mapping with position_ids": lambda call: call({"input_ids": TOKENS, "position_ids": POSITIONS}),
}


@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)
def test_runs_keep_documents_apart(give):
    """Logits, captures, edits and gradients of each document are those that it has alone."""
    edit = [(SITE, edits.only(edits.Scale(0.5), positions=-1))]
    own = [(SITE, lambda value, hook: value * (1 + hook.positions[..., None]))]
    for run in (
        model(),
        lambda x, **given: model().run_with_cache(x, SITE, **given)[1][SITE],
        lambda x, **given: model().run_with_hooks(x, edit, **given),
        lambda x, **given: model().run_with_hooks(x, own, **given),
        lambda x, **given: model().run_with_cache(x, SITE, incl_bwd=True, loss_fn=jnp.sum, **given)[1].grads[SITE],
    ):
        assert_same(give(run), np.concatenate([run(part) for part in PARTS], axis=1), 1e-5)
        assert not same(run(TOKENS), give(run), 1e-3)  # control: as one text


def test_the_loss_is_the_mean_over_documents():
    """No pair of tokens of two documents counts."""
    pairs = np.array(LENGTHS) - 1
    alone = np.array([float(model()(part, "loss")) for part in PARTS])
    assert_same(model()(TOKENS, "loss", segment_ids=IDS), (alone * pairs).sum() / pairs.sum(), 1e-5)


def test_padding_beside_documents():
    """Padding at the ends of a packed row is masked by itself, whichever way the documents are given."""
    tokens, ids, positions = (
        np.pad(array, [(0, 0), (2, 3)], constant_values=fill) for array, fill in ((TOKENS, 0), (IDS, 0), (POSITIONS, 1))
    )
    expected = np.concatenate([model()(part) for part in PARTS], axis=1)
    assert_same(model()(tokens, segment_ids=ids)[:, 2:-3], expected, 1e-5)
    assert_same(model()(tokens, positions=positions)[:, 2:-3], expected, 1e-5)
    _, cache = model().run_with_cache(tokens, SITE, segment_ids=ids)
    assert cache.real(SITE).shape[0] == sum(LENGTHS)


def test_activations_of_packed_batches():
    """Batches of several rows, the last of them filled up."""
    batches = [{"input_ids": np.repeat(TOKENS, n, axis=0), "segment_ids": np.repeat(IDS, n, axis=0)} for n in (3, 1)]
    expected = np.concatenate([model().run_with_cache(part, SITE)[1][SITE] for part in PARTS], axis=1)
    for n, cache in zip((3, 1), model().activations(batches, SITE), strict=True):
        assert_same(cache[SITE], np.repeat(expected, n, axis=0), 1e-5)


def test_what_documents_cannot_be_combined_with():
    """Generation continues one text; one token of a position is not one token of a packed row."""
    with pytest.raises(ValueError, match="leave positions and segment_ids out"):
        model().generate({"input_ids": TOKENS, "segment_ids": IDS}, 2)
    with pytest.raises(ValueError, match="with segment_ids each document has one"):
        model()(TOKENS, segment_ids=IDS, logits_at=-1)
    with pytest.raises(ValueError, match="position 0 is that of 3 tokens of row 0"):
        model()(TOKENS, positions=POSITIONS, logits_at=0)
    with pytest.raises(ValueError, match=r"positions has 5; at .* there are 5"):
        model().run_with_hooks(TOKENS, [(SITE, edits.only(edits.Scale(0.0), positions=5))], segment_ids=IDS)


def test_analyses_keep_documents_apart():
    """Losses and head scores of a packed row are those of its documents; no pair and no first token is missed."""
    tokens = np.concatenate([np.tile(random_tokens((1, 4), seed=i), (1, 2)) for i in range(2)], axis=1)
    packed = {"input_ids": tokens, "segment_ids": [[1] * 8 + [2] * 8]}
    parts = [tokens[:, :8], tokens[:, 8:]]
    losses = np.asarray(analysis.loss_per_token(model(), packed))
    assert np.isnan(losses[0, 7])
    assert_same(np.delete(losses, 7, axis=1), np.concatenate([analysis.loss_per_token(model(), x) for x in parts], 1))
    for kind in ("previous_token_head", "duplicate_token_head", "induction_head"):
        for options in ({}, {"exclude_bos": True}, {"error_measure": "abs"}):
            together = analysis.detect_heads(model(), packed, kind, **options)
            patterns = [detection_counts(part, kind, **options) for part in parts]
            assert_same(together, combined(patterns, options.get("error_measure", "mul")), 1e-5)
    unpacked = analysis.detect_heads(model(), tokens, "previous_token_head")
    assert not same(unpacked, analysis.detect_heads(model(), packed, "previous_token_head"), 1e-3)  # control


def detection_counts(tokens, kind, exclude_bos=False, error_measure="mul"):
    """What a score is made of: attention on the pattern, attention that counts, and distance; each [L, h]."""
    _, cache = model().run_with_cache(tokens, "blocks.*.attn.hook_pattern")
    wanted = np.asarray(analysis.detection_pattern(kind, jnp.asarray(tokens)))[:, None]
    patterns = np.stack([np.asarray(value) for value in cache.values()])
    if exclude_bos:
        patterns, wanted = patterns[..., 1:], wanted[..., 1:]
    sums = (patterns * wanted, patterns, np.abs(patterns - wanted))
    return [each.sum(axis=(1, 3, 4)) for each in sums] + [tokens.shape[1]]


def combined(parts, measure):
    on_pattern, counted, distance, queries = (sum(each) for each in zip(*parts, strict=True))
    return on_pattern / counted if measure == "mul" else 1 - distance / queries
