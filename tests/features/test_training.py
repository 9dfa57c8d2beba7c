"""Training finds known dictionaries, in raw units, from every kind of source, and depends on its arguments alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import TINY, HookedGemma3, UnknownSite, features
from gemma3_jax.features.training import loop, step
from gemma3_jax.features.training.step import smallest_kept, train_step
from gemma3_jax.harvest import ActivationStore, harvest

SITE, OUT = "blocks.0.hook_out", "blocks.0.ln2_post.hook_out"
D, F, K = 16, 24, 2
KINDS = ["batchtopk", "jumprelu", "topk"]


def codes(n=4096, seed=0):
    """Sparse features [n, f], K active in a token on average."""
    r = np.random.default_rng(seed)
    return (r.random((n, F)) < K / F) * r.uniform(0.5, 1.5, (n, F))


def directions(d=D, seed=1):
    """A dictionary [f, d] with rows of length 1."""
    rows = np.random.default_rng(seed).normal(size=(F, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def trained(activations, kind="batchtopk", **more):
    """A small dictionary; the shapes are shared between the tests, so that each kind compiles once."""
    return features.train(activations, F, kind, **{"k": K, "site_in": SITE, "batch": 128, "steps": 700} | more)


def found(decoder, truth):
    """The mean over known directions of the largest cosine with a row of the decoder."""
    rows = np.asarray(decoder) / np.linalg.norm(decoder, axis=1, keepdims=True)
    return (truth @ rows.T).max(axis=1).mean()


def fvu(y, output):
    """Fraction of variance unexplained."""
    return ((y - np.asarray(output)) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_dictionary_is_found(kind, tmp_path):
    """In raw units, with the L0 that was asked for, and as `save` and `load` return it; an untrained one fails."""
    x = (300 * (codes() @ directions() + 5)).astype(np.float32)
    history = []
    sae = trained(x, kind, report=history.append)
    assert found(sae.W_dec, directions()) > 0.9
    assert found(trained(x, kind, steps=1).W_dec, directions()) < 0.7  # control
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1, atol=1e-6)
    f = np.asarray(sae.encode(x))
    assert 0.8 * K < (f > 0).sum(axis=1).mean() < 1.25 * K
    assert fvu(x, sae(x)) == pytest.approx(history[-1].fvu, rel=0.3)
    assert fvu(x, sae(x)) < 0.25
    assert [each.step for each in history] == list(range(50, 701, 50))
    assert history[0].loss > history[-1].loss
    wanted = features.TopK if kind == "topk" else features.JumpRelu
    assert isinstance(sae.activation, wanted)
    for format in ("saelens",) if kind == "topk" else ("saelens", "gemma_scope"):
        features.save(sae, tmp_path / format, format)
        again = features.load(tmp_path / format)
        assert again.site_in == SITE
        np.testing.assert_allclose(again(x), sae(x), rtol=1e-5, atol=1e-2)


def test_a_transcoder_is_found():
    """From pairs of other sizes and scales; what the inputs do not say stays unexplained."""
    f = codes()
    x, y = f @ directions(), 40 * f @ directions(d=12, seed=2) - 100
    transcoder = trained((x, y), site_out=OUT)
    assert isinstance(transcoder, features.Transcoder)
    assert (transcoder.site_in, transcoder.site_out) == (SITE, OUT)
    assert found(transcoder.W_dec, directions(d=12, seed=2)) > 0.9
    assert fvu(y, transcoder(x)) < 0.25
    assert fvu(y, transcoder(x[::-1])) > 0.9  # control


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_direction(kind):
    """As in Gemma: most of the variance in one direction, far from 0, and tokens of 30 times the norm."""
    r = np.random.default_rng(3)
    outlier = directions(seed=4)[0]
    x = 1000 * (codes() @ directions() + 3.5 * r.normal(size=(4096, 1)) * outlier + 20 * outlier)
    explained = np.var(x @ outlier) / np.var(x, axis=0).sum()
    assert explained > 0.8
    losses = []
    sae = trained(x, kind, k=4, steps=800, report=lambda each: losses.append(each.loss))
    assert losses[-1] < losses[0]
    assert max(losses[2:]) < 1.5 * losses[1]
    assert fvu(x, sae(x)) < 0.12  # less than the outlier leaves
    assert np.isfinite(sae.W_enc).all()
    with_bos = np.concatenate([x, 30 * x[:40]])
    again = trained(with_bos, kind, k=4, steps=100, report=lambda each: losses.append(each.loss))
    assert fvu(with_bos, again(with_bos)) < 0.3


def test_the_same_arguments_give_the_same_dictionary():
    """Bit for bit; another seed gives another. Other rates and numbers of steps do not compile anything."""
    x = codes(512) @ directions()
    first, *others = (trained(x, steps=60, seed=seed) for seed in (0, 0, 1))
    before = train_step._cache_size()
    trained(x, steps=61, learning_rate=1e-4)
    assert train_step._cache_size() == before
    same = [jax.tree.all(jax.tree.map(np.array_equal, first, other)) for other in others]
    assert same == [True, False]


def test_training_is_in_float32_with_64_bits_too():
    """With `jax_enable_x64`, the same dictionary comes out, up to rounding, and the state has no float64."""
    x = (codes(512) @ directions()).astype(np.float32)
    expected = trained(x, steps=4)
    with jax.enable_x64(True):
        actual = trained(x, steps=4)
        plan = step.Plan("batchtopk", K, (F,))
        state = step.new_state((jnp.asarray(x),), 1, plan, seed=0)
    np.testing.assert_allclose(actual.W_dec, expected.W_dec, atol=1e-5)
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == np.float64]


SOURCES = {
    "a list of batches": lambda x: list(x.reshape(-1, 128, D)),
    "a generator": lambda x: (x[i : i + 128] for i in range(0, len(x), 128)),
    "ragged batches": lambda x: np.split(x, [5, 300, 301]),
    "JAX arrays": lambda x: list(jnp.asarray(x).reshape(-1, 128, D)),
    "torch tensors": lambda x: torch.as_tensor(x).reshape(-1, 128, D).unbind(),
    "lists of one tensor": lambda x: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.as_tensor(x)), batch_size=128
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_batches_of_any_origin(source):
    """The tokens and their order are all that counts: the dictionary is that of the same batches."""
    x = (codes(512) @ directions()).astype(np.float32)
    wanted = trained([x[i : i + 128] for i in range(0, 512, 128)], steps=4)
    got = trained(SOURCES[source](x), steps=4)
    np.testing.assert_array_equal(got.W_enc, wanted.W_enc)
    np.testing.assert_array_equal(got.b_dec, wanted.b_dec)


def test_bfloat16_tensors():
    """Values are those of the bfloat16 numbers."""
    x = torch.as_tensor(codes(256) @ directions()).to(torch.bfloat16)
    wanted = trained(x.float(), steps=3)
    np.testing.assert_allclose(trained(x, steps=3).W_enc, wanted.W_enc, atol=1e-5)


def test_one_pass_without_steps():
    """Tokens at the end that do not fill a batch are left out; with more steps, passes are repeated."""
    x, steps = codes(300) @ directions(), []
    for given in (x, [x[:128], x[128:256], x[256:]]):
        trained(given, steps=None, report=lambda each: steps.append(each.step))
    trained(x, steps=7, report=lambda each: steps.append(each.step))
    assert steps == [2, 2, 7]


def test_an_iterator_that_ends_early(caplog):
    """A log message says that it did; the result is there."""
    x = codes(300) @ directions()
    assert trained(iter([x]), steps=50).width == F
    assert "ended after 2 of 50 steps" in caplog.text


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model, texts, and a store of two sites with all tokens."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    texts = ["ba ke lo mu ti so re na ba ke lo mu ti so re"] * 20
    out = tmp_path_factory.mktemp("store") / "s"
    harvest(model, texts, [SITE, OUT, "blocks.1.attn.hook_z"], out, rows=4, length=32, progress=False)
    return model, texts, ActivationStore(out)


def test_a_store_and_the_model_itself(stored):
    """The first token of each text, whose norm is far from others', is left out; heads are side by side."""
    model, texts, store = stored
    small = {"site_in": SITE, "batch": 16, "steps": 3, "k": 2}
    seen = []
    original = loop.scaling_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "scaling_of", lambda x, layers: seen.append(x) or original(x, layers))
        features.train(store, 8, **small)
        features.train(store.shuffled(16), 8, **small)
        features.train(model.activations([texts[:10], texts[10:]], SITE), 8, **small)
    values = np.asarray(store[SITE], np.float32)
    first = values[store.positions(0, len(store)) == 0][0]
    assert (np.abs(values - first).sum(axis=1) == 0).sum() == 20
    for each in seen:
        assert len(each) >= 48
        assert np.abs(each - first).sum(axis=1).min() > 1
    transcoder = features.train(store, 8, **small, site_out="blocks.0.hook_mlp_out")
    assert transcoder.site_out == OUT
    assert features.train(store, 8, **small | {"site_in": "blocks.1.attn.hook_z"}).W_enc.shape == (96, 8)


