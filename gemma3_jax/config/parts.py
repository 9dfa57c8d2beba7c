"""The parts of a config, the error that names a field, and what a value must be."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeGuard, cast

from gemma3_jax.messages import printable
from gemma3_jax.types import Settings

LayerType = Literal["sliding_attention", "full_attention"]

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
)
SPECIAL_TOKENS = ("pad_token_id", "eos_token_id", "bos_token_id")
FLAGS = ("attention_bias", "use_bidirectional_attention", "tie_word_embeddings")
# The dtypes of the embedding in which a model can run, and the reason why float16 is not one of them.
RUN_DTYPES = ("float32", "bfloat16")
PAST_FLOAT16 = "Gemma 3's residual stream reaches 104,000 in the 270m, and float16 ends at 65,504"
FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal number and largest number
MOST_LAYERS = 10_000  # without a limit, a damaged config would take all memory: names and types are made per layer
_LARGEST_INT32 = 2**31 - 1


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


def pattern(n_layers: int, every: int) -> tuple[LayerType, ...]:
    return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layers))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def mapping(value: object, name: str) -> Settings:
    """`value`, after a check that it is a mapping; None is an empty mapping, except for the config itself."""
    if value is None and name:
        return {}
    require(isinstance(value, Mapping), f"{name or 'the config'} is {value!r}; it must be a mapping")
    return cast(Settings, value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that int32 can hold: ids and positions are int32 in the model."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INT32


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    """Whether a number is positive and finite in float32, in which the model computes."""
    return is_number(value) and FLOAT32[0] <= value <= FLOAT32[1]
