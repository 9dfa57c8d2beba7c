"""Running a part of the model: from a layer on, up to a layer, and logits at some positions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, edits, forward
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import (
    LEFT_PADDED,
    TOKENS,
    assert_same,
    identity,
    jitted,
    nudge,
    padded,
    plain,
    run,
    same,
    small,
)

ANY_STREAM = np.zeros((2, 9, SMALL["hidden_size"]), np.float32)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_start_at_layer(layer):
    """The residual stream entering a layer gives the logits of the whole run, and that of another layer does not."""
    config, params = small()
    names = ("blocks.0.hook_in", "blocks.1.hook_in", "ln_final.hook_in")
    logits, _ = forward(config, params, inputs_embeds=plain()[1][names[layer]], start_at_layer=layer)
    assert_same(logits, plain()[0], 1e-6)
    wrong, _ = forward(config, params, inputs_embeds=plain()[1][names[layer - 1]], start_at_layer=layer)
    assert not same(wrong, plain()[0])


def test_a_traced_start_compiles_once():
    """One compiled function starts at every layer, with edits of the blocks that run and of none that do not."""
    config, params = small()
    names = ("blocks.0.hook_in", "blocks.1.hook_in", "ln_final.hook_in")

    @jax.jit
    def run_from(stream, layer):
        return forward(config, params, inputs_embeds=stream, start_at_layer=layer, edits={"blocks.0.hook_out": nudge})[
            0
        ]

    edited = run(edits={"blocks.0.hook_out": nudge})[0]
    assert not same(edited, plain()[0])
    for layer, name in enumerate(names):
        assert_same(run_from(plain()[1][name], jnp.int32(layer)), edited if layer == 0 else plain()[0], 1e-6)
    # -2 is the first of two layers.
    assert_same(run_from(plain()[1][names[0]], jnp.int32(-2)), edited, 1e-6)
    assert_same(run_from(plain()[1][names[1]], jnp.int32(-1)), plain()[0], 1e-6)
    assert run_from._cache_size() == 1


def test_gradients_through_a_traced_start():
    """The gradient by the stream is that of the same run with a fixed start."""
    config, params = small()

    def loss(stream, layer):
        return jnp.mean(forward(config, params, inputs_embeds=stream, start_at_layer=layer)[0] ** 2)

    traced = jax.jit(jax.grad(loss))(plain()[1]["blocks.1.hook_in"], jnp.int32(1))
    fixed = jax.jit(jax.grad(loss), static_argnums=1)(plain()[1]["blocks.1.hook_in"], 1)
    assert_same(traced, fixed, 1e-5)


@pytest.mark.parametrize("integer", [int, np.int64, jnp.int32])
def test_any_known_integer_is_a_layer(integer):
    """NumPy's and JAX's integers count from either end as Python's do, and captures know which blocks run."""
    config, params = small()
    names = ["blocks.1.hook_out"]
    logits, cache = forward(
        config, params, None, names, inputs_embeds=plain()[1]["blocks.1.hook_in"], start_at_layer=integer(-1)
    )
    assert_same(logits, plain()[0], 1e-6)
    assert_same(cache[names[0]], plain()[1][names[0]], 1e-6)
    assert_same(run(stop_at_layer=integer(-1))[0], plain()[1]["blocks.1.hook_in"], 1e-6)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda at: forward(config, params, None, names, inputs_embeds=ANY_STREAM, start_at_layer=at)[0])(
            integer(1)
        )


@pytest.mark.parametrize("at", [-1, 3, [0, 8], [-1, 2], [[0, -2], [3, 4]]], ids=str)
def test_logits_at(at):
    """The logits there are those of the whole run at these positions."""
    logits, _ = run(logits_at=at)
    index = np.broadcast_to(np.atleast_1d(at), (2, np.atleast_1d(at).shape[-1]))
    expected = np.take_along_axis(np.asarray(plain()[0]), index[..., None] % 9, axis=1)
    assert_same(logits, expected, 1e-6)
    assert not same(logits, np.roll(expected, 1, axis=0))


