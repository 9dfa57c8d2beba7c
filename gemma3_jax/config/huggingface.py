"""Configs as Hugging Face writes them, in every dialect, from and to the fields of a `Gemma3Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, get_args

from gemma3_jax.config.parts import (
    FLAGS,
    MOST_LAYERS,
    SPECIAL_TOKENS,
    ConfigError,
    EmbeddingHead,
    LayerType,
    Rope,
    is_positive,
    mapping,
    pattern,
    require,
)
from gemma3_jax.types import JsonObject, Settings

# Defaults of transformers' Gemma3TextConfig for fields that a config.json leaves out. Published multimodal configs rely
# on them: the config of the 4b has six fields of its text model.
_HF_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_MODEL_TYPES = ("gemma3_text", "gemma3", "shieldgemma2")
_ACTIVATION = "gelu_pytorch_tanh"
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}


class WithDict(Protocol):
    """What is read of a config of `transformers`."""

    def to_dict(self) -> JsonObject: ...


def fields_of(config: Settings | WithDict) -> tuple[JsonObject, int | list[int] | None]:
    """The fields of a `Gemma3Config` and the stop tokens, from a Hugging Face config: see `Gemma3Config.from_hf`.

    Raises:
        ConfigError: the port does not support the value of a field.
    """
    raw = mapping(config if isinstance(config, Mapping) or not hasattr(config, "to_dict") else config.to_dict(), "")
    _check_model_type(raw)
    if "text_config" in raw:
        # The multimodal class reads tie_word_embeddings from the outer config, which may also have the special
        # tokens.
        outer = {name: raw[name] for name in SPECIAL_TOKENS if raw.get(name) is not None}
        text = mapping(raw["text_config"], "text_config")
        tied = raw.get("tie_word_embeddings", True)
        if raw.get("model_type") == "shieldgemma2":
            # This class is tied if either config says so, and a field that is left out counts for the inner one.
            tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", True)
        raw = {**text, **outer, "tie_word_embeddings": tied}
        _check_model_type(raw)
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or _ACTIVATION
    if activation != _ACTIVATION:
        raise ConfigError(f"hidden_activation is {activation!r}; this port supports only {_ACTIVATION!r}")
    fields = {name: raw.get(name, default) for name, default in _HF_DEFAULTS.items()}
    # Hugging Face treats None as false here.
    fields |= {name: False for name in FLAGS if fields[name] is None}
    stop = fields.pop("eos_token_id")
    full, sliding = _ropes(raw)
    fields |= {
        "layer_types": _layer_types(raw),
        "rope_full": full,
        "rope_sliding": sliding,
        "truncated_from": raw.get("truncated_from"),
        "embedding_head": _embedding_head(raw.get("embedding_head")),
    }
    return fields, stop


def written(fields: JsonObject) -> JsonObject:
    """The `config.json` of the fields of a config, which it changes: see `Gemma3Config.to_hf`."""
    head = fields.pop("embedding_head")
    if head is not None:
        fields["embedding_head"] = {**head, "dense": list(head["dense"]), "prompts": dict(head["prompts"])}
    fields["layer_types"] = list(fields["layer_types"])
    del fields["allow_truncated_logits"]  # a decision for one session
    if fields["truncated_from"] is None:
        del fields["truncated_from"]
    if isinstance(fields["eos_token_id"], tuple):
        fields["eos_token_id"] = list(fields["eos_token_id"])
    ropes = {"sliding_attention": fields.pop("rope_sliding"), "full_attention": fields.pop("rope_full")}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": _ACTIVATION,
        **fields,
        "rope_parameters": {kind: _rope_to_hf(**rope) for kind, rope in ropes.items()},
    }


def _check_model_type(raw: Settings) -> None:
    model_type = raw.get("model_type", "gemma3_text")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}; this port supports {' and '.join(_MODEL_TYPES)}")


def _embedding_head(entry: object) -> EmbeddingHead | None:
    if entry is None:
        return None
    fields = dict(mapping(entry, "embedding_head"))
    unknown = set(fields) - {field.name for field in dataclasses.fields(EmbeddingHead)}
    require(not unknown, f"embedding_head has {', '.join(sorted(unknown))}, which it does not take")
    dense, prompts = fields.pop("dense", ()), mapping(fields.pop("prompts", None), "prompts of embedding_head")
    require(isinstance(dense, list | tuple), f"dense of embedding_head is {dense!r}; it must list sizes")
    return EmbeddingHead(dense=tuple(dense), prompts=tuple(prompts.items()), **fields)


def _layer_types(raw: Settings) -> tuple[LayerType, ...]:
    values = raw.get("layer_types")
    if values is not None:
        return tuple(values) if isinstance(values, list) else values
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    layers = raw.get("num_hidden_layers", _HF_DEFAULTS["num_hidden_layers"])
    require(isinstance(every, int) and every > 0, f"sliding_window_pattern is {every!r}; it must be a positive integer")
    require(
        isinstance(layers, int) and layers <= MOST_LAYERS,
        f"num_hidden_layers is {layers!r}; it must be a positive integer, at most {MOST_LAYERS:,}",
    )
    return pattern(layers, every)


def _ropes(raw: Settings) -> tuple[Rope, Rope]:
    """The (full, sliding) rotary embeddings of any config style, or of styles merged as in Hugging Face."""
    new = mapping(raw.get("rope_parameters"), "rope_parameters")
    kinds = get_args(LayerType)
    if new and not set(new) & set(kinds):
        new = {"full_attention": new}
    # transformers 5 keeps the keys of a flat entry beside the entries that it adds, and does not read them.
    stray = sorted(set(new) - set(kinds) - _ROPE_FIELDS)
    require(not stray, f"rope_parameters has {', '.join(stray)}; it takes one entry per layer type")
    full = {"rope_theta": raw.get("rope_theta", 1_000_000.0)}
    full |= _rope_entry(new.get("full_attention"), "rope_parameters of full_attention")
    full |= _rope_entry(raw.get("rope_scaling"), "rope_scaling")
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
    sliding |= _rope_entry(new.get("sliding_attention"), "rope_parameters of sliding_attention")
    return _rope_from_hf(full, "full_attention"), _rope_from_hf(sliding, "sliding_attention")


def _rope_entry(value: object, name: str) -> JsonObject:
    """A mapping of rope parameters, in which the old key `type` is `rope_type` unless that is there, too."""
    entry = dict(mapping(value, name))
    old = entry.pop("type", None)
    return entry if old is None else {"rope_type": old, **entry}


def _rope_from_hf(entry: Settings, where: str) -> Rope:
    values = {name: value for name, value in entry.items() if value is not None}
    kind = values.pop("rope_type", "default")
    require(kind in ("default", "linear"), f"rope_type of {where} is {kind!r}; this port takes 'default' and 'linear'")
    partial = values.pop("partial_rotary_factor", 1.0)
    require(partial == 1.0, f"partial_rotary_factor of {where} is {partial!r}; Gemma 3 rotates the whole head")
    theta, factor = values.pop("rope_theta", None), values.pop("factor", None)
    local = where == "sliding_attention"
    name = "rope_theta of sliding_attention (rope_local_base_freq)" if local else "rope_theta of full_attention"
    require(is_positive(theta), f"{name} is {theta!r}; it must be a positive number that float32 can hold")
    require(not values, f"the rope parameters of {where} have {', '.join(values)}, which rope_type {kind!r} lacks")
    if kind == "default":
        # transformers reads `factor` only for the linear type.
        return Rope(float(theta))
    why = "rope_type 'linear' needs a positive number that float32 can hold"
    require(is_positive(factor), f"factor of {where} is {factor!r}; {why}")
    return Rope(float(theta), float(factor))


def _rope_to_hf(theta: float, factor: float) -> JsonObject:
    scaling = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}
