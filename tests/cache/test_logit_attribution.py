"""Norms applied to parts of the residual stream, and what each part adds to a logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.captured import LOGITS, D, E, F, H, captured, of_token
from tests.helpers.small_model import LAYERS, TOKENS, assert_same, same


@pytest.mark.parametrize(
    ("layer", "mlp_input", "normed"),
    [(1, False, "blocks.1.ln1.hook_out"), (1, True, "blocks.1.ln2.hook_out"), (None, False, "ln_final.hook_out")],
)
def test_apply_ln_sums_to_the_norms_output(layer, mlp_input, normed):
    """By the cached scale and the weight of the norm that reads the stream, in every method that has apply_ln."""
    cache = captured("bias")
    options = {"apply_ln": True, "return_labels": True}
    for stack, _ in (
        cache.decompose_resid(layer, mlp_input, **options),
        cache.get_full_resid_decomposition(layer, mlp_input, **options),
    ):
        assert_same(stack.sum(0), cache[normed])
    if not mlp_input:
        for stack, _ in (
            cache.stack_head_results(layer, incl_remainder=True, **options),
            cache.stack_neuron_results(layer, incl_remainder=True, **options),
        ):
            assert_same(stack.sum(0), cache[normed])
    plain = cache.decompose_resid(layer, mlp_input)
    np.testing.assert_array_equal(
        cache.apply_ln_to_stack(plain, layer, mlp_input), cache.decompose_resid(layer, mlp_input, apply_ln=True)
    )
    other = cache.apply_ln_to_stack(plain, 0, mlp_input=not mlp_input)  # control: another norm
    assert not same(other.sum(0), cache[normed])


def test_accumulated_streams():
    """Every stream in order, with TransformerLens' labels; the last is normed as the layer's own norm does it."""
    cache = captured()
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    names = ["blocks.0.hook_in", "blocks.0.hook_resid_mid", "blocks.1.hook_in", "blocks.1.hook_resid_mid"]
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    np.testing.assert_array_equal(stack, jnp.stack([cache[name] for name in [*names, "blocks.1.hook_out"]]))
    labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1]
    assert labels == ["0_pre", "1_pre", "1_mid"]
    assert cache.accumulated_resid(0, return_labels=True)[1] == ["0_pre"]
    lens = cache.accumulated_resid(apply_ln=True)
    assert_same(lens[-1], cache["ln_final.hook_out"])
    weight = cache.params["ln_final"]["weight"]
    root_mean_square = jnp.sqrt(jnp.mean(cache["resid_pre", 1] ** 2, -1, keepdims=True) + 1e-6)
    assert_same(lens[1], cache["resid_pre", 1] / root_mean_square * weight)
    frozen = cache.apply_ln_to_stack(cache.accumulated_resid())
    assert_same(frozen[-1], lens[-1])
    assert not same(frozen[1], lens[1])  # control: the cached scale is that of the last stream
    by_layer = cache.accumulated_resid(1, apply_ln=True)
    assert_same(by_layer[1], cache["blocks.1.ln1.hook_out"])
    assert_same(
        by_layer[0], cache["resid_pre", 0] / cache["scale", 1, "ln1"] * cache.params["blocks_1"]["ln1"]["weight"]
    )


@pytest.mark.parametrize("variant", ["grouped", "untied"])
def test_tokens_of_an_attribution(variant):
    """One id, one for each row, one for each position; differences to other ids; the same at chosen positions."""
    cache = captured(variant)
    stack = cache.decompose_resid()
    # [b, p, V]
    logits = cache[LOGITS]
    assert_same(cache.logit_attrs(stack, 5).sum(0), logits[..., 5])
    rows = cache.logit_attrs(stack, [5, 70]).sum(0)
    assert_same(rows, jnp.stack([logits[0, :, 5], logits[1, :, 70]]))
    assert not same(rows, jnp.stack([logits[0, :, 70], logits[1, :, 5]]))  # control
    assert_same(cache.logit_attrs(stack, TOKENS).sum(0), of_token(logits))
    assert_same(cache.logit_attrs(stack, TOKENS[:1]).sum(0)[0], of_token(logits)[0])
    difference = cache.logit_attrs(stack, TOKENS, incorrect_tokens=5)
    assert_same(difference.sum(0), of_token(logits) - logits[..., 5])
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), [5, 70], pos_slice=-1)
    assert_same(last, cache.logit_attrs(stack, [5, 70])[..., -1])
    some = slice(2, 6)
    middle = cache.logit_attrs(cache.decompose_resid(pos_slice=some), TOKENS[:, some], pos_slice=some)
    assert_same(middle, cache.logit_attrs(stack, TOKENS)[..., some])


def test_attributions_that_would_be_wrong_are_errors():
    """Positions that do not belong to the stack, tokens of another shape or outside the vocabulary, and texts."""
    cache = captured()
    stack = cache.decompose_resid()
    for call, message in (
        (lambda: cache.logit_attrs(stack[:, :, :3], 5), "pass the pos_slice"),
        (lambda: cache.logit_attrs(stack[..., -1, :], 5), "pass the pos_slice"),
        (lambda: cache.logit_attrs(stack, 5, pos_slice=-1), "pass the pos_slice"),
        (lambda: cache.apply_ln_to_stack(stack[:, :1]), "pass the pos_slice"),
        (lambda: cache.logit_attrs(stack, TOKENS[0]), r"shape \(9,\)"),
        (lambda: cache.logit_attrs(stack, TOKENS[:, :3]), r"shape \(2, 3\)"),
        (lambda: cache.logit_attrs(stack, 101), "vocabulary of 101"),
        (lambda: cache.logit_attrs(stack, 5, -1), "vocabulary of 101"),
        (lambda: cache.logit_attrs(stack, "ba"), "to_single_token"),
        (lambda: cache.logit_attrs(stack, 0.5), "to_single_token"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    unknown = jax.jit(lambda tokens: cache.logit_attrs(stack, tokens))(jnp.asarray(101))
    assert bool(jnp.isnan(unknown).all())


def test_neuron_attributions_without_the_stack():
    """Equal to the attributions of the stacked neurons, with fewer neurons and positions too."""
    cache = captured("untied")
    for options in ({}, {"layer": 1}, {"neuron_slice": slice(3, 9)}, {"neuron_slice": 4, "pos_slice": -1}):
        stack, labels = cache.stack_neuron_results(**{"layer": -1, **options}, return_labels=True)
        pos_slice = options.get("pos_slice")
        expected = cache.logit_attrs(stack, [5, 70], 6, pos_slice)
        ours, our_labels = cache.neuron_logit_attrs([5, 70], 6, **options, return_labels=True)
        assert our_labels == labels
        assert_same(ours, expected)
        assert not same(cache.neuron_logit_attrs([70, 5], 6, **options), expected)  # control


def largest_array(function) -> int:
    """The number of elements of the largest array that a function forms, arguments and constants aside."""
    return max(v.aval.size for equation in jax.make_jaxpr(function)().eqns for v in equation.outvars)


def test_big_stacks_are_only_formed_when_asked_for():
    """Neurons' attributions form nothing of size b p f d, and slices are taken before products."""
    cache = captured()
    b, p = TOKENS.shape
    assert largest_array(lambda: cache.neuron_logit_attrs(5)) <= max(F * D, LAYERS * F * b * p)
    assert largest_array(lambda: cache.get_neuron_results(0, [1, 2])) <= max(F * D, 2 * b * p * D)
    assert largest_array(lambda: cache.get_neuron_results(0, pos_slice=-1)) <= b * F * D
    assert largest_array(lambda: cache.stack_head_results(pos_slice=-1)) <= max(b * p * H * E, H * E * D)
    assert largest_array(lambda: cache.get_neuron_results(0)) == b * p * F * D  # control
