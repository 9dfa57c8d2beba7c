"""Decompositions of the residual stream: every sum holds to float32 rounding, on every kind of small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_checkpoint
from gemma3_jax import TINY, ActivationCache, edits, forward
from gemma3_jax.cache.residual import HEADS, RESIDUAL
from tests.cache.captured import LOGITS, STREAMS, VARIANTS, D, F, H, absolute, captured, of_token, roundings, within
from tests.helpers.small_model import LAYERS, TOKENS, assert_same, same


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_sums_to_the_stream(variant, expand_neurons):
    """Heads, neurons or MLPs, embedding and biases add up to the stream that enters any layer, its MLP or the head."""
    cache = captured(variant)
    for layer, mlp_input, stream in STREAMS:
        stack, labels = cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons, return_labels=True)
        terms = absolute(variant).get_full_resid_decomposition(layer, mlp_input, expand_neurons)
        assert len(labels) == len(set(labels)) == len(stack)
        # in NumPy, where additions are not compiled
        stack, terms = np.asarray(stack), np.asarray(terms).sum(0)
        assert within(stack.sum(0), cache[stream], terms, roundings(len(stack)))
        for component in stack:  # control: none of them is a rounding error
            assert not within(stack.sum(0) - component, cache[stream], terms, roundings(len(stack)))


@pytest.mark.parametrize("variant", ["bias", "padded"])
def test_sublayers_sum_to_the_stream(variant):
    """Embedding, attention and MLP outputs add up, and attention alone with MLPs alone are all of them."""
    cache = captured(variant)
    for layer, mlp_input, stream in STREAMS:
        stack, labels = cache.decompose_resid(layer, mlp_input, return_labels=True)
        stack = np.asarray(stack)
        terms = np.abs(stack).sum(0)
        assert within(stack.sum(0), cache[stream], terms, 2 * len(stack))
        assert not within(stack[:-1].sum(0), cache[stream], terms, 2 * len(stack))  # control
    stack, labels = cache.decompose_resid(1, True, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out"]
    attn, mlp = (cache.decompose_resid(1, True, mode, incl_embeds=False) for mode in ("attn", "mlp"))
    np.testing.assert_array_equal(attn, np.asarray(stack)[[1, 3]])
    np.testing.assert_array_equal(mlp, np.asarray(stack)[[2]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_attributions_sum_to_the_logit(variant):
    """Over a full decomposition, at every token and position, before softcapping."""
    cache = captured(variant)
    stack = cache.get_full_resid_decomposition()
    attrs = cache.logit_attrs(stack, TOKENS)
    terms = absolute(variant).logit_attrs(absolute(variant).get_full_resid_decomposition(), TOKENS).sum(0)
    # on top, on both sides: the product over d, and the norm
    more = roundings(len(stack)) + 2 * (D + 3)
    logits = of_token(cache[LOGITS])
    assert attrs.shape == (len(stack), *TOKENS.shape)
    assert within(attrs.sum(0), logits, terms, more)
    if variant == "softcap":  # control
        assert not within(attrs.sum(0), 3.0 * jnp.tanh(logits / 3.0), terms, more)
    # control: without the weight of the final norm
    bare = cache.with_params({**cache.params, "ln_final": {"weight": jnp.ones(D)}})
    assert not within(bare.logit_attrs(stack, TOKENS).sum(0), logits, terms, more)


@pytest.mark.parametrize("variant", ["grouped", "bias"])
def test_heads_and_neurons_go_through_their_post_norm(variant):
    """The heads of a layer, with its bias, sum to what it adds to the stream, and its neurons to what its MLP adds.

    Without the gain, which is what other libraries do, they do not.
    """
    cache = captured(variant)
    stack, labels = cache.get_full_resid_decomposition(return_labels=True)
    terms = absolute(variant).get_full_resid_decomposition()
    raw = cache.compute_head_results()
    for layer in range(LAYERS):
        for name, start in (("attn", f"L{layer}H"), ("mlp", f"L{layer}N")):
            mine = jnp.asarray([label.startswith((start, f"{layer}_{name}_bias")) for label in labels])
            assert int(mine.sum()) == (H + (variant == "bias") if name == "attn" else F)
            out = cache[f"{name}_out", layer]
            assert within(stack[mine].sum(0), out, terms[mine].sum(0), roundings(len(labels)))
            without = raw["result", layer].sum(-2) if name == "attn" else post_times_w_out(cache, layer)
            assert not same(without, out, 0.1)  # control


def post_times_w_out(cache, layer):
    return cache["post", layer] @ cache.params[f"blocks_{layer}"]["mlp"]["out"]["weight"]


def test_head_results_are_those_of_the_site():
    """compute_head_results gives hook_result as a capture would, changes nothing else, and leaves a captured one."""
    cache = captured("bias")
    filled = cache.compute_head_results()
    site = "blocks.1.attn.hook_result"
    seen = jax.jit(lambda params: forward(cache.config, params, TOKENS, site)[1])(cache.params)
    assert_same(filled[site], seen[site])
    assert not same(filled[site], seen[site][..., ::-1, :])  # control
    assert set(filled) - set(cache) == {f"blocks.{i}.attn.hook_result" for i in range(LAYERS)}
    assert_same(filled.stack_head_results(), cache.stack_head_results())
    other = ActivationCache(cache.config, {**cache, site: seen[site] * 2}, cache.params)
    np.testing.assert_array_equal(other.compute_head_results()[site], seen[site] * 2)


def test_an_edited_result_is_what_the_stream_gets():
    """With the results of a layer captured, the heads are what they were after an edit, and the sum still holds."""
    cache = captured("bias")
    site = "blocks.0.attn.hook_result"
    scaled, names = {site: edits.Scale(jnp.arange(8.0)[:, None])}, (*RESIDUAL, *HEADS, site)
    edited = jax.jit(lambda params: forward(cache.config, params, TOKENS, names, scaled)[1])(cache.params)
    stack = edited.with_params(cache.params).get_full_resid_decomposition(expand_neurons=False)
    assert_same(stack.sum(0), edited["ln_final.hook_in"])
    values = {name: value for name, value in edited.items() if name != site}
    blind = ActivationCache(cache.config, values, cache.params)
    assert not same(blind.get_full_resid_decomposition(expand_neurons=False).sum(0), edited["ln_final.hook_in"])


def test_remainders_complete_the_sum():
    """With the remainder any stack sums to the stream: heads, neurons, some neurons, sublayers, and none of them."""
    cache = captured("bias")
    for layer, stream in ((0, "blocks.0.hook_in"), (1, "blocks.1.hook_in"), (-1, "ln_final.hook_in")):
        for stack, labels in (
            cache.stack_head_results(layer, return_labels=True, incl_remainder=True),
            cache.stack_neuron_results(layer, return_labels=True, incl_remainder=True),
            cache.stack_neuron_results(layer, None, [7, 3], return_labels=True, incl_remainder=True),
            cache.decompose_resid(layer, mode="mlp", return_labels=True, incl_remainder=True),
        ):
            assert labels[-1] == "remainder"
            # the sum twice over, in whatever order
            assert within(stack.sum(0), cache[stream], jnp.abs(stack).sum(0), 2 * len(stack) + 1)
            assert not within(stack[:-1].sum(0), cache[stream], jnp.abs(stack).sum(0), 2 * len(stack) + 1) or layer == 0


def test_bfloat16_leaves_a_remainder_of_its_rounding():
    """On a bfloat16 model the parts are computed in float32, and what the stream was rounded by is the remainder."""
    config, params = convert_checkpoint(TINY)
    tokens = jnp.asarray([[2, 10, 20, 30, 40, 10, 20]])
    cache = jax.jit(lambda params: forward(config, params, tokens, RESIDUAL + HEADS)[1])(params).with_params(params)
    stack = cache.get_full_resid_decomposition(expand_neurons=False, incl_remainder=True)
    stream = cache["ln_final.hook_in"].astype(jnp.float32)
    assert cache["ln_final.hook_in"].dtype == jnp.bfloat16
    assert stack.dtype == jnp.float32
    assert within(stack.sum(0), stream, jnp.abs(stack).sum(0), 2 * len(stack))
    positive = jax.tree.map(jnp.abs, cache).with_params(jax.tree.map(jnp.abs, params))
    terms = positive.get_full_resid_decomposition(expand_neurons=False).sum(0)
    # of a sublayer's output, of its norm's and of the stream, each by up to 2^-9 of their terms, in 2 L sublayers
    largest = (2 + 2 * config.num_hidden_layers) * 2.0**-9 * terms
    assert bool(jnp.all(jnp.abs(stack[-1]) <= largest))
    assert float(jnp.abs(stack[-1]).max()) > 2.0**-12 * float(jnp.abs(stream).max())
    raw = cache.compute_head_results()  # control: heads without the gain leave more than rounding
    without = [raw["result", i].sum(-2) for i in range(config.num_hidden_layers)]
    through = cache.decompose_resid(mode="attn", incl_embeds=False).sum(0)
    assert bool(jnp.any(jnp.abs(sum(without) - through) > largest))
