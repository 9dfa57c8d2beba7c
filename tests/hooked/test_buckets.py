"""Prompts run at the length of a bucket: exact shapes and numbers everywhere, and few programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3_jax import HookedGemma3, edits, forward, grad_at, reductions, stack_layers
from gemma3_jax.hooked import buckets, cropping, cut
from gemma3_jax.hooked.buckets import bucket
from gemma3_jax.hooks import needs
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.request import new_request
from tests.helpers.programs import programs
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import COPIES, assert_same, at_once, direction, same, small
from tests.hooked.bucketed import NEXT, RESIDUAL, assert_same_caches, ids, model

# Tokens and rows, at the ends of the buckets 16 and 20.
SHAPES = ((1, 1), (2, 2), (15, 1), (16, 2), (17, 1), (20, 2), (21, 2))
RIGHT_PADDED = np.asarray([[1] * 11 + [0] * 2, [1] * 13], np.int32)


@given(st.integers(1, 10**6))
def test_padding_is_less_than_a_quarter(length):
    chosen = bucket(length)
    assert length <= chosen == bucket(chosen)
    assert chosen < 1.25 * length or chosen == 16
    assert length <= bucket(length, shortest=1) <= chosen


def test_few_lengths_are_common():
    """As the README says."""
    assert len({bucket(length) for length in range(5, 55)}) == 8
    assert len({bucket(length) for length in range(1, 65)}) == 9
    assert len({bucket(length) for length in range(1, 1025)}) == 25


def test_prompts_of_one_bucket_share_a_program():
    """Captures and the loss of 20 lengths, at any position."""
    hooked, before = model(), programs()
    for p in range(13, 33):
        out, cache = hooked.run_with_cache(ids(p, 1), RESIDUAL, return_type="both", pos_slice=p % 5 - 2)
        assert out[0].shape == (1, p, SMALL["vocab_size"])
        assert cache[RESIDUAL].shape == (1, 1, SMALL["hidden_size"])
    assert programs() - before == len({bucket(p) for p in range(13, 33)}) == 5


def test_ready_edits_and_reductions_share_a_program():
    hooked, before = model(), programs()
    for p in range(5, 16):
        edit = edits.only(edits.Add(direction(p)), positions=p - 3)
        last = {RESIDUAL: reductions.At(p - 2)}
        hooked.run_with_hooks(ids(p), [(RESIDUAL, edit)], names_filter=last, logits_at=-2)
    assert programs() - before == 1


@pytest.mark.parametrize(("p", "b"), [*SHAPES, (530, 1)])
def test_every_site_is_exact(p, b):
    """Logits and all captures; 530 tokens, several windows long, do not store their scores unless asked to."""
    hooked, tokens = model(), ids(p, b)
    names = "**" if p < 500 else ["blocks.*.hook_out", "blocks.0.attn.hook_rot_k"]
    logits, cache = hooked.run_with_cache(tokens, names)
    expected, theirs = at_once(forward, *small(), tokens, names)
    assert_same(logits, expected)
    assert_same_caches(cache, theirs)
    np.testing.assert_array_equal(cache.tokens, tokens)
    np.testing.assert_array_equal(cache.attention_mask, np.ones_like(tokens))


@pytest.mark.parametrize("attention_mask", [None, RIGHT_PADDED, RIGHT_PADDED[:, ::-1]], ids=["none", "right", "left"])
def test_padding_of_the_user_stays(attention_mask):
    """On either side, and the losses and negative positions count real tokens only."""
    hooked, tokens = model(), ids(13)
    (logits, loss), cache = hooked.run_with_cache(tokens, return_type="both", attention_mask=attention_mask)
    expected, theirs = at_once(forward, *small(), tokens, "**", attention_mask=attention_mask, return_type="both")
    assert_same(logits, expected[0])
    assert_same(loss, expected[1])
    assert_same_caches(cache, theirs)
    real = np.ones_like(tokens) if attention_mask is None else attention_mask
    np.testing.assert_array_equal(cache.attention_mask, real)
    last = hooked(tokens, attention_mask=attention_mask, logits_at=[-1, 0])
    assert_same(last, at_once(forward, *small(), tokens, attention_mask=attention_mask, logits_at=[-1, 0])[0])


def test_texts_of_a_batch_far_beyond_a_window_stay():
    """A token of padding that attends to no token gets the mean over the prompt's columns."""
    p = 4 * SMALL["sliding_window"]
    mask = np.asarray([[1] * 2 + [0] * (p - 2), [1] * p], np.int32)
    hooked, tokens = model(), ids(p)
    _, cache = hooked.run_with_cache(tokens, attention_mask=mask)
    assert_same_caches(cache, at_once(forward, *small(), tokens, "**", attention_mask=mask)[1])


