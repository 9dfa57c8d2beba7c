"""Traced functions: equal ones are one computation, different ones never, and numbers as data change no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax.hooks.lifting import with_numbers_as_inputs
from gemma3_jax.hooks.tracing import traced

X = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
VALUE = jnp.asarray(np.random.default_rng(0).normal(size=X.shape), jnp.float32)
W = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)


def of(function, shape=X):
    return traced(function, shape, where="the function")


def straight_through(slope):
    """Rounds, with a made-up derivative."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (slope * g,))
    return rounded


def made_up_jvp(slope):
    @jax.custom_jvp
    def same_value(x):
        return x + 0.0

    same_value.defjvp(lambda x, dx: (x[0] + 0.0, slope * dx[0]))
    return same_value


# Functions that make a function anew at each call, all of different content.
MAKERS = {
    "add": lambda: lambda x: x + W[0],
    "subtract": lambda: lambda x: x - W[0],
    "product": lambda: lambda x: x @ W,
    "an axis": lambda: lambda x: jnp.sum(x, axis=1, keepdims=True) + x,
    "another axis": lambda: lambda x: jnp.sum(x, axis=2, keepdims=True) + x,
    "relu": lambda: lambda x: jax.nn.relu(x),
    "relu6": lambda: lambda x: jax.nn.relu6(x),
    "gelu": lambda: lambda x: jax.nn.gelu(x),
    "softplus": lambda: lambda x: jax.nn.softplus(x),
    "an autoencoder": lambda: lambda x: x + jax.nn.relu(x @ W + W[0]) @ W.T,
    "logsumexp": lambda: lambda x: jax.nn.logsumexp(x, axis=-1, keepdims=True) + x,
    "scan": lambda: lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0],
    "a longer scan": lambda: lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=4)[0],
    "scan of another body": lambda: lambda x: jax.lax.scan(lambda c, _: (c + c**3, None), x, None, length=3)[0],
    "cond": lambda: lambda x: jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x),
    "cond the other way": lambda: lambda x: jax.lax.cond(x.sum() > 0, lambda x: -x, lambda x: x, x),
    "loop": lambda: lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x + i, x),
    "gradient": lambda: jax.grad(lambda x: jax.nn.relu(x).sum()),
    "random": lambda: lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "another key": lambda: lambda x: x + jax.random.normal(jax.random.key(1), x.shape),
    "remat": lambda: jax.checkpoint(lambda x: jnp.sin(x @ W)),
    "jitted": lambda: jax.jit(lambda x: jnp.cos(x)),
    "printing": lambda: lambda x: (jax.debug.print("{}", x.sum()), x)[1],
    "printing something else": lambda: lambda x: (jax.debug.print("x {}", x.sum()), x)[1],
    "a made-up derivative": lambda: straight_through(1.0),
    "another made-up derivative": lambda: straight_through(2.0),
    "a forward derivative": lambda: made_up_jvp(1.0),
    "another forward derivative": lambda: made_up_jvp(3.0),
    "power": lambda: lambda x: jnp.abs(x) ** 0.5,
    "another power": lambda: lambda x: jnp.abs(x) ** 0.7,
    "an index": lambda: lambda x: x.at[:, 1].set(0.0),
    "another index": lambda: lambda x: x.at[:, 2].set(0.0),
    "infinity": lambda: lambda x: jnp.where(x > 0, x, -jnp.inf) ** 2,
    "a dtype": lambda: lambda x: x.astype(jnp.bfloat16),
    "nothing": lambda: lambda x: x,
    "a constant": lambda: lambda x: jnp.full_like(x, 2.0),
    "another constant": lambda: lambda x: jnp.full_like(x, 3.0),
    "zero": lambda: lambda x: jnp.full_like(x, 0.0),
    "minus zero": lambda: lambda x: jnp.full_like(x, -0.0),
    "a pair": lambda: lambda x: (x, x.sum()),
    "a dictionary": lambda: lambda x: {"a": x, "b": x.sum()},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_function_made_anew_is_the_same_computation(make):
    """Whatever it is built from, derivative rules included, and with the results of the function itself."""
    first, second = of(make()), of(make())
    assert first.computation is second.computation
    for ours, theirs in zip(jax.tree.leaves(second(VALUE)), jax.tree.leaves(make()(VALUE)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_different_functions_are_different_computations():
    """No two of them are taken for each other; a wrong pair would be a silent wrong number."""
    made = {name: of(make()) for name, make in MAKERS.items()}
    assert len({id(each.computation) for each in made.values()}) == len(made)


def test_derivatives_pass_through():
    """A traced function has the gradients of the function, made-up ones too."""
    for name in ("an autoencoder", "softplus", "a made-up derivative", "another made-up derivative", "cond", "scan"):
        make = MAKERS[name]
        ours, theirs = (jax.grad(lambda x, f=f: (f(x) ** 2).sum())(VALUE) for f in (of(make()), make()))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


OPERATIONS = {
    "add": lambda x, c: x + c,
    "subtract": lambda x, c: c - x,
    "multiply": lambda x, c: c * x,
    "divide": lambda x, c: x / c,
    "divide by": lambda x, c: c / x,
    "power": lambda x, c: jnp.abs(x) ** c,
    "logarithm": lambda x, c: x * jnp.log(jnp.abs(c) + 1.0),
    "bound": lambda x, c: jnp.clip(x, -jnp.abs(c), jnp.abs(c)),
    "replace": lambda x, c: jnp.where(x > c, x, c),
    "maximum": lambda x, c: jnp.maximum(x, c),
    "square root": lambda x, c: jnp.sqrt(jnp.abs(x * c)),
    "a vector of them": lambda x, c: x + jnp.full(8, c),
    "a table": lambda x, c: x * (jnp.arange(8) * c),
}


NUMBERS = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]))


