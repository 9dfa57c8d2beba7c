"""A store gives each token once an epoch, from all over, wherever it begins; and its rows by range and by number."""

import numpy as np
import pytest
import torch

from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.harvest import ActivationStore, StoreError, harvest

WORDS = ["ba", "ke", "lo", "mu", "ti", "so", "re"]


@pytest.fixture(scope="module")
def model():
    """The shipped model."""
    return HookedGemma3.from_pretrained(TINY)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """A store of a few units; the first site has the token's id in its values, so that rows can be recognised."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, n)) for n in generator.integers(1, 30, 60)]
    out = tmp_path_factory.mktemp("store")
    harvest(model, texts, ["embed.hook_in", "blocks.1.hook_out"], out, rows=4, length=64)
    return ActivationStore(out)


def rows_of(batches):
    return np.concatenate([batch.rows for batch in batches])


@pytest.mark.parametrize(("batch", "buffer"), [(1000, 1), (64, 256), (50, 300), (7, 10_000)])
def test_each_token_once(store, batch, buffer):
    """Whatever the sizes; the values belong to the rows; only the last batch may be smaller."""
    batches = list(store.shuffled(batch, buffer=buffer))
    rows = rows_of(batches)
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(store)))
    assert len(batches) == len(store.shuffled(batch, buffer=buffer)) == -(-len(store) // batch)
    assert {len(each.rows) for each in batches[:-1]} <= {batch}
    tokens, documents = store.tokens(0, len(store)), store.documents(0, len(store))
    for each in batches:
        np.testing.assert_array_equal(each["embed.hook_in"], tokens[each.rows])
        np.testing.assert_array_equal(each.documents, documents[each.rows])
        np.testing.assert_array_equal(each["resid_post", 1], store["resid_post", 1].take(each.rows))
    assert (np.diff(rows) != 1).mean() > 0.9  # control: it is not the corpus' order


def test_the_order_depends_on_seed_and_epoch(store):
    """The same for the same; another for another."""
    orders = [
        rows_of(store.shuffled(50, seed, epoch=epoch)).tolist() for seed, epoch in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_parts_share_an_epoch(store):
    """Each token is in one part."""
    parts = [rows_of(store.shuffled(32, part=(i, 3))) for i in range(3)]
    assert min(map(len, parts)) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(store)))


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_it_begins_anywhere(store, start):
    """As after a crash, from the state that was kept."""
    whole = [batch.rows.tolist() for batch in store.shuffled(50, 3, buffer=200)]
    assert [batch.rows.tolist() for batch in store.shuffled(50, 3, buffer=200).from_batch(start)] == whole[start:]
    reader = store.shuffled(50, 3, buffer=200)
    for _, batch in zip(range(start + 1), reader, strict=False):
        last = batch
    assert last.rows.tolist() == whole[start]
    again = store.shuffled(50, 3, buffer=200).restored(reader.state)
    assert [batch.rows.tolist() for batch in again] == whole[start + 1 :]
    with pytest.raises(StoreError, match="seed 3"):
        store.shuffled(50, 4).restored(reader.state)


@pytest.mark.parametrize(("to", "kind"), [("jax", "ArrayImpl"), ("torch", "Tensor"), ("numpy", "ndarray")])
def test_arrays_of_a_batch(store, to, kind):
    """bfloat16 too, with the same values."""
    plain, batch = (next(iter(store.shuffled(8, sites=[("resid_post", 1)], to=each))) for each in ("numpy", to))
    value = batch["blocks.1.hook_out"]
    assert type(value).__name__ == kind
    assert "bfloat16" in str(value.dtype)
    as_floats = value.float() if isinstance(value, torch.Tensor) else value
    np.testing.assert_array_equal(np.asarray(as_floats, np.float32), plain["resid_post", 1].astype(np.float32))
    assert list(batch) == ["blocks.1.hook_out"]


def test_rows(store):
    """Inside a unit and over several; nothing; and absent rows are an error."""
    every = store.tokens(0, len(store))
    bounds = store.bounds("tokens").tolist()
    assert len(bounds) > 3
    for start, stop in [(0, 3), (bounds[1] - 2, bounds[1] + 2), (5, bounds[3] + 1), (7, 7), (bounds[1], bounds[2])]:
        np.testing.assert_array_equal(store["embed.hook_in"].rows(start, stop), every[start:stop])
    assert store["resid_post", 1].rows(0, 3).base is not None  # a view of the file
    for start in (0, len(store) - 3, len(store), len(store) + 5):  # as in a slice
        np.testing.assert_array_equal(store.tokens(start, 10**6), every[start:])
        assert store["resid_post", 1].rows(start, 10**6).shape[1:] == (96,)
    for start, stop in [(-1, 3), (3, 2)]:
        with pytest.raises(IndexError, match="the store has"):
            store.tokens(start, stop)
    with pytest.raises(IndexError):
        store["resid_post", 1].take(np.asarray([len(store)]))
    with pytest.raises(KeyError, match="was not harvested"):
        store["resid_post", 2]
    assert store["model.layers.1.output"].name == "blocks.1.hook_out"


def test_rows_as_numpy_chooses_them(store):
    """An integer, slices, integers that may be negative, and booleans; others are refused by name."""
    site = store["resid_post", 1]
    whole = np.asarray(site)
    mask = np.arange(len(site)) % 7 == 3
    for rows in (5, np.int64(-2), slice(40), slice(-9, None), slice(50, 3, -4), slice(9, 2), [3, 3, -1], mask, []):
        expected = whole[rows] if np.size(rows) else whole[:0]
        np.testing.assert_array_equal(np.asarray(site[rows], np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(site.take(mask), whole[mask])
    assert site[5].shape == (96,)
    for wrong in (mask[1:], [0.5], [[1, 2]]):
        with pytest.raises(StoreError, match=r"rows are .*; they must be integers \[m\] or booleans"):
            site.take(wrong)
    for wrong in (None, "a", 1.5):
        with pytest.raises(StoreError, match=r"rows are .*; they must be integers \[m\] or booleans"):
            site[wrong]
    for wrong in (len(site), -len(site) - 1):
        with pytest.raises(IndexError, match=rf"rows {wrong} to {wrong} .*: the store has"):
            site[wrong]


def test_context(store, model):
    """The text around a token, without its neighbours in the corpus."""
    [rows] = np.nonzero(store.documents(0, len(store)) == 4)
    tokens = store.tokens(int(rows[0]), int(rows[-1]) + 1)
    left, own, right = store.context(int(rows[2]), model.tokenizer, before=99, after=99)
    assert model.to_tokens(f"{left} {own} {right}".replace("<bos>", "").strip())[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 3, "part": (3, 3)}, {"batch": 3, "to": "tf"}])
def test_wrong_arguments(store, options):
    """One clear error."""
    with pytest.raises(StoreError, match="batch is"):
        store.shuffled(**options)