def test_gradients_are_exact():
    hooked, tokens = model(), ids(13)
    names = ["blocks.*.hook_in", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_k", "unembed.hook_out"]
    value, cache = hooked.run_with_cache(tokens, names, incl_bwd=True)
    expected, theirs = at_once(grad_at, *small(), jnp.asarray(tokens), names)
    assert_same(value, expected)
    assert_same_caches(cache, theirs)


def test_gradients_of_a_metric_are_exact():
    """A metric of all logits sees the prompt's; one of chosen logits shares a program."""
    hooked, shapes = model(), []

    def metric(logits):
        shapes.append(logits.shape)
        return logits.mean()

    for options in ({}, {"logits_at": -1}):
        _, cache = hooked.run_with_cache(ids(13), RESIDUAL, incl_bwd=True, loss_fn=metric, **options)
        assert_same_caches(cache, at_once(grad_at, *small(), jnp.asarray(ids(13)), RESIDUAL, jnp.mean, **options)[1])
    assert {shape[1] for shape in shapes} == {13, 1}


@functools.cache
def whole(*names, incl_bwd):
    """Values, or values and gradients, at each position of one row."""
    function = grad_at if incl_bwd else forward
    return at_once(function, *small(), jnp.asarray(ids(13, 1)), names)[1]


@pytest.mark.parametrize("pos_slice", [0, -1, slice(2, None, 3), slice(None, 12), slice(-2, None)])
@pytest.mark.parametrize("incl_bwd", [False, True])
def test_slices_are_exact(pos_slice, incl_bwd):
    hooked, tokens = model(), ids(13, 1)
    names = ["embed.hook_in", RESIDUAL, "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_k"]
    names = names[1:] if incl_bwd else names
    _, cache = hooked.run_with_cache(tokens, names, pos_slice=pos_slice, remove_batch_dim=True, incl_bwd=incl_bwd)
    theirs = whole(*names, incl_bwd=incl_bwd).sliced(positions=pos_slice).remove_batch_dim()
    assert_same_caches(cache, theirs)
    kept = range(13)[pos_slice] if isinstance(pos_slice, slice) else [range(13)[pos_slice]]
    np.testing.assert_array_equal(cache.tokens, tokens[0, list(kept)])


@pytest.mark.parametrize(
    "steps",
    [
        reductions.At([0, -1]),
        reductions.Mean(),
        reductions.TopK(3),
        [reductions.Project(np.eye(SMALL["hidden_size"], 5)), reductions.At(-2)],
        lambda x, hook: x.sum(axis=1),
    ],
    ids=["at", "mean", "top_k", "project", "function"],
)
def test_reductions_are_exact(steps):
    """A function sums over the prompt's columns only."""
    keep = {RESIDUAL: steps}
    _, cache = model().run_with_cache(ids(13), keep)
    expected = forward(*small(), ids(13), keep)[1][RESIDUAL]
    jax.tree.map(assert_same, cache[RESIDUAL], expected)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn.hook_pattern", "model.layers.0.self_attn.o_proj.input", "model.layers.0.self_attn.q_norm.output"],
)
def test_reductions_with_keys_or_another_layout_are_exact(name):
    keep = {name: reductions.TopK(2)}
    _, cache = model().run_with_cache(ids(13), keep)
    jax.tree.map(assert_same, cache[name], forward(*small(), ids(13), keep)[1][name])


