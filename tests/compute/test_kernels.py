"""Attention in a band and in chunks is the attention that holds every score, in linear memory, and time if it can.

The reference is `dense`, which the tests of masks and of parity hold to its definition and to Hugging Face.
"""

import dataclasses
import functools
import math
from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from gemma3_jax import Gemma3, Gemma3Config, forward
from gemma3_jax.compute.attention import SHORT, attend, banded, chunked, dense
from gemma3_jax.compute.masks import Mask
from gemma3_jax.hooks.interception import site_of
from gemma3_jax.model.masks import mask_of
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import assert_same, same, small

SCALE = 0.4
KERNELS = {"banded": functools.partial(banded, chunk=4), "chunked": functools.partial(chunked, chunk=4)}
PLATFORMS = ("cpu", "cuda", "tpu")


def every_score(q, k, v, scale, mask):
    columns = jnp.arange(q.shape[1])
    return dense(q, k, v, scale, mask.seen(columns, columns))


def random_qkv(length: int, heads: int = 4, groups: int = 2, e: int = 6, dtype="float32"):
    rng = np.random.default_rng(length)
    return tuple(jnp.asarray(rng.normal(size=(2, length, n, e)), dtype) for n in (heads, groups, groups))


def padded(length: int, side: str, pads: int) -> jax.Array:
    """[2, k] bool: the first row is padded, perhaps entirely, and the second is not."""
    real = np.ones((2, length), bool)
    real[0, slice(pads) if side == "left" else slice(length - pads, None)] = False
    return jnp.asarray(real)


def documents(length: int, cuts: Collection[int]) -> jax.Array:
    """[2, k] int32: the first row has documents that begin at these columns, the second is one."""
    begins = np.isin(np.arange(length), list(cuts))
    return jnp.asarray(np.stack([np.cumsum(begins) - begins[0], np.zeros(length)]), jnp.int32)


