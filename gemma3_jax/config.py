"""The shape and constants of one Gemma 3 text model, read from and written to Hugging Face configs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

LayerType = Literal["sliding_attention", "full_attention"]

# What transformers' Gemma3TextConfig assumes for a field that a config.json leaves out. Published multimodal
# configs rely on it: the 4b states six fields of its text model.
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
_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
)
_POSITIVE_NUMBERS = ("query_pre_attn_scalar", "rms_norm_eps", "final_logit_softcapping")
_SPECIAL_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")
_FLAGS = ("attention_bias", "use_bidirectional_attention", "tie_word_embeddings")
_MODEL_TYPES = ("gemma3_text", "gemma3")
_ACTIVATION = "gelu_pytorch_tanh"


class ConfigError(ValueError):
    """A config that this port cannot honour; the message names the field."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: `theta` is the base, `factor` divides every frequency."""

    theta: float
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gemma3Config:
    """Everything that fixes a Gemma 3 text model's computation, under Hugging Face's field names.

    Frozen and hashable, so it can be a static argument of `jax.jit`. Empty `layer_types` take Gemma 3's
    pattern, a full layer after every five sliding ones. Source: `transformers` `Gemma3TextConfig`, of which it
    leaves out what inference never reads (dropout, initializer range, `attn_logit_softcapping`, which the
    Hugging Face model accepts and never applies).

    Raises:
        ConfigError: a value is out of range or two values do not fit together.

    >>> config = Gemma3Config.preset("1b")
    >>> config.num_hidden_layers, config.layer_types[4:6]
    (26, ('sliding_attention', 'full_attention'))
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    query_pre_attn_scalar: float
    layer_types: tuple[LayerType, ...] = ()
    rope_full: Rope = Rope(1_000_000.0)
    rope_sliding: Rope = Rope(10_000.0)
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = None
    attention_bias: bool = False
    use_bidirectional_attention: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2

    def __post_init__(self):
        _check_values(self)
        types = tuple(self.layer_types) or _pattern(self.num_hidden_layers, every=6)
        object.__setattr__(self, "layer_types", types)
        _check_layers(self)

    def rope(self, layer_type: LayerType) -> Rope:
        """The rotary embedding that layers of `layer_type` use."""
        return self.rope_full if layer_type == "full_attention" else self.rope_sliding

    @classmethod
    def preset(cls, size: str) -> "Gemma3Config":
        """The published text model of that size: "270m", "1b", "4b", "12b" or "27b"."""
        if size not in PRESETS:
            raise ConfigError(f"no preset {size!r}; the published sizes are {', '.join(PRESETS)}")
        return PRESETS[size]

    @classmethod
    def from_hf(cls, config: Any) -> "Gemma3Config":
        """Read a Hugging Face config: a `config.json` as a dict, or a `PretrainedConfig`.

        Takes text configs and multimodal ones (their `text_config`), with `rope_parameters` per layer type or
        the older `rope_theta`, `rope_local_base_freq` and `rope_scaling`, with `layer_types` or the older
        `sliding_window_pattern`.

        Raises:
            ConfigError: naming the field whose value the port cannot honour.
        """
        raw = _mapping(
            config if isinstance(config, Mapping) or not hasattr(config, "to_dict") else config.to_dict(), ""
        )
        _check_model_type(raw)
        if "text_config" in raw:
            # The multimodal class ties by its own, outer field, and may name the special tokens there.
            outer = {name: raw[name] for name in _SPECIAL_TOKENS if raw.get(name) is not None}
            outer["tie_word_embeddings"] = raw.get("tie_word_embeddings", True)
            raw = {**_mapping(raw["text_config"], "text_config"), **outer}
            _check_model_type(raw)
        activation = raw.get("hidden_activation") or raw.get("hidden_act") or _ACTIVATION
        if activation != _ACTIVATION:
            raise ConfigError(f"hidden_activation is {activation!r}; Gemma 3 in this port has {_ACTIVATION!r} only")
        fields = {name: raw.get(name, default) for name, default in _HF_DEFAULTS.items()}
        # Hugging Face takes None for false here.
        fields |= {name: False for name in _FLAGS if fields[name] is None}
        stop = fields.pop("eos_token_id")
        full, sliding = _ropes(raw)
        config = cls(**fields, layer_types=_layer_types(raw), rope_full=full, rope_sliding=sliding)
        return config.stopping_at(stop)

    def stopping_at(self, stop: int | list[int] | tuple[int, ...] | None) -> "Gemma3Config":
        """The same with other stop tokens: an id, several, or None.

        >>> Gemma3Config.preset("1b").stopping_at([1, 106]).eos_token_id
        (1, 106)
        """
        return dataclasses.replace(self, eos_token_id=tuple(stop) if isinstance(stop, list) else stop)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a `Gemma3ForCausalLM` with this shape; `from_hf` reads it back to an equal config."""
        fields = dataclasses.asdict(self)
        fields["layer_types"] = list(fields["layer_types"])
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        ropes = {"sliding_attention": fields.pop("rope_sliding"), "full_attention": fields.pop("rope_full")}
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": _ACTIVATION,
            **fields,
            "rope_parameters": {kind: _rope_to_hf(**rope) for kind, rope in ropes.items()},
        }


