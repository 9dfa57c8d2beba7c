"""The shape and constants of one Gemma 3 text model, read from and written to Hugging Face configs."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast, get_args

from gemma3_jax.descriptions import Described, Description
from gemma3_jax.elsewhere import missing
from gemma3_jax.messages import printable

Json = Mapping[str, Any]  # an object of a JSON file
LayerType = Literal["sliding_attention", "full_attention"]

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
# The fields that `shape_text` has.
_IN_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "truncated_from",
)
_SPECIAL_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")
_FLAGS = ("attention_bias", "use_bidirectional_attention", "tie_word_embeddings")
# The dtypes of the embedding in which a model can run, and the reason why float16 is not one of them.
RUN_DTYPES = ("float32", "bfloat16")
PAST_FLOAT16 = "Gemma 3's residual stream reaches 104,000 in the 270m, and float16 ends at 65,504"
_FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal number and largest number
_MOST_LAYERS = 10_000  # without a limit, a damaged config would take all memory: names and types are made per layer
_LARGEST_INT32 = 2**31 - 1
_MODEL_TYPES = ("gemma3_text", "gemma3", "shieldgemma2")
_ACTIVATION = "gelu_pytorch_tanh"
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}


class ConfigError(ValueError):
    """A config that this port does not support; the message is one line, and names the field."""

    def __init__(self, message: object):
        super().__init__(printable(message))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: `theta` is the base, `factor` divides every frequency."""

    theta: float
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class EmbeddingHead:
    """What turns the states of a text's tokens into one vector: a mean, dense layers without bias, and the L2 norm.

    EmbeddingGemma has one. Source: the modules `Pooling`, `Dense` and `Normalize` of `sentence_transformers`.

    Attributes:
        dense: output size of each dense layer, in order; (3072, 768) in EmbeddingGemma.
        normalize: whether the embedding is divided by its L2 norm.
        max_length: most tokens of a text, with BOS and EOS; longer texts are truncated. None leaves it to the
            tokenizer and `max_position_embeddings`.
        prompts: pairs of a name and the text that goes in front of a text.
        default_prompt: name of the prompt that is used if none is named, or None.

    >>> head = EmbeddingHead((3072, 768), prompts=(("query", "task: search result | query: "),))
    >>> head.prompt("query"), head.prompt(None)
    ('task: search result | query: ', '')
    """

    dense: tuple[int, ...] = ()
    normalize: bool = True
    max_length: int | None = None
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None

    def prompt(self, name: str | None) -> str:
        """The text of the prompt with that name. None is the default prompt, or "" if there is none.

        Raises:
            ValueError: there is no prompt with that name; the message lists the names.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        prompts = dict(self.prompts)
        if name not in prompts:
            raise ValueError(f"there is no prompt {name!r}; this checkpoint has {', '.join(prompts) or 'none'}")
        return prompts[name]


@dataclasses.dataclass(frozen=True, repr=False)
class Gemma3Config(Described):
    """All fields that determine the computation of a Gemma 3 text model, with Hugging Face's field names.

    Frozen and hashable, so it can be a static argument of `jax.jit`. Empty `layer_types` mean Gemma 3's pattern, a full
    layer after every five sliding layers. Source: `transformers` `Gemma3TextConfig`, without the fields that inference
    does not read (dropout, initializer range, and `attn_logit_softcapping`, which the Hugging Face model accepts but
    never applies).

    Two fields are not Hugging Face's. `truncated_from` is the number of layers of the whole model if only the first
    ones were loaded (`first_n_layers`). The logits of the first layers are not those of the whole model, so they are
    refused, unless `allow_truncated_logits` is true.

    Raises:
        ConfigError: a value is out of range, or two values do not match.

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
    truncated_from: int | None = None
    allow_truncated_logits: bool = False
    embedding_head: EmbeddingHead | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        types = tuple(self.layer_types) or _pattern(self.num_hidden_layers, every=6)
        object.__setattr__(self, "layer_types", types)
        _check_layers(self)

    if not TYPE_CHECKING:  # a type checker is to report missing attributes itself

        def __getattr__(self, name):
            raise missing(self, name)

    def _description(self) -> Description:
        said = {field for field in _IN_SHAPE if getattr(self, field) is not None}
        rest = [field.name for field in dataclasses.fields(self) if field.name not in said]
        rows = tuple((name, str(value)) for name in rest if (value := getattr(self, name)) is not None)
        return Description(f"Gemma3Config: {shape_text(self)}", rows)

    def rope(self, layer_type: LayerType) -> Rope:
        """The rotary embedding of layers of `layer_type`."""
        return self.rope_full if layer_type == "full_attention" else self.rope_sliding

    @property
    def has_logits(self) -> bool:
        """Whether logits may be computed: not for the first layers of a larger model, unless they are allowed."""
        return self.truncated_from is None or self.allow_truncated_logits

    def check_logits(self) -> None:
        """Raise if logits may not be computed.

        Raises:
            ValueError: the config has only the first layers of a model.
        """
        if not self.has_logits:
            raise ValueError(
                f"only the first {self.num_hidden_layers} of {self.truncated_from} layers are loaded, so the logits "
                "would not be the model's; give return_type=None to capture activations, or stop_at_layer for the "
                "residual stream; allow_truncated_logits=True, in from_pretrained or the config, computes them anyway"
            )

    @property
    def padding(self) -> int:
        """The id to write at padding: `pad_token_id`, or 0 if that is None or outside the vocabulary.

        >>> Gemma3Config.preset("1b").padding
        0
        """
        pad = self.pad_token_id
        return 0 if pad is None or not 0 <= pad < self.vocab_size else pad

    @classmethod
    def preset(cls, size: str) -> "Gemma3Config":
        """The published text model of that size: "270m", "1b", "4b", "12b" or "27b"."""
        if size not in PRESETS:
            raise ConfigError(f"there is no preset {size!r}; the published sizes are {', '.join(PRESETS)}")
        return PRESETS[size]

    @classmethod
    def from_hf(cls, config: Any) -> "Gemma3Config":
        """Read a Hugging Face config: a `config.json` as a dict, or a `PretrainedConfig`.

        Accepts text configs and multimodal configs (their `text_config`), and these dialects:

        - `rope_parameters` per layer type, or the older `rope_theta`, `rope_local_base_freq` and `rope_scaling`. In
          `rope_scaling`, the old key `type` means `rope_type`, as in transformers 4.50 to 4.57. transformers 5 ignores
          `type`, and would run such a model without its scaling.
        - Flat `rope_parameters`, which describe the full layers, as `rope_theta` and `rope_scaling` do. The sliding
          layers keep `rope_local_base_freq`. transformers 5 ignores a flat entry without a message.
        - `layer_types`, or the older `sliding_window_pattern` or `_sliding_window_pattern`, or neither: then every
          sixth layer is full.

        Raises:
            ConfigError: the port does not support the value of a field; the message names the field.
        """
        raw = _mapping(
            config if isinstance(config, Mapping) or not hasattr(config, "to_dict") else config.to_dict(), ""
        )
        _check_model_type(raw)
        if "text_config" in raw:
            # The multimodal class reads tie_word_embeddings from the outer config, which may also have the special
            # tokens.
            outer = {name: raw[name] for name in _SPECIAL_TOKENS if raw.get(name) is not None}
            text = _mapping(raw["text_config"], "text_config")
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
        fields |= {name: False for name in _FLAGS if fields[name] is None}
        stop = fields.pop("eos_token_id")
        full, sliding = _ropes(raw)
        config = cls(
            **fields,
            layer_types=_layer_types(raw),
            rope_full=full,
            rope_sliding=sliding,
            truncated_from=raw.get("truncated_from"),
            embedding_head=_embedding_head(raw.get("embedding_head")),
        )
        return config.stopping_at(stop)

    def stopping_at(self, stop: int | list[int] | tuple[int, ...] | None) -> "Gemma3Config":
        """The same config with other stop tokens: an id, several ids, or None.

        >>> Gemma3Config.preset("1b").stopping_at([1, 106]).eos_token_id
        (1, 106)
        """
        return dataclasses.replace(self, eos_token_id=tuple(stop) if isinstance(stop, list) else stop)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of a `Gemma3ForCausalLM` with this shape; `from_hf` reads it back to an equal config.

        The entry `embedding_head`, of a config that has one, is this library's own.
        """
        fields = dataclasses.asdict(self)
        head = fields.pop("embedding_head")
        if head is not None:
            fields["embedding_head"] = {**head, "dense": list(head["dense"]), "prompts": dict(head["prompts"])}
        fields["layer_types"] = list(fields["layer_types"])
        del fields["allow_truncated_logits"]  # a decision for one session
        if self.truncated_from is None:
            del fields["truncated_from"]
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


def shape_text(config: Gemma3Config) -> str:
    """The shape of a model in words.

    >>> shape_text(Gemma3Config.preset("270m"))
    '18 layers (3 full, 15 sliding by 512), d 640, 4 heads of 256 over 1 key/value heads, MLP 2048, vocabulary 262144'
    """
    layers = f"{config.num_hidden_layers} layers"
    if config.truncated_from is not None:
        layers = f"the first {config.num_hidden_layers} of {config.truncated_from} layers"
    full = config.layer_types.count("full_attention")
    sliding = f"{config.num_hidden_layers - full} sliding by {config.sliding_window}"
    heads = f"{config.num_attention_heads} heads of {config.head_dim} over {config.num_key_value_heads} key/value heads"
    sizes = f"d {config.hidden_size}, {heads}, MLP {config.intermediate_size}, vocabulary {config.vocab_size}"
    return f"{layers} ({full} full, {sliding}), {sizes}"


def _pattern(n_layers: int, every: int) -> tuple[LayerType, ...]:
    return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layers))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _mapping(value: object, name: str) -> Json:
    """`value`, after a check that it is a mapping; None is an empty mapping, except for the config itself."""
    if value is None and name:
        return {}
    _require(isinstance(value, Mapping), f"{name or 'the config'} is {value!r}; it must be a mapping")
    return cast(Json, value)


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that int32 can hold: ids and positions are int32 in the model."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INT32


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    """Whether a number is positive and finite in float32, in which the model computes."""
    return _is_number(value) and _FLOAT32[0] <= value <= _FLOAT32[1]


def _check_values(config: Gemma3Config) -> None:
    """Check each field separately."""
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        good = _is_integer(value) and value > 0
        _require(good, f"{name} is {value!r}; it must be a positive integer that int32 can hold")
    layers = config.num_hidden_layers
    _require(layers <= _MOST_LAYERS, f"num_hidden_layers is {layers}; it must be at most {_MOST_LAYERS:,}")
    whole = config.truncated_from
    good = whole is None or (_is_integer(whole) and layers < whole <= _MOST_LAYERS)
    _require(good, f"truncated_from is {whole!r}; it must be more than num_hidden_layers")
    for name in _POSITIVE_NUMBERS:
        value = getattr(config, name)
        good = _is_positive(value) or (value is None and name == "final_logit_softcapping")
        _require(good, f"{name} is {value!r}; it must be a positive number that float32 can hold")
    for name in _FLAGS:
        value = getattr(config, name)
        _require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
    for name in _SPECIAL_TOKENS:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
        good = all(item is None or _is_integer(item) for item in each)
        _require(good, f"{name} is {value!r}; it must be a token id")
    for name in ("rope_full", "rope_sliding"):
        rope = getattr(config, name)
        good = all(_is_positive(value) for value in (rope.theta, rope.factor))
        _require(good, f"{name} is {rope}; theta and factor must be positive numbers that float32 can hold")
    if config.embedding_head is not None:
        _check_head(config.embedding_head)
    good = isinstance(config.layer_types, (tuple, list)) and all(isinstance(kind, str) for kind in config.layer_types)
    _require(good, f"layer_types is {config.layer_types!r}; it must list one type for each layer")


def _check_head(head: EmbeddingHead) -> None:
    sizes = {"dense": head.dense, "max_length": () if head.max_length is None else (head.max_length,)}
    for name, values in sizes.items():
        for size in values:
            good = isinstance(size, int) and not isinstance(size, bool) and size > 0
            _require(good, f"{name} of embedding_head has {size!r}; it must be a positive integer")
    prompts = dict(head.prompts)
    good = all(isinstance(text, str) for pair in head.prompts for text in pair)
    _require(good, f"prompts of embedding_head are {prompts!r}; they must be texts")
    default = head.default_prompt
    known = default is None or default in prompts
    _require(known, f"default_prompt of embedding_head is {default!r}; there is no prompt of that name")


def _check_layers(config: Gemma3Config) -> None:
    """Check that the fields match each other."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    _require(heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    _require(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; rotary embeddings need an even one")
    for name in ("rope_full", "rope_sliding"):
        rope = getattr(config, name)
        # [e / 2] frequencies theta**(-2i / e) / factor; the largest is the first or, for theta below 1, the last.
        largest = max(1.0, rope.theta ** (2 / config.head_dim - 1)) / rope.factor
        good = largest * config.max_position_embeddings <= _FLOAT32[1]
        _require(good, f"{name} is {rope}; its angles overflow float32 within max_position_embeddings")
    n, layers = len(config.layer_types), config.num_hidden_layers
    _require(n == layers, f"layer_types has {n} entries for num_hidden_layers {layers}")
    known = get_args(LayerType)
    unknown = sorted(set(config.layer_types) - set(known))
    _require(not unknown, f"layer_types has {', '.join(unknown)}; it takes {' and '.join(known)}")


