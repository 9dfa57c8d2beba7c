"""The running tally of a search equals a computation over all values at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import features
from gemma3_jax.features.searches.tallies import BINS, added, chunks, empty, kept_of, totals
from tests.features.small_dictionaries import sae

D, N = 12, 64


def reader(activation, f=D):
    """Features that are the coordinates of the input, so that values are exact."""
    return sae(W_enc=jnp.eye(D, f), b_enc=jnp.zeros(f), activation=activation)


def tally(one, batches, k, indices=None, real=N):
    """The tally of batches [n, d], in chunks put together."""
    found = []
    for chunk in chunks(one, np.arange(one.width) if indices is None else indices, N):
        each = empty(len(chunk.columns), k)
        for number, x in enumerate(batches):
            each = added(each, one, jnp.asarray(x), kept_of(one, x), chunk, jnp.int32(real), jnp.int32(number))
        found.append(each)
    return [np.concatenate(parts, axis=int(i in (3, 5))) for i, parts in enumerate(zip(*found, strict=True))]


@pytest.fixture(scope="module")
def batches():
    """Whole numbers with many ties, which grow from batch to batch; one feature is never active, one on 3 tokens."""
    x = np.random.default_rng(0).integers(-9, 4, (4, N, D)).astype(np.float32)
    x[2] *= 50
    x[:, :, 3], x[..., 5] = -1, 0
    x[1, [4, 9, 63], 5] = 2
    return x


def test_a_tally_equals_the_sorted_values(batches):
    """Of equal values the first tokens; of a feature that is active on fewer than k tokens, those."""
    k = 7
    values, numbers, places, counts, exponents, _ = tally(reader(features.Relu()), batches, k)
    flat = batches.reshape(-1, D)
    for f in range(D):
        order = [i for i in np.argsort(-flat[:, f], kind="stable") if flat[i, f] > 0][:k]
        n = len(order)
        assert n == {3: 0, 5: 3}.get(f, k)
        np.testing.assert_array_equal(values[f], [*flat[order, f], *[0] * (k - n)])
        np.testing.assert_array_equal(numbers[f] * N + places[f], [*order, *[-1 - N] * (k - n)])
        active = flat[:, f][flat[:, f] > 0]
        edges = np.linspace(0, 2.0 ** exponents[f], BINS + 1)
        np.testing.assert_array_equal(totals(counts)[f], np.histogram(active, edges)[0])
        if n:
            assert edges[-1] / 2 <= active.max() < edges[-1]


def test_tokens_after_the_real_ones_do_not_count(batches):
    """Negative control of the filling of the last batch: with one token more, the counts are others."""
    some, more = (totals(tally(reader(features.Relu()), batches[:1], 2, real=real)[3]).sum() for real in (30, 31))
    assert some == np.sum(batches[0, :30] > 0) < more


@pytest.mark.parametrize("activation", [features.TopK(3), features.GroupMax(4), features.JumpRelu(jnp.arange(D) / 4)])
@pytest.mark.parametrize("values", [2**24, N])
def test_features_that_depend_on_others(batches, activation, values, monkeypatch):
    """All together, in chunks, and a few of them alone, they are what the dictionary's `encode` says."""
    monkeypatch.setattr("gemma3_jax.features.searches.tallies.VALUES", values)
    one = reader(activation)
    chosen = np.asarray([1, 2, 7, 11])
    f = np.asarray(one.encode(batches.reshape(-1, D)))
    least = D // 4 if isinstance(activation, features.GroupMax) else D
    assert len(chunks(one, np.arange(D), N)) == (1 if values > N else least)
    for indices in (np.arange(D), chosen):
        found = tally(one, batches, 2, indices)
        np.testing.assert_array_equal(totals(found[3]).sum(axis=1), (f > 0).sum(axis=0)[indices])
        np.testing.assert_array_equal(found[0], np.sort(f, axis=0)[::-1][:2].T[indices])


def test_counts_go_beyond_32_bits(batches):
    """They are kept in two parts, and the lower one carries."""
    one = reader(features.Relu())
    (chunk,) = chunks(one, np.arange(D), N)
    start = empty(D, 1)
    many = np.full((D, BINS), 2**34 + 2**24 - 1)
    start = start._replace(counts=jnp.asarray([many >> 24, many & (2**24 - 1)], jnp.int32), exponents=jnp.full(D, 9))
    after = added(start, one, jnp.asarray(batches[0]), None, chunk, jnp.int32(N), jnp.int32(0))
    assert totals(np.asarray(after.counts)).sum() == many.sum() + np.sum(batches[0] > 0)


def test_the_memory_of_a_feature():
    """It is what `search` says, whatever the number of tokens."""
    assert sum(each.nbytes for each in empty(5, 20)) == 5 * (12 * 20 + 260)
