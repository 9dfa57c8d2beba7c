"""Fold norm gains into the weights that read them, and centre the unembedding: the same model with simpler weights.

Axes: n heads of q, k or v, d hidden_size, e head_dim, f intermediate_size, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config
from gemma3_jax.model.layout import check_model, is_stacked, stack_layers, unstack_layers
from gemma3_jax.sites.names import block_key
from gemma3_jax.types import Params


def fold_ln(config: Gemma3Config, params: Params) -> tuple[Gemma3Config, Params]:
    """Multiply the gains of ln1, ln2 and ln_final into the weights after them, and set those gains to 1.

    Afterwards q, k, v, gate, in and the unembedding read `hook_normalized` itself. Logits are unchanged up to rounding:
    each product is computed in float32 and rounded once to the weight's dtype. Fold float32 parameters. In bfloat16 the
    relative change of a weight is up to 2**-9, and the logits change as if the checkpoint had been rounded again.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; not changed.

    Returns:
        The folded model's (config, params), in the layout of `params`. An unembedding that was tied to the
        embedding becomes a separate weight.

    Raises:
        ValueError: the model has an embedding head.

    Memory: a second copy of q, k, v, gate, in and the unembedding; the other arrays are shared with `params`. A tied
    model grows by the size of its embedding (1b in float32: 1.2 GB).

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import fold_ln
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> folded = HookedGemma3(*fold_ln(model.config, model.params), model.tokenizer)
    >>> bool(jnp.allclose(folded("ba ke lo"), model("ba ke lo"), atol=1e-4)), folded.config.tie_word_embeddings
    (True, False)
    """
    check_model(config, params)
    if config.embedding_head is not None:
        raise ValueError("this model has an embedding head, which reads ln_final too: folding would change embeddings")
    # ln1_post and ln2_post stay. Their output is added to the residual stream, so no weight reads it directly, and a
    # gain moved into the weight before them would change the root mean square that they divide by. q_norm and k_norm
    # stay too: after them come the rotation, which mixes the features that they scale, and a product of activations.
    stacked = is_stacked(params)
    params = unstack_layers(config, params)
    blocks = {block_key(i): _fold_block(params[block_key(i)]) for i in range(config.num_hidden_layers)}
    folded = {**params, **blocks, "ln_final": _one(params["ln_final"])}
    folded["unembed"] = {"weight": _scaled(_unembedding(config, params), params["ln_final"]["weight"][:, None])}
    return _untied(config), stack_layers(_untied(config), folded) if stacked else folded


def center_unembed(config: Gemma3Config, params: Params) -> tuple[Gemma3Config, Params]:
    """Subtract the mean over the vocabulary from the unembedding.

    This subtracts the mean from the logits of each position. Log-probabilities are unchanged up to rounding. A direct
    attribution to a logit then explains the difference between the logit and the mean logit. Centre float32 parameters:
    in bfloat16 every weight is rounded again. You can fold and centre in either order; the logits are the same.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; not changed.

    Returns:
        The centred model's (config, params). An unembedding that was tied to the embedding becomes a separate
        weight: the embedding is not centred.

    Memory: a second unembedding, and its float32 copy while the mean is computed; the other arrays are shared with
    `params`.

    Raises:
        ValueError: the model has final_logit_softcapping, under which a shift of all logits changes probabilities.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import center_unembed
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> centred = HookedGemma3(*center_unembed(model.config, model.params), model.tokenizer)
    >>> centred.W_U.shape, bool(abs(centred("ba ke lo").mean()) < 1e-5)
    ((96, 104), True)
    """
    check_model(config, params)
    if config.final_logit_softcapping is not None:
        raise ValueError(
            f"this model has final_logit_softcapping {config.final_logit_softcapping}: its tanh does not preserve "
            "differences between logits, so centring the unembedding would change the probabilities"
        )
    weight = _unembedding(config, params)
    # [d, V] -> [d, 1]
    mean = jnp.mean(weight.astype(jnp.float32), axis=1, keepdims=True)
    centred = (weight.astype(jnp.float32) - mean).astype(weight.dtype)
    return _untied(config), {**params, "unembed": {"weight": centred}}


def _fold_block(block: Params) -> Params:
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


def _fold(projection: Params, gain: jax.Array) -> Params:
    # the bias is added after the product, and does not change
    return {**projection, "weight": _scaled(projection["weight"], gain)}


def _scaled(weight: jax.Array, gain: jax.Array) -> jax.Array:
    return (weight.astype(jnp.float32) * gain.astype(jnp.float32)).astype(weight.dtype)


def _one(norm: Params) -> Params:
    return {"weight": jnp.ones_like(norm["weight"])}


def _unembedding(config: Gemma3Config, params: Params) -> jax.Array:
    # [d, V]
    return params["embed"]["weight"].T if config.tie_word_embeddings else params["unembed"]["weight"]


def _untied(config: Gemma3Config) -> Gemma3Config:
    return dataclasses.replace(config, tie_word_embeddings=False)
