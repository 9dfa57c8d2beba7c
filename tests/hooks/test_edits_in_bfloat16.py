"""Edits of bfloat16 values: computed in float32 and rounded once, however many there are."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gemma3_jax import Gemma3, Gemma3Config, edits
from gemma3_jax.hooks.interception import apply_edits
from tests.hooks.edited_rows import CASES, call, hook_at, length, values


@functools.cache
def wide(d: int):
    """A bfloat16 model of one block with that hidden size."""
    config = Gemma3Config(
        vocab_size=8,
        hidden_size=d,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        sliding_window=4,
        query_pre_attn_scalar=4,
    )
    params = jax.jit(Gemma3(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)


def residual(d: int, massive: bool) -> np.ndarray:
    """[64, d], each of norm 25,000: Gaussian, or as trained models have it, with one feature that is most of it."""
    x = np.random.default_rng(d).normal(size=(64, d))
    x[:, 3] = 12 * d**0.5 if massive else x[:, 3]
    return x * 25_000 / length(x)


def step(d: int) -> np.ndarray:
    """[d], in a random direction, of norm 50."""
    v = np.random.default_rng(0).normal(size=d)
    return (v * 50 / length(v)).astype(np.float32)


def captured(d: int, chain: list, massive: bool = False) -> np.ndarray:
    """[64, d], the residual stream as it is captured, with the edits in place."""
    name, x = "embed.hook_out", jnp.asarray(residual(d, massive)[None], jnp.bfloat16)
    _, cache = call(*wide(d), None, name, {name: chain}, inputs_embeds=x, return_type=None)
    assert cache[name].dtype == jnp.bfloat16
    return np.asarray(cache[name][0], np.float64)


def share(d: int, chain: list, massive: bool = False) -> np.ndarray:
    """[64], how much of the step arrives at each position, along its direction; 1 is all of it."""
    return (captured(d, chain, massive) - captured(d, [], massive)) @ step(d) / 50**2


def expected_share(d: int) -> float:
    """The mean share for a Gaussian residual, when sums are rounded to the nearest bfloat16 once.

    Between 2^i and 2^(i + 1) bfloat16 values lie q = 2^(i - 7) apart. From one of them, a step s ends at the nearest
    multiple of q.
    """
    s, sigma = step(d).astype(np.float64), 25_000 / d**0.5
    edges = 2.0 ** np.arange(-30, 20)
    chance = 2 * np.diff(scipy.stats.norm.cdf(edges / sigma))
    q = edges[:-1, None] / 2**7
    return float(chance @ (s * q * np.rint(s / q)).sum(axis=1) / 50**2)


@flax.struct.dataclass
class Narrow:
    """The control: an edit whose result is rounded to bfloat16 at once."""

    edit: Any

    def __call__(self, value, hook):
        return self.edit(value.astype(jnp.bfloat16), hook)


# One step of norm 50, in one edit or in eight.
STEPS = {
    "once": lambda v: [edits.Add(v)],
    "scaled": lambda v: [edits.Add(v / 50, 50.0)],
    "relative": lambda v: [edits.Add(v, 50 / 25_000, relative=True)],
    "eight": lambda v: [edits.Add(v, 1 / 8)] * 8,
    "restricted": lambda v: [edits.only(edits.Add(v, 1 / 8), rows=0)] * 8,
}


@pytest.mark.parametrize("d", [640, 1152])
@pytest.mark.parametrize("steps", STEPS)
def test_what_arrives_in_bfloat16(steps, d):
    """Of a step of norm 50 on a Gaussian residual of norm 25,000, as much as one rounding leaves: about 80 %.

    Its larger entries have neighbours further away than the step goes. In eight edits no less arrives than in one,
    since they are cast once. On a residual with one massive feature all of it arrives.
    """
    arrived = share(d, STEPS[steps](step(d)))
    print(f"d = {d}, {steps}: {arrived.mean():.3f} of the step arrives, {expected_share(d):.3f} expected")
    error = arrived.std() / arrived.size**0.5
    assert abs(arrived.mean() - expected_share(d)) < 4 * error < 0.02
    assert 0.75 < arrived.mean() < 0.85
    assert share(d, STEPS[steps](step(d)), massive=True).mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("d", [640, 1152])
def test_rounding_after_each_edit_would_lose_the_step(d):
    """The control: of eight small steps, each rounded to bfloat16, little arrives."""
    rounded = share(d, [Narrow(each) for each in STEPS["eight"](step(d))]).mean()
    print(f"d = {d}, each of eight rounded: {rounded:.3f} of the step arrives")
    assert rounded < 0.2


@pytest.mark.parametrize("edit", [case for case in CASES if case != "Mean"])
def test_low_precision_is_rounded_once(edit):
    """Alone too, each edit of a bfloat16 value is its float32 self, cast."""
    name = "blocks.1.hook_out"
    value, edit = jnp.asarray(values()[name], jnp.bfloat16), CASES[edit][0](name)
    once = edit(value.astype(jnp.float32), hook_at(name)).astype(jnp.bfloat16)
    for ours in (edit(value, hook_at(name)), apply_edits([edit], value, hook_at(name))):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, once)
