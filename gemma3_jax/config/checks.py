"""Checks of the fields of a `Gemma3Config`: each by itself, and whether they match."""

from __future__ import annotations

from typing import get_args

from gemma3_jax.config.parts import (
    FLAGS,
    FLOAT32,
    MOST_LAYERS,
    SIZES,
    SPECIAL_TOKENS,
    EmbeddingHead,
    LayerType,
    is_integer,
    is_positive,
    require,
)
from gemma3_jax.types import Settings

_POSITIVE_INTEGERS = (*SIZES, "max_position_embeddings")
_POSITIVE_NUMBERS = ("query_pre_attn_scalar", "rms_norm_eps", "final_logit_softcapping")


def check_values(fields: Settings) -> None:
    """Check each field of a config separately."""
    for name in _POSITIVE_INTEGERS:
        value = fields[name]
        good = is_integer(value) and value > 0
        require(good, f"{name} is {value!r}; it must be a positive integer that int32 can hold")
    layers = fields["num_hidden_layers"]
    require(layers <= MOST_LAYERS, f"num_hidden_layers is {layers}; it must be at most {MOST_LAYERS:,}")
    whole = fields["truncated_from"]
    good = whole is None or (is_integer(whole) and layers < whole <= MOST_LAYERS)
    require(good, f"truncated_from is {whole!r}; it must be more than num_hidden_layers")
    for name in _POSITIVE_NUMBERS:
        value = fields[name]
        good = is_positive(value) or (value is None and name == "final_logit_softcapping")
        require(good, f"{name} is {value!r}; it must be a positive number that float32 can hold")
    for name in FLAGS:
        value = fields[name]
        require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
    for name in SPECIAL_TOKENS:
        value = fields[name]
        each = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
        good = all(item is None or is_integer(item) for item in each)
        require(good, f"{name} is {value!r}; it must be a token id")
    for name in ("rope_full", "rope_sliding"):
        rope = fields[name]
        good = all(is_positive(value) for value in (rope.theta, rope.factor))
        require(good, f"{name} is {rope}; theta and factor must be positive numbers that float32 can hold")
    if fields["embedding_head"] is not None:
        _check_head(fields["embedding_head"])
    types = fields["layer_types"]
    good = isinstance(types, (tuple, list)) and all(isinstance(kind, str) for kind in types)
    require(good, f"layer_types is {types!r}; it must list one type for each layer")


def _check_head(head: EmbeddingHead) -> None:
    sizes = {"dense": head.dense, "max_length": () if head.max_length is None else (head.max_length,)}
    for name, values in sizes.items():
        for size in values:
            good = isinstance(size, int) and not isinstance(size, bool) and size > 0
            require(good, f"{name} of embedding_head has {size!r}; it must be a positive integer")
    prompts = dict(head.prompts)
    good = all(isinstance(text, str) for pair in head.prompts for text in pair)
    require(good, f"prompts of embedding_head are {prompts!r}; they must be texts")
    default = head.default_prompt
    known = default is None or default in prompts
    require(known, f"default_prompt of embedding_head is {default!r}; there is no prompt of that name")


def check_layers(fields: Settings) -> None:
    """Check that the fields of a config match each other."""
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    require(heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    size = fields["head_dim"]
    require(size % 2 == 0, f"head_dim is {size}; rotary embeddings need an even one")
    for name in ("rope_full", "rope_sliding"):
        rope = fields[name]
        # [e / 2] frequencies theta**(-2i / e) / factor; the largest is the first or, for theta below 1, the last.
        largest = max(1.0, rope.theta ** (2 / size - 1)) / rope.factor
        good = largest * fields["max_position_embeddings"] <= FLOAT32[1]
        require(good, f"{name} is {rope}; its angles overflow float32 within max_position_embeddings")
    types, layers = fields["layer_types"], fields["num_hidden_layers"]
    require(len(types) == layers, f"layer_types has {len(types)} entries for num_hidden_layers {layers}")
    known = get_args(LayerType)
    unknown = sorted(set(types) - set(known))
    require(not unknown, f"layer_types has {', '.join(unknown)}; it takes {' and '.join(known)}")
