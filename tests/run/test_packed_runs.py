"""Edits, reductions, gradients and transformations of packed rows: positions are those of each document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import edits, forward, grad_at, reductions, stack_layers
from gemma3_jax.sites.table import site
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import assert_same, at_once, nudge, same, small

TOKENS = jnp.asarray(random_tokens((2, 12)), jnp.int32)
IDS = jnp.asarray([[1] * 5 + [2] * 3 + [1] * 4, [0] * 12])
DOCUMENTS = [(0, slice(0, 5)), (0, slice(5, 8)), (0, slice(8, 12)), (1, slice(0, 12))]
POSITIONS = jnp.asarray([[*range(5), *range(3), *range(4)], range(12)])
RESIDUAL, PATTERN = "blocks.0.hook_out", "blocks.1.attn.hook_pattern"
AS_GIVEN = {"ids": {"segment_ids": IDS}, "positions": {"positions": POSITIONS}}


def run(capture=(), edit=None, tokens=TOKENS, name=RESIDUAL, **options):
    return forward(*small(), tokens, capture, None if edit is None else {name: edit}, **options)


# --- edits ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("given_as", "name"))
def edited(edit, tokens, given_as=None, name=RESIDUAL):
    """Logits and the residual stream; edits whose positions have one shape share a program."""
    return run(RESIDUAL, edit, tokens, name, **AS_GIVEN.get(given_as, {}))


@pytest.mark.parametrize("given_as", AS_GIVEN)
@pytest.mark.parametrize("wanted", [0, 3, -1, -4, [1, -2], [[0, 2], [-1, -3]]], ids=str)
def test_positions_of_an_edit_are_those_of_every_document(wanted, given_as):
    """Counted from either end of each document, which is then what it is alone under the edit."""
    edit = edits.only(nudge, positions=wanted)
    packed, cache = edited(edit, TOKENS, given_as)
    untouched = edited(None, TOKENS, given_as)[0]
    by_row = np.broadcast_to(np.atleast_1d(wanted), (2, np.atleast_1d(wanted).shape[-1]))
    for row, columns in DOCUMENTS:
        n = columns.stop - columns.start
        there = [position for position in by_row[row].tolist() if -n <= position < n]
        own_edit = edits.only(nudge, positions=there) if there else None
        alone, expected = edited(own_edit, TOKENS[row : row + 1, columns])
        assert_same(packed[row, columns], alone[0])
        assert_same(cache[RESIDUAL][row, columns], expected[RESIDUAL][0])
    assert not same(packed[0], untouched[0], 1e-3)  # control


@pytest.mark.parametrize("given_as", AS_GIVEN)
def test_keys_are_those_of_every_document(given_as):
    """An edit of the pattern at key 0 acts on the first token of each document, and -1 on its last."""
    edit = edits.only(edits.Scale(0.5), keys=[0, -1])
    packed = edited(edit, TOKENS, given_as, PATTERN)[0]
    for row, columns in DOCUMENTS:
        alone = edited(edit, TOKENS[row : row + 1, columns], name=PATTERN)[0]
        assert_same(packed[row, columns], alone[0])
    assert not same(packed, edited(None, TOKENS, given_as)[0], 1e-3)  # control


@pytest.mark.parametrize("given_as", AS_GIVEN)
def test_what_a_hook_is_told(given_as):
    """Documents by number and positions that restart, whichever of the two was given; no documents in one text."""
    seen = []

    def look(value, hook):
        seen.append(hook)
        return value

    run(edit=look, **AS_GIVEN[given_as])
    run(edit=look)
    run(edit=look, positions=POSITIONS, attention_mask=jnp.ones_like(POSITIONS))
    np.testing.assert_array_equal(seen[0].segment_ids, [[0] * 5 + [1] * 3 + [2] * 4, [0] * 12])
    np.testing.assert_array_equal(seen[0].positions, POSITIONS)
    assert seen[1].segment_ids is None
    assert seen[2].segment_ids is None


# --- one token for each position ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "what"),
    [({"logits_at": -1}, "logits_at"), ({"capture": {RESIDUAL: reductions.At(-1)}}, f"reductions.At at {RESIDUAL}")],
)
def test_ids_refuse_what_takes_one_token(asked, what):
    """Each document has a last token, and the error says what to do; slicing, as it says, works."""
    with pytest.raises(ValueError, match=rf"{what} takes one token .* logits\[:, columns\]"):
        jax.eval_shape(lambda ids: run(**asked, segment_ids=ids), IDS)
    logits, cache = run(RESIDUAL, segment_ids=IDS)
    assert logits[:, [4, 7, 11]].shape == (2, 3, 101)
    assert cache[RESIDUAL][:, [4, 7, 11]].shape == (2, 3, 48)


@pytest.mark.parametrize("asked", [2, [5, 2], -1])
def test_positions_refuse_what_several_tokens_have(asked):
    """Known positions that occur twice in a row are refused, by logits and by reductions; others are found."""
    for options in ({"logits_at": asked}, {"capture": {RESIDUAL: reductions.At(asked)}}):
        with pytest.raises(ValueError, match="tokens of row 0"):
            run(**options, positions=POSITIONS)
    logits, cache = run({RESIDUAL: reductions.At(4)}, positions=POSITIONS, logits_at=4)
    whole, everywhere = run(RESIDUAL, positions=POSITIONS)
    assert_same(logits[:, 0], whole[:, 4], 1e-6)
    assert_same(cache[RESIDUAL][:, 0], everywhere[RESIDUAL][:, 4], 1e-6)


def test_traced_positions_give_nan_where_several_tokens_have_them():
    """Where nothing is known, an ambiguous position is NaN and no token's number; others are found."""

    @jax.jit
    def traced(positions):
        at = {RESIDUAL: reductions.At([2, 4, -1])}
        logits, cache = run(at, positions=positions, logits_at=[2, 4, -1])
        return logits, cache[RESIDUAL]

    whole, cache = run(RESIDUAL, positions=POSITIONS)
    for found, expected in zip(traced(POSITIONS), (whole, cache[RESIDUAL]), strict=True):
        assert np.isnan(found[0, [0, 2]]).all()
        assert_same(found[0, 1], expected[0, 4], 1e-6)
        assert_same(found[1], expected[1, [2, 4, 11]], 1e-6)


