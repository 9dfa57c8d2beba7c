"""Names of TransformerLens that this library does not have, and what does their work here.

An attribute that is missing gives an error anyway; for these names the error says what to write.
"""

from __future__ import annotations

_HOOKS = "name the hooks in each run: run_with_hooks(input, [(name, function)])"
_FLAG = "no site needs a flag; name it in names_filter"
_DEVICE = "place the parameters: HookedGemma3(config, jax.device_put(model.params, device), model.tokenizer), or mesh="
_FUNCTIONS = "a model is its parameters and pure functions; model.params has the arrays"
_STATE = "there are no training and evaluation modes, and no gradients are kept"

REMEDIES: dict[str, dict[str, str]] = {
    "HookedGemma3": {
        "cfg": "use model.config, with Hugging Face's names of fields",
        **dict.fromkeys(
            ["add_hook", "add_perma_hook", "add_caching_hooks", "hooks", "reset_hooks", "remove_all_hook_fns"], _HOOKS
        ),
        "check_hooks_to_add": _HOOKS,
        "hook_dict": "gemma3_jax.site_names(model.config) lists the sites",
        "hook_points": "gemma3_jax.site_names(model.config) lists the sites",
        **dict.fromkeys(["to", "cuda", "cpu", "mps", "device"], _DEVICE),
        **dict.fromkeys(["blocks", "unembed", "ln_final"], _FUNCTIONS),
        **dict.fromkeys(["parameters", "named_parameters", "state_dict", "load_state_dict"], _FUNCTIONS),
        **dict.fromkeys(["eval", "train", "zero_grad", "requires_grad_"], _STATE),
        **dict.fromkeys(
            ["set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in", "set_use_attn_in"], _FLAG
        ),
        "loss_fn": "use analysis.loss_per_token(model, input), or return_type='loss'",
        "loss_per_token": "use analysis.loss_per_token(model, input)",
        "fold_layer_norm": "use analysis.fold_ln",
        "center_unembed": "use analysis.center_unembed",
        "process_weights_": "weights are never changed in place; use analysis.fold_ln and analysis.center_unembed",
        "QK": "use analysis.qk_circuit",
        "OV": "use analysis.ov_circuit",
        "all_composition_scores": "use analysis.all_composition_scores",
        "sample_datapoint": "load a text with the datasets library",
        "from_pretrained_no_processing": "use from_pretrained, which never changes weights",
        "forward": "call the model, or gemma3_jax.forward",
    },
    "ActivationCache": {
        "cache_dict": "a cache is a mapping itself; dict(cache) is a plain one",
        "model": "cache.config and cache.params have the model",
        "to": "use cache.numpy() for host memory, or jax.device_put(cache, device)",
        "has_batch_dim": "use cache.batched",
        "apply_slice_to_batch_dim": "use cache.sliced(batch=...)",
        "toggle_autodiff": "captures have no graph; use run_with_cache(..., incl_bwd=True), or grad_at",
    },
    "Hook": {
        "ctx": "a hook stores nothing; names_filter returns values, and an edit can read an array of yours",
        "clear_context": "a hook stores nothing, so there is nothing to clear",
        "is_backward": "there are no backward hooks; run_with_cache(..., incl_bwd=True) returns gradients",
        **dict.fromkeys(["add_hook", "add_perma_hook", "remove_hooks", "fwd_hooks", "bwd_hooks"], _HOOKS),
    },
    "Gemma3Config": {
        "d_model": "use hidden_size",
        "n_layers": "use num_hidden_layers",
        "n_heads": "use num_attention_heads",
        "n_key_value_heads": "use num_key_value_heads",
        "d_head": "use head_dim",
        "d_mlp": "use intermediate_size",
        "d_vocab": "use vocab_size",
        "d_vocab_out": "use vocab_size",
        "n_ctx": "use max_position_embeddings",
        "eps": "use rms_norm_eps",
        "window_size": "use sliding_window",
        "attn_types": "use layer_types",
        "rotary_base": "use rope_full.theta and rope_sliding.theta",
        "output_logits_soft_cap": "use final_logit_softcapping",
        "device": "a config has no device; the arrays of model.params do",
        "dtype": "a config has no dtype; the arrays of model.params do",
    },
}


def missing(owner: object, name: str) -> AttributeError:
    """The error for an attribute that an object lacks.

    >>> class HookedGemma3:
    ...     pass
    >>> str(missing(HookedGemma3(), "cfg"))
    "HookedGemma3 has no cfg: use model.config, with Hugging Face's names of fields (see docs/migration.md)"
    """
    kind = next((base.__name__ for base in type(owner).__mro__ if base.__name__ in REMEDIES), type(owner).__name__)
    remedy = REMEDIES.get(kind, {}).get(name)
    if remedy is None:
        return AttributeError(f"{kind!r} object has no attribute {name!r}", name=name, obj=owner)
    return AttributeError(f"{kind} has no {name}: {remedy} (see docs/migration.md)", name=name, obj=owner)
