"""Dashboards in a browser without a network: what they show is what the search found, and nothing of a text is run."""

import dataclasses
import json

import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.pictures.labels import visible
from tests.features.gemma_scope_files import params, write
from tests.features.hostile_words import HOSTILE, hostile_model
from tests.features.small_dictionaries import clt, sae

TEXTS = [" ".join(HOSTILE), " ".join(HOSTILE[::-1]), " ".join(HOSTILE[2:7])]
FEATURES, NEVER = [12, 2, 3, 5], 3  # pages are in the order of numbers
LABEL = "<b>a label</b> of 12"


@pytest.fixture(scope="module")
def model():
    return hostile_model()


@pytest.fixture(scope="module")
def found(model):
    one = sae(d=model.config.hidden_size)
    dictionary = dataclasses.replace(one, b_enc=one.b_enc.at[NEVER].set(-1e4))
    object.__setattr__(dictionary, "_neuronpedia", "model/9-set")
    return features.search(model, dictionary, TEXTS, 3, FEATURES, rows=2, length=12)


@pytest.fixture(scope="module")
def index(found, tmp_path_factory):
    return features.dashboard(found, tmp_path_factory.mktemp("d") / "pages", labels={12: LABEL}, title="<i>Title</i>")


def test_a_page_shows_what_was_found(found, index, visit):
    """Each token has its value under the mouse, and a colour if that is not 0; one of them is the example's."""
    own = max((found[i] for i in FEATURES), key=lambda each: each.count)
    page, problems = visit(index.with_name(f"{own.feature}.html"))
    rows = page.query_selector_all(".examples tbody tr")
    assert len(rows) == len(own.examples) == 3
    for row, example, values in zip(rows, own.examples, own.activations, strict=True):
        tokens = row.query_selector_all("i")
        assert [each.get_attribute("title") for each in tokens] == [
            f"{visible(token)}: {value:.4g}" for token, value in zip(example.tokens, values.tolist(), strict=True)
        ]
        assert [bool(each.get_attribute("style")) for each in tokens] == (values != 0).tolist()
        assert [i for i, each in enumerate(tokens) if each.get_attribute("class") == "at"] == [example.at]
        assert row.inner_text().startswith(f"{example.value:.4g}")
        assert all(visible(token) in row.inner_text() for token in example.tokens)
    text = page.inner_text("body")
    assert f"{own.frequency:.4%} of {own.tokens} tokens: {own.count}" in text
    assert sum("0 tokens" not in bar.get_attribute("title") for bar in page.query_selector_all(".histogram b")) == (
        np.count_nonzero(own.histogram.counts)
    )
    for token, logit in own.top_logits + own.bottom_logits:
        assert f"{visible(token)}\t{logit:+.3g}" in text
    for other, tokens, jaccard in found.coactive(own.feature):
        assert f"{other} {jaccard:.2f}" in " ".join(text.split())
        assert page.query_selector(f"[title='{tokens} tokens']")
    assert page.evaluate("window.hit") is None
    assert page.get_attribute("text=Neuronpedia", "href") == f"https://www.neuronpedia.org/model/9-set/{own.feature}"
    assert problems == []


def test_the_index_finds_features(index, visit):
    """By number, by a token, by a label; Enter opens the feature of that number; a click on a heading sorts."""
    page, problems = visit(index)

    def shown(query):
        page.fill("#query", query)
        return [cell.inner_text() for cell in page.query_selector_all("tbody tr:not([hidden]) td:first-child")]

    assert shown("") == [str(i) for i in sorted(FEATURES)]
    assert page.inner_text("h1") == "<i>Title</i>"
    assert shown("5") == ["5"]
    assert shown("A LABEL") == shown("<b>") == ["12"]
    assert set(shown("مرحبا 北京")) <= set(shown("مرحبا"))
    assert shown("nowhere") == []
    assert page.inner_text("#count") == "0 of 4"
    shown("")
    page.click("th:has-text('largest') >> nth=0")
    largest = [float(cell.get_attribute("data-value")) for cell in page.query_selector_all("tbody td:nth-child(4)")]
    assert largest == sorted(largest, reverse=True)
    assert len(set(largest)) == len(FEATURES)
    page.fill("#query", "2")  # also in the label of 12
    page.press("#query", "Enter")
    page.wait_for_url("**/2.html")
    page.click("text=3 →")
    assert "not active on any token" in page.inner_text("body")
    page.click("text=All features")
    assert page.evaluate("window.hit") is None
    assert problems == []


