"""`forward` itself: watching, stopping, inputs, and one clear error for each bad argument."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import Gemma3, HookedGemma3, UnknownSite, forward, grad_at, next_token_loss
from gemma3_jax.run import request
from gemma3_jax.sites.table import site
from tests.helpers.small_model import (
    COPIES,
    LAYERS,
    LEFT_PADDED,
    TOKENS,
    assert_same,
    identity,
    nudge,
    padded,
    plain,
    run,
    same,
    small,
)


@pytest.mark.parametrize("watched", ["hook_attn_scores", "hook_pattern", "hook_result", *COPIES])
def test_watching_changes_no_result(watched):
    """Watching a site that is computed on demand does not change the logits, up to rounding, padded or not."""
    logits, cache = run(f"**.{watched}", attention_mask=LEFT_PADDED)
    assert len(cache) == LAYERS
    assert_same(logits, padded()[0], 5e-6)


@pytest.mark.parametrize("stop", [0, 1, 2, -1, -2])
def test_stop_at_layer(stop):
    """Only the blocks before that layer run, negative from the end, and the stream that enters it is returned."""
    before = stop % LAYERS if stop < 0 else stop
    at = f"blocks.{before}.hook_in" if before < LAYERS else "ln_final.hook_in"
    out, cache = run("**", stop_at_layer=stop)
    assert_same(out, plain()[1][at])
    blocks = {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")}
    assert blocks == set(range(before))
    assert {"embed.hook_out"} < set(cache) if before else set(cache) == {"embed.hook_in", "embed.hook_out"}
    assert not same(out, plain()[1]["embed.hook_out" if before else "blocks.1.hook_in"])  # control


def equations(jaxpr):
    """All equations of a jaxpr, those of the functions that it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def work(**options) -> tuple[int, bool]:
    """How many blocks a call runs (each has one tanh, in its gelu), and whether it computes logits, of three layers."""
    config, params = small(3)
    found = list(equations(jax.make_jaxpr(lambda params: forward(config, params, TOKENS, **options))(params).jaxpr))
    unembeds = any(variable.aval.shape[-1:] == (config.vocab_size,) for eqn in found for variable in eqn.outvars)
    return sum(eqn.primitive.name == "tanh" for eqn in found), unembeds


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, True)),  # control: the count sees all blocks and the unembedding
        ({"capture": "blocks.1.hook_out"}, (3, True)),
        ({"capture": "blocks.1.hook_out", "return_type": None}, (2, False)),
        ({"capture": ("blocks.0.attn.hook_pattern", "blocks.1.hook_in"), "return_type": None}, (2, False)),
        ({"capture": "blocks.0.**", "return_type": None}, (1, False)),
        ({"capture": "blocks.2.hook_out", "return_type": None}, (3, False)),
        ({"capture": "hook_embed", "return_type": None}, (0, False)),
        ({"return_type": None}, (0, False)),
        ({"capture": "unembed.hook_out", "return_type": None}, (3, True)),
        ({"stop_at_layer": 1}, (1, False)),
        ({"stop_at_layer": -1, "return_type": None}, (2, False)),
    ],
)
def test_what_nobody_asked_for_is_not_run(options, expected):
    """Without a result to return, blocks after the last capture and the unembedding are not in the program."""
    assert work(**options) == expected


def test_return_type_none_gives_the_captures_of_a_whole_run():
    """Stopping early changes no captured value, and the result is None."""
    out, cache = run("blocks.1.**", return_type=None)
    assert out is None
    for name, value in cache.items():
        assert_same(value, plain()[1][name], 1e-6)


