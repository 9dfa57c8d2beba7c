"""Decompositions of the residual stream: every sum holds to float32 rounding, on every kind of small model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SMALL, hf_model
from small_model import KINDS, LAYERS, LEFT_PADDED, TOKENS, assert_same, same, small

from conversion import convert_checkpoint, convert_state_dict
from gemma3_jax import TINY, ActivationCache, Gemma3Config, edits, forward
from gemma3_jax.decomposition import HEADS, NEURONS, RESIDUAL

ROUNDING = 2.0**-24  # of one float32 operation, relative
KINDS_OF_MODEL = {
    "grouped": {},
    "bias": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "softcap": {"final_logit_softcapping": 3.0},
}
VARIANTS = [*KINDS_OF_MODEL, "padded"]
LOGITS = "unembed.hook_out"
H, E, D, F = (SMALL[key] for key in ("num_attention_heads", "head_dim", "hidden_size", "intermediate_size"))
# (layer, mlp_input, the site that holds that stream)
STREAMS = [
    (0, False, "blocks.0.hook_in"),
    (0, True, "blocks.0.hook_resid_mid"),
    (1, False, "blocks.1.hook_in"),
    (1, True, "blocks.1.hook_resid_mid"),
    (None, False, f"blocks.{LAYERS - 1}.hook_out"),
]


@functools.cache
def captured(variant: str = "grouped") -> ActivationCache:
    """Everything that a decomposition may need, of a model with every parameter random."""
    model = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], **KINDS_OF_MODEL.get(variant, {}))
    config = Gemma3Config.from_hf(model.config)
    params = convert_state_dict(model.state_dict(), config)
    names = (*RESIDUAL, *HEADS, *NEURONS, "blocks.*.hook_out", LOGITS, "blocks.*.ln1.hook_out", "blocks.*.ln2.hook_out")
    mask = LEFT_PADDED if variant == "padded" else None
    capture = (*names, "ln_final.hook_out")
    cache = jax.jit(lambda params: forward(config, params, TOKENS, capture, attention_mask=mask)[1])(params)
    return cache.with_params(params)


def compiled(cache: ActivationCache, method: str, **arguments):
    """What a method returns, compiled as one: faster than operation by operation when shapes are new."""
    return jax.jit(lambda cache, params: getattr(cache.with_params(params), method)(**arguments))(cache, cache.params)


@functools.cache
def absolute(variant: str) -> ActivationCache:
    """The cache whose decompositions are the sums of the absolute values of all terms: what rounding grows with."""
    cache = captured(variant)
    return jax.tree.map(jnp.abs, cache).with_params(jax.tree.map(jnp.abs, cache.params))


def within(ours: jax.Array, theirs: jax.Array, terms: jax.Array, roundings: int) -> bool:
    """Whether two ways of adding the same terms agree as far as so many roundings in a row allow, everywhere.

    The standard bound: a term that goes through K operations is off by at most K * 2^-24 of its size, and so is the
    sum by K * 2^-24 times `terms`, the sum of absolute values.
    """
    return bool(np.all(np.abs(np.asarray(ours) - np.asarray(theirs)) <= roundings * ROUNDING * np.asarray(terms)))


def roundings(n: int) -> int:
    """Of one term in the stream: n additions of components and e of a head's here; in the model the largest of its
    products, which is over h * e or f terms, and the 2 L additions of sublayers; and the norm's division and product in
    both, with one for forming the gain."""
    return n + E + max(H * E, F) + 2 * LAYERS + 5


def of_token(logits: jax.Array) -> jax.Array:
    # [b, p, V] at TOKENS [b, p] -> [b, p]
    return jnp.take_along_axis(logits, TOKENS[..., None], -1)[..., 0]


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("expand_neurons", [True, False])
def test_the_full_decomposition_sums_to_the_stream(variant, expand_neurons):
    """Heads, neurons or MLPs, embedding and biases add up to the stream that enters any layer, its MLP or the head."""
    cache = captured(variant)
    for layer, mlp_input, stream in STREAMS:
        stack, labels = cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons, return_labels=True)
        terms = absolute(variant).get_full_resid_decomposition(layer, mlp_input, expand_neurons)
        assert len(labels) == len(set(labels)) == len(stack)
        # in numpy, where additions compile nothing
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


# --- norms and logits -------------------------------------------------------------------------------------------------


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


# --- slices, batch axis, transformations ------------------------------------------------------------------------------

INDEX = st.one_of(
    st.integers(-9, 8), st.slices(9).filter(lambda s: len(range(9)[s])), st.lists(st.integers(-9, 8), min_size=1)
)


@settings(max_examples=8, deadline=None)
@given(positions=INDEX, neurons=INDEX)
def test_slices_are_those_of_the_whole(positions, neurons):
    """Any positions, of any method, are those positions of the whole result; and any neurons, by numpy's rules."""
    cache, chosen = captured(), positions if isinstance(positions, (int, slice)) else np.asarray(positions)
    for method, arguments in (("decompose_resid", {"apply_ln": True}), ("stack_head_results", {})):
        whole = np.asarray(compiled(cache, method, **arguments))
        assert_same(compiled(cache, method, **arguments, pos_slice=positions), whole[:, :, chosen])
    some = neurons if isinstance(neurons, (int, slice)) else np.asarray(neurons)
    # [b, p, n, d]
    whole = np.asarray(compiled(cache, "get_neuron_results", layer=-1))[..., :9, :][..., some, :][:, chosen]
    arguments = {"neuron_slice": np.arange(9)[some], "pos_slice": positions}
    assert_same(compiled(cache, "get_neuron_results", layer=-1, **arguments), whole)