def _check_model_type(raw: Json) -> None:
    model_type = raw.get("model_type", "gemma3_text")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}; this port supports {' and '.join(_MODEL_TYPES)}")


def _embedding_head(entry: object) -> EmbeddingHead | None:
    if entry is None:
        return None
    fields = dict(_mapping(entry, "embedding_head"))
    unknown = set(fields) - {field.name for field in dataclasses.fields(EmbeddingHead)}
    _require(not unknown, f"embedding_head has {', '.join(sorted(unknown))}, which it does not take")
    dense, prompts = fields.pop("dense", ()), _mapping(fields.pop("prompts", None), "prompts of embedding_head")
    _require(isinstance(dense, list | tuple), f"dense of embedding_head is {dense!r}; it must list sizes")
    return EmbeddingHead(dense=tuple(dense), prompts=tuple(prompts.items()), **fields)


def _layer_types(raw: Json) -> tuple[LayerType, ...]:
    values = raw.get("layer_types")
    if values is not None:
        return tuple(values) if isinstance(values, list) else values
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    layers = raw.get("num_hidden_layers", _HF_DEFAULTS["num_hidden_layers"])
    _require(
        isinstance(every, int) and every > 0, f"sliding_window_pattern is {every!r}; it must be a positive integer"
    )
    _require(
        isinstance(layers, int) and layers <= _MOST_LAYERS,
        f"num_hidden_layers is {layers!r}; it must be a positive integer, at most {_MOST_LAYERS:,}",
    )
    return _pattern(layers, every)


