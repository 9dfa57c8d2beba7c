"""`HookedGemma3.from_pretrained`: a directory becomes a model, with its tokenizer where there is one."""

import jax.numpy as jnp
import pytest

from gemma3_jax import HookedGemma3
from tests.hooked.word_model import (
    BOS,
    IDS,
    SENTENCE,
    SENTENCE_IDS,
    assert_close,
    hf,
    hf_values,
    hooked,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with its tokenizer, as transformers writes them."""
    path = tmp_path_factory.mktemp("checkpoint")
    hf().save_pretrained(path)
    make_tokenizer(adds_bos=True).save_pretrained(path)
    return path


def test_from_pretrained(directory):
    """A directory gives the model and its tokenizer."""
    model = HookedGemma3.from_pretrained(directory)
    assert model.to_tokens(SENTENCE).tolist() == [[BOS, *SENTENCE_IDS]]
    assert_close(model(IDS), hf_values()[0])
    assert model.W_E.dtype == jnp.float32
    assert model.config == hooked().config


def test_from_pretrained_in_another_dtype(directory):
    """The parameters have the dtype that is asked for, but for the norms; a path may be a string."""
    model = HookedGemma3.from_pretrained(str(directory), dtype="bfloat16")
    assert model.W_Q.dtype == model.W_E.dtype == jnp.bfloat16
    assert model.params["ln_final"]["weight"].dtype == jnp.float32


def test_from_pretrained_without_tokenizer(tmp_path):
    """A directory without a tokenizer gives a model for ids."""
    hf().save_pretrained(tmp_path)
    model = HookedGemma3.from_pretrained(tmp_path)
    assert model.tokenizer is None
    assert_close(model(IDS), hf_values()[0])
    with pytest.raises(ValueError, match="no tokenizer"):
        model("sun")