def test_dead_features_learn():
    """Those of the auxiliary loss come back; without it, they stay dead."""
    x = (codes() @ directions()).astype(np.float32)
    state, values = None, (jnp.asarray(x[:128]),)
    unit = step.Scaling(jnp.zeros(D), jnp.float32(2.5))
    for patience, alive in ((5, True), (10**6, False)):
        plan = step.Plan("topk", K, (F,))
        state = step.new_state((unit(values[0]),), 1, plan, 0)
        state.weights[0]["b_enc"] = state.weights[0]["b_enc"].at[0].set(-3.0)
        for i in range(400):
            values = (jnp.asarray(x[i % 32 * 128 :][:128]),)
            state, _ = train_step(state, values, (unit,), jnp.float32(5e-3), jnp.int32(patience), plan=plan)
        assert (int(state.idle[0, 0]) < 50) == alive


def test_how_many_are_kept():
    """Exactly as many as wanted of distinct values, along an axis and of all; no negative one."""
    z = jax.random.normal(jax.random.key(0), (50, 40))
    assert int((z > smallest_kept(z, 70, None)).sum()) == 70
    np.testing.assert_array_equal((z > smallest_kept(z, 3, 1)).sum(axis=1), 3)
    np.testing.assert_array_equal(z > smallest_kept(z, 40, 1), z > 0)


