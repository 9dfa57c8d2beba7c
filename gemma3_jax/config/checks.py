"""Checks of the fields of a `Gemma3Config`: each by itself, and whether they match."""

from __future__ import annotations

from typing import Any, get_args

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

_POSITIVE_INTEGERS = (*SIZES, "max_position_embeddings")
_POSITIVE_NUMBERS = ("query_pre_attn_scalar", "rms_norm_eps", "final_logit_softcapping")


def check_values(config: Any) -> None:
    """Check each field separately."""
    for name in _POSITIVE_INTEGERS:
        value = getattr(config, name)
        good = is_integer(value) and value > 0
        require(good, f"{name} is {value!r}; it must be a positive integer that int32 can hold")
    layers = config.num_hidden_layers
    require(layers <= MOST_LAYERS, f"num_hidden_layers is {layers}; it must be at most {MOST_LAYERS:,}")
    whole = config.truncated_from
    good = whole is None or (is_integer(whole) and layers < whole <= MOST_LAYERS)
    require(good, f"truncated_from is {whole!r}; it must be more than num_hidden_layers")
    for name in _POSITIVE_NUMBERS:
        value = getattr(config, name)
        good = is_positive(value) or (value is None and name == "final_logit_softcapping")
        require(good, f"{name} is {value!r}; it must be a positive number that float32 can hold")
    for name in FLAGS:
        value = getattr(config, name)
        require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false")
    for name in SPECIAL_TOKENS:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
        good = all(item is None or is_integer(item) for item in each)
        require(good, f"{name} is {value!r}; it must be a token id")
    for name in ("rope_full", "rope_sliding"):
        rope = getattr(config, name)
        good = all(is_positive(value) for value in (rope.theta, rope.factor))
        require(good, f"{name} is {rope}; theta and factor must be positive numbers that float32 can hold")
    if config.embedding_head is not None:
        _check_head(config.embedding_head)
    good = isinstance(config.layer_types, (tuple, list)) and all(isinstance(kind, str) for kind in config.layer_types)
    require(good, f"layer_types is {config.layer_types!r}; it must list one type for each layer")


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


def check_layers(config: Any) -> None:
    """Check that the fields match each other."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    require(heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    require(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; rotary embeddings need an even one")
    for name in ("rope_full", "rope_sliding"):
        rope = getattr(config, name)
        # [e / 2] frequencies theta**(-2i / e) / factor; the largest is the first or, for theta below 1, the last.
        largest = max(1.0, rope.theta ** (2 / config.head_dim - 1)) / rope.factor
        good = largest * config.max_position_embeddings <= FLOAT32[1]
        require(good, f"{name} is {rope}; its angles overflow float32 within max_position_embeddings")
    n, layers = len(config.layer_types), config.num_hidden_layers
    require(n == layers, f"layer_types has {n} entries for num_hidden_layers {layers}")
    known = get_args(LayerType)
    unknown = sorted(set(config.layer_types) - set(known))
    require(not unknown, f"layer_types has {', '.join(unknown)}; it takes {' and '.join(known)}")