def test_return_types():
    """Logits, their loss, or both."""

    def expected(logits, counted):
        logits = np.asarray(logits, np.float64)
        normalised = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses = -np.take_along_axis(normalised[:, :-1], np.asarray(TOKENS)[:, 1:, None], axis=-1)[..., 0]
        return losses[counted].mean()

    loss, _ = run(return_type="loss")
    (logits, again), _ = run(return_type="both")
    assert_same(logits, plain()[0])
    everything = np.ones((2, 8), bool)
    np.testing.assert_allclose([loss, again], expected(logits, everything), rtol=1e-5)

    (logits, masked), _ = run(return_type="both", attention_mask=LEFT_PADDED)
    pairs_of_real_tokens = everything.copy()
    pairs_of_real_tokens[0, :3] = False
    np.testing.assert_allclose(masked, expected(logits, pairs_of_real_tokens), rtol=1e-5)
    np.testing.assert_allclose(next_token_loss(logits, TOKENS, LEFT_PADDED), masked, rtol=1e-6)
    assert abs(masked - expected(logits, everything)) > 1e-3  # control: the loss over padding too is another


def test_nothing_leaks_from_one_call_to_the_next():
    """After edits, after an error inside an edit, and after a capture, a plain call is as before."""

    def fail(value, hook):
        raise RuntimeError("on purpose")

    def result():
        return jax.tree.map(np.asarray, run())

    logits, cache = result()
    assert not cache
    run("blocks.*.hook_out", {"blocks.*.hook_out": nudge})
    np.testing.assert_array_equal(result()[0], logits)
    with pytest.raises(RuntimeError, match="on purpose"):
        run((), {"blocks.1.hook_out": fail})
    np.testing.assert_array_equal(result()[0], logits)
    config, params = small()
    np.testing.assert_array_equal(Gemma3(config).apply({"params": params}, TOKENS), logits)


def test_threads_do_not_see_each_others_hooks():
    """Calls in several threads at once give what each gives alone."""
    names = ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
    alone = [run(name, {name: nudge}) for name in names]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: run(name, {name: nudge}), names * 2))
    for (logits, cache), (expected_logits, expected) in zip(together, alone * 2, strict=True):
        assert list(cache) == list(expected)
        assert_same(logits, expected_logits, 1e-6)
        assert_same(next(iter(cache.values())), next(iter(expected.values())), 1e-6)
    assert not same(alone[0][0], alone[1][0])


def test_inputs_embeds_take_the_place_of_tokens():
    """The captured embedding, given as input, gives the same logits; the raw rows of W_E do not."""
    config, params = small()
    logits, cache = forward(config, params, inputs_embeds=plain()[1]["embed.hook_out"], capture="embed.hook_in")
    assert_same(logits, plain()[0], 1e-6)
    assert_same(cache["embed.hook_in"], plain()[1]["embed.hook_out"], 1e-12)
    raw = params["embed"]["weight"][TOKENS]
    assert not same(forward(config, params, inputs_embeds=raw)[0], plain()[0])
    model = Gemma3(config).apply({"params": params}, inputs_embeds=plain()[1]["embed.hook_out"])
    assert_same(model, plain()[0], 1e-6)


def test_explicit_positions():
    """Default positions written out change nothing, nor does shifting them all; stretching them does."""
    counted = jnp.broadcast_to(jnp.arange(9), (2, 9))
    assert_same(run(positions=counted)[0], plain()[0], 1e-6)
    assert_same(run(positions=counted + 100)[0], plain()[0], 1e-4)
    assert not same(run(positions=counted * 2)[0], plain()[0], 1e-3)
    counted_by_hand = jnp.stack([jnp.maximum(jnp.arange(9) - 3, 0), jnp.arange(9)])
    by_mask = padded()[0]
    by_hand = run(attention_mask=LEFT_PADDED, positions=counted_by_hand)[0]
    assert_same(by_hand, by_mask, 1e-6)
    # The row alone: what follows a token does not reach it.
    alone = run(tokens=jnp.roll(TOKENS, -3, axis=1))[0][0, :6]
    assert_same(by_mask[0, 3:], alone)
    assert not same(plain()[0][0, 3:], alone)  # control: without the mask the padding is seen


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_a_mask_of_any_kind_says_the_same(dtype):
    """Booleans, integers and floats of 0 and 1; traced values cannot be checked: a nonzero value is a real token."""
    config, params = small()
    mask = np.asarray(LEFT_PADDED).astype(dtype)
    assert_same(forward(config, params, TOKENS, attention_mask=mask)[0], padded()[0], 1e-6)
    traced = jax.jit(lambda mask: forward(config, params, TOKENS, attention_mask=mask)[0])
    assert_same(traced(np.asarray(LEFT_PADDED) * 3), padded()[0], 1e-6)
    with pytest.raises(ValueError, match="attention_mask must be"):
        HookedGemma3(config, params)(TOKENS, attention_mask=np.asarray(LEFT_PADDED) * 3)


