"""The statistics of a site are those of all its values, for any number of processes; and values are centred and scaled.

Axes: n rows.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, reductions
from gemma3_jax.harvest import ActivationStore, StoreError, harvest
from gemma3_jax.harvest.statistics import Moments, keys_of, moments_of, statistics_of

GENERATOR = np.random.default_rng(0)
TEXTS = [" ".join(GENERATOR.choice(["ba", "ke", "lo", "mu", "ti", "so", "re"], n)) for n in [3, 25, 1, 30, 7, 12, 2, 9]]
SITES = {
    "embed.hook_in": None,
    "blocks.1.hook_resid_post": None,
    "blocks.1.attn.hook_z": reductions.Cast("bfloat16"),
    "blocks.2.hook_resid_post": reductions.Int8(),
    "blocks.3.hook_resid_post": reductions.TopK(3),
    "blocks.0.ln1.hook_scale": None,
}
FLOATS = [("resid_post", 1), ("z", 1), ("resid_post", 2), "blocks.0.ln1.hook_scale"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of one process, and one of three that began in another order."""
    model, folder = HookedGemma3.from_pretrained(TINY, dtype="float32"), tmp_path_factory.mktemp("stores")
    for name, parts in (("one", ["0/1"]), ("three", ["2/3", "0/3", "1/3"])):
        for part in parts:
            harvest(model, TEXTS, SITES, folder / name, rows=1, length=32, part=part)
    return ActivationStore(folder / "one"), ActivationStore(folder / "three")


@pytest.mark.parametrize("name", FLOATS)
def test_statistics_are_those_of_the_values(stores, name):
    """Of float32, bfloat16 and int8, vectors and heads; the same bits for any processes; the control: half of them."""
    store, other = stores
    found, values = store.statistics[name], np.asarray(store[name], np.float64)
    assert found.count == len(store) > 80
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-5, atol=1e-5 * np.abs(values).max())
    np.testing.assert_allclose(found.variance, values.var(axis=0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.norm, np.linalg.norm(values, axis=-1).mean(axis=0), rtol=1e-5)
    for part in ("mean", "variance", "norm"):
        np.testing.assert_array_equal(getattr(found, part), getattr(other.statistics[name], part))
    assert not np.allclose(found.mean, values[: len(store) // 2].mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("name", ["embed.hook_in", ("resid_post", 3)])
def test_what_has_no_statistics(stores, name):
    """Integers and results with several arrays: one clear error."""
    with pytest.raises(KeyError, match="has no statistics"):
        stores[0].statistics[name]


@pytest.mark.parametrize("name", FLOATS)
def test_values_are_centred_and_scaled(stores, name):
    """By rows, by number and in batches: mean 0, and deviation 1 or mean square 1; without, they are as they were."""
    store = stores[0]
    plain = np.asarray(store[name], np.float64)
    by_std = np.asarray(store[name].normalized(scale="std"), np.float64)
    np.testing.assert_allclose(by_std.mean(axis=0), 0, atol=1e-3)
    varies = plain.std(axis=0) > 0
    np.testing.assert_allclose(by_std.std(axis=0)[varies], 1, rtol=1e-3)
    by_norm = store[name].normalized(center=False, scale="norm")
    assert by_norm.rows(0, 5).dtype == np.float32
    squares = np.square(np.asarray(by_norm, np.float64)).mean(axis=(0, -1))
    np.testing.assert_allclose(squares, 1, rtol=1e-3)
    for batch in store.shuffled(16, sites=[name], center=True):
        np.testing.assert_allclose(batch[name], plain[batch.rows] - plain.mean(axis=0), atol=1e-4 * np.abs(plain).max())
    np.testing.assert_array_equal(
        store[name].normalized().take(np.asarray([3, 1])), store[name].normalized().rows(0, 4)[[3, 1]]
    )


def test_wrong_scale(stores):
    """One clear error."""
    with pytest.raises(StoreError, match="'variance'"):
        stores[0].shuffled(3, sites=[("resid_post", 1)], scale="variance")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_means_do_not_spoil_the_variance(dtype):
    """As in a residual stream, where a few entries are thousands of times as large as they vary; in several blocks."""
    x = GENERATOR.normal(size=(5000, 3)) * [1, 10, 0.1] + [3000, -2e4, 0]
    x = x.astype(jnp.dtype(dtype))
    cut = [x[:10], x[10:10], x[10:]]
    kept = [moments_of("site", {"site": part}) for part in cut]
    units = [
        (len(part), Moments(*(each[key] for key in keys_of("site")))) for part, each in zip(cut, kept, strict=True)
    ]
    found, wide = statistics_of(units), x.astype(np.float64)
    np.testing.assert_allclose(found.variance, wide.var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-7, atol=1e-6)