def test_pages_are_written_whole_or_not_at_all(found, tmp_path):
    """A feature that was not searched, or a directory with files, leaves nothing new."""
    for wrong, message in (([2, 4], "feature 4 was not searched"), ([99], "has 24 features"), ([], "is empty")):
        with pytest.raises((KeyError, ValueError), match=message):
            features.dashboard(found, tmp_path / "pages", wrong)
    with pytest.raises(ValueError, match="has 24 features"):
        features.dashboard(found, tmp_path / "pages", labels={24: "none"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        features.dashboard(found, tmp_path / "full")
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "mine"]


def test_several_layers_and_no_direct_path(tmp_path):
    """Features are named by their layer; and a page without logits says why."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    d = model.config.hidden_size
    layered = features.search(model, clt(d=d), ["ba ke lo"], 2, [(0, 1), (1, 2)])
    index = features.dashboard(layered, tmp_path / "pages")
    assert sorted(file.name for file in index.parent.iterdir()) == ["0-1.html", "1-2.html", "index.html"]
    assert "blocks.1.ln2.hook_out" in index.with_name("1-2.html").read_text()
    before = features.search(model, sae("blocks.1.ln2.hook_out", d=d), ["ba ke lo"], 2, [1])
    page = features.dashboard(before, tmp_path / "more").with_name("1.html").read_text()
    assert "has no direct path to the logits" in page
    assert "Neuronpedia" not in page


@pytest.mark.parametrize(
    ("folder", "known"),
    [
        ("gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_medium", "gemma-3-270m/9-gemmascope-2-res-16k"),
        (
            "models--google--gemma-scope-2-4b-it/snapshots/0a/resid_post/layer_17_width_262k_l0_medium",
            "gemma-3-4b-it/17-gemmascope-2-res-262k",
        ),
        (
            "gemma-scope-2-27b-it/transcoder_all/layer_3_width_262k_l0_small_affine",
            "gemma-3-27b-it/3-gemmascope-2-transcoder-262k",
        ),
        ("gemma-scope-2-270m-pt/resid_post/layer_9_width_16k_l0_small", None),  # not on Neuronpedia
        ("gemma-scope-2-270m-pt/resid_post_all/layer_9_width_16k_l0_medium", None),
        ("gemma-scope-2-12b-it/resid_post/layer_9_width_16k_l0_medium", None),
        ("mine/resid_post/layer_9_width_16k_l0_medium", None),
    ],
)
def test_published_artifacts_have_an_id(folder, known, tmp_path):
    """Those of the registry alone; a copy with other weights is not the artifact."""
    write(tmp_path / folder, params())
    one = features.load(tmp_path / folder)
    assert one._neuronpedia == known
    assert not hasattr(dataclasses.replace(one, b_enc=one.b_enc + 1), "_neuronpedia")


@pytest.mark.parametrize(
    ("named", "known"), [("gpt2-small/9-res-jb", "gpt2-small/9-res-jb"), ("../..", None), ("a/b?c", None), (7, None)]
)
def test_saelens_keeps_the_id(named, known, tmp_path):
    """In its config; another text makes no address."""
    features.save(sae(), tmp_path / "sae", format="saelens")
    file = tmp_path / "sae" / "cfg.json"
    config = json.loads(file.read_text())
    config["metadata"]["neuronpedia_id"] = named
    file.write_text(json.dumps(config))
    assert features.load(tmp_path / "sae")._neuronpedia == known
