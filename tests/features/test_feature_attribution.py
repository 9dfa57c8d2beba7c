"""Scores of features are the derivatives that splicing measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, features
from tests.features.small_dictionaries import clt, sae, transcoder
from tests.helpers.small_model import TOKENS, run, small

ROW = TOKENS[:1]
HERE = [
    lambda: sae("blocks.0.hook_out", normalization=features.LayerNorm()),
    lambda: sae("blocks.1.attn.o.hook_in", d=80),
    transcoder,
    clt,
]


def metric(logits):
    return logits[0, -1, 7] - logits[0, -1, 11]


@pytest.fixture(scope="module")
def model():
    return HookedGemma3(*small())


@pytest.fixture(scope="module")
def found(model):
    """All dictionaries at once."""
    return features.feature_attribution(model, ROW, metric, [make() for make in HERE], k=None)


@pytest.mark.parametrize("which", range(len(HERE)), ids=["normalized", "heads", "transcoder", "clt"])
def test_a_score_is_the_slope_of_a_splice(which, found):
    """Of the metric, as one feature is scaled at one token: for each kind of dictionary."""
    one, scores = HERE[which](), found.of[which].scores
    at = np.unravel_index(int(jnp.argmax(jnp.abs(scores))), scores.shape)
    f, p = (int(at[-1]) if scores.ndim == 3 else (int(at[0]), int(at[-1]))), int(at[-2])

    def scaled(factor):
        return float(metric(run((), [features.splice(one, scale={f: factor}, positions=p)], ROW)[0]))

    slope = (scaled(1.1) - scaled(0.9)) / 0.2
    assert slope == pytest.approx(float(scores[at]), rel=0.03, abs=2e-4)
    assert abs(float(scores[at])) > 1e-3


def test_the_largest_scores(model, found):
    """They are those of the dense result, by size, with the features that they belong to."""
    first = features.feature_attribution(model, ROW, metric, [HERE[2]()], k=4).of[0]
    dense = found.of[2]
    np.testing.assert_allclose(first.scores, jnp.take_along_axis(dense.scores, first.indices, -1), atol=1e-5)
    np.testing.assert_allclose(first.activations, jnp.take_along_axis(dense.activations, first.indices, -1), atol=1e-5)
    [alone] = features.feature_attribution(model, ROW, metric, HERE[2](), k=4).of  # one, without a list
    np.testing.assert_array_equal(alone.scores, first.scores)
    np.testing.assert_allclose(jnp.abs(first.scores), -jnp.sort(-jnp.abs(dense.scores))[..., :4], atol=1e-5)


def test_it_shows_the_largest_scores(found, model):
    """Five of each dictionary, with the feature and the token (of a CLT, layer and token), not all numbers."""
    shown = repr(found).splitlines()
    assert len(shown) == 1 + 5 * len(HERE)
    scores = np.asarray(found.of[0].scores)
    b, p, f = np.unravel_index(np.argmax(np.abs(scores)), scores.shape)
    assert shown[1].split() == [".of[0]", "feature", str(f), "at", f"[{b},", f"{p}]", f"{scores[b, p, f]:+.4g}"]
    few = features.feature_attribution(model, ROW, metric, [make() for make in HERE], k=5)
    assert repr(few).splitlines()[1:] == shown[1:]
    assert "<table" in found._repr_html_()
    jax.jit(lambda found: repr(found) and found.metric)(found)  # traced values have none


def test_integrated_gradients_sum_to_the_change(model):
    """From no features to all of two dictionaries on one path; without the line they do not."""
    several = [sae("blocks.0.hook_out"), transcoder()]
    whole = features.feature_attribution(model, ROW, metric, several, k=None, steps=8)
    total = float(sum(jnp.sum(each.scores) for each in whole.of))
    change = total + float(whole.missing)
    assert abs(whole.missing) < 0.02 * abs(change)
    plain = features.feature_attribution(model, ROW, metric, several, k=None)
    assert abs(change - float(sum(jnp.sum(each.scores) for each in plain.of))) > 0.05 * abs(change)


def test_what_makes_no_sense_is_refused(model):
    """Nothing to attribute to, or no points on the line."""
    with pytest.raises(ValueError, match="0 dictionaries"):
        features.feature_attribution(model, ROW, metric, [])
    with pytest.raises(ValueError, match="steps is 0"):
        features.feature_attribution(model, ROW, metric, [sae()], steps=0)