def test_an_edit_of_some_logits_counts_in_their_documents():
    """With `logits_at`, -1 at the unembedding is the last token of each document that has logits."""
    edit = edits.only(edits.Replace(0.0), positions=-1)
    positions = jnp.asarray([[*range(5), *range(10, 17)], range(12)])
    logits = run(edit=edit, name="unembed.hook_out", positions=positions, logits_at=[16, 3, 4, 10])[0]
    assert np.all(logits == 0, axis=-1)[0].tolist() == [True, False, True, False]
    assert not (logits[1, 1:3] == 0).all(axis=-1)[0]


# --- gradients ------------------------------------------------------------------------------------------------------

SITES = ("blocks.*.hook_in", "blocks.*.attn.o.hook_in", "blocks.*.attn.k.hook_out", PATTERN, "blocks.1.mlp.out.hook_in")
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 101)), jnp.float32)


@functools.partial(jax.jit, static_argnames="stacked")
def gradients(tokens, weights, segment_ids=None, stacked=False):
    """Of a weighted sum of logits under an edit: at sites, and of the parameters."""
    config, params = small()
    edit = {RESIDUAL: edits.only(edits.Scale(0.7), positions=[0, -2])}
    params = stack_layers(config, params) if stacked else params

    def value(params):
        return jnp.sum(forward(config, params, tokens, edits=edit, segment_ids=segment_ids)[0] * weights)

    _, cache = grad_at(
        config,
        params,
        tokens,
        SITES,
        lambda logits: jnp.sum(logits * weights),
        edits=edit,
        segment_ids=segment_ids,
    )
    return dict(cache.grads), jax.grad(value)(params)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers apart", "scanned"])