def _ropes(raw: Json) -> tuple[Rope, Rope]:
    """The (full, sliding) rotary embeddings of any config style, or of styles merged as in Hugging Face."""
    new = _mapping(raw.get("rope_parameters"), "rope_parameters")
    kinds = get_args(LayerType)
    if new and not set(new) & set(kinds):
        new = {"full_attention": new}
    # transformers 5 keeps the keys of a flat entry beside the entries that it adds, and does not read them.
    stray = sorted(set(new) - set(kinds) - _ROPE_FIELDS)
    _require(not stray, f"rope_parameters has {', '.join(stray)}; it takes one entry per layer type")
    full = {"rope_theta": raw.get("rope_theta", 1_000_000.0)}
    full |= _rope_entry(new.get("full_attention"), "rope_parameters of full_attention")
    full |= _rope_entry(raw.get("rope_scaling"), "rope_scaling")
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
    sliding |= _rope_entry(new.get("sliding_attention"), "rope_parameters of sliding_attention")
    return _rope_from_hf(full, "full_attention"), _rope_from_hf(sliding, "sliding_attention")


def _rope_entry(value: Any, name: str) -> dict[str, Any]:
    """A mapping of rope parameters, in which the old key `type` is `rope_type` unless that is there, too."""
    entry = dict(_mapping(value, name))
    old = entry.pop("type", None)
    return entry if old is None else {"rope_type": old, **entry}


def _rope_from_hf(entry: dict[str, Any], where: str) -> Rope:
    values = {name: value for name, value in entry.items() if value is not None}
    kind = values.pop("rope_type", "default")
    _require(kind in ("default", "linear"), f"rope_type of {where} is {kind!r}; this port takes 'default' and 'linear'")
    partial = values.pop("partial_rotary_factor", 1.0)
    _require(partial == 1.0, f"partial_rotary_factor of {where} is {partial!r}; Gemma 3 rotates the whole head")
    theta, factor = values.pop("rope_theta", None), values.pop("factor", None)
    local = where == "sliding_attention"
    name = "rope_theta of sliding_attention (rope_local_base_freq)" if local else "rope_theta of full_attention"
    _require(_is_positive(theta), f"{name} is {theta!r}; it must be a positive number that float32 can hold")
    _require(not values, f"the rope parameters of {where} have {', '.join(values)}, which rope_type {kind!r} lacks")
    if kind == "default":
        # transformers reads `factor` only for the linear type.
        return Rope(float(theta))
    why = "rope_type 'linear' needs a positive number that float32 can hold"
    _require(_is_positive(factor), f"factor of {where} is {factor!r}; {why}")
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
