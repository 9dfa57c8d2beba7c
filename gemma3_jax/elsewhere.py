"""Names of TransformerLens that this library does not have, and what does their work here.

An attribute or an argument that is missing gives an error anyway; for these names the error says what to write.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_HOOKS = "name the hooks in each run: run_with_hooks(input, [(name, function)])"
_FLAG = "no site needs a flag; name it in names_filter"
_BIASES = "Gemma 3 has no biases; of a checkpoint that has them, model.params does"
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
        **dict.fromkeys(["blocks", "unembed", "ln_final", "mod_dict"], _FUNCTIONS),
        **dict.fromkeys(["W_pos", "W_E_pos", "pos_embed"], "positions are rotary, so they have no weights"),
        **dict.fromkeys(["b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U", "accumulated_bias"], _BIASES),
        "all_head_labels": "cache.stack_head_results(return_labels=True) returns them: L0H0, L0H1, ...",
        "input_to_embed": "capture hook_embed, with stop_at_layer=0",
        "get_caching_hooks": _HOOKS,
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
        "cache_dict": "a cache is a mapping itself; dict(cache) is a plain one, with canonical names",
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

_NEVER_FOLDED = "weights are never changed at load; analysis.fold_ln and analysis.center_unembed return changed ones"
_ONE_BOS = "each text has one BOS; pass ids without it: model.to_tokens(text, prepend_bos=False)"
_NO_HOOKS_STAY = "no hooks stay after a run, so there is nothing to reset"

# Arguments of the methods that load and run a model.
ARGUMENTS: dict[str, str] = {
    "device": "set jax.default_device, or place the parameters with mesh=",
    "n_devices": "use mesh=gemma3_jax.placing.make_mesh()",
    "torch_dtype": "use dtype",
    "hf_model": "use HookedGemma3.from_hf",
    **dict.fromkeys(["fold_ln", "center_unembed", "center_writing_weights", "fold_value_biases"], _NEVER_FOLDED),
    "refactor_factored_attn_matrices": _NEVER_FOLDED,
    **dict.fromkeys(["prepend_bos", "default_prepend_bos"], _ONE_BOS),
    "padding_side": "texts are padded on the tokenizer's side; model.to_tokens takes padding_side",
    "default_padding_side": "texts are padded on the tokenizer's side; model.to_tokens takes padding_side",
    "bwd_hooks": "gradients are values: run_with_cache(..., incl_bwd=True), or gemma3_jax.grad_at",
    **dict.fromkeys(["reset_hooks", "reset_hooks_end", "clear_contexts"], _NO_HOOKS_STAY),
    "return_cache_object": "a cache is a mapping itself; dict(cache) is a plain one, with canonical names",
    "loss_per_token": "use analysis.loss_per_token(model, input)",
    "start_at_layer": "use gemma3_jax.forward, which takes inputs_embeds and start_at_layer",
    "do_sample": "temperature=0, the default, takes the likeliest token, and a higher temperature samples",
    "freq_penalty": "use repetition_penalty",
    "verbose": "it shows no progress of its own",
    "truncate": "texts are never truncated; take a slice of the ids",
    "move_to_device": "arrays are on JAX's default device, or on the devices of the parameters",
    "batch_slice": "use cache.sliced(batch=...)",
    "use_past_kv_cache": "generation always has a KV cache",
    "past_kv_cache": "use model.generate, or past= of gemma3_jax.forward",
}


def knows_arguments_from_elsewhere(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose error for an argument of TransformerLens says what to write.

    >>> @knows_arguments_from_elsewhere
    ... def run(input): ...
    >>> run("a", bwd_hooks=[])
    Traceback (most recent call last):
    TypeError: run does not take bwd_hooks: gradients are values: run_with_cache(..., incl_bwd=True), or ...
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in ARGUMENTS and name not in known:
                what = f"{function.__name__} does not take {name}: {ARGUMENTS[name]}"
                raise TypeError(f"{what} (see docs/migration.md)")
        return function(*args, **kwargs)

    return call


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
