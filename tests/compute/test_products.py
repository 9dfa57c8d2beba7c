"""Products of few rows have forms of their own: the same numbers, derivatives and batches, and no copy of a weight.

Axes: b batch, p position, i inputs, o outputs, n heads, e head_dim, d hidden_size, V vocabulary.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import Gemma3, Gemma3Config
from gemma3_jax.compute import cpu, matmul, projections
from gemma3_jax.generation import decode as decoding
from gemma3_jax.generation.loop import begin

# By function: its product, as an einsum, and the axes that are summed over.
FORMS = {
    "linear": ("bpi,io->bpo", "i"),
    "heads_in": ("bpd,nde->bpne", "d"),
    "heads_out": ("bpne,ned->bpd", "ne"),
    "unembed": ("bpd,vd->bpv", "d"),
}
form = pytest.mark.parametrize("name", FORMS)


def operands(name, dtype, b=1, p=1, width=24, seed=0):
    """Random x and w for a form: `width` inputs, two heads, other sizes unlike each other."""
    (left, right), summed = FORMS[name][0].split("->")[0].split(","), FORMS[name][1]
    sizes = {"b": b, "p": p, "n": 2, "o": 20, "e": 10, "v": 26, "d": 18} | dict.fromkeys(summed, width)
    if name == "heads_out":
        sizes |= {"n": 2, "e": width // 2}
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal([sizes[axis] for axis in axes])).astype(dtype) for axes in (left, right)]


def exact(name, x, w):
    return np.einsum(FORMS[name][0], np.asarray(x, np.float64), np.asarray(w, np.float64))


def bar(name, x, w, out):
    """What rounding may do: half a unit of the result's dtype, and a unit of float32 of the terms for each of them."""
    terms = w.size // out.shape[-1] if name != "unembed" else w.shape[1]
    size = np.einsum(FORMS[name][0], *(np.abs(np.asarray(each, np.float64)) for each in (x, w)))
    return terms * np.finfo(np.float32).eps * size + float(jnp.finfo(out.dtype).eps) * np.abs(exact(name, x, w))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    rows=st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 5), (1, 17)]),
    width=st.sampled_from([8, 16, 10, 6, 40]),
    seed=st.integers(0, 99),
)
def test_products_are_exact_to_rounding(name, dtype, rows, width, seed):
    """Of one row and of many, of widths that the form of one row takes (multiples of 8) and of others."""
    x, w = operands(name, dtype, *rows, width, seed)
    out = getattr(projections, name)(x, w)
    assert out.dtype == (jnp.float32 if name == "unembed" else x.dtype)
    error = np.abs(np.asarray(out, np.float64) - exact(name, x, w))
    assert (error <= bar(name, x, w, out)).all()
    worse = np.abs(np.asarray(out, np.float64) - exact(name, x, 1.02 * w.astype(jnp.float32)))
    assert (worse > bar(name, x, w, out)).any()  # control


# Batches that are decoded, by weights that are large enough for a form of their own: sizes of [b, 1, i] and of w.
BATCHES = {
    "linear": ((3, 1, 1160), (1160, 3620)),
    "heads_in": ((16, 1, 1152), (4, 1152, 914)),
    "heads_out": ((2, 1, 8, 512), (8, 512, 1025)),
    "unembed": ((5, 1, 832), (5051, 832)),
}


@form
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_rows_by_large_weights_are_exact_to_rounding(name, dtype):
    """Of sizes that no block divides: a last turn that begins early, and groups of inputs."""
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in BATCHES[name])
    product = getattr(projections, name)
    out = product(x, w)
    error = np.abs(np.asarray(out, np.float64) - exact(name, x, w))
    assert (error <= bar(name, x, w, out)).all()
    off = exact(name, x, w) - exact(name, x, w.at[..., -1, -1].set(0))  # control: a single weight is missed
    assert (np.abs(off) > bar(name, x, w, out)).any()
    # float32 logits have no loop: the product that names the embedding first is fast enough
    assert ("while" in jax.jit(product).lower(x, w).as_text()) == ((name, dtype) != ("unembed", "float32"))
    small = w[:8] if name == "unembed" else w[..., :8]
    assert "while" not in jax.jit(product).lower(x, small).as_text()  # control


