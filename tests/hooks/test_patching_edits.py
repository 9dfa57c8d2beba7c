"""Edits with values from elsewhere: another run, another row, noise; and the order of several at one site."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gemma3_jax import HookedGemma3, edits
from gemma3_jax.hooks.interception import apply_edits
from tests.helpers.small_model import assert_same, same, small
from tests.hooks.edited_rows import MASK, ROWS, call, hook_at, logits_of, values, vector

PATCHED = ("blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.0.mlp.hook_post", "ln_final.hook_scale")


def test_from_cache():
    """One edit over globs of unlike sites puts another run's activation at each, and at no other site."""
    model = HookedGemma3(*small())
    other = jnp.flip(ROWS)
    kept = [*PATCHED, "unembed.hook_in", "blocks.0.hook_in"]
    clean_logits, clean = model.run_with_cache(other, kept)
    logits, plain = model.run_with_cache(ROWS, kept)
    patched, cache = model.run_with_hooks(ROWS, [(PATCHED, edits.FromCache(clean))], names_filter=kept)
    for name in set(cache) - {"blocks.0.hook_in"}:
        assert_same(cache[name], clean[name], 1e-6)
        assert not same(cache[name], plain[name])
    assert_same(cache["blocks.0.hook_in"], plain["blocks.0.hook_in"], 1e-6)
    assert_same(patched, clean_logits, 1e-6)
    assert not same(patched, logits)

    # A mapping of one's own; here the residual stream alone, and in one of two layers.
    mine = {"blocks.1.hook_out": np.asarray(clean["blocks.1.hook_out"])}
    assert_same(model.run_with_hooks(ROWS, [("blocks.1.hook_out", edits.FromCache(mine))]), clean_logits)


def test_a_cache_that_does_not_fit():
    """Names the site, what is wrong, and for shapes both."""
    model = HookedGemma3(*small())
    _, clean = model.run_with_cache(ROWS, "blocks.0.hook_out")

    def patched(cache, name, tokens=ROWS):
        return model.run_with_hooks(tokens, [(name, edits.FromCache(cache))])

    for cache in (clean, dict(clean)):
        with pytest.raises(ValueError, match=r"the cache has no blocks\.1\.hook_out; capture it"):
            patched(cache, "blocks.*.hook_out")
        with pytest.raises(ValueError, match=r"\(3, 9, 48\) at blocks\.0\.hook_out; this run has \(3, 8, 48\)"):
            patched(cache, "blocks.0.hook_out", ROWS[:, 1:])
        with pytest.raises(ValueError, match=r"\(3, 9, 48\) at blocks\.0\.hook_out; this run has \(1, 9, 48\)"):
            patched(cache, "blocks.0.hook_out", ROWS[:1])


def test_from_row_in_a_whole_run():
    """Rows exchange their residual streams, and so their logits; one that does not exist gives no neighbour's."""
    name, expected = "blocks.1.hook_in", logits_of(ROWS)
    exchanged = logits_of(ROWS, {name: edits.FromRow(jnp.asarray([1, 2, 0]))})
    assert_same(exchanged, expected[jnp.asarray([1, 2, 0])])
    assert not same(exchanged, expected)
    lacking = logits_of(ROWS, {name: edits.FromRow(jnp.asarray([1, 3, 0]))})
    assert np.isnan(lacking[1]).all()
    assert_same(lacking[0], expected[1])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (3, r"row has 3; at blocks\.0\.hook_out there are 3"),
        ([0, 1, -4], "row has -4"),
        ([0, 1], r"row has shape \(2,\); it must be one row, or one for each of the 3"),
        (0.0, "row is 0.0; it takes an integer or several"),
        (True, "row is True"),
    ],
)
def test_a_row_that_the_batch_lacks(row, says):
    """Is one error, restricted or not, before anything runs."""
    edit = edits.FromRow(row if isinstance(row, int | float) else np.asarray(row))
    for each in (edit, edits.only(edit, rows=0), edits.only(edits.only(edit, rows=0), positions=1)):
        with pytest.raises(ValueError, match=says):
            HookedGemma3(*small()).run_with_hooks(ROWS, [("blocks.*.hook_out", each)])


NOISY = ("embed.hook_out", "blocks.1.hook_out", "blocks.0.attn.o.hook_in")


@functools.cache
def noise(scale: float, relative: bool = False) -> dict[str, np.ndarray]:
    """[key, b, p, ...], what is added to the values of these sites under each of 64 keys."""
    plain = {name: jnp.asarray(values()[name], jnp.float32) for name in NOISY}

    @jax.jit
    @jax.vmap
    def added(key):
        edit = edits.Noise(key, scale, relative)
        return {name: apply_edits([edit], value, hook_at(name)) - value for name, value in plain.items()}

    return {name: np.asarray(x, np.float64) for name, x in added(jax.random.split(jax.random.key(0), 64)).items()}


def is_standard_normal(x: np.ndarray) -> bool:
    return scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3


def test_noise():
    """Normal, of the scale that is asked for, and drawn for each site and key on its own."""
    for name, x in noise(0.5).items():
        assert is_standard_normal(x / 0.5)
        assert not is_standard_normal(x / 0.475)  # control: 5 % off is seen
        of_the_value = 0.5 * np.sqrt(np.mean(values()[name] ** 2, axis=-1, keepdims=True))
        assert is_standard_normal(noise(0.5, relative=True)[name] / of_the_value)
        assert not is_standard_normal(noise(0.5, relative=True)[name])
    one, other = (noise(0.5)[name].ravel() for name in NOISY[:2])
    for a, b in ((one, other), (one, np.roll(one, one.size // 64))):  # of two sites, of two keys
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / one.size**0.5
    np.testing.assert_array_equal(one, noise.__wrapped__(0.5)[NOISY[0]].ravel())  # reproducible


def test_edits_of_one_site_run_in_the_order_given():
    """In a list under one name, or in pairs that name the site in several ways."""
    name, model = "blocks.1.hook_out", HookedGemma3(*small())
    x, v = values()[name], vector(name)
    add, double, turn = edits.Add(v), edits.only(edits.Scale(2.0), rows=1), edits.FromRow(np.asarray([1, 2, 0]))
    twice = np.asarray([1, 2, 1])[:, None, None]

    _, cache = call(*small(), ROWS, name, {"blocks.1.hook_resid_post": [add, double, turn]}, MASK, return_type=None)
    assert_same(cache[name], ((x + v) * twice)[[1, 2, 0]])

    pairs = [("blocks.*.hook_out", edits.only(double, layer=1)), ("model.layers.1.output", turn), (name, add)]
    _, cache = model.run_with_hooks(ROWS, pairs, names_filter=name, attention_mask=MASK)
    assert_same(cache[name], (x * twice)[[1, 2, 0]] + v)
    assert not same(cache[name], ((x + v) * twice)[[1, 2, 0]])  # control: the order matters
