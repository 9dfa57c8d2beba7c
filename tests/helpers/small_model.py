"""A converted small model, shared by the tests of `forward`, and what they compare and edit with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, forward, site_names
from tests.helpers.random_models import SMALL, hf_config, hf_model, random_tokens

LAYERS = 2  # a sliding and a full one
KINDS = SMALL["layer_types"]
SITES = site_names(Gemma3Config.from_hf(hf_config(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS])))
# One shape for all, so that operations compile once.
TOKENS = jnp.asarray(random_tokens((2, 9)), jnp.int32)
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")  # of the residual stream, for each head
LEFT_PADDED = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9], jnp.int32)
SOME = ("blocks.*.hook_resid_post", "blocks.0.attn.hook_pattern", "blocks.*.attn.hook_z", "unembed.hook_out")


@functools.cache
def small(layers: int = LAYERS) -> tuple[Gemma3Config, Any]:
    """The model; gradients compile slowly, and are content with one layer."""
    model = hf_model(num_hidden_layers=layers, layer_types=KINDS[:layers])
    config = Gemma3Config.from_hf(model.config)
    with jax.ensure_compile_time_eval():  # the first to ask may be a function that is being traced
        return config, convert_state_dict(model.state_dict(), config)


def run(capture=(), edits=None, tokens=TOKENS, *arguments, **options):
    """Forward of the small model, not jitted."""
    return forward(*small(), tokens, capture, edits, *arguments, **options)


def at_once(function, config, params, *arguments, **options):
    """`forward` or `grad_at` as one program: for a new shape, its operations one by one take four times as long."""
    return jax.jit(lambda params: function(config, params, *arguments, **options))(params)


def jitted():
    """Forward under a jit of its own, with what must be static as static arguments."""
    static = ("config", "capture", "stop_at_layer", "return_type")
    return jax.jit(functools.partial(forward), static_argnames=static)


@functools.cache
def plain():
    """Logits and every captured value of an unedited run."""
    return run("**")


@functools.cache
def padded():
    """Logits of an unedited run with padding on the left of the first row."""
    return run(attention_mask=LEFT_PADDED)


def difference(ours, theirs) -> float:
    """Largest difference, relative to the largest value; infinite where one is NaN and the other is not."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return np.inf
    # masked scores are the lowest float32, which would drown all others
    ours, theirs = (np.where(x < -1e30, -1e30, x) for x in (ours, theirs))
    size = np.abs(theirs[theirs > -1e30]).max(initial=0)
    return float(np.nanmax(np.abs(ours - theirs), initial=0) / max(size, 1e-30))


def same(ours, theirs, bound: float = 2e-5) -> bool:
    return difference(ours, theirs) < bound


def assert_same(ours, theirs, bound: float = 2e-5) -> None:
    assert difference(ours, theirs) < bound


def identity(value, hook):
    return value


def nudge(value, hook):
    """Change every element a little, each by its own value, so that no norm undoes it; ids take their neighbour's."""
    if jnp.issubdtype(value.dtype, jnp.integer):
        return (value + 1) % SMALL["vocab_size"]
    return value + 0.05 * jnp.cos(value)


def zero(value, hook):
    return jnp.zeros_like(value)


def direction(seed: int = 0) -> np.ndarray:
    """[d], a direction to steer in."""
    return np.random.default_rng(seed).normal(size=SMALL["hidden_size"]).astype(np.float32)


def captures(params, tokens=TOKENS):
    return forward(small(1)[0], params, tokens, SOME)
