"""Head detection: the scores by their definition, row by row, and reduced on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import TINY, Gemma3, Gemma3Config, HookedGemma3, forward
from gemma3_jax.analysis import detect_heads, detection_pattern
from gemma3_jax.analysis import heads as heads_module
from gemma3_jax.run.request import new_request
from tests.helpers.programs import programs
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import LEFT_PADDED, TOKENS, assert_same, same, small

KINDS = ("previous_token_head", "duplicate_token_head", "induction_head")
REPEATED = np.asarray([[2, 5, 9, 9, 5, 9, 7, 5, 9], [2, 5, 6, 7, 8, 5, 6, 7, 8]])


def model() -> HookedGemma3:
    return HookedGemma3(*small())


def looks(kind: str, row: list[int]) -> np.ndarray:
    """[p, k], by the definition in words."""
    wanted = np.zeros((len(row), len(row)))
    for p, token in enumerate(row):
        earlier = [k for k in range(p) if row[k] == token]
        keys = {"previous": [p - 1] if p else [], "duplicate": earlier, "induction": [k + 1 for k in earlier]}
        wanted[p, keys[kind.split("_")[0]]] = 1
    return wanted


def score(pattern: np.ndarray, wanted: np.ndarray, exclude_bos=False, exclude_current_token=False, measure="mul"):
    """[h] float64, of one row without padding; pattern [h, p, k]."""
    keep = np.ones_like(wanted)
    keep[:, 0] -= exclude_bos
    keep *= 1 - np.eye(len(wanted)) * exclude_current_token
    if measure == "abs":
        return 1 - (abs(pattern - wanted) * keep).sum(-1).mean(-1)
    return (pattern * wanted * keep).sum((-2, -1)) / (pattern * keep).sum((-2, -1))


@functools.cache
def patterns(row: tuple[int, ...]) -> np.ndarray:
    """[L, h, p, k] float64, of one row alone."""
    _, cache = model().run_with_cache(np.asarray([row]), "blocks.*.attn.hook_pattern", return_type=None)
    return np.stack([np.asarray(value[0], np.float64) for value in cache.values()])


def expected(tokens, wanted, **options) -> np.ndarray:
    rows = [tuple(int(i) for i in row) for row in tokens]
    return np.mean([[score(p, wanted(row), **options) for p in patterns(row)] for row in rows], axis=0)


FLAGS = [
    {},
    {"exclude_bos": True},
    {"exclude_current_token": True},
    {"exclude_bos": True, "exclude_current_token": True},
]


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind, measure):
    """Of each kind under each measure and exclusion, averaged over two rows."""
    scores = [detect_heads(model(), REPEATED, kind, error_measure=measure, **flags) for flags in FLAGS]
    for ours, flags in zip(scores, FLAGS, strict=True):
        theirs = expected(REPEATED, lambda row: looks(kind, row), measure=measure, **flags)
        assert ours.shape == theirs.shape == (2, SMALL["num_attention_heads"])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    # control: each exclusion changes the score, except where there is nothing that it could take away
    assert all(not same(scores[0], other) for other in scores[1:])


@settings(max_examples=30, deadline=None)
@given(row=st.lists(st.integers(3, 8), min_size=9, max_size=9))
def test_patterns_by_definition(row):
    """Where each kind looks, for any tokens, and with padding on either side."""
    padded = {"left": [0, 0, *row[2:]], "right": [*row[:-2], 0, 0]}
    for kind in KINDS:
        np.testing.assert_array_equal(detection_pattern(kind, jnp.asarray([row]))[0], looks(kind, row))
        for side, real in (("left", slice(2, None)), ("right", slice(-2))):
            mask = np.zeros((1, 9), int)
            mask[0, real] = 1
            pattern = np.array(detection_pattern(kind, jnp.asarray([padded[side]]), jnp.asarray(mask))[0])
            np.testing.assert_array_equal(pattern[real, real], looks(kind, row[real]))
            pattern[real, real] = 0
            assert not pattern.any()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_padding(measure, flags):
    """A padded row counts as it does alone: the first real token is its <bos>, and padding is neither query nor key."""
    tokens = np.where(LEFT_PADDED, np.roll(REPEATED, 3, axis=1), 0)
    tokens[1] = REPEATED[1]
    alone = [
        detect_heads(model(), row, "induction_head", error_measure=measure, **flags)
        for row in (tokens[:1, 3:], tokens[1:])
    ]
    both = detect_heads(model(), tokens, "induction_head", error_measure=measure, attention_mask=LEFT_PADDED, **flags)
    np.testing.assert_allclose(both, np.mean(alone, axis=0), rtol=0, atol=2e-6)
    everything = np.ones_like(LEFT_PADDED)
    unmasked = detect_heads(
        model(), tokens, "induction_head", error_measure=measure, attention_mask=everything, **flags
    )
    assert not same(unmasked, both)  # control


@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_a_pattern_of_ones_own(measure):
    """Any lower triangular pattern, also a head's own: that scores 1 under "abs", and no other head does."""
    row = tuple(int(i) for i in REPEATED[0])
    own = patterns(row)[1, 2]
    scores = detect_heads(model(), REPEATED[:1], own, error_measure=measure)
    theirs = expected(REPEATED[:1], lambda row: own, measure=measure)
    np.testing.assert_allclose(scores, theirs, rtol=0, atol=2e-6)
    if measure == "abs":
        assert abs(scores[1, 2] - 1) < 2e-6
        assert np.sort(scores, axis=None)[-2] < 0.999
    causal = np.tril(np.ones((9, 9)))
    assert_same(detect_heads(model(), REPEATED, causal), np.ones((2, 8)), 1e-6)


