"""Norm gains folded into the weights that read them, and a centred unembedding: the same model in simpler weights.

Axes: n heads of q, k or v, d hidden_size, e head_dim, f intermediate_size, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config
from gemma3_jax.stacking import is_stacked, stack_layers, unstack_layers


def fold_ln(config: Gemma3Config, params: Mapping[str, Any]) -> tuple[Gemma3Config, dict[str, Any]]:
    """Multiply the gains of ln1, ln2 and ln_final into the weights behind them, and set those gains to 1.

    Afterwards q, k, v, gate, in and the unembedding read `hook_normalized` itself. Logits are unchanged, to the
    rounding of the products; each is computed in float32 and rounded once to the weight's dtype. Fold float32 params:
    in bfloat16 every weight moves by up to 2**-9 of itself, and the logits as if the checkpoint had been rounded anew.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; not changed.

    Returns:
        The folded model's (config, params), in the layout of `params`. An unembedding that was tied to the embedding
        is a weight of its own now.

    Memory: a second copy of q, k, v, gate, in and the unembedding; all else is shared with `params`. A tied model
    grows by the size of its embedding (1b in float32: 1.2 GB).

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import fold_ln
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> folded = HookedGemma3(*fold_ln(model.config, model.params), model.tokenizer)
    >>> bool(jnp.allclose(folded("ba ke lo"), model("ba ke lo"), atol=1e-4)), folded.config.tie_word_embeddings
    (True, False)
    """
    # ln1_post and ln2_post stay: what they scale is added to the residual stream, so that no weight reads it, and a
    # gain moved into the weight before them would change the root mean square they divide by. So do q_norm and
    # k_norm: behind them come the rotation, which mixes the features that they scale, and a product of two activations.
    stacked = is_stacked(params)
    params = unstack_layers(config, params)
    blocks = {f"blocks_{i}": _fold_block(params[f"blocks_{i}"]) for i in range(config.num_hidden_layers)}
    folded = {**params, **blocks, "ln_final": _one(params["ln_final"])}
    folded["unembed"] = {"weight": _scaled(_unembedding(config, params), params["ln_final"]["weight"][:, None])}
    return _untied(config), stack_layers(_untied(config), folded) if stacked else folded


def center_unembed(config: Gemma3Config, params: Mapping[str, Any]) -> tuple[Gemma3Config, dict[str, Any]]:
    """Subtract from the unembedding its mean over the vocabulary.

    That takes from the logits of each position their mean. Log-probabilities are unchanged, to rounding, and a
    direct attribution to a logit is then one to how far it stands above the mean. Centre float32 params: in bfloat16
    every weight is rounded anew. Fold first, then centre, or the other way round: both give the same logits.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; not changed.

    Returns:
        The centred model's (config, params). An unembedding that was tied to the embedding is a weight of its own
        now: the embedding is not centred.

    Memory: a second unembedding, and its float32 copy while the mean is taken; all else is shared with `params`.

    Raises:
        ValueError: the model has final_logit_softcapping, under which a shift of all logits changes probabilities.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import center_unembed
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> centred = HookedGemma3(*center_unembed(model.config, model.params), model.tokenizer)
    >>> centred.W_U.shape, bool(abs(centred("ba ke lo").mean()) < 1e-5)
    ((96, 104), True)
    """
    if config.final_logit_softcapping is not None:
        raise ValueError(
            f"this model has final_logit_softcapping {config.final_logit_softcapping}: its tanh is no function of "
            "differences between logits, so that centring the unembedding would change the probabilities"
        )
    weight = _unembedding(config, params)
    # [d, V] -> [d, 1]
    mean = jnp.mean(weight.astype(jnp.float32), axis=1, keepdims=True)
    centred = (weight.astype(jnp.float32) - mean).astype(weight.dtype)
    return _untied(config), {**params, "unembed": {"weight": centred}}


def _fold_block(block: Mapping[str, Any]) -> dict[str, Any]:
    # [d, 1] with [n, d, e] and with [d, f]
    ln1, ln2 = (block[name]["weight"][:, None] for name in ("ln1", "ln2"))
    attn = {name: _fold(block["attn"][name], ln1) for name in ("q", "k", "v")}
    mlp = {name: _fold(block["mlp"][name], ln2) for name in ("gate", "in")}
    return {
        **block,
        "ln1": _one(block["ln1"]),
        "ln2": _one(block["ln2"]),
        "attn": {**block["attn"], **attn},
        "mlp": {**block["mlp"], **mlp},
    }


def _fold(projection: Mapping[str, Any], gain: jax.Array) -> dict[str, Any]:
    # a bias is added behind the product, and stays
    return {**projection, "weight": _scaled(projection["weight"], gain)}


def _scaled(weight: jax.Array, gain: jax.Array) -> jax.Array:
    return (weight.astype(jnp.float32) * gain.astype(jnp.float32)).astype(weight.dtype)


def _one(norm: Mapping[str, Any]) -> dict[str, Any]:
    return {"weight": jnp.ones_like(norm["weight"])}


def _unembedding(config: Gemma3Config, params: Mapping[str, Any]) -> jax.Array:
    # [d, V]
    return params["embed"]["weight"].T if config.tie_word_embeddings else params["unembed"]["weight"]


def _untied(config: Gemma3Config) -> Gemma3Config:
    return dataclasses.replace(config, tie_word_embeddings=False)