EDITS = {
    "add": lambda d: edits.Add(d, 3.0, relative=True),
    "scale": lambda d: edits.Scale(0.5),
    "replace": lambda d: edits.Replace(0.1),
    "project": lambda d: edits.ProjectOut(d),
    "clamp": lambda d: edits.Clamp(d, high=0.0),
    "mean": lambda d: edits.Mean(),
    "row": lambda d: edits.FromRow(np.asarray([1, 0])),
    "noise": lambda d: edits.Noise(jax.random.key(0), 0.5),
    "positions": lambda d: edits.only(edits.Scale(0.0), positions=[1, -2]),
    "booleans": lambda d: edits.only(edits.Scale(0.0), positions=np.arange(26).reshape(2, 13) % 3 == 0),
    "per position": lambda d: edits.Scale(np.linspace(0.5, 1.5, 13, dtype=np.float32)[:, None]),
    "cache": lambda d: edits.FromCache({"blocks.0.hook_out": jnp.ones((2, 13, SMALL["hidden_size"]))}),
    "function": lambda d: lambda value, hook: value - value.mean(axis=1, keepdims=True),
}


@pytest.mark.parametrize("attention_mask", [None, RIGHT_PADDED], ids=["none", "right"])
@pytest.mark.parametrize("make", EDITS.values(), ids=EDITS)
def test_edits_are_exact(make, attention_mask):
    edit, tokens = make(direction()), ids(13)
    out = model().run_with_hooks(
        tokens, [(RESIDUAL, edit)], names_filter=NEXT, return_type="both", attention_mask=attention_mask
    )
    expected = forward(*small(), tokens, NEXT, {RESIDUAL: edit}, attention_mask=attention_mask, return_type="both")
    assert_same(out[0][1], expected[0][1])
    assert_same_caches(out[1], expected[1])


SITES = (
    "blocks.0.attn.hook_attn_scores",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_rot_k",
    "blocks.0.attn.hook_cos",
    "blocks.0.attn.hook_z",
    "model.layers.0.self_attn.q_norm.output",
    "blocks.1.mlp.hook_post",
    "unembed.hook_out",
    *(f"blocks.0.{copy}" for copy in COPIES),
)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("edit", [edits.Scale(0.0), edits.Replace(0.3)])
def test_edits_of_every_kind_of_site_are_exact(name, edit):
    """A weight at a masked key would give weight to padding."""
    tokens = ids(13)
    logits = model().run_with_hooks(tokens, [(name, edit)])
    assert_same(logits, forward(*small(), tokens, (), {name: edit})[0])


def test_edits_of_copies_and_of_their_inputs_are_exact():
    """With copies for each head, the inputs of q have another axis."""
    pairs = [("blocks.0.hook_q_input", edits.Scale(0.5)), ("blocks.0.attn.q.hook_in", edits.Add(direction()))]
    assert_same(model().run_with_hooks(ids(13), pairs), forward(*small(), ids(13), (), dict(pairs))[0])


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("blocks.0.attn.hook_pattern", edits.Replace(0.3)),
        (RESIDUAL, edits.Noise(jax.random.key(0), 0.5)),
    ],
)
def test_an_edit_that_depends_on_the_length_would_be_wrong(name, edit, monkeypatch):
    """Negative control of the tests above, and the reason for the exceptions."""
    monkeypatch.setattr(needs, "depends_on_length", lambda edit, name: False)
    assert not same(model().run_with_hooks(ids(13), [(name, edit)]), forward(*small(), ids(13), (), {name: edit})[0])


def test_padding_that_attends_to_nothing_would_be_wrong(monkeypatch):
    """Negative control: on the left, the pattern of padding is the mean over all columns that are present."""
    narrow = buckets.in_bucket

    def without(*arguments):
        request, metric = narrow(*arguments)
        return dataclasses.replace(request, present=None), metric

    monkeypatch.setattr(cut, "in_bucket", without)
    mask, name = RIGHT_PADDED[:, ::-1], "blocks.0.attn.hook_pattern"
    _, cache = model().run_with_cache(ids(13), name, attention_mask=mask)
    assert not same(cache[name], forward(*small(), ids(13), name, attention_mask=mask)[1][name])