@pytest.mark.parametrize("mask", [LEFT_PADDED, LEFT_PADDED[:, ::-1]], ids=["left", "right"])
def test_logits_at_count_the_real_tokens(mask):
    """Under padding -1 is each row's last real token, and 0 its first; a position that a row lacks is NaN."""
    whole, _ = run(attention_mask=mask)
    logits, _ = run(attention_mask=mask, logits_at=[0, -1, 7])
    for row in range(2):
        real = np.flatnonzero(np.asarray(mask[row]))
        assert_same(logits[row, :2], whole[row, real[[0, -1]]], 1e-6)
    assert np.isnan(logits[0, 2]).all()
    assert_same(logits[1, 2], whole[1, 7], 1e-6)


def test_logits_at_is_data():
    """Other positions do not recompile, in a jitted function and in `HookedGemma3`, which checks their range."""
    call, model = jitted(), HookedGemma3(*small())
    for at in range(3):
        assert_same(call(*small(), TOKENS, logits_at=jnp.int32(at))[0][:, 0], plain()[0][:, at], 1e-6)
        assert_same(model(TOKENS, logits_at=at)[:, 0], plain()[0][:, at], 1e-6)
    assert call._cache_size() == 1
    with pytest.raises(ValueError, match="9 positions"):
        model(TOKENS, logits_at=9)


def test_given_positions_are_the_ones_that_are_meant():
    """With positions from 100 on, 103 is the fourth token, for edits and for logits; 3 is none."""
    shifted = jnp.broadcast_to(jnp.arange(100, 109), (2, 9))

    def zeroed(position, **options):
        return run(edits={"blocks.0.hook_out": edits.only(edits.Replace(0.0), positions=position)}, **options)[0]

    assert_same(zeroed(103, positions=shifted), zeroed(3), 1e-4)
    assert_same(run(positions=shifted, logits_at=103)[0][:, 0], plain()[0][:, 3], 1e-4)
    with pytest.raises(ValueError, match=r"positions has 3, but no token at blocks\.0\.hook_out has that position"):
        zeroed(3, positions=shifted)
    assert not same(zeroed(103, positions=shifted), plain()[0], 1e-3)
    assert np.isnan(run(positions=shifted, logits_at=3)[0]).all()


def test_scaled_scores_spoil_nothing_under_padding():
    """Scores of a row of padding are all masked; twice the lowest number is still no NaN, for any real token."""
    doubled = run(edits={"blocks.*.attn.hook_attn_scores": lambda value, hook: 2 * value}, attention_mask=LEFT_PADDED)[
        0
    ]
    assert np.isfinite(doubled).all()
    alone = run(edits={"blocks.*.attn.hook_attn_scores": lambda value, hook: 2 * value}, tokens=TOKENS[:, 3:])[0]
    assert_same(doubled[0, 3:], alone[0], 1e-5)
    assert not same(doubled, padded()[0], 1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"start_at_layer": 1}, "needs inputs_embeds"),
        ({"start_at_layer": 3, "inputs_embeds": ANY_STREAM}, "start_at_layer is 3"),
        ({"start_at_layer": 1, "inputs_embeds": ANY_STREAM, "capture": "blocks.0.hook_out"}, "never runs"),
        ({"start_at_layer": 1, "inputs_embeds": ANY_STREAM, "edits": {"embed.hook_out": identity}}, "never runs"),
        ({"start_at_layer": 1, "stop_at_layer": 0, "inputs_embeds": ANY_STREAM}, "is 1, after stop_at_layer 0"),
        ({"start_at_layer": -1, "stop_at_layer": -2, "inputs_embeds": ANY_STREAM}, "is -1, after stop_at_layer -2"),
        ({"inputs_embeds": ANY_STREAM.astype(int)}, "inputs_embeds are int32"),
        ({"start_at_layer": np.int64(3), "inputs_embeds": ANY_STREAM}, "start_at_layer is 3"),
        ({"stop_at_layer": np.int64(-3)}, "stop_at_layer is -3"),
        ({"logits_at": 9}, "9 positions"),
        ({"logits_at": [-10]}, "9 positions"),
        ({"logits_at": 1.0}, "integers"),
        ({"logits_at": []}, "integers"),
        ({"logits_at": [[1], [2], [3]]}, "3 rows"),
        ({"logits_at": 1, "stop_at_layer": 1}, "logits_at cannot be used"),
        ({"logits_at": 1, "return_type": "loss"}, "whole model"),
    ],
)
def test_bad_arguments(arguments, says):
    """Each is one error that says what is wrong."""
    tokens = {} if "inputs_embeds" in arguments else {"tokens": TOKENS}
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: forward(*small(), **tokens, **arguments))
