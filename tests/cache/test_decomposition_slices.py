"""Decompositions of chosen positions, neurons and rows, and under jit, vmap and grad."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import forward
from gemma3_jax.cache.residual import HEADS, RESIDUAL
from tests.cache.captured import captured, compiled
from tests.helpers.small_model import TOKENS, assert_same, same, small

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
