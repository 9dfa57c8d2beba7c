"""`search` equals a dense computation, document by document."""

import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, analysis, features, pictures
from gemma3_jax.features.direct import direct_logits
from gemma3_jax.harvest import ActivationStore, harvest
from tests.features.small_dictionaries import arrays, sae, transcoder

LONG = "ba ke lo mu ti so re na du pi ba ke lo mu ti so re na du pi ba ke"
TEXTS = ["ba ke lo mu ti so re na du pi", "so re na ti", "ke pi ti lo ke pi", "ba ke", "na du na du na du", "lo mu"]
Z = "blocks.1.attn.o.hook_in"
LAYOUT = {"rows": 2, "length": 12}
K = 4


@pytest.fixture(scope="module")
def model():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def dictionary(model):
    one = sae(d=model.config.hidden_size)
    # Feature 3 is never active.
    return features.SparseAutoencoder(**{**vars(one), "b_enc": one.b_enc.at[3].set(-1e4)})


@pytest.fixture(scope="module")
def found(model, dictionary):
    return features.search(model, dictionary, TEXTS, K, **LAYOUT)


@pytest.fixture(scope="module")
def caches(model):
    """The values of sites in each text alone."""
    sites = ["blocks.1.hook_out", "blocks.{1,2}.ln2.hook_out", Z]
    return [model.run_with_cache(text, sites)[1] for text in TEXTS]


def dense(caches, one, first=1):
    """The features of all tokens [n, f] in order, without BOS, and the document and place [n, 2] of each."""
    values = [np.asarray(one.encode(cache[one.site_in][0]))[first:] for cache in caches]
    where = [(number, place) for number, f in enumerate(values) for place in range(first, first + len(f))]
    return np.concatenate(values), where


def check_equal(found, f, where, key=lambda i: i):
    """Frequencies, histograms and examples of all features, for values [n, f]."""
    assert found.tokens == len(f)
    for i in range(f.shape[1]):
        own, order = found[key(i)], [t for t in np.argsort(-f[:, i], kind="stable") if f[t, i] > 0][:K]
        assert own.count == np.sum(f[:, i] > 0)
        assert own.frequency == own.count / len(f)
        np.testing.assert_allclose([each.value for each in own.examples], f[order, i], rtol=1e-4)
        assert [(each.document, each.offset) for each in own.examples] == [where[t] for t in order]
        counts, edges = own.histogram
        np.testing.assert_array_equal(counts, np.histogram(f[:, i][f[:, i] > 0], edges)[0])


def test_search_equals_the_dense_computation(caches, dictionary, found):
    """Over several units of packed documents; a feature that is never active has no examples and an empty histogram."""
    f, where = dense(caches, dictionary)
    check_equal(found, f, where)
    assert len(found) == dictionary.width
    assert not found[3].examples
    assert not found[3].activations
    assert found[3].histogram.counts.sum() == found[3].largest == found.frequency[3] == 0
    assert "1" in repr(found)
    assert "never active" in found._repr_html_()


def test_bos_and_padding_are_left_out(model, caches, dictionary, found):
    """Also where a corpus of ids has them. Negative control: with BOS, the result is another one."""
    ids = np.zeros((len(TEXTS), 12), np.int32)
    for row, text in zip(ids, TEXTS, strict=True):
        own = np.asarray(model.to_tokens(text))[0]
        row[: len(own)] = own
    again = features.search(model, dictionary, ids, K, **LAYOUT)
    assert again.tokens == found.tokens
    np.testing.assert_array_equal(again.frequency, found.frequency)
    np.testing.assert_allclose(again.largest, found.largest, rtol=1e-4)
    with_bos, _ = dense(caches, dictionary, first=0)
    assert len(with_bos) == found.tokens + len(TEXTS)
    assert np.any(with_bos.max(axis=0) > 1.01 * found.largest)
    with pytest.raises(ValueError, match="no tokens but BOS and padding"):
        features.search(model, dictionary, ids[:, :1], **LAYOUT)


def test_an_example_has_its_text_and_its_values(model, caches, dictionary, found):
    """The window is what the model saw with the token, and the values on it have a picture."""
    f, where = dense(caches, dictionary)
    own = max(found, key=lambda each: each.count)
    for each, values in zip(own.examples, own.activations, strict=True):
        words = TEXTS[each.document].split()
        assert each.tokens == words
        assert each.token == words[each.offset - 1]
        assert each.value == pytest.approx(values[each.at], rel=1e-4)
        tokens = [f[i, own.feature] for i, (document, _) in enumerate(where) if document == each.document]
        np.testing.assert_allclose(values, tokens, rtol=1e-4, atol=1e-5)
        assert each.text == model.to_string(each.ids)
        assert each.text.startswith(each.before)
        assert each.text.endswith(each.after)
    pictures.feature_on_texts([each.tokens for each in own.examples], own.activations)
    assert f"{own.examples[0].value:.4g}" in repr(own)


def test_a_window_ends_where_a_document_is_cut(model, dictionary):
    """The pieces of a document that is longer than a row do not see each other."""
    found = features.search(model, dictionary, [LONG], 50, **LAYOUT)
    assert found.tokens == len(LONG.split())
    assert max(len(each.ids) for each in found for each in each.examples) == LAYOUT["length"] - 1