X = np.zeros((256, D))
WRONG = [
    ((X, 8), {}, "give site_in="),
    ((X, 8), {"site_in": "blocks.0.nothing"}, "no site is named"),
    ((X, 8, "relu"), {"site_in": SITE}, "'batchtopk', 'jumprelu', 'topk'"),
    ((X, 8), {"site_in": SITE, "k": 9}, "at most the width, 8"),
    ((X, 8), {"site_in": SITE, "k": 2, "steps": 0}, "steps is 0"),
    ((X, 8), {"site_in": SITE, "k": 2}, "all activations are equal"),
    ((X + np.nan, 8), {"site_in": SITE, "k": 2}, "NaN"),
    ((X[None], 8), {"site_in": SITE, "k": 2}, r"must be \[n, d\]"),
    ((X, 8), {"site_in": SITE, "k": 2, "batch": 512}, "do not fill a batch of 512"),
    (([(X, X)], 8), {"site_in": SITE, "k": 2}, "site_out="),
    (([X], 8), {"site_in": SITE, "site_out": OUT, "k": 2}, r"pairs \(x, y\)"),
    (("text", 8), {"site_in": SITE, "k": 2}, "an array"),
    (([X[:0]], 8), {"site_in": SITE, "k": 2, "steps": 3}, "do not fill a batch"),
    (([], 8), {"site_in": SITE, "k": 2}, "no batch"),
]


@pytest.mark.parametrize(("given", "more", "message"), WRONG)
def test_wrong_arguments(given, more, message):
    """Each names the remedy."""
    with pytest.raises((ValueError, TypeError, UnknownSite), match=message):
        features.train(*given, **more)
