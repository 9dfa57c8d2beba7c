"""The dictionaries that the package ships: small, of every layer, at their sites; and what carries copying in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, features
from gemma3_jax.cli.demo import repeated_tokens

PLACES = [f"{kind}_all/layer_{i}_width_256_l0_small" for kind in ("resid_post", "transcoder") for i in range(4)]
HALF = 12


@pytest.fixture(scope="module")
def model():
    """The shipped model."""
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def test_they_are_small_and_whole():
    """Less than 1 MB in all, in Gemma Scope 2's layout, and no other files."""
    files = {str(file.relative_to(features.TINY)): file for file in features.TINY.rglob("*") if file.is_file()}
    assert set(files) == {f"{place}/{name}" for place in PLACES for name in ("config.json", "params.safetensors")}
    assert sum(file.stat().st_size for file in files.values()) < 1e6


@pytest.mark.parametrize("place", PLACES)
def test_each_explains_its_site(model, place):
    """On text that it was not trained on, with few active features; the layer beside it is explained less."""
    sae = features.load(features.TINY, place)
    layer = int(place.split("_")[-5])
    reads = "hook_out" if place.startswith("resid") else "ln2.hook_out"
    assert sae.site_in == f"blocks.{layer}.{reads}"
    report = sae.check(model, repeated_tokens(model, rows=16, half=16, seed=9))
    assert report.fvu < 0.2
    assert report.l0 < 10
    assert abs(report.delta_loss) < 0.2  # 0.13 at the first layer
    assert not report.better
    worst = max(fvu for _, fvu in report.neighbours)
    assert worst > 3 * report.fvu  # control


def test_what_carries_copying(model):
    """Without 30 features after layer 1, the model copies little; without all the others, it still does."""
    first = np.stack([np.random.default_rng(i).permutation(HALF) + 20 for i in range(16)])
    tokens = np.concatenate([np.full((16, 1), model.config.bos_token_id), first, first], axis=1)
    repetition = np.arange(HALF + 1, 2 * HALF)

    def copying(logits):
        log_probs = jax.nn.log_softmax(logits[:, HALF + 1 : -1])
        return jnp.take_along_axis(log_probs, tokens[:, HALF + 2 :, None], axis=-1).mean()

    sae = features.load(features.TINY, PLACES[1])
    sae.check(model, tokens[:2])
    scores = features.feature_attribution(model, tokens, copying, [sae], k=None, steps=4).of[0].scores
    order = np.argsort(-np.asarray(scores)[:, repetition].sum(axis=(0, 1)))

    def without(chosen):
        edit = features.splice(sae, ablate=[int(f) for f in chosen], positions=repetition)
        return float(copying(model.run_with_hooks(tokens, [edit])))

    assert without(order[:30]) < -2
    assert without(order[30:]) > -0.5
