"""Dictionaries in models on a mesh, and under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, features
from tests.features.small_dictionaries import sae, transcoder
from tests.helpers.small_model import TOKENS, assert_same, run
from tests.placing.on_meshes import TOKENS as EIGHT
from tests.placing.on_meshes import config, mesh_of, on, params

D = 32


def dictionaries():
    return sae("blocks.0.hook_out", d=D), transcoder(d=D)


@functools.cache
def one_device():
    return results(HookedGemma3(config(8), params(8)), *dictionaries())


def results(model, first, second):
    """The logits with both spliced in, the largest features, the scores of all, and what a search finds."""
    edits = [features.splice(first, set={3: 2.0}, ablate=[5]), features.splice(second, error=False)]
    capture = {second.site_in: features.Encode(second, k=5)}
    logits, cache = model.run_with_hooks(EIGHT, edits, names_filter=capture)
    found = features.feature_attribution(model, EIGHT, lambda logits: logits[:, -1, 7].sum(), [first, second], k=None)
    scores = (each.scores for each in found.of)
    searched = features.search(model, second, np.asarray(EIGHT), 3, rows=8, length=EIGHT.shape[1])
    return logits, cache[second.site_in].values, *scores, searched.frequency, searched.largest, searched[3].logits


def test_a_mesh_gives_what_one_device_gives():
    """With the features cut over eight devices, as the model is."""
    mesh = mesh_of(8)
    cut = [jax.device_put(one, features.shardings(one, mesh)) for one in dictionaries()]
    assert tuple(cut[0].W_enc.sharding.spec) == (None, "model")
    for ours, theirs in zip(results(HookedGemma3(config(8), on(mesh, 8)), *cut), one_device(), strict=True):
        assert_same(ours, theirs, 1e-4)


def test_values_can_be_mapped():
    """`vmap` over values that are set gives what single runs give."""

    def logits(value):
        return run((), [features.splice(sae(), set={3: value})])[0]

    values = jnp.asarray([0.0, 4.0])
    mapped = jax.vmap(logits)(values)
    for value, each in zip(values, mapped, strict=True):
        assert_same(each, logits(value), 1e-5)
    assert not np.allclose(mapped[0], mapped[1], atol=1e-3)


@pytest.mark.parametrize("make", [sae, transcoder])
def test_gradients_of_weights(make):
    """Training through the model: the loss has a gradient in every weight that the reconstruction reads."""
    one = make()

    def loss(one):
        return jnp.mean(run((), [features.splice(one, error=False)], TOKENS)[0] ** 2)

    grads = jax.grad(loss)(one)
    assert all(jnp.abs(getattr(grads, name)).max() > 0 for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