def masked(
    length: int, window: int | None, both_ways: bool, real: jax.Array | None, segment_ids: jax.Array | None = None
) -> Mask:
    """As `visible` has it: a window counts the query itself, or both ways half of it on either side."""
    before = length - 1 if window is None else min(length - 1, window // 2 if both_ways else window - 1)
    return Mask(before, before if both_ways else 0, real, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(kernel, q, k, v, mask, cotangent):
    """The kernel's value, and its gradients in q, k and v."""
    z, pull = jax.vjp(lambda *qkv: kernel(*qkv, SCALE, mask), q, k, v)
    return z, *pull(cotangent)


def rounding(q, k, v, cotangent) -> tuple[float, float, float, float]:
    """How far the value and the gradients in q, k and v of two float32 computations may be apart.

    A score of e products is off by e units in the last place of their sum of magnitudes, a power of it by twice that
    (its own, and the normaliser's); each sum over k keys adds k units. A gradient passes through the pattern twice.
    Each is then relative to the largest sum of magnitudes that it can be: a pattern adds up to one over the keys, and
    to at most p r over the queries of a key.
    """
    (_, p, h, e), g = q.shape, k.shape[2]
    size = {name: float(jnp.max(jnp.abs(x))) for name, x in {"q": q, "k": k, "v": v, "dz": cotangent}.items()}
    unit = float(jnp.finfo(jnp.float32).eps)
    one = unit * (2 * e * (e * size["q"] * size["k"] * SCALE) + 2 * p + 4)
    through_scores, queries = 2 * e * size["dz"] * size["v"] * SCALE, p * h // g
    return (
        one * size["v"],
        2 * one * through_scores * size["k"],
        2 * one * through_scores * size["q"] * queries,
        one * size["dz"] * queries,
    )


def furthest(one, other) -> list[float]:
    """The largest difference of each pair; infinite where one is not finite."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(one, other, strict=True)]
    return [float(np.max(np.abs(a - b))) if np.isfinite([a, b]).all() else math.inf for a, b in pairs]


MASKS = st.tuples(st.none() | st.integers(1, 14), st.booleans())
PADDING = st.none() | st.tuples(st.sampled_from(["left", "right"]), st.integers(0, 24))
CUTS = st.none() | st.sets(st.integers(0, 23), max_size=5)


# Few lengths, so that few programs compile: less than a block, no multiple of one, and whole blocks.
@settings(deadline=None, max_examples=12)
@given(st.sampled_from([1, 13, 24]), MASKS, PADDING, CUTS, st.sampled_from([(4, 1), (4, 2), (3, 3)]))
def test_value_and_gradients_are_those_of_every_score_at_once(length, mask, padding, cuts, heads):
    """Any length, window, padding, packing and grouping, causal and both ways; queries that see nothing, never NaN."""
    q, k, v = random_qkv(length, *heads)
    real = None if padding is None else padded(length, padding[0], min(padding[1], length))
    mask = masked(length, *mask, real, None if cuts is None else documents(length, cuts))
    cotangent = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    wanted = with_gradients(every_score, q, k, v, mask, cotangent)
    for name, kernel in KERNELS.items():
        found = furthest(with_gradients(kernel, q, k, v, mask, cotangent), wanted)
        assert (np.array(found) <= rounding(q, k, v, cotangent)).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_window_off_by_one_is_seen(kernel, both_ways, dtype):
    """In both dtypes equal within rounding, with and without padding; one key more or fewer is not."""
    length, window = 30, 6
    q, k, v = random_qkv(length, dtype=dtype)
    # A pattern's entry that is rounded the other way is off by one spacing of bfloat16, and the result by another.
    largest = float(jnp.max(jnp.abs(v.astype(jnp.float32))))
    bound = 2 * float(jnp.finfo(dtype).eps) * largest if dtype == "bfloat16" else rounding(q, k, v, q)[0]

    def difference(other, real=None):
        ours = KERNELS[kernel](q, k, v, SCALE, masked(length, other, both_ways, real))
        return furthest([ours], [every_score(q, k, v, SCALE, masked(length, window, both_ways, real))])[0]

    step = 2 if both_ways else 1
    for real in (None, padded(length, "left", 9), padded(length, "right", 9)):
        assert difference(window, real) <= bound
    assert difference(window + step) > 4 * bound
    assert difference(window - step) > 4 * bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("both_ways", [False, True])
def test_documents_that_begin_one_token_late_are_seen(kernel, window, both_ways):
    """Borders within blocks and at their ends: equal within rounding, and with each border moved by one not."""
    length, cuts, holes = 30, (4, 9, 15, 16), jnp.asarray(np.arange(30) % 4 > 0)[None].repeat(2, axis=0)
    q, k, v = random_qkv(length)
    for real in (None, padded(length, "left", 3), holes):
        wanted = every_score(q, k, v, SCALE, masked(length, window, both_ways, real, documents(length, cuts)))
        for i, moved in enumerate((cuts, (5, 9, 15, 16), (4, 10, 15, 16), (4, 9, 15, 17))):
            mask = masked(length, window, both_ways, real, documents(length, moved))
            distance = furthest([KERNELS[kernel](q, k, v, SCALE, mask)], [wanted])[0]
            assert (distance > 1e-2) if i else (distance <= rounding(q, k, v, q)[0])


def test_queries_that_see_nothing_take_the_mean():
    """In padding, and in a row that is nothing else: the mean of all values, as equal scores give it."""
    q, k, v = random_qkv(30)
    mask = masked(30, 6, False, padded(30, "left", 30))
    mean = np.broadcast_to(np.asarray(v[0]).mean(axis=0), (30, 2, 6)).repeat(2, axis=1)
    for kernel in (every_score, *KERNELS.values()):
        np.testing.assert_allclose(kernel(q, k, v, SCALE, mask)[0], mean, rtol=0, atol=1e-6)
    assert np.abs(KERNELS["banded"](q, k, v, SCALE, mask)[1] - mean).max() > 0.1  # control: the row of real tokens


def test_kernels_are_mapped():
    """vmap over a further axis gives what each call alone gives."""
    q, k, v = (jnp.stack([x, 2 * x]) for x in random_qkv(17))
    for kernel in KERNELS.values():
        run = functools.partial(kernel, scale=SCALE, mask=masked(17, 5, False, None))
        assert_same(jax.vmap(run)(q, k, v)[1], run(q[1], k[1], v[1]), 1e-6)


# --- the model ------------------------------------------------------------------------------------------------------

LONG = SHORT + 88  # no multiple of a block
ROWS = jnp.asarray(random_tokens((2, LONG)))
Z = "**.attn.o.hook_in"
VARIANTS = {
    "causal": {},
    "both ways": {"use_bidirectional_attention": True, "sliding_window": 9},
    "a wide window": {"sliding_window": 300},  # too wide for a band of this length
}


@functools.partial(jax.jit, static_argnames=("config", "capture"))
def long_run(config, params, capture, attention_mask=None):
    logits, cache = forward(config, params, ROWS, capture, attention_mask=attention_mask)
    return logits, {name: value for name, value in cache.items() if name.endswith("o.hook_in")}


@pytest.mark.parametrize(
    ("variant", "side", "shown"),
    [
        ("causal", None, "hook_pattern"),
        ("causal", "left", "hook_attn_scores"),
        ("both ways", "right", "hook_pattern"),
        ("a wide window", "left", "hook_pattern"),
    ],
)
def test_watching_changes_no_result_of_a_long_prompt(variant, side, shown):
    """Logits and attention results agree whether or not scores are shown, which decides the kernel: to rounding.

    Bit for bit they cannot: sums over keys have another order. 5e-6 of the largest value is what watching any other
    site is held to.
    """
    config, params = small(2)
    config = dataclasses.replace(config, **VARIANTS[variant])
    mask = None if side is None else padded(LONG, side, 70).astype(jnp.int32)
    unwatched, z = long_run(config, params, (Z,), mask)
    watched, shown_z = long_run(config, params, (Z, f"**.{shown}"), mask)
    assert_same(watched, unwatched, 5e-6)
    assert len(z) == config.num_hidden_layers
    for name in z:
        assert_same(shown_z[name], z[name], 5e-6)
    if side is None:
        other = dataclasses.replace(config, sliding_window=config.sliding_window + 1)
        assert not same(long_run(other, params, (Z,), mask)[0], watched, 1e-3)  # control


def test_watching_one_layer_leaves_the_others_their_kernel():
    """Bit for bit the same before the layer that is watched, and other kernels only there."""
    config, params = small(2)
    _, unwatched = long_run(config, params, (Z,))
    _, watched = long_run(config, params, (Z, "blocks.1.attn.hook_pattern"))
    np.testing.assert_array_equal(watched["blocks.0.attn.o.hook_in"], unwatched["blocks.0.attn.o.hook_in"])
    assert not np.array_equal(watched["blocks.1.attn.o.hook_in"], unwatched["blocks.1.attn.o.hook_in"])


def equations(jaxpr, times: int = 1):
    """(equation, how often it runs) of a jaxpr and all that it calls; the body of a scan runs once for each step."""
    for equation in jaxpr.eqns:
        inner_times = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        bodies = [
            getattr(each, "jaxpr", each)
            for value in equation.params.values()
            for each in (value if isinstance(value, tuple | list) else [value])
        ]
        bodies = [body for body in bodies if hasattr(body, "eqns")]
        for body in bodies:
            yield from equations(body, inner_times)
        if not bodies:
            yield equation, times


def largest_values(function, *args) -> tuple[int, bool]:
    """The most elements that one value of a program has, and whether one is as long as the prompt along two axes."""
    shapes = [
        variable.aval.shape
        for equation, _ in equations(jax.make_jaxpr(function)(*args).jaxpr)
        for variable in equation.outvars
    ]
    return max(math.prod(shape) for shape in shapes), any(shape.count(LONG) > 1 for shape in shapes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_value_of_a_long_prompt_is_quadratic(variant):
    """Neither scores nor masks exist at full size, forward or backward, padded, packed or not, unless watched."""
    config, params = small(2)
    config = dataclasses.replace(config, **VARIANTS[variant])
    every = ROWS.shape[0] * config.num_attention_heads * LONG**2

    def loss(params, mask, ids=None, capture=()):
        return forward(config, params, ROWS, capture, attention_mask=mask, segment_ids=ids, return_type="loss")[0]

    for given_mask, ids in ((None, None), (padded(LONG, "left", 70), None), (None, documents(LONG, (200, 203)))):
        size, square = largest_values(jax.grad(loss), params, given_mask, ids)
        assert size < every
        assert not square
    size, square = largest_values(lambda params: loss(params, None, None, "blocks.1.attn.hook_pattern"), params)
    assert size >= every  # control
    assert square


def test_short_prompts_show_their_scores():
    """Below the length from which it pays all scores are computed, where anybody's interceptor sees them unasked."""
    config, params = small()

    def seen(length: int) -> set[str]:
        names: set[str] = set()

        def look(next_fun, args, kwargs, context):
            names.add(site_of(context.module))
            return next_fun(*args, **kwargs)

        def run(params):
            with nn.intercept_methods(look):
                return Gemma3(config).apply({"params": params}, jnp.zeros((1, length), jnp.int32))

        jax.eval_shape(run, params)
        return names

    shown = {"blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"}
    assert shown <= seen(SHORT - 1)
    assert not shown & seen(SHORT)  # control


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(kernel, length: int, gradient: bool) -> np.ndarray:
    """Floating-point operations of the matrix products, bytes read and written, and memory for what is between.

    The first two are counted over the program's equations, unfused: XLA's own analysis counts the body of a loop once.
    The third is what XLA sets aside in the compiled program.
    """
    config = Gemma3Config.preset("270m")
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

    def run(q, k, v):
        return kernel(q, k, v, SCALE, mask_of(config, "sliding_attention", length, None))

    f = jax.grad(lambda *qkv: jnp.sum(run(*qkv) ** 2), argnums=(0, 1, 2)) if gradient else run
    flops = moved = 0
    for equation, times in equations(jax.make_jaxpr(f)(shape, shape, shape).jaxpr):
        values = [each.aval for each in (*equation.invars, *equation.outvars) if hasattr(each.aval, "dtype")]
        moved += times * sum(math.prod(value.shape) * value.dtype.itemsize for value in values)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            flops += times * 2 * size * math.prod(left[axis] for axis in contracted)
    compiled = jax.jit(f).lower(shape, shape, shape).compile()
    return np.array([flops, moved, compiled.memory_analysis().temp_size_in_bytes], np.float64)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_local_layer_grows_linearly(gradient):
    """Up to 8192 tokens each doubling at most doubles work, traffic and memory, for the dense kernel nearly fourfold.

    1024 tokens are two windows, of which chunks leave out more than a band does, by a sixth.
    """
    grown = [cost(attend, length, gradient) for length in (1024, 2048, 4096, 8192)]
    for shorter, longer, bound in zip(grown, grown[1:], (2.4, 2.02, 2.02), strict=False):
        assert (longer <= bound * shorter).all()
    assert (cost(every_score, 2048, gradient) > 3.5 * cost(every_score, 1024, gradient)).all()  # control
    # The products: 8192 queries, each with its block and the 511 keys before, in blocks of 128; twice for q k and p v.
    if not gradient:
        assert grown[-1][0] == 8192 * (512 + 128) * 16 * 2 * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_long_attention_exports_for_every_platform(kind, dtype):
    """The kernels of a prompt of 2048 tokens, padded and packed, lower for CPU, CUDA and TPU, forward and backward."""
    config = Gemma3Config.preset("270m")
    q, k = (jax.ShapeDtypeStruct((2, 2048, n, config.head_dim), dtype) for n in (4, 1))

    def loss(q, k, v, attention_mask, segment_ids):
        z = attend(q, k, v, SCALE, mask_of(config, kind, 2048, attention_mask, segment_ids))
        return jnp.sum(z.astype(jnp.float32) ** 2)

    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    by_token = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    exported = export.export(function, platforms=PLATFORMS)(q, k, k, by_token, by_token)
    assert exported.platforms == PLATFORMS
