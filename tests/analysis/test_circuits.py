"""Factored matrices against dense ones, and the circuits of a head against the scores and results of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3
from gemma3_jax.analysis import (
    FactoredMatrix,
    all_composition_scores,
    composition_scores,
    ov_circuit,
    qk_circuit,
)
from gemma3_jax.analysis.factored import _eigenvalues_on_host
from tests.helpers.random_models import hf_model
from tests.helpers.small_model import KINDS, TOKENS, assert_same, difference, same

LAYERS = 3  # sliding, full, sliding
NORMS = "blocks.*.**.hook_scale"


@functools.cache
def model() -> HookedGemma3:
    """In full layers, positions stretched as the 4b's are, so that the two rotary embeddings differ in all."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    hf = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], rope_parameters=rope)
    config = Gemma3Config.from_hf(hf.config)
    assert config.rope_full.factor == 2
    return HookedGemma3(config, convert_state_dict(hf.state_dict(), config))


@functools.cache
def cache():
    return model().run_with_cache(TOKENS, return_type=None)[1]


def exact(site: str) -> list[np.ndarray]:
    """The site's value in every layer, float64."""
    return [np.asarray(cache()[f"blocks.{i}.{site}"], np.float64) for i in range(LAYERS)]


def qk(distance) -> FactoredMatrix:
    return qk_circuit(model().config, model().params, distance)


def ov() -> FactoredMatrix:
    return ov_circuit(model().config, model().params)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def dense(factored: FactoredMatrix) -> np.ndarray:
    """[..., m, n] float64."""
    return np.asarray(factored.A, np.float64) @ np.asarray(factored.B, np.float64)


def pair(batch=(), m=12, r=3, n=9) -> FactoredMatrix:
    return FactoredMatrix(jnp.asarray(random(*batch, m, r)), jnp.asarray(random(*batch, r, n, seed=1)))


SHAPES = [
    pytest.param({"batch": (2, 3)}, id="thin"),
    pytest.param({"m": 9, "r": 3, "n": 9}, id="square"),
    pytest.param({"m": 4, "r": 7, "n": 5}, id="inner larger"),
    pytest.param({"m": 9, "r": 6, "n": 4}, id="inner between"),
    pytest.param({"m": 1, "r": 1, "n": 1}, id="one"),
]


# ---- FactoredMatrix


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_matrix(shape):
    """Product, transpose, norm, singular values and collapsed forms."""
    factored, whole = pair(**shape), dense(pair(**shape))
    assert factored.shape == whole.shape
    assert factored.ndim == whole.ndim
    assert_same(factored.AB, whole, 1e-6)
    assert_same(factored.T.AB, np.swapaxes(whole, -1, -2), 1e-6)
    assert_same(factored.norm(), np.linalg.norm(whole, axis=(-2, -1)), 2e-6)
    assert_same(jnp.linalg.norm(factored.collapse_l(), axis=(-2, -1)), factored.norm(), 2e-6)

    U, S, Vh = factored.svd()
    exact_values = np.linalg.svd(whole, compute_uv=False)[..., : S.shape[-1]]
    assert_same(S, exact_values, 2e-6)
    assert_same((U * S[..., None, :]) @ Vh, whole, 5e-6)
    for orthonormal in (U.mT @ U, Vh @ Vh.mT):
        assert_same(orthonormal, np.broadcast_to(np.eye(S.shape[-1]), orthonormal.shape), 5e-6)
    for property, value in ((factored.U, U), (factored.S, S), (factored.Vh, Vh)):
        assert_same(property, value, 1e-7)
    # the collapsed forms lack an orthogonal factor: what they do on their other side is all there
    assert_same(factored.collapse_l().mT @ factored.collapse_l(), np.swapaxes(whole, -1, -2) @ whole, 5e-6)
    assert_same(factored.collapse_r() @ factored.collapse_r().mT, whole @ np.swapaxes(whole, -1, -2), 5e-6)
    assert not same(1.001 * factored.norm(), np.linalg.norm(whole, axis=(-2, -1)), 2e-6)  # control


