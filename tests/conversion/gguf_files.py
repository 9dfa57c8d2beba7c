"""GGUF files as llama.cpp's converter writes them, with random weights, and what `transformers` reads from one."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from gemma3_jax import Gemma3Config
from gemma3_jax.conversion import gguf as ours
from gemma3_jax.conversion.gemma3 import entries

# Two float32 implementations of six layers, relative in norm: 1e-6 each, and the same rounding of RoPE.
BAR = 1e-5
# Quantised in a block of 256 weights; head_dim is 256 because transformers takes the scale of attention to be 1/16.
SMALL = Gemma3Config(
    vocab_size=92,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=4,
    query_pre_attn_scalar=256,
    max_position_embeddings=1024,
)
ONE_LAYER = dataclasses.replace(SMALL, num_hidden_layers=1, layer_types=("sliding_attention",))
LETTERS = "abcdefghijklmnopqrstuvwxyz▁"
TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[tool]", "<start_of_turn>", "<end_of_turn>"),
    *("  ", "   ", "\n\n"),
    *LETTERS,
    *("th", "the", "▁the", "he", "▁t", "in", "ing", "▁a", "an", "and", "▁and", "er", "re", "ere", "there"),
]
TOKENS += [f"<unused{i}>" for i in range(SMALL.vocab_size - len(TOKENS))]
TEXTS = ["the thing there", "  and   here\n\nin", "<start_of_turn>in<end_of_turn>", "[tool]<bos> é", "▁the"]
# By the end of the tensor's name; the others are Q8_0. Norms are float32 in every file.
KINDS = {
    "attn_q": Kind.Q5_0,
    "attn_k": Kind.F16,
    "attn_v": Kind.BF16,
    "attn_output": Kind.Q4_K,
    "ffn_up": Kind.Q4_0,
    "ffn_gate": Kind.F32,
    "ffn_down": Kind.Q6_K,
}
# The bytes of a block's float16 scales, where `gguf` cannot quantise and the test makes random blocks.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}


def shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor by GGUF name."""
    by_key = {ours._key(name): name for name in names(config)}
    return {
        by_key[key]: entry.hf_shape
        for entry in entries(config)
        for key in ["lm_head.weight" if entry.hf.startswith("lm_head") else f"model.{entry.hf}"]
    }


def names(config: Gemma3Config) -> list[str]:
    whole = ["token_embd", "output_norm", *([] if config.tie_word_embeddings else ["output"])]
    in_block = [name for name in ours._KEYS if name not in whole]
    blocks = [f"blk.{i}.{name}" for i in range(config.num_hidden_layers) for name in in_block]
    return [f"{name}.weight" for name in [*whole, *blocks]]


def blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Random quantised rows, [rows, bytes]."""
    if kind not in SCALES:
        return gguf.quantize(rng.normal(size=shape).astype(np.float32) * 0.06, kind)
    size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // size[0], size[1]), np.uint8)
    for at in SCALES[kind]:
        data[..., at : at + 2] = np.array([2e-4], np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)


def write(
    file: Path,
    config: Gemma3Config = SMALL,
    *,
    fields=None,
    tokens=TOKENS,
    kinds=KINDS,
    extra=(),
    architecture="gemma3",
):
    """A GGUF file with random weights, as llama.cpp's converter writes it; `fields` are added or replaced."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_full.theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3 if t[0] == "<" else 4 if t.isspace() or t[0] == "[" else 1 for t in tokens])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    for name, value in (fields or {}).items():
        getattr(writer, f"add_{name}")(*value)
    for name, shape in [*shapes(config).items(), *extra]:
        if name.endswith("_norm.weight"):
            writer.add_tensor(name, 1 + 0.3 * rng.normal(size=shape).astype(np.float32))
        else:
            kind = kinds.get(name.split(".")[-2], Kind.Q8_0)
            writer.add_tensor(name, blocks(rng, shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read_by_transformers(file: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def differing(config, params, state) -> list[str]:
    """The parameters whose Hugging Face tensor is not bit for bit the one in `state`."""
    found = []
    for entry in entries(config):
        leaf = params
        for name in entry.path:
            leaf = leaf[name]
        mine = np.ascontiguousarray(entry.step.revert(np.asarray(leaf)))
        their = state["lm_head.weight" if entry.hf == "lm_head.weight" else f"model.{entry.hf}"].numpy()
        if mine.dtype != their.dtype or mine.shape != their.shape or mine.tobytes() != their.tobytes():
            found.append(entry.ours)
    return found


def relative(value, truth) -> float:
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))
