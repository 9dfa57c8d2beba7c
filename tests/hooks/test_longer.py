"""Functions traced for a prompt, in a run with more columns: equal results for the prompt, or none at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from gemma3_jax.hooks.axes import DependsOnLength
from gemma3_jax.hooks.longer import LongerMetric, longer
from gemma3_jax.hooks.tracing import Traced, traced

B, D, LONGEST = 2, 4, 8
VECTOR = np.arange(1, D + 1, dtype=np.float32)
MATRIX = np.random.default_rng(0).normal(size=(D, 3)).astype(np.float32)
GROWING = ((False, True, False),)

# Functions of x [b, p, d] with the same shape, whose results at the prompt do not depend on what follows it.
EXACT = {
    "scaled": lambda x: 2.0 * x,
    "by its length": lambda x: x * x.shape[1],
    "steered": lambda x: x + VECTOR,
    "zeros": jnp.zeros_like,
    "centred": lambda x: x - x.mean(-1, keepdims=True),
    "unit": lambda x: x / (1 + jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "standard": lambda x: (x - x.mean(-1, keepdims=True)) / (1 + x.std(-1, keepdims=True)),
    "features": lambda x: jax.nn.relu(x @ MATRIX) @ MATRIX.T,
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "sorted features": lambda x: jnp.sort(x, -1),
    "best feature": lambda x: x * (x == jnp.max(x, -1, keepdims=True)),
    "gathered": lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    "one feature": lambda x: x.at[..., 1].set(0.0),
    "features by list": lambda x: x.at[..., [0, -1]].multiply(3.0),
    "first token": lambda x: x.at[:, 0].set(1.0),
    "last token": lambda x: x.at[:, -1].add(1.0),
    "all but the first": lambda x: x.at[:, 1:].add(VECTOR),
    "all but the last": lambda x: x.at[:, :-1].multiply(0.5),
    "tokens by list": lambda x: x.at[:, [0, -1]].set(0.5),
    "one row": lambda x: x.at[0].set(0.5),
    "rows exchanged": lambda x: x[::-1],
    "minus the last": lambda x: x - x[:, -1:],
    "from the one before": lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))),
    "rolled": lambda x: jnp.roll(x, 1, axis=1),
    "first beside the rest": lambda x: jnp.concatenate([x[:, :1], 2 * x[:, 1:]], axis=1),
    "summed so far": lambda x: jnp.cumsum(x, axis=1),
    "where last": lambda x: jnp.where((jnp.arange(x.shape[1]) == x.shape[1] - 1)[:, None], 0.0, x),
    "clipped": lambda x: jnp.clip(x, -1, 1),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], axis=-1),
    "in heads": lambda x: (x.reshape(*x.shape[:2], 2, 2) * np.ones((2, 1), np.float32)).reshape(x.shape),
    "in another order": lambda x: jnp.einsum("bpd->pdb", x * VECTOR).transpose(2, 0, 1),
    "by token": jax.vmap(lambda row: jax.vmap(lambda token: token - token[0])(row)),
    "in slices": lambda x: lax.dynamic_update_slice_in_dim(x, 2 * x[:, :1], 0, axis=1),
}
# Those whose results do, or may, depend on it.
DEPENDENT = {
    "mean": lambda x: x - x.mean(1, keepdims=True),
    "masked mean": lambda x: x - jnp.mean(x, axis=(0, 1), where=jnp.ones(x.shape, bool)),
    "largest": lambda x: x * (x == jnp.max(x, 1, keepdims=True)),
    "flipped": lambda x: x[:, ::-1],
    "sorted": lambda x: jnp.sort(x, 1),
    "softmax over tokens": lambda x: jax.nn.softmax(x, 1),
    "rolled back": lambda x: jnp.roll(x, -1, axis=1) + 0 * jnp.flip(x, 1),
    "summed from the end": lambda x: lax.cumsum(x, axis=1, reverse=True),
    "the largest token": lambda x: x.at[:, jnp.argmax(x[0, :, 0])].set(0.0),
    "token at a computed place": lambda x: x + x[:, jnp.int32(x[0, 0, 0])][:, None],
    "all tokens as one": lambda x: (x.reshape(1, -1) * jnp.arange(x.size)).reshape(x.shape),
    "noise": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "scan": lambda x: lax.scan(lambda sum, y: (sum + y, sum), x[:, 0], x.swapaxes(0, 1))[1].swapaxes(0, 1),
    "mixed tokens": lambda x: jnp.einsum("pk,bkd->bpd", jnp.ones((x.shape[1], x.shape[1])), x),
    "values for each token": lambda x: x * np.arange(x.shape[1], dtype=np.float32)[:, None],
    "token by token": lambda x: jnp.stack([x[:, i] * i for i in range(x.shape[1])], axis=1),
    "printed": lambda x: (jax.debug.print("{}", x), x)[1],
}

FUNCTIONS = [*EXACT.values(), *(each for name, each in DEPENDENT.items() if name != "printed")]


def for_more(function, p: int, columns: int, results=GROWING) -> Traced:
    once = traced(function, jax.ShapeDtypeStruct((B, p, D), jnp.float32), where="the test")
    return longer(once, GROWING, columns, results)


def values(p: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(p).normal(size=(B, p, D)), jnp.float32)


def followed(x: jax.Array, columns: int, by: float = np.nan) -> jax.Array:
    """x with more columns, of a number that shows wherever it gets."""
    return jnp.pad(x, ((0, 0), (0, columns), (0, 0)), constant_values=by)


def assert_exact(function, p: int, columns: int) -> None:
    """The results for the prompt are those of the function for the prompt alone, whatever follows it."""
    wide = for_more(function, p, columns)(followed(values(p), columns))
    assert wide.shape == (B, p + columns, D)
    np.testing.assert_allclose(wide[:, :p], function(values(p)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_functions_of_each_token_are_exact_and_shared(name):
    """At several lengths, one of which is the number of features, with one computation for all."""
    several = [for_more(EXACT[name], p, LONGEST - p) for p in (3, D, LONGEST)]
    assert_exact(EXACT[name], D, LONGEST - D)
    shared = len({each.computation for each in several})
    # A part of the tokens up to the last is an array of another shape at each length.
    assert shared == (3 if name in ("all but the last",) else 1)


@pytest.mark.parametrize("name", DEPENDENT)
def test_other_functions_are_refused(name):
    with pytest.raises(DependsOnLength):
        for_more(DEPENDENT[name], D, 2)


@pytest.mark.parametrize("name", ["mean", "flipped", "sorted", "softmax over tokens"])
def test_a_refused_function_would_be_wrong(name):
    """Negative control: numbers after the prompt get into its results."""
    wide = DEPENDENT[name](followed(values(3), 2, by=0.5))
    assert not np.allclose(wide[:, :3], DEPENDENT[name](values(3)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(FUNCTIONS), min_size=2, max_size=4),
    st.sampled_from([1, 2, 3, D]),
    st.sampled_from([0, 2]),
)
def test_whatever_is_not_refused_is_exact(functions, p, columns):
    """Any functions after one another, times the value; the tokens of a prompt may be an axis of size 1."""

    def function(x):
        y = x
        for each in functions:
            y = each(y)
        return x * y

    try:
        assert_exact(function, p, columns)
    except DependsOnLength:
        # In a prompt of one or two tokens, a slice of one token could be read in two ways.
        assert p < 3 or any(each in DEPENDENT.values() for each in functions)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_indices_are_exact(data):
    """Reads and writes at any static index, slice or list, of any result."""
    p, columns = 4, 2
    bound = st.integers(-p, p - 1)
    one = st.one_of(bound, st.slices(p), st.lists(bound, min_size=1, max_size=3).map(np.asarray))
    at = (data.draw(st.one_of(st.just(slice(None)), st.integers(0, 1))), data.draw(one))
    x = values(p)
    doubled = np.array(x)
    np.multiply.at(doubled, at, 2.0)
    pairs = [(lambda x: x.at[at].multiply(2.0), doubled), (lambda x: x[at], np.asarray(x)[at])]
    for function, exact in pairs:
        try:
            wide = for_more(function, p, columns, results=None)(followed(x, columns))
        except DependsOnLength:
            continue
        np.testing.assert_array_equal(wide[tuple(map(slice, exact.shape))], exact)


def test_most_indices_are_not_refused():
    """So that the test above tests something."""
    for at in (0, -1, slice(1, None), slice(2), slice(-2, None), np.asarray([0, -2])):
        for_more(lambda x, at=at: x.at[:, at].add(1.0), 5, 3)
        for_more(lambda x, at=at: x[:, at], 5, 3, results=None)


def test_arrays_and_numbers_stay_inputs():
    """Other arrays of the same shape, other lengths and other indices give the same computation."""
    several = []
    for p, vector in ((3, VECTOR), (5, 2 * VECTOR)):
        several.append(for_more(lambda x, v=vector: (x.shape[1] * x + v).at[:, -2].set(0.0), p, LONGEST - p))
    assert several[0].computation is several[1].computation
    assert len(several[0].arrays) == len(several[1].arrays) > 1


def test_an_index_out_of_range_is_still_an_error():
    """It must not reach a column after the prompt."""
    with pytest.raises(ValueError, match="index 3"):
        for_more(lambda x: x.at[:, 3].set(0.0), 3, 2)
    with pytest.raises(DependsOnLength):
        for_more(lambda x: jnp.take(x, jnp.asarray([3]), axis=1, mode="fill"), 3, 2, results=None)


def test_the_message_has_the_line():
    with pytest.raises(DependsOnLength, match=r"reduce_sum at .*test_longer\.py:\d+, in "):
        for_more(DEPENDENT["mean"], 3, 2)


METRICS = {
    "last logit": lambda out: out[0, -1, 2] - out[0, -1, 1],
    "log probability": lambda out: jax.nn.log_softmax(out)[0, -2, 3],
    "pole": lambda out: jnp.log(out**2)[0, 1, 2],
}


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_exact(name):
    """Also where the derivative after the prompt is infinite, and a factor of 0 would make it NaN."""
    x, metric = values(4), METRICS[name]
    once = traced(metric, jax.ShapeDtypeStruct(x.shape, x.dtype), where="the metric")
    function = longer(once, GROWING, 2, derivatives=True)
    wide = LongerMetric(function, np.arange(6)[None] < 4, (1,))
    value, grad = jax.value_and_grad(wide)(followed(x, 2, by=0.0))
    expected, exact = jax.value_and_grad(metric)(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, followed(exact, 2, by=0.0), rtol=1e-5, atol=1e-6)


def test_a_derivative_rule_of_a_function_is_not_dropped():
    """Its body is another function: the gradient of its jaxpr is not the user's."""

    @jax.custom_jvp
    def rounded(x):
        return jnp.round(x)

    rounded.defjvp(lambda x, dx: (jnp.round(x[0]), dx[0]))
    once = traced(lambda x: rounded(x)[0, 0, 0], jax.ShapeDtypeStruct((B, 3, D), jnp.float32), where="the metric")
    assert longer(once, GROWING, 2)(values(5)) == jnp.round(values(5)[0, 0, 0])
    with pytest.raises(DependsOnLength, match="custom_jvp_call"):
        longer(once, GROWING, 2, derivatives=True)