def test_without_a_batch_axis_and_sliced():
    """A row of its own, with and without its axis, decomposes as it does in the batch."""
    cache = captured("bias")
    row = cache.sliced(batch=1)
    alone = row.remove_batch_dim()
    late = alone.sliced(positions=slice(4, None))
    assert late.params is cache.params
    for name, arguments in (
        ("get_full_resid_decomposition", {"expand_neurons": False, "incl_remainder": True, "apply_ln": True}),
        ("accumulated_resid", {"apply_ln": True}),
        ("stack_neuron_results", {"layer": 1, "neuron_slice": 3}),
        ("get_neuron_results", {"layer": 1}),
        ("neuron_logit_attrs", {"tokens": 7}),
    ):
        results = (compiled(c, name, **arguments) for c in (cache, row, alone, late))
        whole, one, flat, few = (np.asarray(result) for result in results)
        axis = 0 if name == "get_neuron_results" else 1
        assert_same(one, whole.take([1], axis))
        assert_same(flat, whole.take(1, axis))
        assert_same(few, flat.take(range(4, 9), axis))
    stack = alone.decompose_resid()
    expected = cache.logit_attrs(cache.decompose_resid(), TOKENS)[:, 1]
    assert_same(alone.logit_attrs(stack, TOKENS[1]), expected)
    assert not same(alone.logit_attrs(stack, TOKENS[0]), expected)  # control
    assert_same(
        alone.logit_attrs(alone.decompose_resid(pos_slice=-1), 5, pos_slice=-1), alone.logit_attrs(stack, 5)[:, -1]
    )


def test_inside_jit_and_vmap():
    """A traced cache, a traced token and a traced position; the cache of a vmapped run keeps its outer axis."""
    cache = captured()

    @jax.jit
    def attribute(cache, params, token, position):
        cache = cache.with_params(params)
        stack = cache.get_full_resid_decomposition(pos_slice=position)
        return cache.logit_attrs(stack, token, pos_slice=position)

    ours = attribute(cache, cache.params, jnp.asarray(5), jnp.asarray(3))
    assert_same(ours, cache.logit_attrs(cache.get_full_resid_decomposition(), 5)[..., 3])
    attribute(cache, cache.params, jnp.asarray(9), jnp.asarray(1))
    assert attribute._cache_size() == 1

    double = jax.tree.map(lambda value: jnp.stack([value, 2 * value]), cache)
    stack = jax.vmap(lambda one: one.with_params(cache.params).stack_head_results())(double)
    assert_same(stack[0], cache.stack_head_results())
    assert_same(double.with_params(cache.params).stack_head_results()[:, 0], stack[0])


def test_the_gradient_of_an_attributed_logit_is_that_of_the_logit():
    """Since the sum is the logit for any parameters, differentiating through the decomposition changes nothing."""
    config, params = small(1)

    def both(params):
        logits, cache = forward(config, params, TOKENS, RESIDUAL + HEADS)
        cache = cache.with_params(params)
        stack = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
        return cache.logit_attrs(stack, 5, pos_slice=-1).sum(), logits[:, -1, 5].sum()

    ours, theirs = (jax.jit(jax.grad(lambda p, i=i: both(p)[i]))(params) for i in range(2))
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same(mine, its, 2e-4)


# --- stack_activation, labels, arguments ------------------------------------------------------------------------------


def test_stack_activation():
    """One site of all layers, or of the first ones, with the part where its name needs one."""
    cache = captured()
    np.testing.assert_array_equal(cache.stack_activation("z"), jnp.stack([cache["z", 0], cache["z", 1]]))
    np.testing.assert_array_equal(cache.stack_activation("resid_pre", 1), cache["resid_pre", 0][None])
    scale = cache.stack_activation("scale", -1, "ln2")
    np.testing.assert_array_equal(scale, jnp.stack([cache["scale", 0, "ln2"], cache["scale", 1, "ln2"]]))


