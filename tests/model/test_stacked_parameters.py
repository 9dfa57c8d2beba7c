"""Stacked parameters: made, taken apart, saved and read as parameters by block are, or refused with one error."""

import dataclasses
import functools
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import (
    TINY,
    Gemma3,
    Gemma3Config,
    HookedGemma3,
    forward,
    stack_layers,
    unstack_layers,
)
from gemma3_jax.analysis import fold_ln, ov_circuit
from gemma3_jax.cache.residual import HEADS
from gemma3_jax.hooked import hooked
from gemma3_jax.model import layout
from tests.helpers.small_model import TOKENS, difference
from tests.model.stacked_model import BOUND, FULL, LOCAL, both, plain, worst


def test_plain_linen_has_the_same():
    """init makes the stacked layout, each weight drawn by itself; apply is what forward is; own values are stacked."""
    config, params, stacked = both()
    model = Gemma3(config, scan_layers=True)
    made = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, stacked)
    weights = made["blocks"]["mlp"]["in"]["weight"]
    assert 0.015 < jnp.std(weights) < 0.025
    assert not jnp.allclose(weights[0], weights[1])

    def keep(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name == "mlp":
            context.module.sow("mine", "kept", out)
        return out

    @jax.jit
    def run(params):
        with nn.intercept_methods(keep):
            return model.apply({"params": params}, TOKENS, mutable=["mine"])

    logits, variables = run(stacked)
    assert difference(logits, plain()[0]) < BOUND
    assert difference(jax.jit(model.apply)({"params": stacked}, TOKENS), plain()[0]) < BOUND
    (out,) = variables["mine"]["blocks_0_to_6"]["mlp"]["kept"]
    assert difference(out[3], plain()[1]["blocks.3.mlp.hook_out"]) < BOUND
    with pytest.raises(ValueError, match="stack_layers"):
        model.apply({"params": params}, TOKENS)


def test_from_pretrained_frees_the_layers_of_each_weight(monkeypatch):
    """Before it stacks the next weight; `stack_layers`, the negative control, leaves all of them to its caller."""
    blocks, alive, stack = [], [], layout._stacked

    def watched(config, params):
        blocks.extend(map(weakref.ref, jax.tree.leaves([params[f"blocks_{i}"] for i in range(4)])))
        return layout.stack_and_empty(config, params)

    def count(layers):
        alive.append(sum(each() is not None for each in blocks))
        return stack(layers)

    monkeypatch.setattr(layout, "_stacked", count)
    monkeypatch.setattr(hooked, "stack_and_empty", watched)
    model = HookedGemma3.from_pretrained(TINY, scan_layers=True)
    weights = len(jax.tree.leaves(model.params["blocks"]))
    assert alive == [4 * left for left in range(weights, 0, -1)]
    alive.clear()
    config, params = convert_checkpoint(TINY)
    blocks[:] = map(weakref.ref, jax.tree.leaves([params[f"blocks_{i}"] for i in range(4)]))
    stack_layers(config, params)
    assert alive == [4 * weights] * weights


@pytest.mark.parametrize("stop", [None, 1], ids=["scanned", "one layer"])
def test_own_values_of_every_module(stop):
    """What an interceptor stores at each call is under the name of its module, and the model's own is there once."""
    config, _, stacked = both()

    def keep(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            context.module.sow("mine", "kept", out)
        return out

    with nn.intercept_methods(keep):
        model = Gemma3(config, scan_layers=True)
        out, variables = model.apply({"params": stacked}, TOKENS, stop_at_layer=stop, mutable=["mine"])
    (own,) = variables["mine"]["kept"]
    assert difference(own, out) == 0
    (blocks,) = variables["mine"]["blocks_0" if stop else "blocks_0_to_6"]["kept"]
    last = blocks if stop else blocks[-1]
    assert difference(last, out if stop else plain()[1]["ln_final.hook_in"]) < BOUND


@given(st.lists(st.sampled_from([LOCAL, FULL]), min_size=1, max_size=24))
@settings(max_examples=30, deadline=None)
def test_round_trip(types):
    """Whatever the layer types: one entry for all blocks, each layer in its place, and back is bit for bit."""
    config = dataclasses.replace(Gemma3Config.preset("270m"), num_hidden_layers=len(types), layer_types=tuple(types))
    params = {f"blocks_{i}": {"w": np.full((2,), i, np.float32)} for i in range(len(types))} | {"embed": np.zeros(1)}
    stacked = stack_layers(config, params)
    assert set(stacked) == {"blocks", "embed"}
    assert stacked["blocks"]["w"][:, 0].tolist() == list(range(len(types)))
    again = unstack_layers(config, stacked)
    assert set(again) == set(params)
    assert all((again[key]["w"] == params[key]["w"]).all() for key in params if key != "embed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_of_a_model_is_bit_for_bit(dtype):
    """Every leaf, dtypes included, twice either way."""
    config, params, _ = both()
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    stacked = stack_layers(config, params)
    again = unstack_layers(config, stack_layers(config, stacked))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(unstack_layers(config, again)), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()


def test_parameters_that_do_not_fit_are_refused():
    """One message that names what is wrong."""
    config, params, stacked = both()
    shallow = dataclasses.replace(config, num_hidden_layers=5, layer_types=config.layer_types[:5])
    with pytest.raises(ValueError, match=r"\(7, .*this config has 5 layers"):
        forward(shallow, stacked, TOKENS)
    with pytest.raises(ValueError, match="have 'blocks_5'; the config requires 5 blocks"):
        forward(shallow, params, TOKENS)
    with pytest.raises(ValueError, match="have 'blocks', which are stacked, and 'blocks_2'; remove one of them"):
        forward(config, {**stacked, "blocks_2": params["blocks_2"]}, TOKENS)
    with pytest.raises(ValueError, match="lack 'blocks_3'"):
        stack_layers(config, {key: value for key, value in params.items() if key != "blocks_3"})
    unlike = {**params, "blocks_2": jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["blocks_2"])}
    with pytest.raises(ValueError, match="blocks_2/attn/k/weight is bfloat16"):
        stack_layers(config, unlike)


@functools.cache
def tiny():
    """The shipped model, unrolled and scanned."""
    return [HookedGemma3.from_pretrained(TINY, dtype="float32", scan_layers=scan) for scan in (False, True)]


def test_hooked_model_weights_and_analyses():
    """Everything that reads parameters reads either layout."""
    unrolled, scanned = tiny()
    assert "blocks" in scanned.params
    text = "ba ke lo mu ti so re ba ke"
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "W_E", "W_U"):
        assert (getattr(scanned, name) == getattr(unrolled, name)).all()
    (logits, cache), (found, kept) = (model.run_with_cache(text, HEADS) for model in tiny())
    assert difference(found, logits) < BOUND
    assert difference(kept.stack_head_results(), cache.stack_head_results()) < BOUND
    circuits = [ov_circuit(model.config, model.params).A for model in tiny()]
    assert difference(*circuits) < BOUND
    folded = HookedGemma3(*fold_ln(scanned.config, scanned.params), scanned.tokenizer)
    assert "blocks" in folded.params
    assert difference(folded(text), logits) < 1e-4
    again = HookedGemma3(unrolled.config, unrolled.params, unrolled.tokenizer, scan_layers=True)
    assert difference(again(text), logits) < BOUND


def test_generation_and_saving(tmp_path):
    """Generation from stacked parameters writes the same, and files hold an entry for each block."""
    unrolled, scanned = tiny()
    text = "ba ke lo mu ti so re ba ke"
    options = {"max_new_tokens": 4, "names_filter": "blocks.*.hook_resid_post"}
    (wanted, _), (written, found) = unrolled.generate(text, **options), scanned.generate(text, **options)
    assert written == wanted
    assert found.cache.params is scanned.params
    save_params(scanned.config, scanned.params, tmp_path / "saved")
    config, params = load_params(tmp_path / "saved")
    assert jax.tree.structure(params) == jax.tree.structure(unrolled.params)
    export_checkpoint(config, scanned.params, tmp_path / "exported")
    exported = HookedGemma3.from_pretrained(tmp_path / "exported")
    assert worst(params, unrolled.params) == 0
    assert worst(exported.params, unrolled.params) < 1e-6
    again = HookedGemma3.from_pretrained(tmp_path / "saved", scan_layers=True)
    assert jax.tree.structure(again.params) == jax.tree.structure(scanned.params)