@pytest.mark.parametrize(("m", "r"), [(9, 3), (4, 7)])
def test_eigenvalues_and_trace(m, r):
    """The nonzero eigenvalues of the dense matrix, on the device and on the host, and their sum."""
    factored = pair((2,), m, r, m)
    expected = np.linalg.eigvals(dense(factored))
    values = np.asarray(factored.eigenvalues)
    assert values.shape == (2, min(m, r))
    for ours, theirs in zip(values, expected, strict=True):
        largest = theirs[np.argsort(-abs(theirs))][: min(m, r)]
        # each has its partner, whatever their order
        gaps = abs(ours[:, None] - largest)
        assert gaps.min(0).max() < 1e-5 * abs(largest).max()
        assert gaps.min(1).max() < 1e-5 * abs(largest).max()
    assert_same(factored.trace(), np.trace(dense(factored), axis1=-2, axis2=-1), 1e-5)
    assert_same(factored.trace(), values.sum(-1).real, 1e-5)
    small = factored.BA if r < m else factored.AB
    on_host = jax.jit(jax.vmap(_eigenvalues_on_host))(small)
    assert on_host.dtype == jnp.complex64
    assert np.sort_complex(on_host) == pytest.approx(np.sort_complex(values), rel=1e-4, abs=1e-4)


def test_products():
    """With matrices, batches of them, vectors and other factored matrices, from either side, jax's or numpy's."""
    left, whole = pair((2, 3)), dense(pair((2, 3)))
    for make in (np.asarray, jnp.asarray):
        matrix, batch, row, column = (make(random(*shape)) for shape in ((9, 5), (3, 9, 5), (12,), (9,)))
        assert_same((left @ matrix).AB, whole @ matrix, 2e-6)
        assert_same((left @ batch).AB, whole @ batch, 2e-6)
        assert_same((matrix.T @ left.T).AB, np.swapaxes(whole @ matrix, -1, -2), 2e-6)
        assert_same((make(random(2, 1, 5, 12)) @ left).AB, random(2, 1, 5, 12) @ whole, 2e-6)
        assert_same(left @ column, whole @ column, 2e-6)
        assert_same(row @ left, row @ whole, 2e-6)
        assert_same((make(np.float32(-2)) * left).AB, -2 * whole, 1e-6)
        assert_same((left * make([[1.0, 2.0, 3.0]])).AB, whole * np.array([1.0, 2, 3])[:, None, None], 1e-6)
    assert_same((2 * left).AB, 2 * whole, 1e-6)
    for r in (2, 6):  # a smaller inner size than the left one, and a larger one
        right = pair((3,), 9, r, 11)
        both = left @ right
        assert both.mdim == min(left.mdim, r)
        assert_same(both.AB, whole @ dense(right), 2e-6)
        assert not same((right.T @ left.T).AB.mT, whole @ dense(right)[::-1], 2e-6)  # control


def test_indexing_takes_batch_entries():
    """By ints, slices, masks, arrays and traced values; rows and columns are out of reach, and so is nothing else."""
    factored = FactoredMatrix(jnp.asarray(random(2, 3, 12, 4)), jnp.asarray(random(3, 4, 9)))  # broadcast
    whole = dense(factored)
    for index in (0, -1, (1, 2), (slice(None), 1), None, ([0, 1], [2, 0]), np.array([True, False])):
        assert_same(factored[index].AB, whole[index if isinstance(index, tuple) else (index,)], 2e-6)
    assert_same(factored[..., 1].AB, whole[:, 1], 2e-6)
    assert_same(jax.jit(lambda m, i: m[i, 1].AB)(factored, 1), whole[1, 1], 2e-6)
    assert np.isnan(jax.jit(lambda m, i: m[i].AB)(factored, 2)).all()
    for index in (2, -3, (0, 3), (0, 0, 0), (0, 0, slice(None))):
        with pytest.raises(IndexError):
            factored[index]
    assert [each.shape for each in factored] == [(3, 12, 9)] * 2