def test_chosen_features(model, dictionary, found):
    """They are as among all; others were not searched, or do not exist."""
    some = features.search(model, dictionary, TEXTS, K, features=[9, 2, 9], **LAYOUT)
    assert some.features.tolist() == [2, 9]
    np.testing.assert_array_equal(some.frequency, found.frequency[[2, 9]])
    assert [each.offset for each in some[9].examples] == [each.offset for each in found[9].examples]
    with pytest.raises(KeyError, match="feature 4 was not searched"):
        some[4]
    for wrong in ([24], [1.5], [(1, 2)]):
        with pytest.raises(ValueError, match="feature"):
            features.search(model, dictionary, TEXTS, features=wrong)
    with pytest.raises(ValueError, match="features is empty"):
        features.search(model, dictionary, TEXTS, features=[])
    with pytest.raises(ValueError, match="k is 0"):
        features.search(model, dictionary, TEXTS, 0)


def test_a_store_is_a_corpus(model, caches, dictionary, found, tmp_path):
    """The same result from its tokens, with BOS in the store or without; without a run of the model."""
    harvest(model, TEXTS, dictionary.site_in, tmp_path, **LAYOUT)
    store = ActivationStore(tmp_path)
    again = features.search(model, dictionary, store, K)
    check_equal(again, *dense(caches, dictionary))
    own = max(found, key=lambda each: each.count).feature
    for one, other in zip(found[own].examples, again[own].examples, strict=True):
        assert one.tokens == other.tokens
    for one, other in zip(found[own].activations, again[own].activations, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError, match="was not harvested"):
        features.search(model, sae("blocks.2.hook_out"), store)


def test_a_site_with_heads_and_a_model_without_a_tokenizer(model, caches):
    """The heads are side by side, as in `encode`; tokens that have no spelling are shown as ids."""
    one = sae(Z, d=model.config.num_attention_heads * model.config.head_dim)
    ids = [np.asarray(model.to_tokens(text))[0] for text in TEXTS]
    found = features.search(HookedGemma3(model.config, model.params), one, ids, K, **LAYOUT)
    check_equal(found, *dense(caches, one))
    best = found[int(np.argmax(found.largest))]
    each = best.examples[0]
    assert each.tokens == [str(token) for token in each.ids]
    assert f"['{each.ids[each.at]}']" in repr(best).replace('"', "")


def test_a_transcoder_and_layers(model, caches):
    """A transcoder by its input; and a dictionary of two layers, whose features are (layer, index)."""
    d = model.config.hidden_size
    one = transcoder(d=d)
    check_equal(features.search(model, one, TEXTS, K, **LAYOUT), *dense(caches, one))
    other = transcoder(2, seed=5, d=d)
    layers = [one, other]
    clt = features.CrossLayerTranscoder(
        **{name: tuple(getattr(each, name) for each in layers) for name in ("W_enc", "b_enc", "b_dec", "activation")},
        W_dec=(arrays(7, out=(2, d))["W_dec"], arrays(8, out=(1, d))["W_dec"]),
        site_in=tuple(each.site_in for each in layers),
        site_out=tuple(each.site_out for each in layers),
    )
    found = features.search(model, clt, TEXTS, K, **LAYOUT)
    assert len(found) == 2 * one.width
    for layer, each in enumerate(layers, 1):
        check_equal(found, *dense(caches, each), key=lambda i, layer=layer: (layer, i))
    sums = [direct_logits(model, sae("blocks.1.hook_out", d=d, W_dec=clt.W_dec[0][:, i]), 5) for i in (0, 1)]
    np.testing.assert_allclose(found[1, 5].logits, sums[0] + sums[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="it is \\(layer, index\\)"):
        found[5]


def test_logits_are_those_of_the_direct_path(model, dictionary, found):
    """Where the stream has scale 1 and no part of the feature, they are the derivative of its readout."""
    own, row = found[5], np.asarray(dictionary.W_dec[5])
    x = np.random.default_rng(0).normal(size=len(row)).astype(np.float32)
    x -= x @ row / (row @ row) * row
    x /= np.sqrt(np.mean(x**2))
    step = 1e-2
    logits = [analysis.lens.readout(model.config, model.params, (x + s * row)[None, None])[0, 0] for s in (-step, step)]
    slope = np.asarray(logits[1] - logits[0]) / (2 * step)
    np.testing.assert_allclose(own.logits, slope - slope.mean(), atol=1e-3 * np.abs(own.logits).max())
    top, bottom = np.argsort(-own.logits)[:K], np.argsort(own.logits)[:K]
    assert own.top_logits == list(zip(model.to_str_tokens(top), own.logits[top].tolist(), strict=True))
    assert [token for token, _ in own.bottom_logits] == model.to_str_tokens(bottom)


def test_sites_before_a_norm(model):
    """A row goes through the output projection and the gain of the post-norm; other sites are refused."""
    block = model.params["blocks_1"]
    W_O = np.asarray(block["attn"]["o"]["weight"]).reshape(-1, model.config.hidden_size)
    gain = np.asarray(block["ln1_post"]["weight"])
    d = model.config.hidden_size
    row = np.random.default_rng(0).normal(size=(1, len(W_O))).astype(np.float32)

    def logits(site, row):
        return direct_logits(model, sae(site, d=d, W_dec=row), 0)

    expected = logits("blocks.1.hook_out", row @ W_O * gain)
    for site, value in [
        ("blocks.1.attn.o.hook_in", row),
        ("blocks.1.attn.o.hook_out", row @ W_O),
        ("blocks.1.ln1_post.hook_normalized", row @ W_O),
        ("blocks.1.ln1_post.hook_out", row @ W_O * gain),
    ]:
        np.testing.assert_allclose(logits(site, value), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(logits("blocks.1.hook_out", row @ W_O) - expected).max() > 0.1
    with pytest.raises(ValueError, match=r"blocks.1.ln2.hook_out has no direct path"):
        logits("blocks.1.ln2.hook_out", row)
