"""`run_with_cache(incl_bwd=True)`: gradients beside the values, of any loss, sliced as the values are."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import HookedGemma3, next_token_loss
from tests.helpers.programs import programs
from tests.helpers.small_model import (
    LEFT_PADDED,
    SITES,
    TOKENS,
    assert_same,
    same,
    small,
)
from tests.run.metrics import PATTERN, PRE, ROT_K, Z, along, gradients, plain


@functools.cache
def hooked() -> HookedGemma3:
    return HookedGemma3(*small(1))


@functools.cache
def backward():
    """(loss, cache) of every site."""
    return hooked().run_with_cache(TOKENS, incl_bwd=True, attention_mask=LEFT_PADDED)


def test_run_with_cache_keeps_gradients():
    """Of the loss of the real tokens, at every site but the token ids; found under every name, with `_grad`."""
    loss, cache = backward()
    assert (
        list(cache.grads)
        == list(cache)
        == [name for name in SITES if not name.startswith(("blocks.1", "embed.hook_in"))]
    )
    assert all(cache.grads[name].shape == cache[name].shape for name in cache)
    value, expected = gradients(
        (PRE, ROT_K, Z), lambda logits: next_token_loss(logits, TOKENS, LEFT_PADDED), attention_mask=LEFT_PADDED
    )
    assert_same(loss, value, 1e-6)
    for name in expected:
        assert_same(cache[name], expected[name])
        assert_same(cache.grads[name], expected.grads[name])
        assert cache[f"{name}_grad"] is cache.grads[name]
    for name in ("blocks.0.hook_resid_pre_grad", "model.layers.0.input_grad", ("resid_pre_grad", 0)):
        np.testing.assert_array_equal(cache[name], cache.grads[PRE])
    assert cache["model.layers.0.self_attn.o_proj.input_grad"].shape == (2, 9, 80)
    assert cache.params is hooked().params
    assert not same(cache.grads[PRE], plain()[1].grads[PRE])  # control


def test_logits_at():
    """One's own loss of the logits at some positions, counted in each row; the gradients are those of the whole run."""

    def whole(logits):
        return logits[0, 3, 5] + 2 * logits[1, 0, 5] - logits[:, -1, 7].sum()

    def chosen(logits):
        return logits[0, 0, 5] + 2 * logits[1, 0, 5] - logits[:, 1, 7].sum()

    names = (PRE, "ln_final.hook_out", "unembed.hook_in", "unembed.hook_out")
    options = {"attention_mask": LEFT_PADDED}  # row 0 begins with three tokens of padding
    expected_value, expected = gradients(names, whole, **options)
    value, cache = hooked().run_with_cache(
        TOKENS, names, incl_bwd=True, loss_fn=chosen, logits_at=jnp.asarray([0, -1]), **options
    )
    assert_same(value, expected_value)
    for name in names[:2]:
        assert_same(cache.grads[name], expected.grads[name])
    for name in names[2:]:
        rows = np.asarray(expected.grads[name])
        assert_same(cache.grads[name], np.stack([rows[0, [3, 8]], rows[1, [0, 8]]]))
        assert not same(cache.grads[name], rows[:, [0, 8]])  # control


def test_slices_of_gradients():
    """`pos_slice` and `remove_batch_dim` cut the gradients as they cut the values, after the backward pass."""
    run = functools.partial(hooked().run_with_cache, names_filter=(PRE, PATTERN), incl_bwd=True)
    _, whole = backward()
    _, cache = run(TOKENS, attention_mask=LEFT_PADDED, pos_slice=-2)
    for name, index in ((PRE, np.s_[:, 7:8]), (PATTERN, np.s_[:, :, 7:8])):
        assert_same(cache[name], whole[name][index])
        assert_same(cache.grads[name], whole.grads[name][index])
    assert not same(cache.grads[PRE], whole.grads[PRE][:, 6:7])  # control
    _, cache = run(TOKENS[1:], pos_slice=slice(2, 5), remove_batch_dim=True)
    for name, index in ((PRE, np.s_[1, 2:5]), (PATTERN, np.s_[1, :, 2:5])):
        assert_same(cache[name], whole[name][index])
        # The loss is a mean: row 1 has 8 of the 13 pairs of real neighbours.
        assert_same(cache.grads[name], whole.grads[name][index] * 13 / 8)


def test_nothing_recompiles_because_a_value_changed():
    """New tokens, masks, parameters and leaves of the loss are traced; another function is another program."""

    def read(index, weight, stream):
        return weight * jnp.take(stream[:, -1], index, axis=1).sum()

    def run(loss_fn, model=None, tokens=TOKENS, mask=LEFT_PADDED):
        _, cache = (model or hooked()).run_with_cache(
            tokens, PRE, incl_bwd=True, loss_fn=loss_fn, stop_at_layer=1, attention_mask=mask
        )
        return cache.grads[PRE]

    first = run(Partial(read, 5, 1.0))
    before = programs()
    assert_same(run(Partial(read, 5, -2.0)), -2 * first)
    assert not same(run(Partial(read, 7, 1.0)), first)
    assert not same(run(Partial(read, 5, 1.0), tokens=TOKENS + 1), first)
    assert not same(run(Partial(read, 5, 1.0), mask=LEFT_PADDED[:, ::-1]), first)
    config, params = small(1)
    other = HookedGemma3(config, {**params, "embed": {"weight": params["embed"]["weight"][::-1]}})
    assert not same(run(Partial(read, 5, 1.0), other), first)
    assert programs() == before
    with pytest.raises(ZeroDivisionError):
        run(lambda stream: 1 / 0)
    assert same(run(lambda stream: read(5, 1.0, stream)), first)
    assert programs() == before + 1  # control: the index is a constant of this one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"return_type": "loss"}, "the value of loss_fn"),
        ({"return_type": None}, "the value of loss_fn"),
        ({"incl_bwd": False, "loss_fn": along}, "loss_fn needs incl_bwd=True"),
        ({"names_filter": "embed.hook_in"}, "token ids do not have one"),
        ({"loss_fn": lambda logits: logits[0, 0]}, r"float32 of shape \(101,\)"),
        ({"stop_at_layer": 1}, "'loss' needs"),
        ({"remove_batch_dim": True}, "batch of 1"),
    ],
)
def test_run_with_cache_refuses(change, message):
    """Arguments that cannot be combined with gradients raise one clear error."""
    with pytest.raises(ValueError, match=message):
        hooked().run_with_cache(TOKENS, **{"names_filter": PRE, "incl_bwd": True, **change})
