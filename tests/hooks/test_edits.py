"""Edits are pytrees: what they see, what they may return, and what compiles."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import HookedGemma3, edits, forward
from tests.helpers.programs import programs
from tests.helpers.small_model import (
    LEFT_PADDED,
    SOME,
    TOKENS,
    assert_same,
    captures,
    direction,
    identity,
    jitted,
    plain,
    run,
    same,
    small,
)


@flax.struct.dataclass
class Steer:
    """Add strength * vector at one position of one layer; everything but the count of traces is traced."""

    vector: jax.Array
    strength: Any
    position: Any = -1
    layer: Any = 1
    traces: list = flax.struct.field(pytree_node=False, default_factory=list)

    def __call__(self, value, hook):
        self.traces.append(hook.name)
        here = (hook.positions == self.position) | (jnp.asarray(self.position) < 0)
        step = self.strength * (hook.layer == jnp.asarray(self.layer)) * self.vector
        return value + here[..., None] * step

    def __hash__(self):
        return 0


def add(vector, value, hook):
    return value + vector


def test_vmap_over_the_strength_of_an_edit():
    """One vmapped call gives what a call for each strength gives."""
    strengths = jnp.asarray([0.0, 0.5, 2.0])

    def out(strength):
        edits = {"blocks.0.hook_resid_mid": Steer(direction(), strength, layer=0)}
        return forward(*small(1), TOKENS, "blocks.0.hook_out", edits)

    logits, cache = jax.jit(jax.vmap(out))(strengths)
    for i, strength in enumerate(strengths):
        alone, captured = out(strength)
        assert_same(logits[i], alone)
        assert_same(cache["blocks.0.hook_out"][i], captured["blocks.0.hook_out"])
    assert_same(logits[0], forward(*small(1), TOKENS)[0])
    assert not same(logits[1], logits[2])


def test_gradients_with_respect_to_an_edit():
    """The gradient of a vector added to every embedding is the sum of the gradients of `inputs_embeds`."""
    config, params = small(1)
    embeddings, _ = forward(config, params, TOKENS, stop_at_layer=0)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(vector, embeddings):
        edits = {"hook_embed": Partial(add, vector)}
        logits, cache = forward(config, params, inputs_embeds=embeddings, capture=SOME, edits=edits)
        return jnp.sum(jnp.sin(logits)), cache

    (ours, theirs), cache = gradients(jnp.zeros_like(direction()), embeddings)
    assert_same(ours, theirs.sum(axis=(0, 1)), 1e-4)
    assert not same(ours, theirs.sum(axis=1)[0], 1e-4)  # control: one row's share is not all
    for name, value in captures(params)[1].items():
        assert_same(cache[name], value)


def test_gradients_with_respect_to_an_edit_equal_finite_differences():
    """By the strength and by the vector of an edit in the middle, along a direction."""
    config, params = small(1)

    def out(strength, vector):
        edits = {"blocks.*.hook_resid_mid": Steer(vector, strength, position=4, layer=0)}
        return jnp.mean(forward(config, params, TOKENS, (), edits, stop_at_layer=1)[0] ** 2)

    gradients, out = jax.jit(jax.grad(out, (0, 1))), jax.jit(out)
    by_strength, by_vector = gradients(1.0, direction())
    step = 0.05
    finite = (out(1 + step, direction()) - out(1 - step, direction())) / (2 * step)
    np.testing.assert_allclose(by_strength, finite, rtol=0.02)
    np.testing.assert_allclose(by_strength, by_vector @ direction(), rtol=1e-4)
    other = direction(1)
    finite = (out(1.0, direction() + step * other) - out(1.0, direction() - step * other)) / (2 * step)
    np.testing.assert_allclose(by_vector @ other, finite, rtol=0.02)


@pytest.mark.parametrize("entry", ["jit", "HookedGemma3"])
def test_new_values_in_an_edit_compile_nothing(entry):
    """50 vectors, strengths, positions and layers go through code that was traced once."""
    model, call = HookedGemma3(*small()), jitted()
    traces, rng = [], np.random.default_rng(0)

    def out(edit):
        if entry == "jit":
            return call(*small(), TOKENS, (), {"blocks.*.hook_out": edit}, stop_at_layer=2)[0]
        return model.run_with_hooks(TOKENS, [("blocks.*.hook_out", edit)], stop_at_layer=2)

    for step in range(50):
        values = {"strength": rng.normal(), "position": int(rng.integers(9)), "layer": int(rng.integers(2))}
        steered = out(Steer(direction(step), traces=traces, **values))
        if step % 25 == 1:
            here = {f"blocks.{values['layer']}.hook_out": Steer(direction(step), **values)}
            assert_same(steered, forward(*small(), TOKENS, (), here, stop_at_layer=2)[0])
            assert not same(steered, plain()[1]["ln_final.hook_in"])
        if step == 0:
            compiled = programs()
    assert programs() == compiled
    if entry == "jit":
        assert traces == ["blocks.0.hook_out", "blocks.1.hook_out"]
        assert call._cache_size() == 1


def test_a_partial_and_a_closure_compile_once():
    """The arrays that an edit reads are data, as leaves of a `Partial` and in a closure."""
    model = HookedGemma3(*small())

    def add(vector, value, hook):
        return value + vector

    def steered(edit):
        hooks = [("embed.hook_out", edit)]
        return model.run_with_hooks(TOKENS, hooks, stop_at_layer=0)

    embeddings = plain()[1]["embed.hook_out"]
    for wrap in (lambda vector: Partial(add, vector), lambda vector: lambda value, hook: add(vector, value, hook)):
        for seed in range(5):
            assert_same(steered(wrap(direction(seed))), embeddings + direction(seed))
            if seed == 0:
                before = programs()
        assert programs() == before
    steered(lambda value, hook: value - direction(0))
    assert programs() == before + 1  # control: another function


def test_edits_of_one_site_run_in_order():
    """A list of edits is applied from first to last, and the capture is taken after all of them."""

    def double(value, hook):
        return value * 2

    def plus_one(value, hook):
        return value + 1

    name = "blocks.1.hook_resid_mid"
    value = plain()[1][name]
    for several, expected in (([double, plus_one], value * 2 + 1), ([plus_one, double], (value + 1) * 2)):
        _, cache = run((name, "blocks.1.ln2.hook_in"), {name: several})
        assert_same(cache[name], expected)
        assert_same(cache["blocks.1.ln2.hook_in"], expected)
    assert not same(value * 2 + 1, (value + 1) * 2)


@pytest.mark.parametrize(
    "keys",
    [
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.*.hook_out", "blocks.1.hook_out"),
        ("model.layers.1.output", "blocks.1.hook_out"),
    ],
)
def test_two_keys_that_name_one_site(keys):
    """A dict has no order that survives jit, so two keys on one site are refused, by the site's name."""
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_out"):
        run((), dict.fromkeys(keys, identity))


