"""Activation patching, path patching and their derivatives, each against runs that do the same by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import HookedGemma3, UnknownSite, edits, forward
from gemma3_jax.analysis import nodes, patching, sweeps
from gemma3_jax.analysis.attribution import attribution_patching, edge_attribution, integrated_gradients
from gemma3_jax.analysis.nodes import Node
from gemma3_jax.analysis.paths import _Patch, path_patching, reads_at
from gemma3_jax.run.gradients import grad_at
from gemma3_jax.sites.names import get_act_name
from tests.helpers.programs import programs
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import LAYERS, LEFT_PADDED, TOKENS, assert_same, run, same, small

CLEAN = jnp.asarray(random_tokens((2, 9), seed=1), jnp.int32)
HEADS, KV_HEADS, POSITIONS = 8, 2, 9
ONE_RESTRICTION = {"layer": "layer", "pos": "positions", "head": "heads", "src_pos": "keys"}


@functools.cache
def model():
    return HookedGemma3(*small())


@functools.cache
def activations(which):
    return run("**", tokens={"clean": CLEAN, "corrupted": TOKENS}[which])[1]


def metric(logits):
    return logits[:, -1, 5].sum() - logits[:, -1, 7].sum()


@jax.jit
def measured(edited):
    return metric(forward(*small(), TOKENS, edits=edited)[0])


def by_hand(name, by, place, cache=None):
    """The metric with the clean activation at one place, in a run of its own."""
    cache = activations("clean") if cache is None else cache
    restricted = {ONE_RESTRICTION[axis]: int(index) for axis, index in zip(by, place, strict=True)}
    site = get_act_name(name, restricted["layer"])
    return measured({site: edits.only(edits.FromCache({site: cache[site]}), **restricted)})


SUITE = {
    "resid_pre": ("resid_pre", "layer pos"),
    "resid_mid": ("resid_mid", "layer pos"),
    "resid_post": ("resid_post", "layer pos"),
    "attn_out": ("attn_out", "layer pos"),
    "mlp_out": ("mlp_out", "layer pos"),
    "attn_head_out_by_pos": ("z", "layer pos head"),
    "attn_head_q_by_pos": ("q", "layer pos head"),
    "attn_head_k_by_pos": ("k", "layer pos head"),
    "attn_head_v_by_pos": ("v", "layer pos head"),
    "attn_head_pattern_by_pos": ("pattern", "layer head pos"),
    "attn_head_pattern_dest_src_pos": ("pattern", "layer head pos src_pos"),
    "attn_head_out_all_pos": ("z", "layer head"),
    "attn_head_q_all_pos": ("q", "layer head"),
    "attn_head_k_all_pos": ("k", "layer head"),
    "attn_head_v_all_pos": ("v", "layer head"),
    "attn_head_pattern_all_pos": ("pattern", "layer head"),
}


def grid(key, **options):
    function = getattr(patching, f"get_act_patch_{key}")
    return function(model(), TOKENS, activations("clean"), metric, logits_at=-1, progress=False, **options)


@pytest.mark.parametrize("key", SUITE)
def test_each_grid_equals_runs_by_hand(key):
    """Its shape is TransformerLens', and sampled places have the metric of a run with that one patch."""
    name, by = SUITE[key][0], tuple(SUITE[key][1].split())
    found = grid(key)
    heads = KV_HEADS if name in "kv" else HEADS
    sizes = {"layer": LAYERS, "pos": POSITIONS, "src_pos": POSITIONS, "head": heads}
    assert found.shape == tuple(sizes[axis] for axis in by)
    rng = np.random.default_rng(0)
    # The last position, where the metric reads, and two anywhere
    last = [sizes[axis] - 1 for axis in by]
    for place in [last, *([rng.integers(sizes[axis]) for axis in by] for _ in range(2))]:
        assert_same(found[tuple(place)], by_hand(name, by, place), 1e-4)
    assert not same(found[tuple(last)], metric(run()[0]), 1e-4)  # control: the patch does something


