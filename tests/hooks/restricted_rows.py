"""Padded rows, the values at a site, and those that an edit leaves there, for the tests of `edits.only`."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax import Hook
from gemma3_jax.positions import default_positions
from gemma3_jax.sites.names import layer_of
from gemma3_jax.sites.table import shape_of
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import jitted, small

MARK = 1e6  # what no site holds
B, P = 3, 6  # unlike each other and all sizes of the model
ROWS = jnp.asarray(random_tokens((B, P), seed=1), jnp.int32)
# Padded on the left, not at all, and on the right.
MASK = np.asarray([[0, 0, 0, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0]])
call = jitted()


def hook_at(name: str, mask: np.ndarray) -> Hook:
    """What an edit is told there; a mask of ones is none."""
    mask = None if mask.all() else jnp.asarray(mask)
    return Hook(name, layer_of(name), default_positions((B, P), mask), mask)


@functools.cache
def some_value(name: str) -> jax.Array:
    shape = shape_of(name, small()[0], B, P)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@functools.cache
def plain(name: str) -> np.ndarray:
    """The unedited value of a site, in float64."""
    return np.asarray(call(*small(), ROWS, name, return_type=None)[1][name], np.float64)


def captured(name: str, edit, **options) -> np.ndarray:
    """The value of a site with an edit in place, whose arrays are traced."""
    return np.asarray(call(*small(), ROWS, name, {name: edit}, return_type=None, **options)[1][name])


@flax.struct.dataclass
class Turn:
    """An edit of one's own: turn the value round, by so much; it counts how often it is traced."""

    by: Any
    traces: list = flax.struct.field(pytree_node=False, default_factory=list)

    def __call__(self, value, hook):
        self.traces.append(hook.name)
        return -self.by * value

    def __hash__(self):
        return 0