@pytest.mark.parametrize(
    ("path", "shape", "ours"),
    [
        ("model.layers.1.self_attn.o_proj.input", (2, 9, 80), "blocks.1.attn.o.hook_in"),
        ("model.layers.1.self_attn.q_proj.output", (2, 9, 80), "blocks.1.attn.q.hook_out"),
        ("model.language_model.layers.1.self_attn.v_proj.output", (2, 9, 20), "blocks.1.attn.v.hook_out"),
        ("layers.1.self_attn.q_norm.output", (2, 8, 9, 10), "blocks.1.attn.q_norm.hook_out"),
        ("model.layers.1.self_attn.k_norm.input", (2, 2, 9, 10), "blocks.1.attn.k_norm.hook_in"),
        ("model.layers.1.mlp.output", (2, 9, 48), "blocks.1.mlp.hook_out"),
    ],
)
def test_edits_under_hf_paths_see_hf_layout(path, shape, ours):
    """The edit gets Hugging Face's layout, the cache gives it back so, and what it returns is put back as ours."""
    seen = []

    def edit(value, hook):
        seen.append((value.shape, hook.name))
        return value.at[..., 3].multiply(-1)

    out, cache = run(path, {path: edit}, stop_at_layer=2)
    assert seen == [(shape, ours)]
    assert list(cache) == [ours]
    value = plain()[1][path]
    assert value.shape == shape
    assert_same(cache[path], value.at[..., 3].multiply(-1))
    assert cache[ours].shape == plain()[1][ours].shape
    assert not same(out, plain()[1]["ln_final.hook_in"])
    assert_same(run((), {path: identity}, stop_at_layer=2)[0], plain()[1]["ln_final.hook_in"], 5e-6)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda value, hook: None, TypeError, "None"),
        (lambda value, hook: value[:, :-1], ValueError, "shape"),
        (lambda value, hook: value[..., None], ValueError, "shape"),
        (lambda value, hook: 0.0, ValueError, "shape"),
        (lambda value, hook: (value, value), ValueError, "shape"),
        (None, (TypeError, ValueError), "edit"),
    ],
    ids=["None", "shorter", "broadcastable", "scalar", "tuple", "no edit"],
)
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "model.layers.1.self_attn.o_proj.input"])
def test_a_bad_edit_is_an_error_that_names_the_site(edit, error, says, name):
    """An edit that returns None or another shape is an error, with the site's canonical name."""
    canonical = "blocks.1.attn.o.hook_in" if name.startswith("model.") else name
    with pytest.raises(error, match=says) as caught:
        jax.eval_shape(lambda: run((), {name: edit}, stop_at_layer=2))
    assert canonical in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "returned"),
    [
        ("blocks.1.hook_out", jnp.bfloat16, jnp.float32),
        ("blocks.1.hook_out", jnp.bfloat16, jnp.int32),
        ("blocks.1.attn.hook_pattern", jnp.float32, jnp.bfloat16),
        ("embed.hook_in", jnp.int32, jnp.int8),
    ],
)
def test_an_edits_result_is_cast_to_the_sites_dtype(name, dtype, returned):
    """Whatever dtype an edit returns, the site keeps its own."""
    config, params = small()
    params = jax.tree.map(lambda x: x if x.ndim == 1 else x.astype(jnp.bfloat16), params)
    edits = {name: lambda value, hook: value.astype(returned)}
    capture = (name, "ln_final.hook_in")
    logits, cache = jax.eval_shape(lambda params: forward(config, params, TOKENS, capture, edits), params)
    assert cache[name].dtype == dtype
    assert logits.dtype == jnp.float32
    assert cache["ln_final.hook_in"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("embed.hook_in", lambda value, hook: value + 0.7),
        ("embed.hook_in", edits.Add(0.7)),
        ("embed.hook_in", edits.Replace(5.9)),
        ("embed.hook_in", edits.Mean()),
        ("blocks.0.hook_out", lambda value, hook: jnp.fft.fft(value)),
    ],
)
def test_a_result_that_a_cast_would_cut_is_refused(name, edit):
    """Fractions at token ids, and imaginary parts: the cast used to drop them, so `ids + 0.7` had no effect."""
    with pytest.raises((TypeError, ValueError), match=f"{name}.*(token ids|drop a part)"):
        run(edits={name: edit})


