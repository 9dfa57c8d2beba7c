"""Gemma 3 in GGUF, the format of llama.cpp: config and tensors, without torch.

The names and what they hold are those of llama.cpp's `convert_hf_to_gguf.py`. Query and key weights have Hugging Face's
order, and norms are stored as 1 + w.
"""

import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma3_jax.config import PRESETS, ConfigError, Gemma3Config
from gemma3_jax.conversion.files import aligned_empty
from gemma3_jax.conversion.gguf_header import Header, block_sizes, n_bytes, vocabulary
from gemma3_jax.conversion.tensors import Tensors
from gemma3_jax.conversion.words import listed
from gemma3_jax.extras import needs_extra
from gemma3_jax.reading import CheckpointError, Stored
from gemma3_jax.types import JsonObject, Settings

ARCHITECTURE = "gemma3"
# Hugging Face's keys after `model.`, by GGUF name; `{}` is the number of the layer.
_KEYS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "layers.{}.input_layernorm",
    "attn_q": "layers.{}.self_attn.q_proj",
    "attn_k": "layers.{}.self_attn.k_proj",
    "attn_v": "layers.{}.self_attn.v_proj",
    "attn_q_norm": "layers.{}.self_attn.q_norm",
    "attn_k_norm": "layers.{}.self_attn.k_norm",
    "attn_output": "layers.{}.self_attn.o_proj",
    "post_attention_norm": "layers.{}.post_attention_layernorm",
    "ffn_norm": "layers.{}.pre_feedforward_layernorm",
    "ffn_gate": "layers.{}.mlp.gate_proj",
    "ffn_up": "layers.{}.mlp.up_proj",
    "ffn_down": "layers.{}.mlp.down_proj",
    "post_ffw_norm": "layers.{}.post_feedforward_layernorm",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_VISION = re.compile(r"(v|mm)\.")  # Ollama's files hold both halves of a multimodal model
_END_OF_TURN = "<end_of_turn>"
_REFUSED = {
    "gemma-embedding": "is an EmbeddingGemma in GGUF, which has no pooling heads; give its Hugging Face checkpoint",
    "clip": "is the vision half of a multimodal model (mmproj); give the GGUF file of the language model",
}
_BAND = 2**18  # weights that are dequantised together: their float32 fits in a processor's cache


def config_of(header: Header) -> Gemma3Config:
    """The config of a GGUF file.

    The file does not have all fields. The base of the local layers (10,000) and their pattern (6) are Gemma 3's unless
    a newer file states them. The scale of attention and the RoPE factor are those of the published model with the same
    width, heads and head_dim; other shapes have head_dim and 1.

    Raises:
        CheckpointError: the file is not a whole Gemma 3 language model, or lacks a field.
        ConfigError: a field is invalid or not supported.
    """
    _check_kind(header)
    fields, file = header.fields, header.file

    def get(name: str, default: object = None) -> object:
        return _as_meant(fields.get(f"{ARCHITECTURE}.{name}", default))

    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file} has no model: it lacks token_embd.weight")
    raw: JsonObject = {
        "vocab_size": embedding.shape[0],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": _one(get("feed_forward_length")),
        "num_attention_heads": _one(get("attention.head_count")),
        "num_key_value_heads": _one(get("attention.head_count_kv")),
        "head_dim": get("attention.key_length", 256),
        "sliding_window": get("attention.sliding_window"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    }
    missing = [name for name, value in raw.items() if value is None]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)} in its metadata")
    # llama.cpp reads these for every architecture; Gemma 3 has one value.
    for name, value in {"attention.causal": True, "rope.dimension_count": raw["head_dim"]}.items():
        if get(name, value) != value:
            raise CheckpointError(f"{file}: {name} is {get(name)}; this library reads Gemma 3 with {value}")
    published = _published(raw)
    factor = get("rope.scaling.factor", published.rope_full.factor if published else 1.0)
    kind = get("rope.scaling.type", "linear")
    raw |= {
        "max_position_embeddings": get("context_length", 131_072),
        "query_pre_attn_scalar": published.query_pre_attn_scalar if published else raw["head_dim"],
        "rope_theta": get("rope.freq_base", get("rope.global.freq_base", 1_000_000.0)),
        "rope_local_base_freq": get("rope.freq_base_swa", get("rope.local.freq_base", 10_000.0)),
        "rope_scaling": None if kind == "none" else {"rope_type": kind, "factor": factor},
        "final_logit_softcapping": get("final_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **_pattern(get("attention.sliding_window_pattern", 6)),
        **_special_tokens(fields),
    }
    try:
        return Gemma3Config.from_hf(raw)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def tensors_of(header: Header, dtype: np.dtype) -> Tensors:
    """The tensors of a GGUF file, which are dequantised when they are read: norms in float32, others in `dtype`.

    Raises:
        CheckpointError: the model does not have a tensor, or one has a quantisation type that the `gguf` package cannot
            dequantise.
    """
    names = {_key(name): name for name in header.tensors}
    unknown = [name for key, name in names.items() if not key.startswith(("model.", "vision_tower.", "lm_head."))]
    if unknown:
        # Not a head: `rope_freqs.weight`, for one, changes every number.
        raise CheckpointError(f"{header.file} has {listed(unknown)}, which its config does not have")
    stored = {key: header.tensors[name] for key, name in names.items()}
    for kind in {tensor.dtype for key, tensor in stored.items() if not key.startswith("vision_tower.")}:
        _check_dequantises(header.file, kind)
    dtypes = {
        key: np.dtype("float32") if name.endswith("_norm.weight") else np.dtype(dtype) for key, name in names.items()
    }
    return Tensors(
        checkpoint=str(header.file),
        shapes={key: tensor.shape for key, tensor in stored.items()},
        dtypes={key: of_key.name for key, of_key in dtypes.items()},
        open=lambda key: functools.partial(_dequantise, names[key], stored[key], dtypes[key]),
        file_of=lambda key: str(header.file),
        norms_hold_one=True,
    )


def _check_kind(header: Header) -> None:
    """Raise unless the file is a whole Gemma 3 language model."""
    fields, file = header.fields, header.file
    architecture = str(fields.get("general.architecture"))
    if architecture in _REFUSED:
        raise CheckpointError(f"{file} {_REFUSED[architecture]}")
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file} is of type {kind!r} (general.type); give a GGUF file with a whole model")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{file} has architecture {architecture!r}; this library reads {ARCHITECTURE!r}")
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{file} is one of the {parts} parts of a model; merge them with llama.cpp's `llama-gguf-split --merge`"
        )


