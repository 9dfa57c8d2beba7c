"""A search that is interrupted goes on where it was; and which features are active together, exactly."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.features.searches import resuming, search
from gemma3_jax.features.searches.tallies import added, chunks, empty, kept_of, totals
from gemma3_jax.harvest import ActivationStore, harvest
from gemma3_jax.reading import CheckpointError
from tests.features.small_dictionaries import clt, sae
from tests.features.test_tallies import reader

TEXTS = ["ba ke lo mu ti so re na du pi", "so re na ti", "ke pi ti lo ke pi", "ba ke", "na du na du na du", "lo mu"]
LAYOUT = {"rows": 1, "length": 12}
SITE = "blocks.1.hook_out"


@pytest.fixture(scope="module")
def model():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def dictionary(model):
    return sae(SITE, d=model.config.hidden_size)


@pytest.fixture(scope="module")
def found(model, dictionary):
    return features.search(model, dictionary, TEXTS, 3, **LAYOUT)


@pytest.fixture
def interrupted(monkeypatch):
    """A context in which a search writes after each batch, and is interrupted before the third; and its batches."""
    monkeypatch.setattr(resuming, "SECONDS", 0.0)
    add, seen = search._Tallies.add, []

    def interrupt(before):
        def stopping(self, values, together, real, number):
            if number == before:
                raise KeyboardInterrupt
            seen.append(number)
            add(self, values, together, real, number)

        monkeypatch.setattr(search._Tallies, "add", stopping)
        seen.clear()
        return seen

    return interrupt


def check_same(one, other):
    """Everything that two searches know is equal."""
    assert (one.tokens, one.documents) == (other.tokens, other.documents)
    for layer, known in one._layers.items():
        for field in dataclasses.fields(known)[1:]:
            np.testing.assert_array_equal(getattr(known, field.name), getattr(other._layers[layer], field.name))


@pytest.mark.parametrize("stored", [False, True])
def test_a_search_goes_on(model, dictionary, found, interrupted, tmp_path, stored, monkeypatch):
    """It does the batches that are missing, and ends with the result of a search in one go; then there are none."""
    corpus = TEXTS
    if stored:
        monkeypatch.setattr("gemma3_jax.features.searches.corpora._STORED", 8)
        harvest(model, TEXTS, SITE, tmp_path / "store", **LAYOUT)
        corpus = ActivationStore(tmp_path / "store")
        found = features.search(model, dictionary, corpus, 3, **LAYOUT)
    file = tmp_path / "state"
    seen = interrupted(2)
    with pytest.raises(KeyboardInterrupt):
        features.search(model, dictionary, corpus, 3, state=file, **LAYOUT)
    assert seen == [0, 1]
    seen = interrupted(None)
    again = features.search(model, dictionary, corpus, 3, state=file, **LAYOUT)
    check_same(found, again)
    batches = sorted(seen)
    assert batches[0] == 2
    assert batches == list(range(2, len(batches) + 2))
    best = max(found, key=lambda each: each.count)
    assert [each.text for each in again[best.feature].examples] == [each.text for each in best.examples]
    seen = interrupted(None)
    check_same(found, features.search(model, dictionary, corpus, 3, state=file, **LAYOUT))
    assert seen == []


def test_it_writes_once_a_minute(model, dictionary, tmp_path, monkeypatch):
    """And at the end; not after each batch."""
    written = []
    monkeypatch.setattr(resuming.StateFile, "write", lambda self, progress: written.append(progress.batches))
    features.search(model, dictionary, TEXTS, 3, state=tmp_path / "state", **LAYOUT)
    assert len(written) == 1


def test_another_search_is_refused(model, dictionary, found, tmp_path):
    """The message names what differs, and the file stays; another decoder changes no values, and may go on."""
    file = tmp_path / "state"
    features.search(model, dictionary, TEXTS, 3, state=file, **LAYOUT)
    before = file.read_bytes()
    other = dataclasses.replace(dictionary, b_enc=dictionary.b_enc + 1)
    params = {**model.params, "ln_final": {"weight": model.params["ln_final"]["weight"] + 1}}
    for wrong, says in [
        ((HookedGemma3(model.config, params, model.tokenizer), dictionary, TEXTS, 3, {}), "the model is"),
        ((model, other, TEXTS, 3, {}), "the dictionary is"),
        ((model, dataclasses.replace(dictionary, activation=features.TopK(4)), TEXTS, 3, {}), "the dictionary is"),
        ((model, dictionary, [*TEXTS[:-1], "mu lo"], 3, {}), "the corpus is"),
        ((model, dictionary, TEXTS, 4, {}), "k is 4, and was 3"),
        ((model, dictionary, TEXTS, 3, {"features": [1, 2]}), r"features is 2 \(.*and was 24 \("),
        ((model, dictionary, TEXTS, 3, {"coactive": [1]}), "coactive is 1"),
        ((model, dictionary, TEXTS, 3, {"rows": 2}), "rows is 2, and was 1"),
    ]:
        *arguments, options = wrong
        with pytest.raises(CheckpointError, match=says):
            features.search(*arguments, state=file, **LAYOUT | options)
    assert file.read_bytes() == before
    decoder = dataclasses.replace(dictionary, W_dec=dictionary.W_dec + 1)
    check_same(found, features.search(model, decoder, TEXTS, 3, state=file, **LAYOUT))


def test_other_files_are_refused(model, dictionary, tmp_path):
    """One that is damaged, one that is something else, and a place where no file can be."""
    file = tmp_path / "state"
    features.search(model, dictionary, TEXTS[:1], 3, state=file, **LAYOUT)
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"text"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="not the state of a search, or is damaged"):
            features.search(model, dictionary, TEXTS[:1], 3, state=file, **LAYOUT)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="not the state of a search"):
        features.search(model, dictionary, TEXTS[:1], 3, state=file, **LAYOUT)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        features.search(model, dictionary, TEXTS[:1], 3, state=tmp_path / "no" / "state", **LAYOUT)


def active_tokens(model, one):
    """[n, f] bool of all texts, without BOS; of several layers, [n, l f]."""
    sites = [one.site_in] if isinstance(one.site_in, str) else list(one.site_in)
    caches = [model.run_with_cache(text, sites)[1] for text in TEXTS]
    encoded = [np.asarray(one.encode(cache if len(sites) > 1 else cache[sites[0]])) for cache in caches]
    # [l, 1, p, f] or [1, p, f] -> [p, l f]
    rows = [np.concatenate(list(each[:, 0]) if len(sites) > 1 else [each[0]], axis=1)[1:] for each in encoded]
    return np.concatenate(rows) > 0


def test_features_that_are_active_together(model, dictionary, found):
    """Counts equal those of all pairs; the best have the largest Jaccard index, and the feature itself is left out."""
    active = active_tokens(model, dictionary).astype(int)
    both = active.T @ active
    for feature in range(dictionary.width):
        np.testing.assert_array_equal(found.coactivation(feature), both[feature])
    union = np.diag(both)[:, None] + np.diag(both) - both
    jaccard = both / np.maximum(union, 1)
    np.fill_diagonal(jaccard, -1)
    feature = int(np.argmax(np.diag(both)))
    best = found.coactive(feature, 3)
    np.testing.assert_allclose([each.jaccard for each in best], np.sort(jaccard[feature])[::-1][:3])
    assert [each.tokens for each in best] == [both[feature, each.feature] for each in best]
    some = features.search(model, dictionary, TEXTS, 3, [2, 5, 7, 9], coactive=[9, 2], **LAYOUT)
    np.testing.assert_array_equal(some.coactivation(9), both[9, [2, 5, 7, 9]])
    with pytest.raises(KeyError, match="feature 5 was not counted together with others"):
        some.coactive(5)
    with pytest.raises(ValueError, match="coactive has 4, which is not among"):
        features.search(model, dictionary, TEXTS, 3, [2, 5], coactive=[4], **LAYOUT)


def test_layers_are_counted_together(model, monkeypatch):
    """Features of one layer with those of another; and by default no pairs of more features than 1,024."""
    one = clt(d=model.config.hidden_size)
    active = active_tokens(model, one).astype(int)
    both = active.T @ active
    found = features.search(model, one, TEXTS, 2, coactive=[(1, 3), (0, 2)], **LAYOUT)
    np.testing.assert_array_equal(found.coactivation((0, 2)), both[2])
    np.testing.assert_array_equal(found.coactivation((1, 3)), both[one.width + 3])
    assert any(each.feature[0] == 0 for each in found.coactive((1, 3), 48))
    monkeypatch.setattr(search, "_PAIRS", 2 * one.width - 1)
    with pytest.raises(KeyError, match="was not counted"):
        features.search(model, one, TEXTS[:1], 2, **LAYOUT).coactivation((0, 2))


def test_pairs_go_beyond_32_bits():
    """They are kept in two parts, and the lower one carries; in chunks, too."""
    one, n = reader(features.Relu()), 64
    x = jnp.ones((n, 12))
    (chunk,) = chunks(one, np.arange(12), n)
    start = empty(12, 1, 2)
    many = np.full((12, 2), 2**34 + 2**24 - 1)
    start = start._replace(together=jnp.asarray([many >> 24, many & (2**24 - 1)], jnp.int32))
    after = added(start, one, x, kept_of(one, x), chunk, jnp.int32(n - 1), jnp.int32(0), jnp.ones((n, 2)))
    np.testing.assert_array_equal(totals(np.asarray(after.together)), many + n - 1)
