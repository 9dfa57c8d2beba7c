"""The ready-made edits: what they compute, in which precision, and that their values are data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import TOKENS, assert_same, plain, run, same, small

from gemma3_jax import edits, forward

NAME = "blocks.0.hook_out"


def captured(edit):
    return run(NAME, {NAME: edit})[1][NAME]


def test_each_does_what_it_says():
    """On the captured value of the site itself, with vectors, scalars and masks."""
    before = plain()[1][NAME]
    vector = jnp.arange(before.shape[-1], dtype=jnp.float32)
    assert_same(captured(edits.Add(vector, 0.5)), before + 0.5 * vector)
    assert_same(captured(edits.Scale(-2.0)), -2 * before)
    assert not captured(edits.Scale(0.0)).any()
    at_last = jnp.arange(before.shape[1])[:, None] == before.shape[1] - 1
    replaced = captured(edits.Replace(vector, at_last))
    assert_same(replaced[:, :-1], before[:, :-1])
    assert_same(replaced[:, -1], jnp.broadcast_to(vector, replaced[:, -1].shape))
    assert not same(replaced, before)


@pytest.mark.parametrize("edit", [edits.Add(jnp.full(4, 3.0)), edits.Scale(1.01)], ids=["Add", "Scale"])
def test_low_precision_is_rounded_once(edit):
    """Equal to the edit in float32 and one cast; adding in bfloat16 step by step would not be."""
    value = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 4)) * 100, jnp.bfloat16)
    expected = edit(value.astype(jnp.float32), None).astype(jnp.bfloat16)
    assert edit(value, None).dtype == jnp.bfloat16
    np.testing.assert_array_equal(edit(value, None), expected)


def test_new_values_compile_nothing():
    """Ten vectors and strengths, one compilation."""
    config, params = small()

    @jax.jit
    def steered(edit):
        return forward(config, params, TOKENS, edits={NAME: edit})[0]

    results = [steered(edits.Add(jnp.full(config.hidden_size, float(i)), i / 10)) for i in range(10)]
    assert steered._cache_size() == 1
    assert not same(results[1], results[9])
