"""Calling a `HookedGemma3`: logits and losses of text and ids, padded or not, and one error for each bad argument."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers.random_models import SMALL
from tests.hooked.word_model import IDS, LONG, PAD, PADDED, assert_close, differ, hf, hf_values, hooked


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.to_tokens([]), "a text has no tokens"),
        (lambda model: model.to_tokens("", prepend_bos=False), "a text has no tokens"),
        (lambda model: model.to_tokens(["sun", ""], prepend_bos=False), "a text has no tokens"),
        (lambda model: model.to_tokens("sun", padding_side="middle"), "padding_side is 'middle'"),
        (lambda model: model([]), "at least one"),
        (lambda model: model([[]]), "at least one token"),
        (lambda model: model([1.0, 2.0]), "must be integers"),
        (lambda model: model([[1, 2], [3]]), "different lengths"),
        (lambda model: model(np.zeros((1, 2, 3), int)), "must be integers"),
        (lambda model: model(np.array([True, False])), "must be integers"),
        (lambda model: model(5), "token ids"),
        (lambda model: model(None), "token ids"),
        (lambda model: model(np.array(["sun", "moon"])), "the input is array.* and texts a str or a list of str"),
        (lambda model: model(text for text in ["sun"]), "token ids must be integers .* and texts a str"),
        (lambda model: model("sun \ud83d"), r"a text has '\\ud83d' at index 4, a lone surrogate"),
        (lambda model: model.to_string([[1, 2], [3]]), "rows of ids have different lengths"),
        (lambda model: model([3, 101]), "token id 101 is outside the vocabulary of 101"),
        (lambda model: model([3, -1]), "token id -1 is outside"),
        (lambda model: model(IDS, return_type="logit"), "return_type is 'logit'"),
        (lambda model: model(IDS, return_type="loss", stop_at_layer=1), "whole model"),
        (lambda model: model(IDS, stop_at_layer=3), "2 layers"),
        (lambda model: model(IDS, stop_at_layer=1.0), "stop_at_layer is 1.0; it must be an integer"),
        (lambda model: model(IDS, attention_mask=np.ones((2, 3), int)), "attention_mask has shape"),
        (lambda model: model.run_with_cache(IDS, "blocks.0.hook_outt"), "no site is named"),
        (lambda model: model.run_with_cache(IDS, lambda name: False), "does not match a site"),
        (
            lambda model: model.run_with_hooks(IDS, [(lambda name: "outt" in name, lambda v, h: v)]),
            "does not match a site",
        ),
        (lambda model: model.run_with_cache(IDS, "blocks.1.hook_out", stop_at_layer=1), "never runs"),
        (lambda model: model.run_with_hooks(IDS, [("blocks.9.hook_out", lambda v, h: v)]), "no site is named"),
        (lambda model: model.run_with_hooks(IDS, [("blocks.0.hook_out", lambda v, h: None)]), "returned None"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", remove_batch_dim=True), "batch of 1"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", pos_slice=9), "position"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", pos_slice=-10), "position"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", pos_slice=[0, 1]), r"pos_slice is \[0, 1\]; it must be"),
        (lambda model: model.run_with_cache(IDS, 3), "3 does not name sites"),
        (lambda model: model.run_with_cache(IDS, ["hook_embed", None]), "None does not name sites"),
        (lambda model: model.run_with_cache(IDS, [("resid_post", 1)]), "does not name sites.* get_act_name"),
        (lambda model: model.run_with_cache(IDS, "resid_post"), r"write get_act_name\('resid_post', layer\)"),
        (lambda model: model.run_with_hooks(IDS, [([], lambda v, h: v)]), r"\[\] has no names of sites"),
        (lambda model: model.run_with_hooks(IDS, [(lambda v, h: v, "hook_embed")]), "is 'hook_embed'; an edit is"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", incl_bwd=True, loss_fn=lambda x: None), "returned None"),
    ],
)
def test_bad_arguments(call, says):
    """Each is one error that says what is wrong."""
    with pytest.raises((ValueError, TypeError, IndexError), match=says):
        call(hooked())


def test_a_model_without_tokenizer():
    """Ids run as ever; text is an error that says what to do, from every method that would need the tokenizer."""
    model = hooked(tokenizer=False)
    assert model(IDS).shape == (2, 9, 101)
    for call in (model, model.to_tokens, model.to_str_tokens, model.to_single_token, model.run_with_cache):
        with pytest.raises(ValueError, match="no tokenizer"):
            call("sun")
    with pytest.raises(ValueError, match="no tokenizer"):
        model.to_string([1, 2])


def test_logits_are_hugging_faces():
    """A plain call gives Hugging Face's logits."""
    assert_close(hooked()(IDS), hf_values()[0])