def test_stacked_grids():
    """Each is the grids of its parts, k and v of a shared head standing at each of its query heads."""
    every = grid("block_every")
    np.testing.assert_array_equal(every, np.stack([grid(key) for key in ("resid_pre", "attn_out", "mlp_out")]))
    heads = grid("attn_head_all_pos_every")
    assert heads.shape == (5, LAYERS, HEADS)
    np.testing.assert_array_equal(heads[2], np.repeat(grid("attn_head_k_all_pos"), HEADS // KV_HEADS, axis=1))
    by_pos = grid("attn_head_by_pos_every")
    assert by_pos.shape == (5, LAYERS, POSITIONS, HEADS)
    np.testing.assert_array_equal(by_pos[4], grid("attn_head_pattern_by_pos").swapaxes(1, 2))
    part = by_pos.copy()
    part[2, 1], part[4, 0, 3:] = np.nan, np.nan
    np.testing.assert_allclose(grid("attn_head_by_pos_every", resume=part), by_pos, rtol=1e-5)


def test_stacked_grids_of_padded_rows():
    """Positions that only padding has are NaN, which is not taken for an interruption; nor is a metric of NaN."""
    mask = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)

    def padded(function, metric):
        return function(model(), TOKENS, CLEAN, metric, attention_mask=mask, logits_at=-1, progress=False)

    stacked = padded(patching.get_act_patch_block_every, metric)
    parts = [patching.get_act_patch_resid_pre, patching.get_act_patch_attn_out, patching.get_act_patch_mlp_out]
    np.testing.assert_array_equal(stacked, np.stack([padded(part, metric) for part in parts]))
    assert np.isfinite(stacked[..., :6]).all()
    assert np.isnan(stacked[..., 6:]).all()

    above = float(np.nanmedian(stacked[0]))
    some = padded(patching.get_act_patch_block_every, lambda x: jnp.where(metric(x) > above, jnp.nan, metric(x)))
    np.testing.assert_array_equal(some, np.where(stacked > above, np.nan, stacked))


@pytest.mark.parametrize("chunk", [1, 2], ids=["between sites", "within a site"])
def test_interrupted_stacked_grids(monkeypatch, chunk):
    """What was done is kept, and the result resumes; the other sites are not run."""
    execute, calls = sweeps.run_compiled, []

    def interrupted(function, *arguments, **static):
        calls.append(function.__name__)
        if calls.count("_chunk") == LAYERS + chunk:
            raise KeyboardInterrupt
        return execute(function, *arguments, **static)

    key, options = "attn_head_all_pos_every", {"chunk_size": HEADS}
    whole = grid(key, **options)
    monkeypatch.setattr(sweeps, "run_compiled", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        part = grid(key, **options)
    monkeypatch.setattr(sweeps, "run_compiled", execute)
    done = np.isfinite(part)
    assert done[0].all()
    assert done[1].any() == (chunk > 1)
    assert not done[2:].any()
    np.testing.assert_array_equal(part[done], whole[done])
    assert_same(grid(key, resume=part, **options), whole, 1e-5)


def test_the_clean_run_may_be_given_as_its_input():
    """Tokens are run for the activations that are needed; a different length is refused."""
    found = patching.get_act_patch_attn_out(model(), TOKENS, CLEAN, metric, logits_at=-1, progress=False)
    np.testing.assert_allclose(found, grid("attn_out"), rtol=1e-5)
    with pytest.raises(ValueError, match=r"clean input has \(2, 8\)"):
        patching.get_act_patch_attn_out(model(), TOKENS, CLEAN[:, :8], metric)


def test_padding():
    """Positions are those of the real tokens: the grid of a padded row is that of the row alone."""
    one = lambda logits: logits[0, -1, 5]  # noqa: E731
    alone = patching.get_act_patch_resid_pre(model(), TOKENS[:1, 3:], CLEAN[:1, 3:], one, progress=False)
    padded = patching.get_act_patch_resid_pre(
        model(), TOKENS, CLEAN, one, attention_mask=LEFT_PADDED, logits_at=-1, progress=False
    )
    assert_same(padded[:, :6], alone, 1e-4)
    assert not same(padded[:, 3:], alone, 1e-3)
    # Of the row alone, no token has the last three positions.
    mask = np.asarray(LEFT_PADDED)[:1]
    row = patching.get_act_patch_resid_pre(
        model(), TOKENS[:1], CLEAN[:1], one, attention_mask=mask, logits_at=-1, progress=False
    )
    assert_same(row[:, :6], alone, 1e-4)
    assert np.isnan(row[:, 6:]).all()


@pytest.mark.parametrize(
    ("name", "by", "says"),
    [
        ("resid_pre", ("layer", "head"), "no axis 'head'"),
        ("resid_pre", ("pos", "layer"), "must begin with 'layer'"),
        ("z", ("layer", "pos", "pos"), "name each axis once"),
        ("z", ("layer", "position"), "of \\('layer', 'pos', 'head', 'src_pos'\\)"),
        ("residual", ("layer", "pos"), "does not match a site"),
    ],
)
def test_bad_grids(name, by, says):
    """A site or an axis that does not exist is named."""
    for function in (patching.activation_patching, attribution_patching):
        with pytest.raises((ValueError, UnknownSite), match=says):
            function(model(), TOKENS, CLEAN, metric, name, by)


@functools.cache
def derivative(name, by, place):
    """By finite differences: the metric's slope as one place goes from corrupted to clean."""
    site, step = get_act_name(name, place[0]), 2e-2
    ours, theirs = activations("corrupted")[site], activations("clean")[site]

    def at(t):
        between = jnp.where(ours == theirs, ours, ours + t * (theirs - ours))
        return by_hand(name, by, place, {site: between})

    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize(
    "key", ["resid_pre", "attn_head_k_by_pos", "attn_head_pattern_by_pos", "attn_head_out_all_pos"]
)
def test_attribution_is_the_slope_of_patching(key):
    """At sampled places, for sites with and without heads."""
    name, by = SUITE[key][0], tuple(SUITE[key][1].split())
    scores = attribution_patching(model(), TOKENS, activations("clean"), metric, name, by)
    assert scores.shape == grid(key).shape
    rng = np.random.default_rng(1)
    for place in [tuple(int(rng.integers(n)) for n in scores.shape) for _ in range(3)]:
        np.testing.assert_allclose(scores[place], derivative(name, by, place), rtol=0.02, atol=2e-3)
    assert np.abs(scores).max() > 0.1


def test_attribution_at_several_sites_at_once():
    """One backward pass for all gives what each alone gives."""
    names = ("resid_pre", "resid_mid", "resid_post")
    found = attribution_patching(model(), TOKENS, CLEAN, metric, names, ("layer", "pos"), logits_at=-1)
    for name in names:
        alone = attribution_patching(model(), TOKENS, activations("clean"), metric, name, ("layer", "pos"))
        assert_same(found[name], alone, 1e-4)
    assert not same(found["resid_pre"], found["resid_mid"], 1e-2)


def frozen(sender):
    """Every activation of the corrupted run with the sender's clean output and all else that writes held as it was."""
    clean, ours = activations("clean"), activations("corrupted")
    held = {}
    for i in range(LAYERS):
        heads, mlp = f"blocks.{i}.attn.o.hook_in", f"blocks.{i}.ln2_post.hook_out"
        held[heads] = [edits.FromCache({heads: ours[heads]})]
        if sender.kind == "head" and sender.layer == i:
            held[heads].append(edits.only(edits.FromCache({heads: clean[heads]}), heads=sender.head))
        source = clean if sender == Node("mlp", i) else ours
        held[mlp] = edits.FromCache({mlp: source[mlp]})
    if sender.kind == "embed":
        held["embed.hook_out"] = edits.FromCache({"embed.hook_out": clean["embed.hook_out"]})
    return run(("blocks.*.hook_in", "blocks.*.hook_resid_mid", "ln_final.hook_in"), held)[1]


SENDERS = [Node("embed"), Node("head", 0, 5), Node("mlp", 0), Node("head", 1, 2), Node("mlp", 1)]
RECEIVERS = [Node("q", 1, 5), Node("k", 1, 1), Node("v", 1, 0), Node("mlp", 1), Node("logits")]


@pytest.mark.parametrize("receiver", RECEIVERS, ids=str)
def test_path_patching_equals_three_runs(receiver):
    """The receiver's input is taken from a run in which everything but the sender is frozen; then that run is made."""
    found = path_patching(model(), TOKENS, CLEAN, metric, [receiver], SENDERS, progress=False)
    plain = metric(run()[0])
    for sender, value in zip(SENDERS, found, strict=True):
        stream = {"logits": "ln_final.hook_in", "mlp": "blocks.1.hook_resid_mid"}.get(receiver.kind, "blocks.1.hook_in")
        heard = frozen(sender)[stream]
        site = reads_at(receiver)
        if receiver.head is None:
            expected = metric(run(edits={site: edits.Replace(heard)})[0])
        else:
            expected = metric(run(edits={site: edits.only(edits.Replace(heard[:, :, None]), heads=receiver.head)})[0])
        assert_same(value, expected, 1e-4)
        assert same(value, plain, 1e-4) != nodes.writes_before(sender, receiver)


def test_path_patching_to_several_receivers():
    """They hear together: what all senders write by default reaches both heads' keys and the MLP."""
    receivers = [("k", 1, 0), ("k", 1, 1), ("mlp", 1)]
    found = path_patching(model(), TOKENS, activations("clean"), metric, receivers, progress=False)
    assert found.shape == (len(nodes.senders(small()[0])),)
    heard = frozen(Node("mlp", 0))
    both = {
        "blocks.1.hook_k_input": edits.Replace(heard["blocks.1.hook_in"][:, :, None] * jnp.ones((2, 1))),
        "blocks.1.ln2.hook_in": edits.Add(
            heard["blocks.1.hook_resid_mid"] - activations("corrupted")["blocks.1.hook_resid_mid"]
        ),
    }
    alone = path_patching(model(), TOKENS, CLEAN, metric, [("k", 1, 0)], [("mlp", 0)], progress=False)[0]
    at = nodes.senders(small()[0]).index(Node("mlp", 0))
    assert_same(found[at], metric(run(edits=both)[0]), 1e-4)
    assert not same(found[at], alone, 1e-3)


def test_edge_attribution_is_the_slope_of_path_patching():
    """For every receiver of the second layer and the logits, and senders of every kind."""
    scores = np.asarray(edge_attribution(model(), TOKENS, CLEAN, metric))
    config = small()[0]
    every, hearing = nodes.senders(config), nodes.receivers(config)
    assert scores.shape == (len(every), len(hearing))
    written = nodes.written_differences(config, small()[1], activations("clean"), activations("corrupted"))

    @functools.partial(jax.jit, static_argnums=0)
    def at(receiver, change, step):
        item = {"written": change, "reads": jnp.full(1, step)}
        return metric(forward(config, small()[1], TOKENS, edits=_Patch((receiver,))(item))[0])

    for receiver in RECEIVERS:
        for sender in (Node("embed"), Node("head", 0, 5), Node("mlp", 0)):
            change = written[every.index(sender)]
            slope = (at(receiver, change, 0.01) - at(receiver, change, -0.01)) / 0.02
            score = scores[every.index(sender), hearing.index(receiver)]
            np.testing.assert_allclose(score, slope, rtol=0.03, atol=3e-3)
    deaf = [[not nodes.writes_before(s, r) for r in hearing] for s in every]
    assert (scores[deaf] == 0).all()
    assert (scores[np.logical_not(deaf)] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"receivers": [("q", 1, 8)]}, "not a receiver"),
        ({"receivers": [("head", 1, 0)]}, "not a receiver"),
        ({"receivers": [("mlp", 1)], "senders": [("q", 0, 0)]}, "not a sender"),
        ({"receivers": []}, "at least one sender and one receiver"),
    ],
)
def test_unknown_nodes(arguments, says):
    """A component that the model lacks is named, with what it has."""
    with pytest.raises(ValueError, match=says):
        path_patching(model(), TOKENS, CLEAN, metric, **arguments)


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"])
def test_integrated_gradients_are_complete(name):
    """The shares sum to the change of the metric from the other run's value there, better with more steps."""
    baseline = activations("clean")[name]
    shares, missing = integrated_gradients(model(), TOKENS, name, metric, baseline, steps=48)
    site = model().run_with_cache(TOKENS, name)[1]
    assert shares.shape == site[name].shape
    change = metric(run()[0]) - metric(run(edits={name: edits.Replace(baseline)})[0])
    np.testing.assert_allclose(shares.sum() + missing, change, rtol=1e-4)
    assert abs(missing) < 1e-2 * abs(change)
    _, coarse = integrated_gradients(model(), TOKENS, name, metric, baseline, steps=1)
    assert abs(coarse) > 5 * abs(missing)  # control: one step is the plain gradient in the middle