def test_blocks_that_the_config_does_not_have_are_refused():
    """Parameters of a deeper or shallower model are not cut to the config's layers, silently."""
    config, params = small(3)
    with pytest.raises(ValueError, match="params have 'blocks_2'; the config requires 2 blocks"):
        forward(dataclasses.replace(config, num_hidden_layers=2, layer_types=()), params, TOKENS)
    with pytest.raises(ValueError, match="params lack 'blocks_3'; the config requires 4 blocks"):
        forward(dataclasses.replace(config, num_hidden_layers=4, layer_types=()), params, TOKENS)
    shape = np.ones((3, 3))
    wrong = {
        **params,
        "blocks_1": {**params["blocks_1"], "mlp": {**params["blocks_1"]["mlp"], "in": {"weight": shape}}},
    }
    with pytest.raises(ValueError, match=r"blocks_1/mlp/in/weight has shape \(3, 3\); the config requires \(48, "):
        forward(config, wrong, TOKENS)


@pytest.mark.parametrize("bad", [101, 5000, -1, -100])
def test_an_id_outside_the_vocabulary(bad):
    """The embedding never uses another row: known ids raise an error, and traced ids give NaN."""
    tokens = TOKENS.at[0, 4].set(bad)
    logits = jax.jit(lambda tokens: run(tokens=tokens)[0])(tokens)
    assert np.isnan(logits[0, 4:]).all()
    assert np.isfinite(logits[1]).all()
    for ids in (tokens, np.asarray(tokens, np.int64), torch.tensor(np.asarray(tokens))):
        for call in (
            lambda ids: run(tokens=ids),
            HookedGemma3(*small()),
            lambda ids: grad_at(*small(), ids, "hook_embed"),
        ):
            with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary of 101"):
                call(ids)
    wide = np.asarray(tokens, np.int64)
    wide[0, 4] = 2**32 + 5  # not token 5
    with pytest.raises(ValueError, match=str(2**32 + 5)):
        run(tokens=wide)


def test_gradients_are_finite_under_padding():
    """Rows of padding see nothing at all; the loss's gradients stay finite, reach everything, and ignore padding."""
    config, params = small(1)

    @jax.jit
    @jax.grad
    def gradients(params, tokens, mask):
        return forward(config, params, tokens, (), None, mask, return_type="loss")[0]

    for mask in (LEFT_PADDED, LEFT_PADDED[:, ::-1]):
        grads = gradients(params, TOKENS, mask)
        for path, leaf in jax.tree.leaves_with_path(grads):
            assert np.isfinite(leaf).all(), path
            assert np.abs(leaf).max() > 0, path
        other = gradients(params, jnp.where(mask == 1, TOKENS, 7), mask)
        jax.tree.map(lambda one, two: assert_same(one, two, 1e-4), grads, other)
        changed = gradients(params, TOKENS.at[0, 4].set(7), mask)
        assert not same(changed["ln_final"]["weight"], grads["ln_final"]["weight"], 1e-4)  # control


