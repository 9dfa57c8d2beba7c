"""Sampling: tokens come with the probabilities that the parameters say, from seeds that reproduce."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma3_jax.generation.loop import generate
from gemma3_jax.generation.sampling import draw, keep_likely, row_keys, sampling
from tests.helpers.lively_model import lively
from tests.helpers.random_models import random_tokens

DRAWS = 20_000
# [V]: likely tokens and a long tail, two of them equal
LOGITS = np.concatenate([[2.0, 2.0, 1.7, 1.2, 0.9, 0.4], np.linspace(0, -3, 14)]).astype(np.float32)
_KEEP = jax.jit(keep_likely)
FILTERS = {"top_k": 5, "top_p": 0.8, "min_p": 0.3}
COMBINATIONS = [
    {"temperature": temperature, **dict(chosen)}
    for temperature in (1.0, 0.6, 1.7)
    for n in range(4)
    for chosen in itertools.combinations(FILTERS.items(), n)
]


def exact(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """[V] float64: the probability of each token, from the definitions, token by token from the likeliest."""
    probabilities = np.exp(np.asarray(logits, np.float64) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if top_k is not None:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        needed = 1 + int(np.searchsorted(np.cumsum(probabilities[order]), top_p))
        probabilities[order[needed:]] = 0
        probabilities /= probabilities.sum()
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def counts(parameters, seed=0):
    """[V]: how often each token was drawn."""
    how = sampling(DRAWS, **parameters)
    drawn = jax.jit(draw)(jnp.tile(LOGITS, (DRAWS, 1)), None, row_keys(seed, DRAWS), how)
    return np.bincount(np.asarray(drawn), minlength=len(LOGITS))


def p_value(found, probabilities):
    """Of the chi-squared test; 0 where something impossible was drawn."""
    if found[probabilities == 0].any():
        return 0.0
    possible = probabilities > 0
    return scipy.stats.chisquare(found[possible], found.sum() * probabilities[possible]).pvalue


@pytest.mark.parametrize("parameters", COMBINATIONS, ids=lambda given: " ".join(f"{k}={v}" for k, v in given.items()))
def test_draws_have_the_exact_probabilities(parameters):
    """Chi-squared of 20,000 draws; the seeds are fixed, so that the test is certain."""
    found, probabilities = counts(parameters), exact(LOGITS, **parameters)
    assert probabilities.argmax() == 0
    assert found.sum() == DRAWS
    assert p_value(found, probabilities) > 1e-3


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_wrong_temperature_is_seen(temperature):
    """Control: 10 % more or less."""
    for wrong in (0.9, 1.1):
        assert p_value(counts({"temperature": temperature}), exact(LOGITS, wrong * temperature)) < 1e-6


@pytest.mark.parametrize("leave_out", list(FILTERS))
def test_a_filter_left_out_is_seen(leave_out):
    """Control: draws with one filter are not those without it."""
    assert p_value(counts({"temperature": 1.0}), exact(LOGITS, **{leave_out: FILTERS[leave_out]})) < 1e-3


def test_filters_keep_what_those_of_transformers_keep():
    """The logits behind each combination of filters, on random rows, equal its processors'; each row has its own."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(6, 50))).astype(np.float32)
    ks, ps, ms = [1, 3, 10, 50, 60, 7], [0.1, 0.5, 0.9, 0.999, 1.0, 0.7], [0.0, 0.01, 0.1, 0.5, 1.0, 0.2]
    for use in itertools.product([False, True], repeat=3):
        names = [name for name, used in zip(("top_k", "top_p", "min_p"), use, strict=True) if used]
        values = {"top_k": ks, "top_p": ps, "min_p": ms}
        ours = keep_likely(jnp.asarray(logits), sampling(6, temperature=1.0, **{name: values[name] for name in names}))
        for i, row in enumerate(logits):
            theirs = torch.tensor(row[None])
            if "top_k" in names:
                theirs = transformers.TopKLogitsWarper(ks[i])(None, theirs)
            if "top_p" in names:
                theirs = transformers.TopPLogitsWarper(ps[i])(None, theirs)
            if "min_p" in names:
                theirs = transformers.MinPLogitsWarper(ms[i])(None, theirs)
            np.testing.assert_array_equal(ours[i], theirs[0], str((names, i)))


