"""A view of a prompt: its data are those of `encode`, and its page shows them, sorted and searched, in a browser."""

import dataclasses

import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.pictures.labels import visible
from tests.features.hostile_words import HOSTILE, hostile_model
from tests.features.small_dictionaries import clt, sae

LABELS = {5: "<b>five</b>", 7: "seven"}
K = 6


@pytest.fixture(scope="module")
def model():
    return hostile_model()


@pytest.fixture(scope="module")
def view(model):
    one = sae(d=model.config.hidden_size)
    return features.prompt_view(model, one, " ".join(HOSTILE), K, labels=LABELS, title="<i>View</i>")


def test_the_rows_are_the_largest_features(model, view):
    """Of each token but BOS, the k largest that are active, as `encode` has them; the largest value comes first."""
    one = view._dictionary
    f = np.asarray(one.encode(model.run_with_cache(" ".join(HOSTILE), one.site_in)[1][one.site_in][0]))
    assert view.tokens[1:] == HOSTILE
    assert view.counts.tolist() == [False] + [True] * len(HOSTILE)
    for position in range(1, len(f)):
        own, order = view.on(position), np.argsort(-f[position])[:K]
        assert [row.feature for row in own] == [i for i in order if f[position, i] > 0]
        np.testing.assert_allclose([row.value for row in own], f[position][order][: len(own)], rtol=1e-4)
        assert {row.token for row in own} == {HOSTILE[position - 1]}
    assert view.on(0) == []
    assert f[0].max() > 0, "control: BOS has features"
    values = [row.value for row in view.rows]
    assert values == sorted(values, reverse=True)
    best = view.rows[0]
    assert view.of(best.feature)[best.position] == np.float32(best.value)
    assert view.on(-1) == view.on(len(HOSTILE))
    assert f"{best.value:.4g}" in repr(view)


def cells(page, column):
    return [cell.inner_text().strip() for cell in page.query_selector_all(f"tbody td:nth-child({column})")]


def test_the_page_sorts_and_finds(view, tmp_path, visit):
    """Headings sort, a token and a feature leave their own rows and colours, the field searches; nothing is run."""
    view.save(tmp_path / "view.html")
    page, problems = visit(tmp_path / "view.html")
    rows = view.rows
    assert cells(page, 2) == [str(row.feature) for row in rows]
    assert cells(page, 4) == [visible(row.token) for row in rows]
    np.testing.assert_allclose([float(value) for value in cells(page, 1)], [row.value for row in rows], rtol=1e-3)
    for heading, column, key in (("feature", 2, int), ("position", 3, int), ("token", 4, str)):
        page.click(f"th[data-column={heading}]")
        values = list(map(key, cells(page, column)))
        assert values == sorted(values)
        page.click(f"th[data-column={heading}]")
        assert list(map(key, cells(page, column))) == sorted(values, reverse=True)
    page.click("[data-position='2']")
    assert sorted(cells(page, 2)) == sorted(str(row.feature) for row in view.on(2))
    best = view.on(2)[0].feature
    page.click(f"tbody tr[data-feature] >> text=/^{best} ?$/")
    own = view.of(best)
    assert sorted(map(int, cells(page, 3))) == np.flatnonzero(own).tolist()
    coloured = page.eval_on_selector_all("#tokens i", "all => all.map(one => one.style.background != '')")
    assert coloured == (own > 0).tolist()
    assert page.get_attribute(f"[data-position='{int(own.argmax())}']", "title") == f"{float(own.max()):.4g}"
    page.click("#all")
    page.fill("#query", "<B>FIVE")
    assert set(cells(page, 2)) == {"5"}
    assert set(cells(page, 5)) == {"<b>five</b>"}
    page.fill("#query", "北京")
    assert set(cells(page, 4)) == {"北京"}
    assert page.inner_text("h1") == "<i>View</i>"
    assert page.evaluate("window.hit") is None
    assert problems == []


def test_many_rows_stay_quick(view, tmp_path, visit):
    """A long prompt has more rows than a page needs: the first 500 of what is asked for are shown."""
    many = dataclasses.replace(view, rows=[row._replace(value=1 + i / 8) for i in range(40) for row in view.rows])
    assert len(many.rows) > 1000
    many.save(tmp_path / "view.html")
    page, problems = visit(tmp_path / "view.html")
    assert len(cells(page, 1)) == 500
    assert page.inner_text("#count") == f"the first 500 of {len(many.rows)} of {len(many.rows)}"
    assert problems == []


def test_several_layers_and_wrong_arguments(view, tmp_path):
    """Features are (layer, index); mistakes are named, and nothing is written."""
    tiny = HookedGemma3.from_pretrained(TINY, dtype="float32")
    one = clt(d=tiny.config.hidden_size)
    layered = features.prompt_view(tiny, one, "ba ke lo", 3)
    _, cache = tiny.run_with_cache("ba ke lo", list(one.site_in))
    f = np.asarray(one.encode(cache))[:, 0]
    for layer, index in {row.feature for row in layered.rows}:
        own = layered.of((layer, index))
        np.testing.assert_allclose(own[own > 0], f[layer, :, index][own > 0], rtol=1e-4)
    assert len(layered.on(-1)) == 6
    assert "1/" in layered.to_html()
    for arguments, message in ((("ba", 0), "k is 0"), ((["ba", "ke"],), "2 prompts")):
        with pytest.raises(ValueError, match=message):
            features.prompt_view(tiny, one, *arguments)
    with pytest.raises(ValueError, match=r"it is \(layer, index\)"):
        features.prompt_view(tiny, one, "ba", labels={5: "five"})
    with pytest.raises(ValueError, match=r"saved as \.html"):
        layered.save(tmp_path / "view.png")
    assert not list(tmp_path.iterdir())
