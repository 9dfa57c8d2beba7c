"""Texts that a small model writes greedily behind padded prompts, for the tests of generation."""

import functools
from typing import Any

import jax
import numpy as np

from gemma3_jax import TINY, Gemma3Config, HookedGemma3, forward
from gemma3_jax.generation.loop import generate
from tests.helpers.lively_model import lively
from tests.helpers.random_models import hf_config, random_tokens

BAR = 5e-6
CONFIG = Gemma3Config.from_hf(hf_config())
LENGTHS = (12, 5, 9)
NEW = 40  # with the prompt, seven windows of 7
P = max(LENGTHS)
TOKENS = random_tokens((3, P))
MASK = (np.arange(P) >= P - np.asarray(LENGTHS)[:, None]).astype(np.int32)


def parameters() -> Any:
    """The parameters of the lively model, which has `CONFIG`."""
    _, config, params = lively()
    assert config == CONFIG
    return params


@functools.cache
def tiny() -> HookedGemma3:
    """The shipped model in float32."""
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def write(new=NEW, config=CONFIG, params=None, **options):
    """The texts, from the lively model's parameters where no others are given."""
    params = parameters() if params is None else params
    return generate(config, params, TOKENS, new, **{"attention_mask": MASK, "stop_at_eos": False, **options})


@functools.cache
def full(capture=(), new=NEW):
    """Logits and sites of one forward over the text that is written greedily."""
    written = write(new)
    run = jax.jit(lambda tokens, mask: forward(CONFIG, parameters(), tokens, capture, attention_mask=mask))
    return run(written.tokens, written.attention_mask)
