"""Caches of small models of every kind, and the bound that rounding puts on two sums of the same terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from conversion import convert_state_dict
from gemma3_jax import ActivationCache, Gemma3Config, forward
from gemma3_jax.cache.residual import HEADS, NEURONS, RESIDUAL
from tests.helpers.random_models import SMALL, hf_model
from tests.helpers.small_model import KINDS, LAYERS, LEFT_PADDED, TOKENS

ROUNDING = 2.0**-24  # of one float32 operation, relative
KINDS_OF_MODEL = {
    "grouped": {},
    "bias": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "softcap": {"final_logit_softcapping": 3.0},
}
VARIANTS = [*KINDS_OF_MODEL, "padded"]
LOGITS = "unembed.hook_out"
H, E, D, F = (SMALL[key] for key in ("num_attention_heads", "head_dim", "hidden_size", "intermediate_size"))
# (layer, mlp_input, the site that holds that stream)
STREAMS = [
    (0, False, "blocks.0.hook_in"),
    (0, True, "blocks.0.hook_resid_mid"),
    (1, False, "blocks.1.hook_in"),
    (1, True, "blocks.1.hook_resid_mid"),
    (None, False, f"blocks.{LAYERS - 1}.hook_out"),
]


@functools.cache
def captured(variant: str = "grouped") -> ActivationCache:
    """Everything that a decomposition may need, of a model with every parameter random."""
    model = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], **KINDS_OF_MODEL.get(variant, {}))
    config = Gemma3Config.from_hf(model.config)
    params = convert_state_dict(model.state_dict(), config)
    names = (*RESIDUAL, *HEADS, *NEURONS, "blocks.*.hook_out", LOGITS, "blocks.*.ln1.hook_out", "blocks.*.ln2.hook_out")
    mask = LEFT_PADDED if variant == "padded" else None
    capture = (*names, "ln_final.hook_out")
    cache = jax.jit(lambda params: forward(config, params, TOKENS, capture, attention_mask=mask)[1])(params)
    return cache.with_params(params)


def compiled(cache: ActivationCache, method: str, **arguments):
    """What a method returns, compiled as one: faster than operation by operation when shapes are new."""
    return jax.jit(lambda cache, params: getattr(cache.with_params(params), method)(**arguments))(cache, cache.params)


@functools.cache
def absolute(variant: str) -> ActivationCache:
    """The cache whose decompositions are the sums of the absolute values of all terms: what rounding grows with."""
    cache = captured(variant)
    return jax.tree.map(jnp.abs, cache).with_params(jax.tree.map(jnp.abs, cache.params))


def within(ours: jax.Array, theirs: jax.Array, terms: jax.Array, roundings: int) -> bool:
    """Whether two ways of adding the same terms agree as far as so many roundings in a row allow, everywhere.

    The standard bound: a term that goes through K operations is off by at most K * 2^-24 of its size, and so is the
    sum by K * 2^-24 times `terms`, the sum of absolute values.
    """
    return bool(np.all(np.abs(np.asarray(ours) - np.asarray(theirs)) <= roundings * ROUNDING * np.asarray(terms)))


def roundings(n: int) -> int:
    """Of one term in the stream: n additions of components and e of a head's here; in the model the largest of its
    products, which is over h * e or f terms, and the 2 L additions of sublayers; and the norm's division and product in
    both, with one for forming the gain."""
    return n + E + max(H * E, F) + 2 * LAYERS + 5


def of_token(logits: jax.Array) -> jax.Array:
    # [b, p, V] at TOKENS [b, p] -> [b, p]
    return jnp.take_along_axis(logits, TOKENS[..., None], -1)[..., 0]
