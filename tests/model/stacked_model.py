"""A model of seven layers, with its parameters by block and stacked, for the tests of the scan over layers.

Two float32 runs that are each within 5e-6 of the exact values (the bar of the parity tests) differ by 1e-5 at most.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from conversion import convert_state_dict
from gemma3_jax import (
    Gemma3Config,
    forward,
    stack_layers,
)
from gemma3_jax.sites.table import SITES
from tests.helpers.random_models import hf_model
from tests.helpers.small_model import TOKENS, difference, nudge

BOUND = 1e-5
LOCAL, FULL = "sliding_attention", "full_attention"
# Both kinds in turn; layer 3 is in the middle.
TYPES = [LOCAL, FULL, LOCAL, FULL, LOCAL, FULL, LOCAL]
MIDDLE = 3
IN_BLOCK = [row.name.removeprefix("blocks.{i}.") for row in SITES if "{i}" in row.name]


@functools.cache
def both(types=tuple(TYPES), **overrides):
    """Config, parameters by block, and stacked."""
    model = hf_model(num_hidden_layers=len(types), layer_types=list(types), **overrides)
    config = Gemma3Config.from_hf(model.config)
    with jax.ensure_compile_time_eval():
        params = convert_state_dict(model.state_dict(), config)
        return config, params, stack_layers(config, params)


def compiled(capture=(), **options):
    """Forward of the model under jit, as a function of parameters and edits."""
    config = both()[0]
    return jax.jit(lambda params, edits: forward(config, params, TOKENS, capture, edits, **options))


@functools.cache
def plain():
    """Logits and every site of the unrolled model."""
    return compiled("**")(both()[1], {})


def exchanged(blocks):
    """The stacked blocks with two in each other's place."""
    return jax.tree.map(lambda w: w[jnp.array([2, 1, 0, 3, 4, 5, 6])], blocks)


def worst(ours, theirs) -> float:
    """Largest difference in two pytrees of one structure."""
    return max(jax.tree.leaves(jax.tree.map(difference, ours, theirs)))


@flax.struct.dataclass
class Nudge:
    """Move each element by its own value, `strength` being traced."""

    strength: jax.Array

    def __call__(self, value, hook):
        return value + self.strength * (nudge(value, hook) - value)