def variables(jaxpr):
    """Every intermediate variable's shape, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from variables(inner)


def forms_the_product(function, *arguments) -> bool:
    """Whether the function has an intermediate with two axes of at least the outer size, 40."""
    shapes = variables(jax.make_jaxpr(function)(*arguments).jaxpr)
    return any(sum(size >= 40 for size in shape) > 1 for shape in shapes)


def test_the_product_is_never_formed():
    """Unless AB is asked for."""
    a, b = pair((2,), 40, 3, 40), pair((2,), 40, 5, 40)
    for function in (
        lambda a, b: (a.norm(), a.svd(), a.eigenvalues, a.trace(), a.collapse_l(), a.collapse_r()),
        lambda a, b: (a @ b, b @ a.T, 2 * a, a[0], a @ jnp.ones(40), jnp.ones(40) @ a),
        composition_scores,
    ):
        assert not forms_the_product(function, a, b)
    assert forms_the_product(lambda a, b: a.AB, a, b)  # control


def test_is_a_pytree():
    """Through jit, vmap and grad; a derivative has its shape."""
    factored = pair((2,))
    norms = jax.jit(jax.vmap(lambda m: m.norm()))(factored)
    assert_same(norms, factored.norm(), 1e-6)
    ours = jax.grad(lambda m: m.norm().sum())(factored)
    theirs = jax.grad(lambda m: jnp.linalg.norm(m.A @ m.B, axis=(-2, -1)).sum())(factored)
    assert_same(ours.A, theirs.A, 1e-5)
    assert_same(ours.B, theirs.B, 1e-5)
    assert jax.vmap(lambda m: m.norm(), in_axes=(FactoredMatrix(0, None),))(
        FactoredMatrix(factored.A, factored.B[0])
    ).shape == (2,)


def test_low_precision_factors():
    """Products stay in their dtype; decompositions are float32."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair((2,), 9, 3, 9))
    assert (low @ low).AB.dtype == jnp.bfloat16
    assert low.norm().dtype == low.S.dtype == low.trace().dtype == jnp.float32
    assert_same(low.norm(), np.linalg.norm(dense(low), axis=(-2, -1)), 2e-6)


def test_errors():
    """A factor the wrong way round, and what only a square matrix has."""
    with pytest.raises(ValueError, match=r"A \(12, 3\) and B \(9, 3\) do not match"):
        FactoredMatrix(random(12, 3), random(9, 3))
    for ask in (lambda m: m.trace(), lambda m: m.eigenvalues, lambda m: m.BA):
        with pytest.raises(ValueError, match="square matrix; this one is 12 x 9"):
            ask(pair())


# ---- circuits


def scores_from_circuits(at_distance) -> np.ndarray:
    """[L, b, h, p, k] float64: attention scores by circuits and the scales of the norms alone."""
    config = model().config
    group = config.num_attention_heads // config.num_key_value_heads
    length = TOKENS.shape[1]
    # [distance, L, h, d, d]
    circuits = dense(jax.jit(jax.vmap(qk))(at_distance(jnp.arange(length))))
    resid, s = exact("hook_in"), exact("ln1.hook_scale")
    q_scale, k_scale = exact("attn.q_norm.hook_scale"), exact("attn.k_norm.hook_scale")
    out = np.full((LAYERS, TOKENS.shape[0], config.num_attention_heads, length, length), np.nan)
    for i in range(LAYERS):
        x = resid[i] / s[i]
        keys = np.repeat(k_scale[i][..., 0], group, axis=2)  # [b, k, h]
        for p in range(length):
            for k in range(p + 1):
                dots = np.einsum("bd,hdc,bc->bh", x[:, p], circuits[p - k][i], x[:, k])
                out[i, :, :, p, k] = dots / q_scale[i][:, p, :, 0] / keys[:, k]
    return out * config.query_pre_attn_scalar**-0.5


def test_qk_circuit_gives_the_models_scores():
    """Of every pair of positions that a head sees, in sliding and in full layers, from the residual streams."""
    scores = np.stack(exact("attn.hook_attn_scores"))
    seen = scores > -1e30
    assert not seen[0].all()
    assert seen[1].sum() > seen[0].sum()  # the full layer sees beyond the window

    def apart(at_distance) -> list[float]:
        ours = scores_from_circuits(at_distance)
        return [difference(ours[i][seen[i]], scores[i][seen[i]]) for i in range(LAYERS)]

    assert max(apart(lambda distance: distance)) < 2e-6
    # controls: no rotation, the opposite one, and one by a position too many are seen in every layer
    for wrong in (lambda distance: 0 * distance, lambda distance: -distance, lambda distance: distance + 1):
        assert min(apart(wrong)) > 1e-2