def _as_meant(value: object) -> object:
    """A number that was rounded to float32 as the decimal that was rounded: 1e-6 is 9.99999997e-7 in the file.

    >>> _as_meant(9.999999974752427e-07)
    1e-06
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _one(value: object) -> object:
    """The value of all layers, where a file has one for each."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _published(raw: Settings) -> Gemma3Config | None:
    """The published model of the same width, heads and head_dim, or None. Layers and vocabulary may differ."""
    names = ("hidden_size", "num_attention_heads", "head_dim")
    same = (preset for preset in PRESETS.values() if all(getattr(preset, name) == raw[name] for name in names))
    return next(same, None)


def _pattern(pattern: object) -> JsonObject:
    """The fields of layer types: from a number, whose multiples are full layers, or a flag per layer, 1 if local."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if local else "full_attention" for local in pattern]}
    return {"sliding_window_pattern": pattern}


def _special_tokens(fields: Settings) -> JsonObject:
    """The special tokens. Those that end a text are the file's, and, of a chat model, the token that ends a turn.

    llama.cpp finds that token by its text too, where the file has only one `eos_token_id`.
    """
    names = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
    tokens = {name: fields[f"tokenizer.ggml.{key}"] for name, key in names.items() if f"tokenizer.ggml.{key}" in fields}
    stop = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    more, texts = fields.get("tokenizer.ggml.eos_token_ids", []), vocabulary(fields)
    stop += more if isinstance(more, list) else [more]
    if "tokenizer.chat_template" in fields and _END_OF_TURN in texts:
        stop.append(texts.index(_END_OF_TURN))
    stop = list(dict.fromkeys(token for token in stop if token is not None))
    return tokens | ({"eos_token_id": stop[0] if len(stop) == 1 else stop} if stop else {})


def _key(name: str) -> str:
    """The Hugging Face key of a tensor; a name that Gemma 3 does not have stays as it is.

    >>> _key("blk.3.attn_q.weight"), _key("rope_freqs.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'rope_freqs.weight')
    """
    if name == "output.weight":
        return "lm_head.weight"
    if _VISION.match(name):
        return f"vision_tower.{name}"
    match = _NAME.fullmatch(name)
    key = _KEYS.get(match[2]) if match else None
    if match is None or key is None or (match[1] is None) == ("{}" in key):
        return name
    return f"model.{key.format(match[1])}.{match[3]}"


def _check_dequantises(file: Path, kind: str) -> None:
    try:
        _dequantiser(kind)(np.zeros((1, block_sizes(kind)[1]), np.uint8))
    except NotImplementedError:
        raise CheckpointError(
            f"{file} has {kind} tensors, which the gguf package cannot dequantise; quantise the model to another type"
        ) from None


def _dequantiser(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    with needs_extra("gguf", "GGUF files need"):
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

    return functools.partial(dequantize, qtype=GGMLQuantizationType[kind])


def _dequantise(name: str, stored: Stored, dtype: np.dtype, rows: slice = slice(None)) -> np.ndarray:
    """One tensor in `dtype`, of which only these rows are filled: blocks are parts of rows.

    It is never in memory in float32 as a whole, unless that is `dtype`.
    """
    try:
        mapped = np.memmap(stored.file, np.uint8, "r", stored.start, n_bytes(stored))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {name} cannot be read: {error}") from error
    weights, size = block_sizes(stored.dtype)
    tensor = aligned_empty(stored.shape, dtype)
    # [blocks, bytes of a block] -> [blocks, weights of a block]
    blocks, out = mapped.view(np.ndarray).reshape(-1, size), tensor.reshape(-1, weights)
    dequantise, step = _dequantiser(stored.dtype), _BAND // weights
    first, end = (row * len(blocks) // stored.shape[0] for row in rows.indices(stored.shape[0])[:2])

    def fill(start: int) -> None:
        band = slice(start, min(start + step, end))
        # As one row: the package loops over groups of 16 rows in Python.
        out[band] = dequantise(blocks[band].reshape(1, -1)).reshape(-1, weights)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(first, end, step)):  # raises the first error
            pass
    return tensor
