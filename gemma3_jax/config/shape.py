"""The shape and constants of one Gemma 3 text model."""

import dataclasses
from typing import TYPE_CHECKING

from gemma3_jax.config.checks import check_layers, check_values
from gemma3_jax.config.huggingface import WithDict, fields_of, written
from gemma3_jax.config.parts import SIZES, ConfigError, EmbeddingHead, LayerType, Rope, pattern
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.elsewhere import missing
from gemma3_jax.types import JsonObject, Settings

# The fields that `shape_text` has.
_IN_SHAPE = (*SIZES, "layer_types", "truncated_from")


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
        check_values(vars(self))
        types = tuple(self.layer_types) or pattern(self.num_hidden_layers, every=6)
        object.__setattr__(self, "layer_types", types)
        check_layers(vars(self))

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

    def check_logits(self, remedy: str | None = None) -> None:
        """Raise if logits may not be computed; the message has a remedy, by default that for a run.

        Raises:
            ValueError: the config has only the first layers of a model.
        """
        if not self.has_logits:
            run = (
                "give return_type=None to capture activations, or stop_at_layer for the residual stream; "
                "allow_truncated_logits=True, in from_pretrained or the config, computes them anyway"
            )
            raise ValueError(
                f"only the first {self.num_hidden_layers} of {self.truncated_from} layers are loaded, so the logits "
                f"would not be the model's; {remedy or run}"
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
    def from_hf(cls, config: Settings | WithDict) -> "Gemma3Config":
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
        fields, stop = fields_of(config)
        return cls(**fields).stopping_at(stop)

    def stopping_at(self, stop: int | list[int] | tuple[int, ...] | None) -> "Gemma3Config":
        """The same config with other stop tokens: an id, several ids, or None.

        >>> Gemma3Config.preset("1b").stopping_at([1, 106]).eos_token_id
        (1, 106)
        """
        return dataclasses.replace(self, eos_token_id=tuple(stop) if isinstance(stop, list) else stop)

    def to_hf(self) -> JsonObject:
        """The `config.json` of a `Gemma3ForCausalLM` with this shape; `from_hf` reads it back to an equal config.

        The entry `embedding_head`, of a config that has one, is this library's own.
        """
        return written(dataclasses.asdict(self))


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


def check_config(config: object) -> None:
    """Raise TypeError for something else than a `Gemma3Config`."""
    if not isinstance(config, Gemma3Config):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a Gemma3Config, which comes before params; "
            "Gemma3Config.from_hf(config) makes one of Hugging Face's"
        )


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
