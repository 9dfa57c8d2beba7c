"""Texts that a small model writes greedily behind padded prompts, for the tests of generation."""

import functools

import jax
import numpy as np
from lively_model import lively
from random_models import random_tokens

from gemma3_jax import TINY, HookedGemma3, forward
from gemma3_jax.generation.generate import generate

BAR = 5e-6
_, CONFIG, PARAMS = lively()
LENGTHS = (12, 5, 9)
NEW = 40  # with the prompt, seven windows of 7
P = max(LENGTHS)
TOKENS = random_tokens((3, P))
MASK = (np.arange(P) >= P - np.asarray(LENGTHS)[:, None]).astype(np.int32)


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def write(new=NEW, config=CONFIG, params=PARAMS, **options):
    return generate(config, params, TOKENS, new, **{"attention_mask": MASK, "stop_at_eos": False, **options})


@functools.cache
def full(capture=(), new=NEW):
    """Logits and sites of one forward over the text that is written greedily."""
    found = write(new)
    run = jax.jit(lambda tokens, mask: forward(CONFIG, PARAMS, tokens, capture, attention_mask=mask))
    return run(found.tokens, found.attention_mask)