def test_integrated_gradients_of_a_linear_metric():
    """Where the metric is linear in the site one step is exact: value times gradient."""
    shares, missing = integrated_gradients(model(), TOKENS, "unembed.hook_in", metric, steps=1)
    _, cache = grad_at(*small(), TOKENS, "unembed.hook_in", metric)
    assert_same(shares, cache["unembed.hook_in"] * cache.grads["unembed.hook_in"], 1e-5)
    assert abs(missing) < 1e-4
    with pytest.raises(ValueError, match="token ids"):
        integrated_gradients(model(), TOKENS, "embed.hook_in", metric)
    with pytest.raises(ValueError, match="steps is 0"):
        integrated_gradients(model(), TOKENS, "hook_embed", metric, steps=0)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 48), (5, 2, 9, 48)])
def test_a_baseline_of_another_shape(shape):
    """The error has both shapes, for one with more axes or rows than the value too."""
    with pytest.raises(ValueError, match=rf"baseline has shape \[{shape[0]}.*blocks.0.hook_out, \[2, 9, 48\]"):
        integrated_gradients(model(), TOKENS, "blocks.0.hook_out", metric, np.zeros(shape), steps=1)


def test_metrics_are_compiled_once():
    """The leaves of a metric are data, in patching and attribution alike."""

    def logit(token, logits):
        return logits[0, -1, token]

    for token in range(3):
        answer = Partial(logit, jnp.int32(token))
        attribution_patching(model(), TOKENS, activations("clean"), answer, "resid_pre", ("layer", "pos"))
        patching.get_act_patch_resid_pre(model(), TOKENS, activations("clean"), answer, progress=False)
        if token == 0:
            first = programs()
    assert programs() == first