def _pattern(n_layers: int, every: int) -> tuple[LayerType, ...]:
    return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layers))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    """`value`, when it is a mapping; an absent one (None) is empty, but for the config itself."""
    if value is None and name:
        return {}
    _require(isinstance(value, Mapping), f"{name or 'the config'} is {value!r}; it must be a mapping")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_values(config: Gemma3Config) -> None:
    """Each field by itself."""
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _require(good, f"{name} is {value!r}; it must be a positive integer")
    for name in _POSITIVE_NUMBERS:
        value = getattr(config, name)
        good = (_is_number(value) and value > 0) or (value is None and name == "final_logit_softcapping")
        _require(good, f"{name} is {value!r}; it must be a positive number")
    for name in _FLAGS:
        value = getattr(config, name)
        _require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
    for name in _SPECIAL_TOKENS:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
        good = all(item is None or (isinstance(item, int) and not isinstance(item, bool)) for item in each)
        _require(good, f"{name} is {value!r}; it must be a token id")
    for name in ("rope_full", "rope_sliding"):
        rope = getattr(config, name)
        good = all(_is_number(value) and value > 0 for value in (rope.theta, rope.factor))
        _require(good, f"{name} is {rope}; theta and factor must be positive numbers")
    good = isinstance(config.layer_types, (tuple, list)) and all(isinstance(kind, str) for kind in config.layer_types)
    _require(good, f"layer_types is {config.layer_types!r}; it must list one type for each layer")


def _check_layers(config: Gemma3Config) -> None:
    """How the fields fit together."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    _require(heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    _require(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; rotary embeddings need an even one")
    n, layers = len(config.layer_types), config.num_hidden_layers
    _require(n == layers, f"layer_types has {n} entries for num_hidden_layers {layers}")
    known = get_args(LayerType)
    unknown = sorted(set(config.layer_types) - set(known))
    _require(not unknown, f"layer_types has {', '.join(unknown)}; it takes {' and '.join(known)}")


def _check_model_type(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type", "gemma3_text")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}; this port takes {' and '.join(_MODEL_TYPES)}")


def _layer_types(raw: Mapping[str, Any]) -> tuple[LayerType, ...]:
    given = raw.get("layer_types")
    if given is not None:
        return tuple(given) if isinstance(given, list) else given
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    layers = raw.get("num_hidden_layers", _HF_DEFAULTS["num_hidden_layers"])
    _require(
        isinstance(every, int) and every > 0, f"sliding_window_pattern is {every!r}; it must be a positive integer"
    )
    _require(isinstance(layers, int), f"num_hidden_layers is {layers!r}; it must be a positive integer")
    return _pattern(layers, every)


def _ropes(raw: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The (full, sliding) rotary embeddings of either config style; where both are given they are merged as HF does."""
    new = _mapping(raw.get("rope_parameters"), "rope_parameters")
    stray = sorted(set(new) - set(get_args(LayerType)))
    _require(not stray, f"rope_parameters has {', '.join(stray)}; it takes one entry per layer type")
    full = {"rope_theta": raw.get("rope_theta", 1_000_000.0)}
    full |= _mapping(new.get("full_attention"), "rope_parameters of full_attention")
    full |= _mapping(raw.get("rope_scaling"), "rope_scaling")
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
    sliding |= _mapping(new.get("sliding_attention"), "rope_parameters of sliding_attention")
    return _rope_from_hf(full, "full_attention"), _rope_from_hf(sliding, "sliding_attention")


def _rope_from_hf(entry: dict[str, Any], where: str) -> Rope:
    given = {name: value for name, value in entry.items() if value is not None}
    # "type" is what old configs call it.
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    _require(kind in ("default", "linear"), f"rope_type of {where} is {kind!r}; this port takes 'default' and 'linear'")
    partial = given.pop("partial_rotary_factor", 1.0)
    _require(partial == 1.0, f"partial_rotary_factor of {where} is {partial!r}; Gemma 3 rotates the whole head")
    theta, factor = given.pop("rope_theta", None), given.pop("factor", None)
    local = where == "sliding_attention"
    name = "rope_theta of sliding_attention (rope_local_base_freq)" if local else "rope_theta of full_attention"
    _require(_is_number(theta), f"{name} is {theta!r}; it must be a positive number")
    _require(not given, f"the rope parameters of {where} have {', '.join(given)}, which rope_type {kind!r} lacks")
    if kind == "default":
        # transformers reads `factor` for the linear type alone.
        return Rope(float(theta))
    _require(_is_number(factor), f"factor of {where} is {factor!r}; rope_type 'linear' needs a positive number")
    return Rope(float(theta), float(factor))


def _rope_to_hf(theta: float, factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    return {**scaling, "rope_theta": theta}


def _preset(d: int, n: int, h: int, g: int, e: int, f: int, *, large: bool, scalar: int = 256) -> Gemma3Config:
    return Gemma3Config(
        vocab_size=262_208 if large else 262_144,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=n,
        num_attention_heads=h,
        num_key_value_heads=g,
        head_dim=e,
        sliding_window=1024 if large else 512,
        query_pre_attn_scalar=scalar,
        rope_full=Rope(1_000_000.0, 8.0 if large else 1.0),
        max_position_embeddings=131_072 if large else 32_768,
    )


# Gemma 3 technical report (arXiv 2503.19786) and the published config.json files.
PRESETS = {
    "270m": _preset(640, 18, 4, 1, 256, 2048, large=False),
    "1b": _preset(1152, 26, 4, 1, 256, 6912, large=False),
    "4b": _preset(2560, 34, 8, 4, 256, 10240, large=True),
    "12b": _preset(3840, 48, 16, 8, 256, 15360, large=True),
    "27b": _preset(5376, 62, 32, 16, 128, 21504, large=True, scalar=168),
}
