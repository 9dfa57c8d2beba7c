"""Analyses of prompts of many lengths: few programs, and the numbers and shapes of a run at the prompt's length."""

import jax
import numpy as np
import pytest

from gemma3_jax import HookedGemma3
from gemma3_jax.analysis import detect_heads, logit_lens, loss_per_token
from gemma3_jax.hooked import buckets
from tests.helpers.programs import programs
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import assert_same, same, small

PREVIOUS = np.eye(13, k=-1)
ANALYSES = {
    "lens": lambda model, tokens, mask: logit_lens(model, tokens, k=2, targets=5, attention_mask=mask),
    "loss": loss_per_token,
    "kind of head": lambda model, tokens, mask: detect_heads(
        model, tokens, "induction_head", attention_mask=mask, exclude_bos=True
    ),
    "pattern": lambda model, tokens, mask: detect_heads(
        model, tokens, PREVIOUS[: tokens.shape[1], : tokens.shape[1]], attention_mask=mask, error_measure="abs"
    ),
}
MASKS = {
    "none": None,
    "right": np.asarray([[1] * 13, [1] * 9 + [0] * 4]),
    "left": np.asarray([[1] * 13, [0, 0] + [1] * 11]),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_prompts_of_many_lengths_share_a_program(name, monkeypatch):
    """With padding of the user on either side, too."""
    model, analyse, before = HookedGemma3(*small()), ANALYSES[name], programs()
    analyse(model, random_tokens((2, 11)), None)
    found = {side: analyse(model, random_tokens((2, 13)), mask) for side, mask in MASKS.items()}
    assert programs() - before == 1
    monkeypatch.setattr(buckets, "in_bucket", lambda *arguments: None)
    for side, mask in MASKS.items():
        jax.tree.map(assert_same, found[side], analyse(model, random_tokens((2, 13)), mask))
    assert programs() - before > 1


def test_entries_after_the_prompt_would_be_wrong(monkeypatch):
    """Negative control: padding that is not masked counts as text."""
    model, tokens = HookedGemma3(*small()), random_tokens((2, 13))
    expected = detect_heads(model, tokens, "previous_token_head")
    inside = buckets.in_bucket

    def unmasked(*arguments):
        request, metric = inside(*arguments)
        return request.replace(attention_mask=np.ones_like(request.attention_mask)), metric

    monkeypatch.setattr(buckets, "in_bucket", unmasked)
    assert not same(detect_heads(model, tokens, "previous_token_head"), expected)