def test_texts_and_the_trained_model():
    """The trained model copies with heads of layer 1, and every text counts once."""
    trained = HookedGemma3.from_pretrained(TINY, dtype="float32")
    texts = ["ba ke lo mu ti so re ba ke lo mu ti so re", "na du pi na du pi"]
    options = {"pattern": "induction_head", "exclude_bos": True}
    scores = detect_heads(trained, texts, **options)
    assert (scores.max(axis=1) > 0.5).tolist() == [False, True, False, False]
    each = [detect_heads(trained, text, **options) for text in texts]
    np.testing.assert_allclose(scores, np.mean(each, axis=0), rtol=0, atol=1e-5)


def test_composes_and_compiles_once():
    """Under jit, vmap and grad; one compilation for all kinds, tokens and exclusions."""
    plain = detect_heads(model(), REPEATED, "induction_head")
    before = programs()
    for kind in KINDS:
        for tokens in (REPEATED, TOKENS):
            detect_heads(model(), tokens, kind, exclude_bos=kind == KINDS[0])
    assert programs() == before
    assert_same(jax.jit(lambda m, t: detect_heads(m, t, "induction_head"))(model(), REPEATED), plain, 1e-5)
    rows = jax.vmap(lambda row: detect_heads(model(), row, "induction_head"))(jnp.asarray(REPEATED))
    assert_same(rows.mean(0), plain, 1e-5)
    custom = jax.jit(lambda pattern: detect_heads(model(), REPEATED, pattern))
    assert_same(custom(np.eye(9, k=-1)), detect_heads(model(), REPEATED, "previous_token_head"), 1e-5)
    gradient = jax.grad(lambda m: detect_heads(m, REPEATED, "induction_head").sum())(model())
    assert np.abs(gradient.params["blocks_0"]["attn"]["q"]["weight"]).max() > 0


def test_patterns_are_reduced_layer_by_layer():
    """Compiled, not run: eight layers take less than two patterns more than the forward pass alone."""
    config = Gemma3Config(**{**SMALL, "num_hidden_layers": 8, "layer_types": ()})
    params = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    length = 256
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    wanted, compared = (jax.ShapeDtypeStruct((1, length, length), dtype) for dtype in (jnp.float32, bool))
    size = 4 * config.num_attention_heads * length**2

    def peak(lowered):
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    @functools.partial(jax.jit, static_argnames="capture")
    def run(params, tokens, capture=()):
        return dict(forward(config, params, tokens, capture, return_type=None if capture else "logits")[1])

    def stop(params, tokens):
        return forward(config, params, tokens, stop_at_layer=8)[0]

    bare = peak(jax.jit(stop).lower(params, tokens))
    request = new_request(config, np.ones((1, length), int), "blocks.*.attn.hook_pattern", return_type=None)
    scores = functools.partial(heads_module._scores, error_measure="mul")
    ours = jax.jit(scores).lower(params, request, wanted, compared)
    assert peak(ours) < bare + 2 * size
    # control: the measure sees patterns that are collected
    assert peak(run.lower(params, tokens, capture="blocks.*.attn.hook_pattern")) > bare + 4 * size


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        ("induction", {}, "no head kind 'induction'; the kinds are previous_token_head, duplicate_token_head"),
        ("induction_head", {"error_measure": "mse"}, "error_measure is 'mse'; it must be 'mul' or 'abs'"),
        (np.eye(8), {}, r"pattern has shape \(8, 8\); the input of 9 tokens needs \(9, 9\)"),
        (np.eye(9, k=1), {}, "attention to later tokens"),
    ],
)
def test_errors(pattern, options, message):
    """Each names what is wrong."""
    with pytest.raises(ValueError, match=message):
        detect_heads(model(), TOKENS, pattern, **options)
