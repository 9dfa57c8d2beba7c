"""Padded rows, the values at sites with every kind of axes, and what each ready-made edit makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax import Hook, edits, forward
from gemma3_jax.hooks.interception import apply_edits
from gemma3_jax.positions import default_positions
from gemma3_jax.sites.names import layer_of
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import jitted, small

# Rows of unequal length, padded on both sides.
ROWS = jnp.asarray(random_tokens((3, 9), seed=1), jnp.int32)
MASK = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 1, 1, 1, 1, 1, 1, 0, 0]])
# A site with each kind of axes, but for that of ids.
KINDS = (
    "embed.hook_out",
    "blocks.0.attn.k.hook_out",
    "blocks.0.attn.hook_rot_k",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.o.hook_in",
    "blocks.1.ln1.hook_scale",
    "blocks.1.attn.q_norm.hook_scale",
    "blocks.1.hook_out",
)


def hook_at(name: str) -> Hook:
    """What an edit is told at that site, in a run of these rows."""
    return Hook(name, layer_of(name), default_positions(MASK.shape, MASK), jnp.asarray(MASK))


@functools.cache
def values() -> dict[str, np.ndarray]:
    """The unedited values of these sites, in float64."""
    _, cache = jitted()(*small(), ROWS, KINDS, attention_mask=MASK)
    return {name: np.asarray(value, np.float64) for name, value in cache.items()}


def vector(name: str, seed: int = 0) -> np.ndarray:
    """[d], random, for that site's last axis."""
    return np.random.default_rng(seed).normal(size=values()[name].shape[-1]).astype(np.float32)


def factors(name: str) -> np.ndarray:
    """One number for each place of the last two axes, in eighths, exact in any dtype."""
    return np.random.default_rng(2).integers(-20, 20, values()[name].shape[-2:]).astype(np.float32) / 8


def unit(name: str) -> np.ndarray:
    long = vector(name).astype(np.float64)
    return long / np.linalg.norm(long)


def length(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def along(x: np.ndarray, name: str) -> np.ndarray:
    return (x * unit(name)).sum(axis=-1, keepdims=True)


def bounds(name: str) -> tuple[float, float]:
    """Between which 40 % of the components lie: some are too low, some too high, some are left alone."""
    low, high = np.quantile(along(values()[name], name), [0.3, 0.7])
    return float(low), float(high)


def clamped(x: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    return x + (np.clip(along(x, name), low, high) - along(x, name)) * unit(name)


# Each edit at a site, and what it must make of the value x there.
CASES = {
    "nothing": (lambda name: edits.Scale(1.0), lambda x, name: x),
    "Add": (lambda name: edits.Add(vector(name)), lambda x, name: x + vector(name)),
    "Add, scaled": (lambda name: edits.Add(vector(name), 0.5), lambda x, name: x + 0.5 * vector(name)),
    "Add, relative": (
        lambda name: edits.Add(vector(name) * 7, -0.3, relative=True),
        lambda x, name: x - 0.3 * length(x) * unit(name),
    ),
    "Scale": (lambda name: edits.Scale(-2.0), lambda x, name: -2 * x),
    "Scale, each": (lambda name: edits.Scale(factors(name)), lambda x, name: factors(name) * x),
    "Replace": (
        lambda name: edits.Replace(vector(name)),
        lambda x, name: np.broadcast_to(vector(name).astype(np.float64), x.shape),
    ),
    "Replace, where": (
        lambda name: edits.Replace(3.25, factors(name) > 0),
        lambda x, name: np.where(factors(name) > 0, 3.25, x),
    ),
    "ProjectOut": (lambda name: edits.ProjectOut(vector(name) * 7), lambda x, name: x - along(x, name) * unit(name)),
    "Clamp": (lambda name: edits.Clamp(vector(name), *bounds(name)), lambda x, name: clamped(x, name, *bounds(name))),
    "Clamp, low": (
        lambda name: edits.Clamp(vector(name) * 7, low=bounds(name)[0]),
        lambda x, name: clamped(x, name, bounds(name)[0], np.inf),
    ),
    "Clamp, high": (
        lambda name: edits.Clamp(vector(name) / 7, high=bounds(name)[1]),
        lambda x, name: clamped(x, name, -np.inf, bounds(name)[1]),
    ),
    "FromRow": (lambda name: edits.FromRow(-1), lambda x, name: np.broadcast_to(x[2], x.shape)),
    "FromRow, partners": (lambda name: edits.FromRow(np.asarray([2, 0, 1])), lambda x, name: x[[2, 0, 1]]),
    "Mean": (
        lambda name: edits.Mean(),
        lambda x, name: np.broadcast_to(x[MASK == 1].mean(axis=0), x.shape),
    ),
}


@functools.cache
def results() -> dict[tuple[str, str], np.ndarray]:
    """What each edit makes of each site's value, applied as `forward` does, all of it in one unedited run."""

    @jax.jit
    def every_edit(given):
        made = {}

        def look(value, hook):
            made.update({key: apply_edits([edit], value, hook) for key, edit in given.items() if key[1] == hook.name})
            return value

        forward(*small(), ROWS, edits={KINDS: look}, attention_mask=MASK)
        return made

    given = {(case, name): make(name) for case, (make, _) in CASES.items() for name in KINDS}
    del given["Mean", "blocks.0.attn.hook_pattern"]
    return jax.tree.map(np.asarray, every_edit(given))


call = jitted()


def logits_of(tokens, placed=None, mask=None):
    return call(*small(), tokens, (), placed, mask)[0]