def test_edits_may_return_numpy():
    """A numpy array, float64 too, is a value like any other."""
    name = "blocks.0.hook_out"
    _, cache = run(name, {name: lambda value, hook: np.asarray(value, np.float64) + 1})
    assert cache[name].dtype == jnp.float32
    assert_same(cache[name], plain()[1][name] + 1)


def test_what_a_hook_says_of_its_place():
    """Each call of an edit is told the site's canonical name, its layer and the positions of the tokens."""
    told = {}

    def edit(value, hook):
        told[hook.name] = (hook.layer, hook.positions)
        return value

    names = ("embed.hook_out", "blocks.0.hook_in", "blocks.1.attn.hook_pattern", "ln_final.hook_out")
    run((), {**dict.fromkeys(names, edit), "blocks.1.mlp.hook_post": edit})
    layers = {"embed.hook_out": None, "blocks.0.hook_in": 0, "blocks.1.mlp.out.hook_in": 1}
    layers |= {"blocks.1.attn.hook_pattern": 1, "ln_final.hook_out": None}
    assert {name: layer for name, (layer, _) in told.items()} == layers
    for _, positions in told.values():
        assert positions.dtype == jnp.int32
        np.testing.assert_array_equal(positions, np.tile(np.arange(9), (2, 1)))


def test_positions_under_left_padding():
    """A hook's positions count the real tokens, so that an edit at position 2 hits the third real token of each row."""
    seen = []

    def edit(value, hook):
        seen.append(hook.positions)
        return jnp.where((hook.positions == 2)[..., None], 0, value)

    name = "blocks.0.hook_in"
    _, cache = run(name, {name: edit}, attention_mask=LEFT_PADDED)
    np.testing.assert_array_equal(seen[0][0, 3:], np.arange(6))
    np.testing.assert_array_equal(seen[0][1], np.arange(9))
    assert np.argwhere(~np.asarray(cache[name]).any(axis=-1)).tolist() == [[0, 5], [1, 2]]

    given = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    run((), {name: lambda value, hook: seen.append(hook.positions) or value}, positions=given)
    np.testing.assert_array_equal(seen[1], given)


def test_an_edit_for_another_phase_than_that_of_the_run_is_refused():
    """It never acted, and nothing said so."""
    edit = {"blocks.1.hook_out": edits.only(edits.Replace(0.0), phase="generation")}
    with pytest.raises(ValueError, match="never acts"):
        run(edits=edit)
    with pytest.raises(ValueError, match="never acts"):
        HookedGemma3(*small()).run_with_hooks(TOKENS, list(edit.items()))
    run(edits=edit, phase="generation")  # control
    with pytest.raises(ValueError, match="phase is 'decode'"):
        run(edits=edit, phase="decode")