def test_ov_circuit_gives_the_heads_results():
    """What each head adds is its pattern over keys of residual @ circuit, after ln1_post's gain."""
    circuits = dense(ov())
    for i in range(LAYERS):
        x = exact("hook_in")[i] / exact("ln1.hook_scale")[i]
        # [b, h, p, k] x [b, k, d] x [h, d, c] -> [b, p, h, c]
        ours = np.einsum("bhpk,bkd,hdc->bphc", exact("attn.hook_pattern")[i], x, circuits[i])
        gain = np.asarray(model().params[f"blocks_{i}"]["ln1_post"]["weight"], np.float64)
        theirs = exact("attn.hook_result")[i] * gain
        assert difference(ours, theirs) < 2e-6
        assert difference(ours, exact("attn.hook_result")[i]) > 1e-2  # control: the gain is in it
        assert difference(ours[:, :, ::-1], theirs) > 1e-2  # control: the right head's


def test_circuits_under_jit():
    """With params as arguments and a traced distance; one compilation for all distances."""
    config = model().config
    jitted = jax.jit(functools.partial(qk_circuit, config))
    for distance in (0, 3):
        assert_same(jitted(model().params, distance).AB, qk(distance).AB, 2e-6)
    assert jitted._cache_size() == 1
    assert_same(jax.jit(functools.partial(ov_circuit, config))(model().params).AB, ov().AB, 2e-6)
    every = jax.vmap(lambda distance: qk(distance)[1, 2].norm())(jnp.arange(4))
    assert_same(every[3], qk(3)[1, 2].norm(), 2e-6)
    assert not same(qk(0).AB, qk(3).AB)  # control


# ---- composition


def ratio(left: np.ndarray, right: np.ndarray) -> float:
    return np.linalg.norm(left @ right) / (np.linalg.norm(left) * np.linalg.norm(right))


def test_composition_scores_of_every_pair():
    """Against dense float64 products; batch axes of the left come first."""
    left, right = pair((2, 3), 12, 3, 9), pair((4,), 9, 5, 8)
    scores = composition_scores(left, right)
    expected = [[[ratio(a, b) for b in dense(right)] for a in row] for row in dense(left)]
    assert scores.shape == (2, 3, 4)
    assert_same(scores, expected, 2e-6)
    assert composition_scores(left[0, 0], right[0]).shape == ()
    assert not same(scores[..., ::-1], expected)  # control


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("distance", [0, 2])
def test_all_composition_scores(mode, distance):
    """Elhage et al.: OV of the earlier head into queries, keys or values of the later; 0 where it is not later."""
    config, params = model().config, model().params
    scores = np.asarray(all_composition_scores(config, params, mode, distance))
    writers, reader = dense(ov()), dense(qk(distance))
    readers = {"Q": reader, "K": np.swapaxes(reader, -1, -2), "V": writers}[mode]
    heads = range(config.num_attention_heads)
    expected = np.zeros_like(scores)
    for i in range(LAYERS):
        for k in range(i + 1, LAYERS):
            expected[i, :, k] = [[ratio(writers[i, j], readers[k, m]) for m in heads] for j in heads]
    assert_same(scores, expected, 5e-6)
    assert not same(scores.transpose(0, 3, 2, 1), expected)  # control: sender and receiver are told apart


def test_modes_differ():
    """Queries, keys and values read different directions, and rotations matter to the first two alone."""
    config, params = model().config, model().params
    modes = [all_composition_scores(config, params, mode) for mode in "QKV"]
    assert not same(modes[0], modes[1])
    assert not same(modes[0], modes[2])
    turned = [all_composition_scores(config, params, mode, distance=3) for mode in "QKV"]
    assert [same(a, b, 1e-6) for a, b in zip(modes, turned, strict=True)] == [False, False, True]
    with pytest.raises(ValueError, match="mode is 'q'; it must be 'Q', 'K' or 'V'"):
        all_composition_scores(config, params, "q")


@pytest.mark.parametrize(("inner", "outer"), [(1, 100), (8, 100), (8, 400)])
def test_chance_level(inner, outer):
    """Random matrices score near 1 / sqrt(d), as the docstring says, whatever their rank."""
    matrices = pair((16,), outer, inner, outer)
    assert np.mean(composition_scores(matrices, matrices)) == pytest.approx(outer**-0.5, rel=0.25)