EMBEDS = np.zeros((2, 9, 48), np.float32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": None}, "tokens or inputs_embeds"),
        ({"inputs_embeds": EMBEDS}, "exactly one"),
        ({"tokens": TOKENS[0]}, r"tokens have shape \(9,\)"),
        ({"tokens": TOKENS[:, :0]}, "token"),
        ({"tokens": np.zeros((2, 9))}, "token ids are float64"),
        ({"tokens": None, "inputs_embeds": EMBEDS[..., :-1]}, r"must be floats \[b, p, 48\]"),
        ({"tokens": None, "inputs_embeds": EMBEDS[0]}, "inputs_embeds are float32"),
        ({"attention_mask": np.ones((2, 8), int)}, "attention_mask has shape"),
        ({"attention_mask": np.ones(9, int)}, "attention_mask has shape"),
        ({"attention_mask": np.full((2, 9), 2)}, "attention_mask must be 1 at real tokens"),
        ({"attention_mask": np.full((2, 9), 0.5)}, "attention_mask must be 1 at real tokens"),
        ({"attention_mask": np.zeros((2, 9))}, "an additive mask has 0"),
        ({"positions": np.arange(9)}, "positions has shape"),
        ({"return_type": "logit"}, "return_type is 'logit'"),
        ({"return_type": "loss", "stop_at_layer": 2}, "whole model"),
        ({"return_type": "both", "tokens": None, "inputs_embeds": EMBEDS}, "needs tokens"),
        ({"stop_at_layer": 4}, "3 layers"),
        ({"stop_at_layer": -4}, "3 layers"),
        ({"capture": "blocks.2.hook_out", "stop_at_layer": 2}, "never runs"),
        ({"capture": "unembed.**", "stop_at_layer": -1}, "never runs"),
        ({"edits": {"blocks.2.hook_out": identity}, "stop_at_layer": 2}, "never runs"),
        ({"capture": "blocks.3.hook_out"}, "no site is named"),
        ({"edits": {"blocks.*.hook_outt": identity}}, "no site matches"),
    ],
)
def test_bad_arguments(arguments, says):
    """Each is one error that says what is wrong, before anything runs."""
    config, params = small(3)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: forward(config, params, **{"tokens": TOKENS, **arguments}))


def test_what_is_no_config():
    """Config and params in the other order, or Hugging Face's config, are told what is expected."""
    config, params = small()
    for call in (lambda: forward(params, config, TOKENS), lambda: HookedGemma3(params, config)):
        with pytest.raises(TypeError, match="config is a dict; it must be a Gemma3Config, which comes before params"):
            call()


def test_unknown_sites_are_key_errors_too():
    """`UnknownSite` is caught as either of the two errors that it is."""
    with pytest.raises(KeyError):
        run("nonsense")
    assert issubclass(UnknownSite, ValueError)
    assert site("blocks.2.hook_out").legacy == "blocks.{i}.hook_resid_post"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_looking_changes_nothing(dtype):
    """The logits of a run that captures every site are bit for bit those of one that captures none."""
    config, params = small()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
    unwatched, _ = forward(config, params, TOKENS)
    watched, _ = forward(config, params, TOKENS, "**")
    np.testing.assert_array_equal(watched, unwatched)
    edited, _ = forward(config, params, TOKENS, edits={"blocks.0.attn.hook_result": lambda value, hook: value * 1.01})
    assert not np.array_equal(edited, unwatched)  # control


def test_large_parameters_as_constants(monkeypatch):
    """A closure over parameters takes gigabytes to compile: a warning says what to write. The control is that."""
    config, params = small()
    monkeypatch.setattr(request, "LARGE", 1)
    stop = {"stop_at_layer": 1}
    with pytest.warns(UserWarning, match=r"are constants of a function .* pass them as an argument"):
        jax.make_jaxpr(lambda tokens: forward(config, params, tokens, **stop)[0])(TOKENS)
    with pytest.warns(UserWarning, match="are constants"):
        jax.make_jaxpr(lambda tokens: grad_at(config, params, tokens, "embed.hook_out", jnp.sum, **stop)[0])(TOKENS)
    jax.make_jaxpr(lambda params, tokens: forward(config, params, tokens, **stop)[0])(params, TOKENS)
    jax.vmap(lambda tokens: forward(config, params, tokens[None], stop_at_layer=0)[0])(TOKENS)
    jax.grad(lambda x: forward(config, params, inputs_embeds=x, stop_at_layer=0)[0].sum())(jnp.ones((1, 3, 48)))
