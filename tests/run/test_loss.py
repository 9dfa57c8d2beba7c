"""Losses per token and per row: labels that do not count, padding, documents, and labels outside the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import HookedGemma3, edits, forward, grad_at, next_token_loss, stack_layers
from gemma3_jax.analysis import loss_per_token
from gemma3_jax.placing import make_mesh
from tests.helpers.small_model import assert_same, small

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


TEXT, OTHER = [2, 10, 20, 30, 40, 50, 60], [2, 11, 21]
ANSWER = [-100, -100, -100, 30, 41, -100, 60]  # of `TEXT`, with one label that is not the next token
BATCH = {
    "tokens": jnp.asarray([TEXT, [0] * 4 + OTHER]),
    "attention_mask": jnp.asarray([[1] * 7, [0] * 4 + [1] * 3]),
    "labels": jnp.asarray([ANSWER, [-100] * 5 + OTHER[1:]]),
}


@functools.cache
def rows_alone() -> list[float]:
    """The loss of each row of `BATCH`, from its logits alone and torch's mean over the labels that count."""
    means = []
    for tokens, labels in ((TEXT, ANSWER), (OTHER, OTHER)):
        logits = forward(*small(1), jnp.asarray([tokens]))[0][0, :-1]
        means.append(
            float(torch.nn.functional.cross_entropy(torch.as_tensor(np.array(logits)), torch.tensor(labels[1:])))
        )
    return means


@pytest.mark.parametrize("stacked", [False, True])
def test_the_loss_of_each_row(stacked):
    """Of padded rows with labels, in both layouts of the parameters: as that of each row alone."""
    config, params = small(1)
    params = stack_layers(config, params) if stacked else params
    losses, _ = forward(config, params, **BATCH, return_type="loss_per_row")
    wanted = rows_alone()
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    total, _ = forward(config, params, **BATCH, return_type="loss")
    np.testing.assert_allclose(total, np.average(wanted, weights=[3, 2]), rtol=1e-5)
    assert abs(forward(config, params, **{**BATCH, "labels": None}, return_type="loss")[0] - total) > 1e-3  # control


def test_a_row_of_packed_documents():
    """Its mean is over the pairs of both documents; a row without a label that counts has none."""
    tokens, ids = jnp.asarray([TEXT + OTHER] * 2), jnp.asarray([[0] * 7 + [1] * 3] * 2)
    labels = jnp.asarray([ANSWER + OTHER, [-100] * 10])
    losses, _ = forward(*small(1), tokens, segment_ids=ids, labels=labels, return_type="loss_per_row")
    np.testing.assert_allclose(losses, [np.average(rows_alone(), weights=[3, 2]), np.nan], rtol=1e-5)


def test_every_way_to_a_loss_with_labels():
    """Methods in buckets, a collator's mapping, losses per token, gradients at sites, and embeddings as input agree."""
    config, params = small(1)
    model = HookedGemma3(config, params)
    tokens, batch = BATCH["tokens"], {"input_ids": BATCH["tokens"], **{k: v for k, v in BATCH.items() if k != "tokens"}}
    wanted = rows_alone()
    rest = {"attention_mask": BATCH["attention_mask"], "labels": BATCH["labels"]}
    per_token = loss_per_token(model, tokens, **rest)
    embedded = forward(config, params, tokens, "hook_embed", attention_mask=rest["attention_mask"])[1]["hook_embed"]
    for losses in (
        model(tokens, "loss_per_row", **rest),
        model(batch, "loss_per_row"),
        model.run_with_hooks(batch, [("hook_embed", edits.Scale(1.0))], return_type="loss_per_row"),
        jnp.nanmean(per_token, axis=1),
        jnp.nanmean(loss_per_token(model, batch), axis=1),
        forward(config, params, inputs_embeds=embedded, **rest, return_type="loss_per_row")[0],
    ):
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(per_token), np.asarray(BATCH["labels"])[:, 1:] == -100)
    mean = np.average(wanted, weights=[3, 2])
    for losses in (
        model.run_with_cache(tokens, "hook_embed", incl_bwd=True, **rest)[0],
        model.run_with_cache(batch, "hook_embed", incl_bwd=True)[0],
        grad_at(config, params, tokens, "hook_embed", **rest)[0],
    ):
        np.testing.assert_allclose(losses, mean, rtol=1e-5)
    assert model(batch).shape == (2, 7, config.vocab_size)  # logits do not need labels


def test_rows_that_a_mesh_adds_have_no_loss():
    """Three rows on two devices run as four; the labels get a row too, and its loss is dropped."""
    model = HookedGemma3(*small(1), mesh=make_mesh(model=1, devices=jax.devices()[:2]))
    three = {name: jnp.concatenate([x, x[:1]]) for name, x in BATCH.items()}
    first, second = rows_alone()
    losses = model(three.pop("tokens"), "loss_per_row", **three)
    np.testing.assert_allclose(losses, [first, second, first], rtol=1e-5)


def test_gradients_of_one_row():
    """That of a row's loss with respect to the parameters is that of the row alone, as per-example training needs."""
    config, params = small(1)

    def of_row(params):
        return forward(config, params, **BATCH, return_type="loss_per_row")[0][1]

    def alone(params):
        return forward(config, params, jnp.asarray([OTHER]), return_type="loss")[0]

    ours, theirs = jax.jit(lambda params: (jax.grad(of_row)(params), jax.grad(alone)(params)))(params)
    jax.tree.map(lambda a, b: assert_same(a, b, 1e-4), ours, theirs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"return_type": "logits"}, "labels are for a loss, but return_type is 'logits'"),
        ({"labels": [[1, 2]]}, "labels has shape"),
        ({"labels": [[0.5] * 7] * 2}, "labels are float"),
        ({"labels": [[1, -1, 2, 3, 4, 5, 6]] * 2}, "label -1 is outside the vocabulary"),
        ({"stop_at_layer": 1}, "whole model"),
    ],
)
def test_bad_labels(options, says):
    """One error, from the pure function and from the method."""
    given = {**BATCH, "return_type": "loss_per_row", **options}
    given["labels"] = np.asarray(given["labels"])
    with pytest.raises(ValueError, match=says):
        forward(*small(1), **given)
    with pytest.raises(ValueError, match=says):
        HookedGemma3(*small(1))(given.pop("tokens"), **given)
