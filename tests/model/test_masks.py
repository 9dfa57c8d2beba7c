"""Who sees whom, and by which angles: masks against one decision per entry, rotary tables against Hugging Face."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, apply_rotary_pos_emb

from gemma3_jax import Gemma3Config, Rope
from gemma3_jax.model.masks import mask_of
from gemma3_jax.model.rope import rope_tables, rotate
from tests.helpers.random_models import hf_config

CONFIG = Gemma3Config.from_hf(hf_config())
KINDS = ("sliding_attention", "full_attention")
LENGTH = 11  # one length, longer than most windows below, so that each operation compiles once


def sees(query: int, key: int, *, kind: str, window: int, bidirectional: bool) -> bool:
    """Whether a query sees a real key: the rule of the paper, one entry at a time."""
    if bidirectional:
        return kind == "full_attention" or abs(query - key) < window // 2 + 1
    return query - key >= 0 and (kind == "full_attention" or query - key < window)


def reference(mask: np.ndarray, **rule) -> np.ndarray:
    entries = [
        [[real and sees(query, key, **rule) for key, real in enumerate(row)] for query in range(LENGTH)] for row in mask
    ]
    return np.array(entries, bool)


def masks(window: int, bidirectional: bool, kind: str, mask: np.ndarray | None) -> np.ndarray:
    config = dataclasses.replace(CONFIG, sliding_window=window, use_bidirectional_attention=bidirectional)
    found = mask_of(config, kind, LENGTH, None if mask is None else jnp.asarray(mask))
    return np.asarray(found.seen(jnp.arange(LENGTH), jnp.arange(LENGTH)))


# Any pattern of padding, not only at the ends: visibility is decided key by key.
PADDING = st.lists(st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2).map(np.array)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.booleans(), st.sampled_from(KINDS), PADDING)
def test_visible_is_the_rule_entry_by_entry(window, bidirectional, kind, mask):
    """Causal or both ways, sliding or full, under any padding: every entry is as the rule has it."""
    rule = {"kind": kind, "window": window, "bidirectional": bidirectional}
    np.testing.assert_array_equal(masks(window, bidirectional, kind, mask), reference(mask, **rule))
    whole = masks(window, bidirectional, kind, None)
    np.testing.assert_array_equal(whole, reference(np.ones((1, LENGTH), int), **rule))


@pytest.mark.parametrize(
    ("bidirectional", "window", "other"),
    [(False, 4, 5), (False, 4, 3), (True, 4, 6), (True, 4, 2), (True, 7, 8)],
)
def test_a_window_off_by_one_is_seen(bidirectional, window, other):
    """Control: a window one wider or narrower gives another mask in sliding layers, and the same in full ones."""
    ours, rule = masks(window, bidirectional, "sliding_attention", None), {"bidirectional": bidirectional}
    wrong = reference(np.ones((1, LENGTH), int), kind="sliding_attention", window=other, **rule)
    assert (ours != wrong).any()
    full = reference(np.ones((1, LENGTH), int), kind="full_attention", window=other, **rule)
    np.testing.assert_array_equal(masks(window, bidirectional, "full_attention", None), full)


def test_the_window_counts_the_query():
    """A sliding window of w is the query and the w - 1 tokens before it; both ways, w // 2 on either side."""
    assert masks(3, False, "sliding_attention", None)[0, 5].nonzero()[0].tolist() == [3, 4, 5]
    assert masks(1, False, "sliding_attention", None)[0, 5].nonzero()[0].tolist() == [5]
    assert masks(4, True, "sliding_attention", None)[0, 5].nonzero()[0].tolist() == [3, 4, 5, 6, 7]
    assert masks(5, True, "sliding_attention", None)[0, 5].nonzero()[0].tolist() == [3, 4, 5, 6, 7]


# --- rotary embedding -----------------------------------------------------------------------------------------------


def hf_tables(positions: np.ndarray, kind: str, head_dim: int, theta: float, factor: float):
    """Hugging Face's cosines and sines for a layer of that kind; the other kind has an angle of its own."""
    entry = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    entries = {other: {"rope_type": "default", "rope_theta": 123.0} for other in KINDS}
    config = hf_config(head_dim=head_dim, rope_parameters={**entries, kind: {**entry, "rope_theta": theta}})
    rotary = Gemma3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.as_tensor(positions), kind)
    rope = Gemma3Config.from_hf(config).rope(kind)
    assert rope == Rope(theta, factor)
    return rope, cos.numpy(), sin.numpy()


def angle_error(positions: np.ndarray) -> float:
    """How far two correct float32 tables may be apart: their frequencies differ in the last bit or two."""
    return 1e-6 + 2.0**-22 * float(positions.max())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4096), min_size=LENGTH, max_size=LENGTH),
    st.sampled_from(KINDS),
    st.sampled_from([2, 10, 64, 256]),
    st.sampled_from([10_000.0, 1_000_000.0, 500.0]),
    st.sampled_from([1.0, 8.0, 3.0]),
)
def test_rope_tables_are_hugging_faces(positions, kind, head_dim, theta, factor):
    """Cosines and sines at any positions, bases, factors and head sizes are those of Hugging Face."""
    positions = np.array([positions])
    rope, cos, sin = hf_tables(positions, kind, head_dim, theta, factor)
    ours = rope_tables(rope, jnp.asarray(positions), head_dim)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=angle_error(positions))


@pytest.mark.parametrize(
    "wrong", [Rope(10_000.0, 8.0), Rope(1_000_000.0), Rope(1_000_000.0, 7.0), Rope(1_000_000.0, 1 / 8)]
)
def test_a_wrong_rope_is_seen(wrong):
    """Control: another base, no factor, another factor, or its inverse is far beyond the bound."""
    positions = np.arange(LENGTH)[None] * 40
    right, cos, _ = hf_tables(positions, "full_attention", 64, 1_000_000.0, 8.0)
    assert np.abs(rope_tables(right, jnp.asarray(positions), 64)[0] - cos).max() <= angle_error(positions)
    assert np.abs(rope_tables(wrong, jnp.asarray(positions), 64)[0] - cos).max() > 100 * angle_error(positions)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 10]))
def test_rotation_is_hugging_faces_and_keeps_lengths(seed, head_dim):
    """Rotating pairs feature i with i + e/2 as Hugging Face does, changes no length, and turns back by -angle."""
    x = np.random.default_rng(seed).normal(size=(2, LENGTH, 3, head_dim)).astype(np.float32)
    positions = np.arange(LENGTH)[None] + seed % 50
    rope, cos, sin = hf_tables(positions, "sliding_attention", head_dim, 10_000.0, 1.0)
    ours = rotate(jnp.asarray(x), *rope_tables(rope, jnp.asarray(positions), head_dim))
    heads_first = torch.as_tensor(x).transpose(1, 2)
    theirs, _ = apply_rotary_pos_emb(heads_first, heads_first, torch.as_tensor(cos), torch.as_tensor(sin))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    back = rotate(ours, *(jnp.asarray(table * sign) for table, sign in zip((cos, sin), (1, -1), strict=True)))
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-4)
    interleaved = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
    if head_dim > 2:  # control: pairing neighbours is another rotation
        assert np.abs(rotate(jnp.asarray(interleaved), jnp.asarray(cos), jnp.asarray(sin)) - ours).max() > 0.1