def test_the_penalty_is_that_of_transformers():
    """Of tokens that the text has, likely and unlikely ones; and of no other."""
    rng = np.random.default_rng(0)
    logits, text = rng.normal(size=(2, 30)).astype(np.float32), rng.integers(0, 30, (2, 9))
    text[:, 0] = logits.argmax(axis=1)
    seen = np.zeros((2, 30), bool)
    np.put_along_axis(seen, text, True, axis=1)
    for penalty in (0.3, 1.0, 1.8, 5.0):
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(text), torch.tensor(logits))
        how = sampling(2, repetition_penalty=penalty)
        ours = draw(jnp.asarray(logits), jnp.asarray(seen), row_keys(0, 2), how)
        np.testing.assert_array_equal(ours, theirs.argmax(-1))
    assert (theirs.argmax(-1).numpy() != logits.argmax(-1)).any()  # control: it changes something


def sorted_cutoff(logits, k, p):
    """[V] bool, in float64: what top-k and then top-p keep of a row, by sorting it."""
    kept = logits >= np.sort(logits)[::-1][min(k, len(logits)) - 1]
    probabilities = np.where(kept, np.exp(np.asarray(logits, np.float64) - logits.max()), 0)
    probabilities /= probabilities.sum()
    likelier = np.array([probabilities[logits > each].sum() for each in logits])
    return kept & (likelier < p)


@given(
    logits=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=16)),
    k=st.integers(1, 50),
    p=st.sampled_from([0.0513, 0.307, 0.617, 0.937]),
)
@settings(deadline=None, max_examples=60)
def test_the_cutoff_is_that_of_a_sorted_row(logits, k, p):
    """Of any sign and size, with ties, and with tokens that a caller excluded."""
    logits = np.append(logits, np.float32(-np.inf))
    row = np.full(64, -np.inf, np.float32)  # one shape, so one program
    row[: len(logits)] = logits
    how = sampling(1, temperature=1.0, top_k=k, top_p=p)
    found = np.asarray(_KEEP(row[None], how))[0]
    np.testing.assert_array_equal(np.isfinite(found), sorted_cutoff(row, k, p) & np.isfinite(row))
    np.testing.assert_array_equal(found[np.isfinite(found)], row[np.isfinite(found)])


def test_a_top_p_of_one_keeps_every_token():
    """Also over a large vocabulary, where a float32 sum reaches 1 before its end."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 200_000)) * 4, jnp.float32)
    kept = keep_likely(logits, sampling(1, temperature=1.0, top_p=1.0))
    np.testing.assert_array_equal(kept, logits)


def test_a_temperature_next_to_zero_takes_the_likeliest():
    """Logits that are divided by it are infinite, all of them, where the largest is not taken off first."""
    logits, keys = jnp.asarray([[1.0, 5.0, 9.0, 9.5]] * 2), row_keys(0, 2)
    for temperature in (2e-38, 1e-30, 1e-3):
        np.testing.assert_array_equal(draw(logits, None, keys, sampling(2, temperature=temperature)), 3)
    drawn = {int(draw(logits, None, row_keys(seed, 2), sampling(2, temperature=5.0))[0]) for seed in range(20)}
    assert len(drawn) > 1  # control


def test_a_top_k_beyond_32_bits_keeps_every_token():
    """As every k above the vocabulary does."""
    logits = jnp.asarray([[1.0, 2.0, 3.0]])
    for k in (3, 2**31, 2**40):
        np.testing.assert_array_equal(keep_likely(logits, sampling(1, temperature=1.0, top_k=k)), logits)
    assert not np.isfinite(keep_likely(logits, sampling(1, temperature=1.0, top_k=2))).all()  # control


def test_a_top_p_that_is_flushed_to_zero_keeps_the_likeliest():
    """And that alone, as any top_p below its probability does."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)) * 3, jnp.float32)
    for top_p in (1e-38, 1e-30):
        kept = np.isfinite(keep_likely(logits, sampling(1, temperature=1.0, top_p=top_p)))
        np.testing.assert_array_equal(np.flatnonzero(kept), [np.argmax(logits)])


def test_each_row_has_its_own_parameters():
    """Greedy beside drawn rows, and a filter of one token for one row alone."""
    how = sampling(4, temperature=[0.0, 1.0, 1.0, 5.0], top_k=[20, 1, 20, 20])
    logits = jnp.tile(np.where(np.arange(len(LOGITS)) == 1, np.float32(1.9), LOGITS), (4, 1))
    drawn = np.asarray(
        jax.vmap(lambda n: draw(logits, None, jax.vmap(jax.random.fold_in, (0, None))(row_keys(0, 4), n), how))(
            jnp.arange(300)
        )
    )
    assert (drawn[:, :2] == 0).all()
    assert len(set(drawn[:, 3])) > len(set(drawn[:, 2])) > 5