@pytest.mark.parametrize("p", [13, 530])
def test_a_row_of_padding_is_exact(p):
    """Its tokens attend to nothing, and each gets the mean over the prompt; so does its gradient."""
    mask = np.stack([np.arange(p) > p - 3, np.zeros(p), np.arange(p) < 3]).astype(np.int32)
    hooked, tokens, names = model(), ids(p, 3), ["blocks.*.hook_out", "blocks.*.attn.hook_z"]
    names += ["blocks.*.attn.hook_attn_scores", "blocks.*.attn.hook_pattern"] if p < 500 else []
    _, cache = hooked.run_with_cache(tokens, names, attention_mask=mask, incl_bwd=True)
    _, theirs = at_once(grad_at, *small(), jnp.asarray(tokens), names, attention_mask=mask)
    assert_same_caches(cache, theirs)


def test_texts_padded_on_either_side_share_a_program():
    hooked, before = model(), programs()
    for p in (9, 12, 16):
        for mask in (np.arange(p) > 2, np.arange(p) < 4, np.arange(p) >= 0):
            hooked(ids(p), attention_mask=np.stack([mask, mask]).astype(np.int32))
    assert programs() - before == 1


@pytest.mark.parametrize("options", [{"stop_at_layer": 1}, {"return_type": None}, {"return_type": "loss"}], ids=str)
def test_other_results_are_exact(options):
    out, cache = model().run_with_cache(ids(13), "blocks.0.hook_in", **options)
    expected, _ = forward(*small(), ids(13), **options)
    jax.tree.map(assert_same, out, expected)
    assert cache.tokens.shape == (2, 13)


def test_stacked_parameters_are_exact():
    config, params = small()
    _, cache = HookedGemma3(config, stack_layers(config, params)).run_with_cache(ids(13))
    assert_same_caches(cache, forward(config, params, ids(13), "**")[1])


def test_the_model_runs_in_a_trace():
    """With traced parameters, ids or edits at the exact length; in a trace of something else, too."""
    hooked, tokens = model(), ids(13)
    expected = forward(*small(), tokens)[0]
    assert_same(jax.jit(lambda hooked: hooked(tokens))(hooked), expected)
    assert_same(jax.jit(hooked)(tokens), expected)
    assert_same(jax.jit(lambda x: x * hooked(tokens))(1.0), expected)
    scaled = jax.vmap(lambda scale: hooked.run_with_hooks(tokens, [(RESIDUAL, edits.Scale(scale))]))(jnp.ones(2))
    assert_same(scaled[1], expected)


def test_arrays_of_several_sites_stay_one_array():
    _, cache = model().run_with_cache(ids(13))
    assert cache["blocks.0.hook_out"] is cache["blocks.1.hook_in"]


def test_one_compiled_cut_gives_the_same(monkeypatch):
    """As on other devices than CPUs: the same bits, and arrays that stay on their device."""
    config, params = small()
    hooked = HookedGemma3(config, jax.device_put(params, jax.devices()[1]))
    _, ours = hooked.run_with_cache(ids(13))
    monkeypatch.setattr(cropping, "_in_host_memory", lambda x: False)
    _, theirs = hooked.run_with_cache(ids(13))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].devices() == theirs[name].devices() == {jax.devices()[1]}
        assert ours[name].committed == theirs[name].committed


def test_padding_takes_no_new_token():
    """An embedding that is not finite, of a token that the text does not have, must not reach it."""
    config, params = small()
    pad = config.padding
    params = {**params, "embed": {"weight": params["embed"]["weight"].at[pad].set(jnp.nan)}}
    tokens = np.where(ids(13) == pad, pad + 1, ids(13))
    logits = HookedGemma3(config, params)(Inputs(tokens), stop_at_layer=2)
    assert np.isfinite(logits).all()


def test_a_request_has_the_length_of_its_bucket():
    """The padding is masked; positions, documents and a KV cache keep the length of their arrays."""
    config, params = small()
    request, _ = buckets.in_bucket(params, new_request(config, ids(13)))
    assert request.source.shape == (2, 16)
    assert request.attention_mask.sum(axis=1).tolist() == [13, 13]
    for name in ("positions", "segment_ids"):
        others = {name: np.zeros((2, 13), np.int32), "attention_mask": np.ones((2, 13), np.int32)}
        assert buckets.in_bucket(params, new_request(config, ids(13), **others)) is None
