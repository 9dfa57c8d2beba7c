"""The KV cache: what is read in pieces equals what is read at once, at every position and every site."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import Gemma3Config, forward
from gemma3_jax.generation.kv_cache import append, cache_bytes, empty_cache, past, positions, slots
from tests.helpers.greedy_texts import CONFIG, parameters
from tests.helpers.lively_model import at_real_tokens
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import difference

BAR = 5e-6  # of relative error, as in the tests of parity; float32 rounding gives about 1e-6
LENGTH = 30  # more than four windows of 7
TOKENS = jnp.asarray(random_tokens((3, LENGTH)), jnp.int32)
START = jnp.asarray([0, 3, 10])  # the padding of each row; the last row's goes beyond a window
MASK = (np.arange(LENGTH) >= np.asarray(START)[:, None]).astype(np.int32)
SOME = ("blocks.*.hook_out", "blocks.*.attn.hook_pattern", "blocks.*.attn.hook_rot_k", "blocks.*.attn.v.hook_out")


@functools.cache
def at_once(capture):
    """Logits and sites of one pass over the whole text, without a cache."""
    run = jax.jit(lambda params: forward(CONFIG, params, TOKENS, capture, attention_mask=MASK))
    logits, cache = run(parameters())
    return np.asarray(logits), cache.numpy()


@functools.partial(jax.jit, static_argnames=("capture", "config"))
def read_piece(params, tokens, mask, cache, capture, config=CONFIG):
    """Logits and sites of some more columns, and the cache with them; the cache keeps the window of `config`."""
    p = tokens.shape[1]
    seen = past(config, cache, p)
    logits, found = forward(
        CONFIG, params, tokens, capture, attention_mask=mask, positions=positions(cache, p), past=seen
    )
    layers = range(CONFIG.num_hidden_layers)
    keys = [found[f"blocks.{i}.attn.hook_rot_k"] for i in layers]
    values = [found[f"blocks.{i}.attn.v.hook_out"] for i in layers]
    return logits, found, append(cache, keys, values)


def in_pieces(sizes, capture=SOME, spoil=lambda cache: cache, config=CONFIG):
    """The largest difference of logits and of each site from `at_once`, reading pieces of these sizes."""
    logits, cache = at_once(capture)
    kept = empty_cache(config, START, LENGTH)
    worst = dict.fromkeys(["logits", *cache], 0.0)
    at = 0
    for p in sizes:
        here = slice(at, at + p)
        kept = spoil(kept) if at == 12 else kept
        ours, found, kept = read_piece(parameters(), TOKENS[:, here], MASK[:, here], kept, capture, config)
        real = MASK[:, here].astype(bool)
        found, theirs = found.numpy(), cache.sliced(positions=here)
        pairs = {name: (_real(name, found[name], real), _real(name, theirs[name], real)) for name in found}
        pairs["logits"] = np.asarray(ours)[real], logits[:, here][real]
        worst = {name: max(worst[name], difference(*pair)) for name, pair in pairs.items()}
        at += p
    assert at == LENGTH
    return worst


def _real(name, value, real):
    """`at_real_tokens` of a piece, with the keys of the whole text."""
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        return np.where(real[:, None, :, None], value, 0)
    return at_real_tokens(name, value, real)


def test_every_site_is_the_same_from_a_cache():
    """Each site at each position: a first piece of more than a window, then token by token through four windows."""
    worst = in_pieces([9] + [1] * (LENGTH - 9), "**")
    assert set(worst) == {"logits", *at_once("**")[1]}
    assert max(worst.values()) < BAR, max(worst, key=worst.get)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([1, 3, 7, 15]), min_size=1, max_size=12))
def test_pieces_of_any_size_give_the_same(sizes):
    """Pieces shorter than a window, of one, and longer, so that the ring wraps within and between them."""
    total = np.cumsum(sizes)
    sizes = [size for size, end in zip(sizes, total, strict=True) if end <= LENGTH]
    sizes += [1] * (LENGTH - sum(sizes))
    worst = in_pieces(sizes)
    assert max(worst.values()) < BAR


def _a_column_lost(cache):
    return cache.replace(length=cache.length + 1)


def _a_slot_off(cache):
    return cache.replace(keys=tuple(jnp.roll(keys, 1, axis=1) for keys in cache.keys))


def _padding_seen(cache):
    return cache.replace(start=jnp.maximum(cache.start - 1, 0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"spoil": _a_column_lost},
        {"spoil": _a_slot_off},
        {"spoil": _padding_seen},
        {"config": dataclasses.replace(CONFIG, sliding_window=8)},
    ],
    ids=["column", "slot", "padding", "window"],
)
def test_a_wrong_cache_is_seen(wrong):
    """Control: off by a column, a slot or a padding token in the middle of the text, or a window of 8 in place of 7."""
    assert in_pieces([1] * LENGTH)["logits"] < BAR
    assert in_pieces([1] * LENGTH, **wrong)["logits"] > 100 * BAR


def test_local_layers_keep_a_window():
    """A ring has as many slots as the window, and no more than the text needs."""
    cache = empty_cache(CONFIG, START, LENGTH)
    assert [keys.shape[1] for keys in cache.keys] == [7, LENGTH, 7]
    assert slots(CONFIG, "sliding_attention", 5) == 5
    # But for layers that are to keep every column, which take what a global one does.
    cache = empty_cache(CONFIG, START, LENGTH, whole={0})
    assert [keys.shape[1] for keys in cache.keys] == [LENGTH, LENGTH, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", [None, "270m", "1b"])
@pytest.mark.parametrize("capacity", [5, 700])
def test_the_stated_memory_is_what_is_allocated(preset, capacity, dtype):
    """`cache_bytes` equals the bytes of `empty_cache`, below the window and beyond, and so does the cost of a token."""
    config = CONFIG if preset is None else Gemma3Config.preset(preset)

    def nbytes(capacity, kinds=("full_attention", "sliding_attention")):
        cache = jax.eval_shape(lambda: empty_cache(config, jnp.zeros(2, jnp.int32), capacity, dtype=dtype))
        layers = [i for i, kind in enumerate(config.layer_types) if kind in kinds]
        return sum(x[i].size * x[i].dtype.itemsize for x in (cache.keys, cache.values) for i in layers)

    stated = cache_bytes(config, 2, capacity, dtype)
    assert stated["total"] == nbytes(capacity)
    assert all(stated[kind] == nbytes(capacity, (kind,)) for kind in ("full_attention", "sliding_attention"))
    assert stated["per_token"] == nbytes(701) - nbytes(700)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"batch": -1}, {"batch": 1.5}, {"capacity": -5}, {"capacity": True}])
def test_memory_of_no_rows_or_columns_is_refused(wrong):
    """It came out negative, or as a fraction of a byte."""
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a positive integer"):
        cache_bytes(CONFIG, **{"batch": 1, "capacity": 1, **wrong})
    assert cache_bytes(CONFIG, np.int64(1), np.int32(2)) == cache_bytes(CONFIG, 1, 2)


def test_the_bytes_are_real():
    """The arrays on the device have the bytes that were stated."""
    cache = empty_cache(CONFIG, START, LENGTH)
    assert sum(x.nbytes for x in (*cache.keys, *cache.values)) == cache_bytes(CONFIG, 3, LENGTH)["total"]


def test_it_is_a_pytree():
    """Keys and values of each layer, the padding and the length; nothing else is kept anywhere."""
    leaves = jax.tree.leaves(empty_cache(CONFIG, START, LENGTH))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == 2 * CONFIG.num_hidden_layers + 2


def filled(columns, capacity):
    """The cache of the first columns of the text."""
    names = [
        f"blocks.{i}.attn.{site}" for site in ("hook_rot_k", "v.hook_out") for i in range(CONFIG.num_hidden_layers)
    ]
    _, values = forward(CONFIG, parameters(), TOKENS[:, :columns], names, attention_mask=MASK[:, :columns])
    both = [values[name] for name in names]
    keys, values = both[: len(both) // 2], both[len(both) // 2 :]
    return append(empty_cache(CONFIG, START, capacity, keys), keys, values), keys, values


def test_default_positions_are_those_after_the_past():
    """They began at 0 again, so that the rotary embedding was wrong."""
    cache, _, _ = filled(20, LENGTH)
    seen, rest = past(CONFIG, cache, LENGTH - 20), TOKENS[:, 20:]
    logits, _ = forward(CONFIG, parameters(), rest, past=seen)
    wanted, _ = forward(CONFIG, parameters(), rest, past=seen, positions=positions(cache, LENGTH - 20))
    np.testing.assert_array_equal(logits, wanted)
    at_zero = jnp.broadcast_to(jnp.arange(LENGTH - 20), rest.shape)
    other, _ = forward(CONFIG, parameters(), rest, past=seen, positions=at_zero)
    assert difference(other, wanted) > 1e-2  # control


def test_columns_beyond_the_capacity_are_refused():
    """They replaced the oldest columns of global layers."""
    cache, keys, values = filled(4, 8)
    full = append(cache, keys, values)
    with pytest.raises(ValueError, match="4 columns after 8 exceed the capacity of 8"):
        append(full, keys, values)
