"""A scan over layers changes no number: any layer types and lengths, bfloat16, gradients, Hugging Face's values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_state_dict
from gemma3_jax import (
    Gemma3,
    Gemma3Config,
    forward,
    grad_at,
    stack_layers,
)
from gemma3_jax.compute.attention import SHORT
from gemma3_jax.parity import SMALL_BAR, compare, compare_sites, huggingface, our_activations
from tests.helpers.random_models import hf_model, random_tokens
from tests.helpers.small_model import TOKENS, difference
from tests.model.stacked_model import BOUND, FULL, LOCAL, TYPES, Nudge, both, exchanged, worst


def test_gradients_at_sites_and_of_an_edit():
    """With an edit in a scanned layer; those of parameters are in the parity test. Each pass has its own rounding."""
    config, params, stacked = both(tuple(TYPES[:4]))
    sites = ("blocks.*.hook_resid_post", "blocks.1.attn.hook_z", "blocks.3.attn.hook_pattern", "ln_final.hook_in")

    @jax.jit
    def run(params, strength):
        value, cache = grad_at(config, params, TOKENS, sites, edits={"blocks.3.mlp.hook_post": Nudge(strength)})
        return value, dict(cache), dict(cache.grads)

    assert worst(run(stacked, 1.0), run(params, 1.0)) < 2 * BOUND
    assert worst(run(stacked, 0.0)[2], run(params, 1.0)[2]) > 1e-3

    def loss(strength, params):
        wanted = {"blocks.*.hook_out": Nudge(strength)}
        return forward(config, params, TOKENS, edits=wanted, return_type="loss")[0]

    slope = jax.jit(jax.grad(loss))
    assert difference(slope(1.0, stacked), slope(1.0, params)) < 2 * BOUND


@pytest.mark.parametrize(
    "types",
    [[LOCAL] * 4, [LOCAL, FULL, FULL, LOCAL, FULL], [FULL]],
    ids=["one kind", "in no order", "one layer"],
)
@pytest.mark.parametrize("length", [9, SHORT + 1])
def test_layer_types_in_any_order(types, length):
    """Logits and streams, in a short text and one whose layers never hold all scores; with other types they differ."""
    config, params, stacked = both(tuple(types))
    tokens = random_tokens((1, length))

    def run(params, config=config):
        return dict(forward(config, params, tokens, ("blocks.*.hook_out", "unembed.hook_out"))[1])

    wanted = jax.jit(run)(params)
    assert worst(jax.jit(run)(stacked), wanted) < BOUND
    other = dataclasses.replace(config, layer_types=(FULL if types[0] == LOCAL else LOCAL, *types[1:]))
    assert worst(jax.jit(functools.partial(run, config=other))(stacked), wanted) > 1e-2


@pytest.mark.parametrize("length", [9, SHORT + 1])
def test_bfloat16_is_as_near_to_float32_as_unrolled(length):
    """The two round in different places: each stream's error is at most half as large again."""
    config, params, _ = both()
    tokens = random_tokens((1, length))
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    # The same values in float32.
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    run = jax.jit(lambda params: dict(forward(config, params, tokens, "blocks.*.hook_out")[1]))
    stacked = stack_layers(config, narrow)
    exact, unrolled, scanned = run(wide), run(narrow), run(stacked)

    def error(found):
        return np.array([jnp.std(found[name].astype(jnp.float32) - exact[name]) for name in exact])

    assert (error(unrolled) > 0).all()
    assert (error(scanned) < 1.5 * error(unrolled)).all()
    # Negative control: two layers in each other's place.
    wrong = run({**stacked, "blocks": exchanged(stacked["blocks"])})
    assert error(wrong)[-1] > 3 * error(unrolled)[-1]


def test_the_program_does_not_grow_with_the_depth():
    """What is compiled is as long for twelve layers as for six; unrolled, twice as long."""

    def lines(layers, scan):
        kinds = tuple(TYPES[:2] * (layers // 2))
        config = dataclasses.replace(both()[0], num_hidden_layers=layers, layer_types=kinds)
        shapes = jax.eval_shape(Gemma3(config, scan_layers=scan).init, jax.random.key(0), TOKENS)["params"]
        run = jax.jit(lambda params: forward(config, params, TOKENS)[0])
        return len(run.lower(shapes).compile().as_text().splitlines())

    assert lines(12, scan=True) < 1.05 * lines(6, scan=True)
    assert lines(12, scan=False) > 1.5 * lines(6, scan=False)


@pytest.mark.parametrize("length", [SHORT, SHORT + 130])
def test_a_long_text_has_the_gradients_and_rows_of_unrolled_layers(length):
    """From `SHORT` tokens on, layers of both kinds share a scan: parameters' gradients, and padding, of each kernel."""
    config, params, stacked = both((LOCAL, FULL, LOCAL))
    tokens = random_tokens((2, length))
    mask = jnp.ones((2, length), int).at[0, :140].set(0)

    def loss(params):
        return forward(config, params, tokens, attention_mask=mask, return_type="loss")[0]

    ours, theirs = (jax.jit(jax.grad(loss))(each) for each in (stacked, params))
    theirs = stack_layers(config, theirs)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    # A sum over all tokens, one by one, is rounded once for each.
    bound = tokens.size * np.finfo(np.float32).eps * largest
    assert worst(ours, theirs) < bound
    assert worst(ours, {**theirs, "blocks": jax.tree.map(lambda w: w[::-1], theirs["blocks"])}) > 1e-2 * largest


def test_hugging_face_parity():
    """Every site and gradient, several windows long, from stacked parameters; with two layers exchanged it fails."""
    model = hf_model(num_hidden_layers=7, layer_types=TYPES)
    config = Gemma3Config.from_hf(model.config)
    stacked = stack_layers(config, convert_state_dict(model.state_dict(), config))
    tokens = random_tokens((2, 30))
    assert not [row for row in compare(model, config, stacked, tokens) if not row.passed]
    wrong = {**stacked, "blocks": exchanged(stacked["blocks"])}
    rows = compare_sites(huggingface.activations(model, tokens), our_activations(config, wrong, tokens), SMALL_BAR)
    assert [row for row in rows if not row.passed]