def test_a_seed_reproduces():
    """The same tokens from the same seed, others from another; rows of one prompt differ."""
    _, config, params = lively()
    prompt = np.tile(random_tokens((1, 5)), (3, 1))

    def write(**options):
        return np.asarray(generate(config, params, prompt, 16, temperature=1.5, stop_at_eos=False, **options).tokens)

    first = write(seed=3)
    np.testing.assert_array_equal(first, write(seed=3))
    assert (first != write(seed=4)).any()
    assert len({tuple(row) for row in first}) == 3
    # A seed of its own makes a row what it is, whatever else is in the batch.
    rows = write(seed=[7, 8, 7])
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(write(seed=[9, 9, 8])[2], rows[1])
    prompt = prompt[:1]
    np.testing.assert_array_equal(write(seed=[8])[0], rows[1])


def test_generated_tokens_have_the_exact_probabilities():
    """The first token after one prompt, over 4,000 rows: the parameters reach the draw, row by row."""
    _, config, params = lively()
    n = 4000
    prompt = np.tile(random_tokens((1, 5)), (n, 1))
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    found = generate(config, params, prompt, 1, return_logits=True, seed=1, **options)
    probabilities = exact(found.logits[0, 0], **options)
    drawn = np.bincount(np.asarray(found.tokens[:, -1]), minlength=config.vocab_size)
    assert p_value(drawn, probabilities) > 1e-3
    assert p_value(drawn, exact(found.logits[0, 0], 0.4, 20, 0.9)) < 1e-3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": 0}, "top_k is 0; it must be a whole number at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be from 0 to 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be at least 0"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": "0.5"}, "top_p is '0.5'"),
        ({"top_k": [[1], [1, 2]]}, "top_k is [[1], [1, 2]]"),
        ({"temperature": [1.0, 0.5, 0.5]}, "temperature has shape (3,); give one number, or one for each of 2 rows"),
    ],
)
def test_parameters_out_of_range_are_named(given, says):
    """One message with the parameter, its value and its range."""
    with pytest.raises(ValueError, match=re.escape(says)):
        sampling(2, **given)


@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize("temperature", [0, 0.0, [0, 0], np.zeros(2, np.float32), 1e-50])
def test_a_filter_without_a_temperature_is_refused(name, temperature):
    """Nothing is drawn then, so that it would change nothing; beside a row that is drawn it is data like others."""
    value = FILTERS[name]
    with pytest.raises(ValueError, match=f"{name} is {value}, but the temperature is 0.* give a temperature above 0"):
        sampling(2, temperature=temperature, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is "):
        sampling(2, temperature=temperature, **{name: [value, value]})
    _, config, params = lively()
    prompt = random_tokens((2, 5))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        generate(config, params, prompt, 2, temperature=temperature, **{name: value})
    sampling(2, temperature=[0.0, 0.5], **{name: value})  # control
    sampling(2, temperature=temperature, repetition_penalty=1.2)  # which greedy tokens obey


@pytest.mark.parametrize("seed", [1.5, "one", [1, 2, 3], None, jax.random.key(0)])
def test_seeds_are_integers(seed):
    """One, or one for each row."""
    with pytest.raises(ValueError, match="seed is"):
        row_keys(seed, 2)


@pytest.mark.parametrize("seed", [2**32, 2**40, 2**63, -(2**31) - 1, [0, 2**40]])
def test_seeds_have_32_bits(seed):
    """More would be cut, and 2**40 draw what 0 draws; the ends of the range are seeds."""
    with pytest.raises(ValueError, match="32 bits"):
        row_keys(seed, 2)
    assert row_keys([-(2**31), 2**32 - 1], 2).shape == (2,)  # control


def test_seeds_of_any_sign():
    """A negative seed is one like others, and is not cut to another row's."""
    for seed in (-1, 2**32 - 1, [-1, 5], np.asarray([-3, 2], np.int64)):
        first, second = np.asarray(jax.random.key_data(row_keys(seed, 2)))
        assert (first != second).any()


def test_an_extreme_penalty_samples_a_token():
    """Two infinite logits differed by NaN, and the first of them was drawn at every seed."""
    logits, seen = jnp.array([[1.0, 2.0, 3.0, -1.0]]), jnp.array([[False, True, True, False]])
    how = sampling(1, temperature=1.0, repetition_penalty=1e-38)
    drawn = {int(draw(logits, seen, row_keys(seed, 1), how)[0]) for seed in range(30)}
    assert drawn == {1, 2}


def test_stop_tokens_that_are_ignored_are_refused():
    """With `stop_at_eos=False` they had no effect."""
    _, config, params = lively()
    with pytest.raises(ValueError, match="stop_at_eos=False ignores it"):
        generate(config, params, random_tokens((1, 5)), 2, stop_at_eos=False, eos_token_id=3)
