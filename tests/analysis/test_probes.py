"""Probes find a direction that is there, score it on other documents, and find nothing in shuffled labels."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from gemma3_jax import TINY, Gemma3Config, HookedGemma3, edits, pictures
from gemma3_jax.analysis import probe

N, D = 600, 12
SITES = ("blocks.0.hook_out", "blocks.2.hook_out")


@dataclasses.dataclass
class Values:
    """The values of a site."""

    x: np.ndarray

    def take(self, rows):
        return self.x[rows]


class Store:
    """Labels are in the second site, along one direction, and not in the first."""

    config = Gemma3Config.preset("270m")
    sites = SITES

    def __init__(self, seed=0):
        generator = np.random.default_rng(seed)
        self.y = generator.random(N) < 0.3
        self.direction = generator.normal(size=D)
        x = generator.normal(size=(2, N, D)) * generator.uniform(0.5, 3, D) + 1
        x[1] += 1.5 * np.outer(self.y, self.direction)
        self.values = dict(zip(SITES, x, strict=True))

    def __len__(self):
        return N

    def __getitem__(self, name):
        return Values(self.values[name])

    def documents(self, start, stop):
        return np.arange(N)[start:stop] // 10


@pytest.mark.parametrize("method", ["logistic", "ridge", "difference"])
def test_a_direction_is_found(method):
    """Where it is and not elsewhere; the control is at chance."""
    store = Store()
    probes = probe(store, store.y, method=method)
    assert probes.scores[1] > 0.9
    assert np.all(np.abs(probes.controls - 0.5) < 0.2)
    assert abs(probes.scores[0] - 0.5) < 0.2
    assert probes.best == "blocks.2.hook_out"
    assert probes.layers == [0, 2]
    found = probes["resid_post", 2]
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    if method == "difference":
        assert found @ store.direction / np.linalg.norm(store.direction) > 0.95
    assert "blocks.2.hook_out" in repr(probes)


@pytest.mark.parametrize(
    ("method", "model"), [("logistic", LogisticRegression(C=0.5, tol=1e-8)), ("ridge", Ridge(2.0))]
)
def test_coefficients_are_those_of_sklearn(method, model):
    """Direction and score, with the same split."""
    store = Store()
    probes = probe(store, store.y, ["blocks.2.hook_out"], method=method, penalty=2.0, seed=3)
    generator = np.random.default_rng(3)
    generator.permutation(N)
    documents = store.documents(0, N)
    test = np.isin(documents, generator.permutation(np.unique(documents))[:12])
    x = store.values["blocks.2.hook_out"]
    spread = x[~test].std(axis=0)
    z = (x - x[~test].mean(axis=0)) / spread
    model.fit(z[~test], store.y[~test])
    weights = np.ravel(model.coef_) / spread
    np.testing.assert_allclose(probes.directions[0], weights / np.linalg.norm(weights), atol=2e-3)
    assert probes.scores[0] == pytest.approx(roc_auc_score(store.y[test], z[test] @ np.ravel(model.coef_)), abs=1e-3)


def test_numbers_and_rows():
    """Ridge takes any numbers; rows choose tokens; most limits them."""
    store = Store()
    numbers = store.values[SITES[1]] @ store.direction
    assert probe(store, numbers, method="ridge", penalty=0.01).scores.round(2).tolist()[1] == 1
    rows = np.arange(0, N, 2)
    found = probe(store, store.y[rows], rows=rows, most=200)
    assert found.scores[1] > 0.85
    same = probe(store, store.y[rows], rows=np.arange(N) % 2 == 0, most=200)
    np.testing.assert_array_equal(same.directions, found.directions)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros(N), {}, "the same"),
        (np.zeros(3), {}, "600 tokens"),
        (np.arange(N), {}, "different labels"),
        (np.arange(N) % 2, {"method": "svm"}, "method"),
        (np.arange(N) % 2, {"held_out": 0.0}, "held_out"),
        (np.arange(N) < 2, {}, "one class"),
        (np.where(np.arange(N) % 2, 1.0, np.nan), {"method": "ridge"}, "labels have NaN"),
        (np.arange(N) % 2, {"penalty": -1.0}, "penalty is -1.0"),
        (np.arange(N) % 2, {"most": 0}, "most is 0"),
    ],
)
def test_wrong_arguments(labels, options, message):
    """One clear error."""
    with pytest.raises(ValueError, match=message):
        probe(Store(), labels, **options)


def test_edits_and_pictures_take_the_result():
    """As it is."""
    store = Store()
    probes = probe(store, store.y, method="difference")
    table = np.stack([probes.scores, probes.controls])
    labels = {"labels": ["true", "shuffled"], "layer": probes.layers}
    picture = pictures.patching_heatmap(table, store.config, axes=("labels", "layer"), labels=labels, quantity="AUC")
    assert "shuffled" in picture.to_html()
    model = HookedGemma3.from_pretrained(TINY)
    direction = np.resize(probes["resid_post", 2], model.config.hidden_size)
    steer = [("blocks.2.hook_resid_post", edits.Add(direction, 5.0))]
    assert not np.array_equal(model.run_with_hooks("ba ke", steer), model("ba ke"))