@form
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_rows_have_the_derivatives_of_their_product(monkeypatch, name, dtype, rows):
    """By both operands, and for a batch of inputs under `vmap`: to rounding what the einsum in float32 gives."""
    monkeypatch.setattr(cpu, "LARGE", 1)
    x, w = operands(name, dtype, rows)
    xs = jnp.stack([x, 2 * x, -x])
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(exact(name, x, w).shape), jnp.float32)

    def loss(product):
        return lambda x, w: jnp.sum(product(x, w).astype(jnp.float32) * weight)

    def plain(x, w):
        return jnp.einsum(FORMS[name][0], x.astype(jnp.float32), w.astype(jnp.float32))

    found, expected = (
        jax.vmap(jax.grad(loss(product), argnums=(0, 1)), (0, None))(xs, w)
        for product in (getattr(projections, name), plain)
    )
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        scale = np.abs(np.asarray(theirs, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance * scale, rtol=0
        )
        assert not np.allclose(np.asarray(ours, np.float32), 0, atol=tolerance * scale)  # control: there is a gradient


@contextlib.contextmanager
def optimized():
    """Compile as for users: what is moved out of loops, and copied, is up to XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def set_aside(dtype: str, b: int) -> int:
    """Bytes that the decoding loop sets aside, for b rows and weights of 270m's widths: V is 8192, d 640, f 2048."""
    types = ("sliding_attention", "full_attention")
    small = {"vocab_size": 8192, "num_hidden_layers": 2, "layer_types": types, "max_position_embeddings": 64}
    config = dataclasses.replace(Gemma3Config.preset("270m"), **small)
    shapes = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype if leaf.ndim > 1 else leaf.dtype), shapes)
    task, text, bounds = begin(config, params, [[5, 6]] * b, 4)
    loop = jax.jit(decoding.go_on, donate_argnums=2).lower(bounds.unstacked, task, text, jnp.int32(bounds.new - 1))
    with optimized():
        compiled = loop.compile()
    jax.clear_caches()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("b", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_copies_no_weights(monkeypatch, dtype, b):
    """XLA:CPU would convert bfloat16 weights to float32 before the loop over tokens, and keep them besides."""
    monkeypatch.setattr(cpu, "LARGE", 640 * 2048)
    one = 640 * 2048 * 4  # a matrix of the MLP
    assert set_aside(dtype, b) < one
    if dtype == "bfloat16":
        monkeypatch.setattr(cpu, "together", lambda x, y: (x, y))
        assert set_aside(dtype, b) > 2 * one  # control: several are copied


# --- float32 sums in chunks -------------------------------------------------------------------------------------------


def rounding_of(product, terms=2048, rows=64):
    """The error in norm of a product of random matrices, [1, rows, terms] by [terms, 96]."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, rows, terms), (terms, 96)))
    truth = x.astype(np.float64) @ w.astype(np.float64)
    return np.linalg.norm(np.asarray(product(x, w), np.float64) - truth) / np.linalg.norm(truth)


def one_by_one(x, w):
    """The product with its terms added one after the other, each sum rounded to float32: one row of steps a term."""
    total = np.zeros((*x.shape[:-1], w.shape[-1]), np.float32)
    for term in range(x.shape[-1]):
        total = (total + x[..., term, None].astype(np.float64) * w[term]).astype(np.float32)
    return total


@pytest.mark.parametrize("terms", [1024, 2048, 6912])
def test_float32_sums_in_chunks_round_less(terms):
    """The error of a sum grows with the root of its length, so sums of 512 terms have 0.7 of that of 1,024, or less.

    The comparison is with a sum of one term after the other, as some versions of XLA:CPU sum in pieces by themselves.
    """
    ours = rounding_of(jax.jit(projections.linear), terms)
    assert ours < 1.1 * (matmul.CHUNK / terms) ** 0.5 * rounding_of(one_by_one, terms)
    with jax.default_matmul_precision("highest"):
        finest = rounding_of(jax.jit(projections.linear), terms)
    assert finest < 0.8 * ours


def test_the_last_digits_of_a_product_do_not_need_chunks_of_one_size():
    """A prime number of terms is summed in one piece, and so is a short sum."""
    assert matmul._chunks(2053) == matmul._chunks(512) == 1
    assert [matmul._chunks(terms) for terms in (640, 1024, 1152, 2048, 6912)] == [2, 2, 3, 4, 16]
    x, w = jnp.ones((1, 2, 2053)), jnp.ones((2053, 3))
    np.testing.assert_array_equal(projections.linear(x, w), np.full((1, 2, 3), 2053))


def test_only_float32_prompts_are_summed_in_chunks():
    """A token's step reads its weights once, and bfloat16 has no digits to save."""

    def in_chunks(x, w):
        return "platform_index" in str(jax.make_jaxpr(projections.linear)(x, w))

    x, w = jnp.ones((1, 5, 1024)), jnp.ones((1024, 8))
    assert in_chunks(x, w)
    assert not in_chunks(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert not in_chunks(jnp.ones((3, 1, 1024)), w)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "scan"])
def test_chunks_under_transformations(transform):
    """The same numbers and derivatives as the einsum, to rounding."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 1, 4, 1024), (1024, 6)))

    def through(product):
        if transform == "vmap":
            return jax.vmap(product, (0, None))(x, w)
        if transform == "grad":
            return jnp.concatenate([g.ravel() for g in jax.grad(lambda *a: product(*a).sum(), (0, 1))(x[0], w)])
        if transform == "jvp":
            return jax.jvp(product, (x[0], w), (x[1], 2 * w))[1]
        return jax.lax.scan(lambda carry, each: (carry, product(each, w)), 0.0, x)[1]

    plain = through(lambda x, w: jnp.einsum("bpi,io->bpo", x, w, precision="highest"))
    np.testing.assert_allclose(through(projections.linear), plain, rtol=0, atol=2e-6 * float(jnp.abs(plain).max()))