def test_gradients_are_those_of_each_document(stacked):
    """At every site those of the document alone; of the parameters the sum over documents."""
    at_sites, of_params = gradients(TOKENS, WEIGHTS, IDS, stacked)
    alone = []
    for row, columns in DOCUMENTS:
        here, each = gradients(TOKENS[row : row + 1, columns], WEIGHTS[row : row + 1, columns])
        alone.append(each)
        for name, expected in here.items():
            cut = [columns if axis in "pk" else slice(None) for axis in site(name).axes.split()[1:]]
            assert_same(at_sites[name][(row, *cut)], expected[0])
    total = jax.tree.map(lambda *each: sum(each), *alone)
    total = stack_layers(small()[0], total) if stacked else total
    jax.tree.map(assert_same, of_params, total)
    assert not same(gradients(TOKENS, WEIGHTS)[0]["blocks.0.hook_in"], at_sites["blocks.0.hook_in"], 1e-2)  # control


def test_a_loss_has_no_gradient_across_documents():
    """The default metric of `grad_at`: the loss of a document moves nothing in another."""

    def loss_of_first(ids):
        first = jnp.arange(12) < 5
        metric = lambda logits: jnp.sum(jnp.where(first[:, None], logits[0] * WEIGHTS[0], 0))  # noqa: E731
        return slope(metric, segment_ids=ids)

    def slope(*metric, **options):
        return at_once(grad_at, *small(), TOKENS, "blocks.0.hook_in", *metric, **options)[1].grads["blocks.0.hook_in"]

    assert not np.any(loss_of_first(IDS)[0, 5:])
    last = slope(segment_ids=IDS)
    # A document's last token is not context for any loss, unless the loss crossed into the next document.
    assert not np.any(last[0, [4, 7, 11]])
    one_text = slope()
    assert np.any(one_text[0, 4])  # control


# --- transformations ------------------------------------------------------------------------------------------------


@functools.cache
def of_last(n):
    """Logits of the last n tokens, run alone."""
    return at_once(forward, *small(), TOKENS[:, -n:])[0]


@pytest.mark.parametrize("stacked", [False, True], ids=["layers apart", "scanned"])
def test_ids_and_positions_are_data(stacked):
    """One compilation serves every arrangement of documents, for both ways to give them."""
    config, params = small()
    params = stack_layers(config, params) if stacked else params
    call = jax.jit(lambda **given: forward(config, params, TOKENS, **given)[0])
    for lengths in ([5, 3, 4], [12], [1] * 12):
        ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None].repeat(2, axis=0)
        positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None].repeat(2, axis=0)
        by_ids, by_positions = call(segment_ids=ids), call(positions=positions)
        assert_same(by_ids, by_positions, 1e-6)
        assert_same(by_ids[:, -lengths[-1] :], of_last(lengths[-1]))
    assert call._cache_size() == 2


def test_vmap_over_arrangements():
    """Mapped over ids, and over tokens and positions, each gives what a call of its own gives."""
    ids = jnp.stack([IDS, IDS[::-1], jnp.zeros_like(IDS)])
    mapped = jax.jit(jax.vmap(lambda ids: run(PATTERN, segment_ids=ids)[0]))(ids)
    for each, found in zip(ids, mapped, strict=True):
        assert_same(found, run(segment_ids=each)[0], 2e-6)
    assert not same(mapped[0], mapped[2], 1e-3)
    both = jnp.stack([TOKENS, TOKENS[::-1]]), jnp.stack([POSITIONS, POSITIONS[::-1]])
    mapped = jax.jit(jax.vmap(lambda tokens, positions: run(tokens=tokens, positions=positions)[0]))(*both)
    assert_same(mapped[0], mapped[1, ::-1], 2e-6)
    assert_same(mapped[0], run(segment_ids=IDS)[0], 2e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"segment_ids": IDS[:, :-1]}, r"segment_ids has shape \(2, 11\)"),
        ({"segment_ids": IDS.astype(jnp.float32)}, "segment_ids are float32; they must be integers"),
        ({"segment_ids": IDS == 1}, "segment_ids are bool"),
        ({"segment_ids": IDS, "past": ()}, "segment_ids cannot be combined with past"),
        ({"attention_mask": np.asarray(IDS)}, "pass segment_ids"),
    ],
)
def test_bad_arguments(arguments, says):
    """Each is one error that says what is wrong."""
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: run(**arguments))
