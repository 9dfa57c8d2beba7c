"""Metrics of a small model, and their gradients at its sites."""

import functools

import jax
import jax.numpy as jnp

from gemma3_jax.run.gradients import grad_at
from tests.helpers.small_model import (
    TOKENS,
    direction,
    small,
)

PADDING = 4


def difference_of_logits(logits):
    """How much likelier token 5 is than token 7, on average behind the padding; in jax and in torch."""
    return (logits[:, PADDING:, 5] - logits[:, PADDING:, 7]).mean()


WEIGHTS = direction()  # [d], the direction that a metric of the residual stream reads
PRE, MID, POST = "blocks.0.hook_in", "blocks.0.hook_resid_mid", "blocks.0.hook_out"
ATTN_OUT, MLP_OUT = "blocks.0.ln1_post.hook_out", "blocks.0.ln2_post.hook_out"
K, ROT_K, PATTERN, Z = (f"blocks.0.attn.{name}" for name in ("k.hook_out", "hook_rot_k", "hook_pattern", "o.hook_in"))
OWN_INPUT = "blocks.0.hook_attn_in"


def gradients(names, metric=difference_of_logits, **options):
    config, params = small(1)
    return jax.jit(lambda params: grad_at(config, params, TOKENS, names, metric, **options))(params)


@functools.cache
def plain():
    """(value, cache) of the logit difference."""
    return gradients((PRE, OWN_INPUT, PATTERN, POST))


def along(stream) -> jax.Array:
    """A scalar of a residual stream, not linear, and another at every position."""
    return jnp.sum(jnp.sin(stream @ WEIGHTS) * jnp.arange(1, 10))


@functools.cache
def along_post():
    """(value, cache) of a metric that reads the residual stream behind the block."""
    return gradients((PRE, POST), lambda logits, cache: along(cache[POST]), metric_sites=POST)
