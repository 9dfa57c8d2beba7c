"""A sweep gives for every item what a run of its own gives, whatever its chunks, and loses nothing when interrupted."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import Gemma3, Gemma3Config, HookedGemma3, edits, forward
from gemma3_jax.analysis import sweeps as module
from gemma3_jax.analysis.sweeps import run_bytes, sweep
from gemma3_jax.hooks.tracing import traced
from gemma3_jax.run.request import new_request
from tests.helpers.programs import programs
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import LEFT_PADDED, TOKENS, assert_same, plain, run, same, small

OTHER = jnp.asarray(random_tokens((2, 9), seed=1), jnp.int32)
LAYER, POSITION = (axis.ravel() for axis in np.indices((2, 9)))
ITEMS = {"layer": LAYER, "positions": POSITION}


@functools.cache
def model():
    return HookedGemma3(*small())


@functools.cache
def other():
    """Every activation of a run on other tokens."""
    return run("**", tokens=OTHER)[1]


def patch(cache, item):
    return {"blocks.*.hook_resid_mid": edits.only(edits.FromCache(cache), **item)}


def metric(logits):
    return logits[:, -1, 5].sum()


def one_by_one(name="blocks.*.hook_resid_mid", mask=None):
    """The same grid, one forward pass for each place."""

    @jax.jit
    def each(layer, position):
        edit = edits.only(edits.FromCache(other()), layer=layer, positions=position)
        return metric(forward(*small(), TOKENS, edits={name: edit}, attention_mask=mask)[0])

    return np.asarray([each(i, j) for i, j in zip(LAYER, POSITION, strict=True)])


def grid(**options):
    options = {"items": ITEMS, "progress": False} | options
    return sweep(model(), TOKENS, Partial(patch, other()), metric=metric, **options)


@pytest.mark.parametrize("chunk", [5, 100, None])
def test_equals_one_run_for_each_item(chunk):
    """In chunks that do and do not divide the number of runs, or span layers, and in what a memory limit allows."""
    assert_same(grid(chunk_size=chunk), one_by_one(), 1e-5)
    shuffled = np.random.default_rng(0).permutation(18)
    items = {key: value[shuffled] for key, value in ITEMS.items()}
    assert_same(grid(chunk_size=chunk, items=items), one_by_one()[shuffled], 1e-5)
    assert not same(grid(chunk_size=chunk, items=items), one_by_one(), 1e-2)  # control: the order matters


def test_padding_and_logits_at():
    """With a mask, positions and logits are those of the real tokens."""
    expected = one_by_one(mask=LEFT_PADDED)
    found = grid(attention_mask=LEFT_PADDED, logits_at=-1)
    assert_same(found, expected, 1e-5)
    assert not same(found, one_by_one(), 1e-3)


def test_edits_outside_the_blocks():
    """An edit of the embedding runs the whole model, one of the final norm none of its blocks."""

    def scaled(name, item):
        return {name: edits.Scale(item)}

    factors = np.asarray([0.5, 2.0], np.float32)
    for name in ("embed.hook_out", "ln_final.hook_normalized", "unembed.hook_out"):
        found = sweep(model(), TOKENS, Partial(functools.partial(scaled, name)), factors, metric, progress=False)
        for factor, value in zip(factors, found, strict=True):
            assert_same(value, metric(run(edits={name: edits.Scale(factor)})[0]), 1e-5)
        assert not same(found[0], found[1], 1e-3)


def test_first_layers_are_those_of_the_edits():
    """What is skipped follows from the edits: their restriction, else their sites."""

    def first(edit_of, items):
        request = new_request(small(3)[0], TOKENS)
        edit = module._traced_edits(request, edit_of, items, np.dtype("float32"))
        return module._checked_layers(request, edit, items).tolist()

    layers = jnp.asarray([2, 0, 1])
    scale = edits.Scale(0.5)
    assert first(lambda i: {"blocks.*.hook_out": edits.only(scale, layer=i)}, layers) == [2, 0, 1]
    assert first(lambda i: {"blocks.*.hook_out": [scale, edits.only(scale, layer=i)]}, layers) == [0, 0, 0]
    assert first(lambda i: {"blocks.2.hook_out": scale, "ln_final.hook_in": scale}, layers) == [2, 2, 2]
    assert first(lambda i: {"blocks.2.hook_out": scale, "hook_embed": scale}, layers) == [-1, -1, -1]
    assert first(lambda i: {"unembed.hook_in": scale}, layers) == [3, 3, 3]


def test_under_jit_vmap_and_grad():
    """The sweep is a pure function when it is traced: same values, and a gradient."""
    jitted = jax.jit(lambda model, tokens: sweep(model, tokens, Partial(patch, other()), ITEMS, metric))
    assert_same(jitted(model(), TOKENS), one_by_one(), 1e-5)

    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def ablated(factor):
        items = {"scale": factor * jnp.ones(2), "layer": jnp.arange(2)}
        return sweep(model(), TOKENS, scaled_at, items, metric).sum()

    step = 1e-2
    values, slopes = ablated(jnp.asarray([1 - step, 1.0, 1 + step]))
    np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / (2 * step), rtol=0.02)
    np.testing.assert_allclose(values[1], 2 * metric(plain()[0]), rtol=1e-4)
    assert not same(values[0], values[2], 1e-4)


def scaled_at(item):
    return {"blocks.*.hook_out": edits.only(edits.Scale(item["scale"]), layer=item["layer"])}


def test_new_values_compile_nothing():
    """Items, activations, metric leaves and tokens are data."""

    def weighted(weight, logits):
        return weight * metric(logits)

    for i in range(3):
        cache = jax.tree.map(lambda x, i=i: x + i, dict(other()))
        items = {"layer": (LAYER + i) % 2, "positions": (POSITION + i) % 9}
        sweep(model(), TOKENS + i, Partial(patch, cache), items, Partial(weighted, float(i)), progress=False)
        if i == 0:
            first = programs()
    assert programs() == first


def test_a_metric_may_return_an_array():
    """Results are stacked along the first axis."""
    found = sweep(model(), TOKENS, Partial(patch, other()), ITEMS, lambda logits: logits[:, -1, :3], progress=False)
    assert found.shape == (18, 2, 3)
    assert_same(
        found[..., 0].sum(axis=1),
        sweep(model(), TOKENS, Partial(patch, other()), ITEMS, lambda logits: logits[:, -1, 0].sum(), progress=False),
        1e-5,
    )


def test_an_interrupted_sweep_keeps_what_is_finished(monkeypatch):
    """Ctrl-C in the third chunk leaves the results of two, and the rest NaN; the result resumes."""
    execute, calls = module.run_compiled, []

    def interrupted(function, *arguments, **static):
        calls.append(function.__name__)
        if calls.count("_chunk") == 3:
            raise KeyboardInterrupt
        return execute(function, *arguments, **static)

    whole = grid(chunk_size=5)
    monkeypatch.setattr(module, "run_compiled", interrupted)
    with pytest.warns(UserWarning, match="10 of 18 runs are NaN"):
        part = grid(chunk_size=4)
    assert np.isnan(part).sum() == 10
    done = ~np.isnan(part)
    assert_same(part[done], whole[done], 1e-5)

    monkeypatch.setattr(module, "run_compiled", execute)
    marked = np.where(done, -7.0, np.nan)  # a finished run is not run again
    resumed = grid(chunk_size=4, resume=marked)
    assert (resumed[done] == -7).all()
    assert_same(resumed[~done], whole[~done], 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(grid(resume=whole), whole)


def test_interrupted_before_anything_is_finished(monkeypatch):
    """There is nothing to keep: the interruption goes on its way."""
    execute = module.run_compiled

    def interrupted(function, *arguments, **static):
        if function is module._chunk:
            raise KeyboardInterrupt
        return execute(function, *arguments, **static)

    monkeypatch.setattr(module, "run_compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid()


@pytest.mark.parametrize("logits", [1, 64])
def test_memory_of_a_run(logits):
    """`run_bytes` is no less than what the compiled chunk takes for each run, and not ten times it."""
    config = dataclasses.replace(Gemma3Config.preset("270m"), num_hidden_layers=2, layer_types=())
    params = jax.eval_shape(lambda: Gemma3(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])

    def make(item):
        return {"blocks.*.hook_out": edits.only(edits.Scale(0.0), layer=item)}

    request = new_request(config, np.ones((1, 64), int), logits_at=np.arange(logits))
    shapes = jax.ShapeDtypeStruct((1, logits, config.vocab_size), jnp.float32)
    measure = traced(lambda x: jax.nn.log_softmax(x)[0, -1, 5], shapes, where="the metric")

    def temporary(c):
        streams = jax.ShapeDtypeStruct((3, 1, 64, 640), jnp.float32)
        items, start = jax.ShapeDtypeStruct((c,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        edit = module._traced_edits(request, make, items, np.dtype("float32"))
        chunk = jax.jit(module._chunk).lower(params, request, measure, edit, items, streams, start)
        return chunk.compile().memory_analysis().temp_size_in_bytes

    for_each = (temporary(12) - temporary(4)) / 8
    assert run_bytes(config, (1, 64), logits) / 10 < for_each <= run_bytes(config, (1, 64), logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"items": {"layer": [0, 1], "positions": [1]}}, "same first axis"),
        ({"items": {"layer": np.zeros(0, int)}}, "same first axis"),
        ({"items": {"layer": 3}}, "same first axis"),
        ({"resume": np.zeros(4)}, "this sweep has 18 runs"),
        ({"logits_at": 9}, "9 positions"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        ({"chunk_size": -3}, "chunk_size is -3; it must be at least 1"),
        ({"memory_limit": -1}, "memory_limit is -1; it must be above 0"),
    ],
)
def test_bad_arguments(change, says):
    """Each is one error that names what is wrong."""
    with pytest.raises(ValueError, match=says):
        grid(**change)


@pytest.mark.parametrize("form", [list, lambda edits: list(edits.items()), lambda edits: next(iter(edits.items()))])
def test_edits_are_a_mapping_or_pairs(form):
    """As in every other function: a list of pairs, which may name a site twice, and one pair."""
    scaled = [("blocks.1.ln2_post.hook_out", edits.Scale), ("blocks.1.hook_mlp_out", lambda x: edits.Add(x))]

    def given(x):
        pairs = [(name, edit(x)) for name, edit in scaled]
        return pairs if form is list else form(dict(pairs[:1]))

    items = np.float32([0.5, 2.0])
    actual = sweep(model(), TOKENS, given, items, metric, progress=False)
    expected = [metric(forward(*small(), TOKENS, edits=given(x))[0]) for x in items]
    assert_same(actual, np.stack(expected), 1e-5)
    assert abs(expected[0] - expected[1]) > 1e-2


def test_edits_must_be_a_mapping():
    """A function that forgets to return is told so."""
    with pytest.raises(TypeError, match="NoneType"):
        sweep(model(), TOKENS, lambda item: None, np.arange(3), metric)
