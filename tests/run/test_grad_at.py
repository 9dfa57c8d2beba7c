"""`grad_at`: gradients of any metric, of logits and of activations, at edited values and at copies for each head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import UnknownSite, edits, forward
from gemma3_jax.run.gradients import grad_at
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import (
    COPIES,
    TOKENS,
    assert_same,
    same,
    small,
)
from tests.run.metrics import (
    ATTN_OUT,
    MID,
    MLP_OUT,
    OWN_INPUT,
    PATTERN,
    POST,
    PRE,
    ROT_K,
    WEIGHTS,
    K,
    along,
    along_post,
    difference_of_logits,
    gradients,
    plain,
)


def from_layer(start: int, metric, stream, **options):
    """The gradient of `metric(logits, cache)` at the residual stream that enters that layer, by `jax.grad` alone."""
    config, params = small(1)

    def value(stream, params):
        return metric(*forward(config, params, inputs_embeds=stream, start_at_layer=start, **options))

    return jax.jit(jax.grad(value))(stream, params)


def test_a_metric_of_activations():
    """`metric_sites` hands activations to the metric; the gradient there is the metric's own, before it the chain's."""
    names = (PRE, ATTN_OUT, MID, "blocks.0.ln2.hook_in", "unembed.hook_in")
    value, cache = gradients(names, lambda logits, cache: along(cache[MID]), metric_sites=MID)
    assert_same(value, along(cache[MID]), 1e-6)
    own = jax.grad(along)(cache[MID])
    assert_same(cache.grads[MID], own)
    assert_same(cache.grads[ATTN_OUT], own)
    assert not np.any(cache.grads["blocks.0.ln2.hook_in"])
    assert not np.any(cache.grads["unembed.hook_in"])
    assert_same(cache.grads[PRE], from_layer(0, lambda _, cache: along(cache[MID]), cache[PRE], capture=MID))
    assert not same(cache.grads[PRE], own)  # control: attention reads the stream too


def test_a_metric_of_logits_and_activations():
    """The metric may read both, and several sites, in a cache that holds those and no others; gradients add."""

    def both(logits, cache):
        assert list(cache) == [MID, POST]
        return difference_of_logits(logits) - 2 * along(cache[POST]) + jnp.sum(cache[MID])

    _, cache = gradients((PRE, ATTN_OUT, POST), both, metric_sites=(POST, MID))
    expected = plain()[1].grads[POST] - 2 * along_post()[1].grads[POST]
    assert_same(cache.grads[POST], expected)
    assert not same(plain()[1].grads[POST], expected)  # control


def test_stop_at_layer():
    """The metric is given the residual stream where the run stops; the sites behind it are not there."""
    expected_value, expected = along_post()
    value, cache = gradients("**.hook_resid*", along, stop_at_layer=1)
    assert list(cache) == [PRE, MID, POST]
    assert_same(value, expected_value, 1e-6)
    assert_same(cache.grads[PRE], expected.grads[PRE])
    assert_same(cache.grads[POST], expected.grads[POST])
    assert not same(plain()[1].grads[PRE], expected.grads[PRE])  # control
    with pytest.raises(ValueError, match="never runs"):
        gradients("unembed.hook_in", along, stop_at_layer=1)


def test_the_gradient_is_at_the_edited_value():
    """A shift comes after the edits of its site; what lies before has the edits in its chain."""
    _, cache = gradients((MLP_OUT, POST), edits={POST: [edits.Scale(3.0), edits.Add(WEIGHTS)]})
    _, unedited = plain()
    assert_same(cache[POST], 3 * unedited[POST] + WEIGHTS)
    expected = from_layer(1, lambda logits, _: difference_of_logits(logits), cache[POST])
    assert_same(cache.grads[POST], expected)
    assert_same(cache.grads[MLP_OUT], 3 * expected)
    assert not same(unedited.grads[POST], expected)  # control


def test_asking_for_the_copies_changes_nothing_else():
    """The gradient at the copies needs heads of their own for q, k and v; neither metric nor edits nor other sites see
    them: each value, shape and gradient is what it is without asking."""
    d, g = SMALL["hidden_size"], SMALL["num_key_value_heads"]
    names = [f"blocks.0.attn.{n}" for n in ("q.hook_in", "k.hook_in", "k_norm.hook_scale", "v.hook_out")] + [K, ROT_K]

    def metric(logits, cache):
        assert cache[K].shape == (2, 9, g, SMALL["head_dim"])
        # Head 1 of two, and not of eight.
        keys, inputs = cache[K][:, :, 1], cache["blocks.0.attn.q.hook_in"][..., 3]
        return jnp.sum(jnp.sin(keys)) + jnp.sum(inputs**2) + difference_of_logits(logits)

    def halve(value, hook):
        assert value.shape == (2, 9, d)
        return value.at[:, 4].multiply(0.5)

    options = {
        "metric_sites": names,
        "edits": {K: edits.only(edits.Scale(-2.0), heads=1), "blocks.0.attn.v.hook_in": halve},
    }
    value, alone = gradients(names, metric, **options)
    value_again, together = gradients([*names, *(f"blocks.0.{name}" for name in COPIES)], metric, **options)
    assert_same(value_again, value)
    for name in names:
        assert_same(together[name], alone[name], 1e-6)
        assert_same(together.grads[name], alone.grads[name])
    # What the query heads' own inputs move is, over a group, what the inputs that it shares do.
    by_head = together.grads[OWN_INPUT] - together.grads["blocks.0.hook_q_input"]
    shared = together.grads["blocks.0.hook_k_input"] + together.grads["blocks.0.hook_v_input"]
    assert_same(by_head.reshape(2, 9, g, -1, d).sum(axis=3), shared)
    assert not same(by_head[:, :, ::4], shared)  # control: one head's part of it
    assert all(np.any(by_head[:, :, head]) for head in range(by_head.shape[2]))


def test_edited_copies():
    """Where one's own edit gives each query head its keys, the gradient is at those: eight, as `forward` captures."""
    changes = {OWN_INPUT: edits.only(edits.Add(WEIGHTS), heads=jnp.asarray([1, 6]))}
    _, cache = gradients((OWN_INPUT, K), edits=changes)
    assert cache[K].shape == cache.grads[K].shape == (2, 9, SMALL["num_attention_heads"], SMALL["head_dim"])
    assert not same(cache[K][:, :, 0], cache[K][:, :, 1])

    @jax.jit
    @jax.grad
    def at(keys):
        return difference_of_logits(forward(*small(1), TOKENS, (), {**changes, K: lambda value, hook: keys})[0])

    assert_same(cache.grads[K], at(cache[K]))
    assert not same(cache.grads[K][:, :, 0], cache.grads[K][:, :, 1])  # control: within one group