@pytest.mark.parametrize("ids", [IDS, IDS.tolist(), tuple(map(tuple, IDS)), jnp.asarray(IDS), IDS.astype(np.uint8)])
def test_ids_in_any_container(ids):
    """Lists, tuples, numpy and jax arrays of ids are one input; a row alone is a batch of one."""
    model = hooked()
    assert_close(model(ids), hf_values()[0])
    assert model(ids[0], stop_at_layer=0).shape == (1, 9, SMALL["hidden_size"])
    np.testing.assert_array_equal(model(ids[0], stop_at_layer=0), model(IDS[:1], stop_at_layer=0))


def test_texts_of_unequal_length_run_as_they_do_alone():
    """Each row of a padded batch has, at its real tokens, the logits and activations of the text alone."""
    model = hooked()
    name, together = "blocks.1.attn.hook_z", np.asarray(model(PADDED))
    assert together.shape == (2, 9, SMALL["vocab_size"])
    _, cache = model.run_with_cache(PADDED, name, return_type=None)
    for i, (text, length) in enumerate(zip(PADDED, (2, 9), strict=True)):
        alone = model(text)
        assert alone.shape == (1, length, SMALL["vocab_size"])
        assert_close(together[i, :length], alone[0])
    assert_close(cache[name][1], model.run_with_cache(LONG, name, return_type=None)[1][name][0])


def test_left_padding_by_attention_mask():
    """A left-padded batch gives each row's own logits, with its mask or without; unmasked, it does not."""
    model = hooked()
    tokens = model.to_tokens(PADDED, padding_side="left")
    mask = np.asarray(tokens) != PAD
    masked, right = np.asarray(model(tokens, attention_mask=mask.astype(np.int32))), np.asarray(model(PADDED))
    assert_close(masked[0, 7:], right[0, :2])
    assert_close(masked[1], right[1])
    np.testing.assert_array_equal(model(tokens), masked)
    assert differ(np.asarray(model(tokens, attention_mask=np.ones_like(mask)))[0, 7:], right[0, :2])  # control
    # a row's mask, of booleans
    row = model(tokens[0], attention_mask=mask[0], stop_at_layer=0)
    np.testing.assert_array_equal(row, model(tokens, stop_at_layer=0)[:1])


def test_return_types():
    """Logits, the loss that Hugging Face gives for labels, both, or nothing at all."""
    model = hooked()
    with torch.no_grad():
        expected = hf()(torch.as_tensor(IDS), labels=torch.as_tensor(IDS)).loss.item()
    assert model(IDS, return_type="loss") == pytest.approx(expected, rel=1e-5)
    logits, loss = model(IDS, return_type="both")
    assert_close(logits, hf_values()[0])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss.shape == ()
    assert model(IDS, return_type=None) is None
    out, cache = model.run_with_cache(IDS, "blocks.0.hook_out", return_type=None)
    assert out is None
    assert list(cache) == ["blocks.0.hook_out"]


def test_the_loss_leaves_padding_out():
    """Padded texts have Hugging Face's loss with the labels at padding set aside, on either side."""
    model = hooked()
    for side in ("right", "left"):
        tokens = np.array(model.to_tokens(PADDED, padding_side=side), np.int64)
        mask = (tokens != PAD).astype(np.int32)
        labels = np.where(mask == 1, tokens, -100)
        labels[np.arange(2), mask.argmax(axis=1)] = -100  # nothing predicts a row's first token
        inputs = {"attention_mask": torch.as_tensor(mask), "labels": torch.as_tensor(labels)}
        with torch.no_grad():
            expected = hf()(torch.as_tensor(tokens), **inputs).loss.item()
        assert model(tokens, return_type="loss", attention_mask=mask) == pytest.approx(expected, rel=1e-5)
    assert model(PADDED, return_type="loss") == pytest.approx(expected, rel=1e-5)
    assert model(tokens, return_type="loss") == pytest.approx(expected, rel=1e-5)
    # Control: unmasked, padding counts.
    assert abs(model(tokens, return_type="loss", attention_mask=np.ones_like(mask)) - expected) > 1e-3
