"""The loss per token: labels that do not count, and labels outside the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import next_token_loss

V, P = 13, 6
LOGITS = np.random.default_rng(0).normal(size=(2, P, V)).astype(np.float32) * 3
IDS = st.lists(st.lists(st.sampled_from([-100, *range(V)]), min_size=P, max_size=P), min_size=2, max_size=2)


def torch_loss(tokens: np.ndarray) -> float:
    """As Hugging Face has it: labels of -100 are ignored."""
    logits, labels = torch.as_tensor(LOGITS[:, :-1]).flatten(0, 1), torch.as_tensor(tokens[:, 1:]).flatten()
    return float(torch.nn.functional.cross_entropy(logits, labels))


@settings(deadline=None, max_examples=60)
@given(IDS.map(np.array))
def test_ignored_labels_do_not_count(tokens):
    """Anywhere, in jit and out of it; where nothing counts the loss is NaN, as torch has it."""
    wanted = torch_loss(tokens)
    for loss in (next_token_loss(LOGITS, tokens), jax.jit(next_token_loss)(LOGITS, tokens)):
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_an_ignored_label_is_no_other():
    """Control: -100 is not token V - 100, of which 104 tokens have one; and ignoring it changes the mean."""
    logits = np.random.default_rng(1).normal(size=(1, 4, 104)).astype(np.float32)
    kept = next_token_loss(logits[:, :3], np.array([[1, 2, 3]]))
    np.testing.assert_allclose(next_token_loss(logits, np.array([[1, 2, 3, -100]])), kept, rtol=1e-6)
    assert abs(next_token_loss(logits, np.array([[1, 2, 3, 4]])) - kept) > 1e-2


@pytest.mark.parametrize("label", [-1, -99, -101, V, 2**31 - 1])
def test_no_other_label_counts(label):
    """One error that names it, and NaN where it is traced, with no finite gradients; the first token is not a label."""
    tokens = np.array([[1, 2, 3, 4, 5, 6], [1, 2, label, 4, 5, 6]])
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of {V}"):
        next_token_loss(LOGITS, tokens)
    assert np.isnan(jax.jit(next_token_loss)(LOGITS, tokens))
    tokens[1, 2], tokens[1, 0] = 3, label
    assert np.isfinite(next_token_loss(LOGITS, tokens))


def test_small_dtypes_do_not_wrap():
    """Of unsigned bytes 156 is a token like any other, though -100 has its bits."""
    logits = np.random.default_rng(2).normal(size=(1, 3, 200)).astype(np.float32)
    tokens = np.array([[1, 156, 2]], np.uint8)
    for call in (next_token_loss, jax.jit(next_token_loss)):
        np.testing.assert_allclose(call(logits, tokens), next_token_loss(logits, tokens.astype(np.int32)), rtol=1e-6)
    assert np.isnan(jax.jit(next_token_loss)(logits[..., :100], tokens))  # beyond a vocabulary of 100


def test_gradients_pass_ignored_labels_by():
    """Finite, and zero where a label is ignored or two documents meet."""
    tokens = jnp.asarray([[1, 2, -100, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    ids = jnp.asarray([[0] * 6, [0, 0, 0, 1, 1, 1]])
    gradient = jax.grad(next_token_loss)(jnp.asarray(LOGITS), tokens, None, ids)
    assert np.isfinite(gradient).all()
    still = ~np.any(gradient, axis=-1)
    assert np.argwhere(still).tolist() == [[0, 1], [0, 5], [1, 2], [1, 5]]


def test_shapes_that_would_broadcast_are_refused():
    """One row of tokens, mask or documents for two of logits counted for both."""
    tokens = np.ones((2, P), int)
    for arguments in ((tokens[:1],), (tokens, tokens[:1]), (tokens, None, tokens[:1]), (tokens[:, 1:],)):
        with pytest.raises(ValueError, match="has shape"):
            next_token_loss(LOGITS, *arguments)


def test_an_additive_mask_is_refused():
    """0 at real tokens, as added to scores, marked them as padding and the padding as real."""
    with pytest.raises(ValueError, match="attention_mask must be 1"):
        next_token_loss(LOGITS, np.ones((2, P), int), np.array([[0.0] * 4 + [-1e9] * 2] * 2))