def nothing(value, hook):
    return value


def test_vmap():
    """Vmapped over the rows of a batch under jit, each row has its own gradients."""
    config, params = small(1)
    names = (PRE, OWN_INPUT, PATTERN)
    value, expected = plain()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def by_row(params, row):
        return grad_at(config, params, row[None], names, difference_of_logits)

    values, rows = by_row(params, TOKENS)
    assert_same(values.mean(), value)
    for name in names:
        assert_same(rows[name][:, 0], expected[name])
        assert_same(rows.grads[name][:, 0] / 2, expected.grads[name])  # the batch's metric is the rows' mean
    assert not same(expected.grads[PRE][0], expected.grads[PRE][1])  # control


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"names": "embed.hook_in"}, ValueError, "token ids do not have one"),
        ({"names": ()}, ValueError, "does not match a site"),
        ({"names": "blocks.0.hook_resid_per"}, UnknownSite, "nearest names are blocks.0.hook_resid_pre"),
        ({"metric": lambda logits: logits[0, 0]}, ValueError, r"float32 of shape \(101,\)"),
        ({"metric": lambda logits: jnp.argmax(logits)}, ValueError, "int32"),
        ({"metric": None, "stop_at_layer": 1}, ValueError, "'loss' needs"),
        ({"metric": None, "logits_at": -1}, ValueError, "'loss' needs"),
        ({"edits": {POST: nothing, "blocks.0.hook_resid_post": nothing}}, ValueError, "two keys of edits"),
    ],
)
def test_what_has_no_gradient_is_refused(change, error, message):
    """Each by one message that names it; a loss over anything but all logits is none."""
    with pytest.raises(error, match=message):
        gradients(**{"names": PRE, **change})