def test_labels():
    """TransformerLens' labels, in the order of the stack."""
    cache = captured("bias")
    heads = [f"L{i}H{head}" for i in range(LAYERS) for head in range(H)]
    assert cache.stack_head_results(return_labels=True)[1] == heads
    assert cache.stack_neuron_results(1, None, [7, -1], return_labels=True)[1] == ["L0N7", f"L0N{F - 1}"]
    labels = cache.get_full_resid_decomposition(1, True, False, return_labels=True)[1]
    assert labels == [*heads, "0_mlp_out", "embed", "0_attn_bias", "1_attn_bias"]


def test_what_was_not_captured_is_listed_at_once():
    """One error with every name, and each method is content with the sets of names that it asks for."""
    cache = captured()
    everything = dict(cache)

    def holding(*globs):
        kept = {name: everything[name] for name in everything if any(fits(name, glob) for glob in globs)}
        return ActivationCache(cache.config, kept, cache.params)

    residual, heads, neurons = holding(*RESIDUAL), holding(*HEADS), holding(*NEURONS)
    residual.accumulated_resid(incl_mid=True, apply_ln=True)
    residual.logit_attrs(residual.decompose_resid(1, True, apply_ln=True), 5)
    heads.stack_head_results()
    heads.compute_head_results()
    neurons.stack_neuron_results()
    holding(*RESIDUAL, *HEADS).stack_head_results(incl_remainder=True, apply_ln=True)
    holding(*RESIDUAL, *HEADS, *NEURONS).get_full_resid_decomposition(apply_ln=True)
    for call, names in (
        (
            lambda: heads.get_full_resid_decomposition(apply_ln=True),
            [*NEURONS, "embed.hook_out", "ln_final.hook_scale"],
        ),
        (
            lambda: heads.stack_head_results(1, incl_remainder=True, apply_ln=True),
            ["blocks.1.hook_in", "blocks.1.ln1.hook_scale"],
        ),
        (lambda: neurons.stack_head_results(1), ["blocks.0.attn.o.hook_in", "blocks.0.ln1_post.hook_scale"]),
        (lambda: neurons.compute_head_results(), ["blocks.*.attn.o.hook_in"]),
        (lambda: neurons.neuron_logit_attrs(5), ["ln_final.hook_scale"]),
        (lambda: heads.logit_attrs(jnp.zeros((1, 2, 9, D)), 5), ["ln_final.hook_scale"]),
        (lambda: heads.stack_activation("q"), ["blocks.*.attn.q.hook_out"]),
    ):
        with pytest.raises(KeyError, match="names_filter") as caught:
            call()
        listed = caught.value.args[0].removeprefix("not captured: ").split(";")[0].split(", ")
        assert sorted(listed) == sorted(names)


def fits(name: str, glob: str) -> bool:
    return name == glob or (glob.startswith("blocks.*") and name.split(".", 2)[2:] == glob.split(".", 2)[2:])


def test_weights_that_are_not_there():
    """A cache without parameters says how to give it some; what needs none works without."""
    cache = jax.tree.map(jnp.asarray, captured())
    assert cache.params is None
    cache.decompose_resid()
    cache.accumulated_resid()
    for call in (cache.stack_head_results, cache.stack_neuron_results, lambda: cache.decompose_resid(apply_ln=True)):
        with pytest.raises(ValueError, match=r"with_params\(params\)"):
            call()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("decompose_resid", {"layer": 3}, "it takes 0 to 2"),
        ("decompose_resid", {"layer": -2}, "it takes 0 to 2"),
        ("decompose_resid", {"mlp_input": True}, "final norm"),
        ("accumulated_resid", {"layer": 2, "mlp_input": True}, "final norm"),
        ("decompose_resid", {"mode": "heads"}, "'all', 'mlp' and 'attn'"),
        ("decompose_resid", {"layer": 0, "incl_embeds": False}, "before layer 0"),
        ("stack_head_results", {"layer": 0}, "before layer 0"),
        ("stack_activation", {"activation_name": "z", "layer": 0}, "before layer 0"),
        ("get_neuron_results", {"layer": 2}, "no layer 2"),
        ("get_neuron_results", {"layer": 0, "neuron_slice": F}, f"lies outside the {F}"),
        ("stack_neuron_results", {"layer": 1, "neuron_slice": [0, F]}, f"lies outside the {F}"),
        ("accumulated_resid", {"pos_slice": 9}, "lies outside the 9"),
        ("accumulated_resid", {"pos_slice": slice(9, None)}, "selects none of the 9"),
    ],
)
def test_arguments_out_of_range(method, arguments, message):
    """Are errors that say what there is; JAX itself would clamp an index to the last position."""
    with pytest.raises(ValueError, match=message):
        getattr(captured(), method)(**arguments)
