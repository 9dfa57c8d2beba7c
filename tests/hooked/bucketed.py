"""Prompts of a few lengths for the tests of buckets, and what their results must be."""

import numpy as np

from gemma3_jax import HookedGemma3
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import difference, small

RESIDUAL = "blocks.0.hook_resid_post"
NEXT = ["blocks.1.attn.hook_pattern", "blocks.1.hook_out"]


def model() -> HookedGemma3:
    return HookedGemma3(*small())


def ids(p: int, b: int = 2) -> np.ndarray:
    return random_tokens((b, p))


def assert_same_caches(ours, theirs) -> None:
    """The same sites in the same order, with the same shapes, dtypes and numbers, and the same gradients."""
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert difference(ours[name], theirs[name]) < 2e-5, name
    if theirs.grads is not None:
        assert_same_caches(ours.grads, theirs.grads)