def compiled(function):
    """The function's result by a compiled program that its numbers are inputs of."""
    as_inputs = of(function)
    return jax.jit(lambda arrays, x: as_inputs.replace(arrays=arrays)(x))(as_inputs.arrays, VALUE)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(OPERATIONS)), number=NUMBERS)
def test_numbers_as_inputs_change_no_bit(name, number):
    """An operation on a number that is an input gives the bits of the operation with the number compiled in."""

    def function(x):
        return OPERATIONS[name](x, number)

    np.testing.assert_array_equal(compiled(function), jax.jit(function)(VALUE))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), NUMBERS), min_size=2, max_size=4))
def test_numbers_as_inputs_in_longer_functions(steps):
    """Of several operations XLA would merge constants, (x * a) * b to x * (a * b); as inputs they stay as written."""

    def function(x):
        for name, number in steps:
            x = OPERATIONS[name](x, number)
        return x

    one_by_one = function(VALUE)
    finite = np.isfinite(one_by_one) & (np.abs(one_by_one) > 1e-3)
    np.testing.assert_allclose(compiled(function)[finite], one_by_one[finite], rtol=1e-4)


def test_which_numbers_become_inputs():
    """Those that scale, shift, bound or replace; no exponent, and nothing of which a function is computed."""

    def numbers(function):
        return [number.item() for number in with_numbers_as_inputs(jax.make_jaxpr(function)(VALUE).jaxpr)[1]]

    assert numbers(lambda x: 2.0 * x + 3.0) == [2.0, 3.0]
    assert numbers(lambda x: jnp.where(x > 4.0, x, 5.0)) == [4.0, 5.0]
    assert numbers(lambda x: x + 7.0 * jnp.arange(8)) == [7.0]
    assert numbers(lambda x: jnp.abs(x) ** 0.5) == []
    assert numbers(lambda x: x * jnp.log(2.5)) == []
    assert numbers(lambda x: x[:, 3]) == []


def test_inputs_of_another_shape_are_refused():
    """A computation is for the shapes that it was traced with, and says so."""
    with pytest.raises(ValueError, match="traced for"):
        of(lambda x: x)(VALUE[:1])


def test_transformations_see_the_arrays():
    """Arrays of an outer jit, vmap or grad that a function reads are theirs."""

    def scaled_sum(factor):
        return of(lambda x: x * factor)(VALUE).sum()

    np.testing.assert_allclose(jax.jit(scaled_sum)(2.0), 2 * VALUE.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(scaled_sum)(2.0), VALUE.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(scaled_sum)(jnp.arange(3.0)), np.arange(3) * VALUE.sum(), rtol=1e-5)


def test_keys_and_callbacks_are_read_too():
    """A hook may close over a random key, and call back to the host: the callback itself runs at every run."""
    calls = []
    key = jax.random.key(7)

    def noisy(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + jax.random.normal(key, x.shape)

    np.testing.assert_array_equal(of(noisy)(VALUE), VALUE + jax.random.normal(key, X.shape))
    jax.effects_barrier()
    assert calls == [1]


def test_leaves_of_a_pytree_are_data():
    """Numbers of any kind in a Partial, and arrays, are inputs; a string is part of the function."""

    def combined(a, b, how, x):
        return (x * a + b) if how == "plain" else (x - b)

    def make(a, b, how="plain"):
        return of(jax.tree_util.Partial(combined, a, b, how))

    first = make(2, np.ones(8))
    for a, b in ((3, np.zeros(8)), (-1, np.full(8, 2.0))):
        assert make(a, b).computation is first.computation
        np.testing.assert_allclose(make(a, b)(VALUE), VALUE * a + b, rtol=1e-6)
    assert make(2, np.ones(8), "other").computation is not first.computation


def test_memory_of_computations_comes_back():
    """Computations without references are freed."""
    from gemma3_jax.hooks import tracing

    before = len(tracing._computations)
    held = [of(lambda x, i=i: x.at[:, i % 5].add(i)) for i in range(50)]
    assert len(tracing._computations) > before
    del held
    assert len(tracing._computations) <= before
