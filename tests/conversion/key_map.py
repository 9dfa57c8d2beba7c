"""Parameters worked out in torch from the key map, without the code under test, and comparison bit by bit."""

import shutil
from pathlib import Path

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}
BITS = {4: np.uint32, 2: np.uint16}


def bits(array) -> np.ndarray:
    """The bit patterns, in which -0 and 0 differ and NaNs are equal."""
    array = np.ascontiguousarray(array)
    return array.view(BITS[array.dtype.itemsize])


def assert_identical(ours: dict, theirs: dict) -> None:
    """Same keys, dtypes, shapes and bits."""
    assert sorted(ours) == sorted(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype, key
        np.testing.assert_array_equal(bits(ours[key]), bits(array), err_msg=str(key))


def flat(params: dict) -> dict[str, jax.Array]:
    """Leaves by adapter key, `blocks_3` spelled as in the tree."""
    return flax.traverse_util.flatten_dict(params, sep=".")


def expected(model, prefix: str = "model.", dtype: torch.dtype | None = None) -> dict[str, np.ndarray]:
    """The parameters of a Hugging Face model, worked out in torch from the key map, without the code under test.

    In `dtype`, or as they are stored, but float16 in float32.
    """
    if dtype is None and model.dtype == torch.float16:
        dtype = torch.float32
    state, config = model.state_dict(), model.config.get_text_config()
    d, e, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads

    def take(key: str) -> torch.Tensor:
        return state[prefix + key].to(dtype or state[prefix + key].dtype)

    def norm(key: str) -> torch.Tensor:
        return 1 + state[f"{prefix}{key}.weight"].float()

    out = {"embed.weight": take("embed_tokens.weight"), "ln_final.weight": norm("norm")}
    if not model.config.tie_word_embeddings and "lm_head.weight" in state:
        out["unembed.weight"] = state["lm_head.weight"].to(dtype or state["lm_head.weight"].dtype).T
    norms = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
    }
    for i in range(config.num_hidden_layers):
        hf, ours = f"layers.{i}", f"blocks_{i}"
        out |= {f"{ours}.{key}.weight": norm(f"{hf}.{name}") for key, name in norms.items()}
        for key, n in (("q", h), ("k", g), ("v", g)):
            proj = f"{hf}.self_attn.{key}_proj"
            out[f"{ours}.attn.{key}.weight"] = take(f"{proj}.weight").reshape(n, e, d).permute(0, 2, 1)
            if config.attention_bias:
                out[f"{ours}.attn.{key}.bias"] = take(f"{proj}.bias").reshape(n, e)
        out[f"{ours}.attn.o.weight"] = take(f"{hf}.self_attn.o_proj.weight").reshape(d, h, e).permute(1, 2, 0)
        if config.attention_bias:
            out[f"{ours}.attn.o.bias"] = take(f"{hf}.self_attn.o_proj.bias")
        for key, name in (("gate", "gate"), ("in", "up"), ("out", "down")):
            out[f"{ours}.mlp.{key}.weight"] = take(f"{hf}.mlp.{name}_proj.weight").T
    return {key: np.array(jax.dlpack.from_dlpack(tensor.contiguous())) for key, tensor in out.items()}


def rekeyed(source: Path, target: Path, rename) -> Path:
    """A copy of a single-file checkpoint with other keys; `rename` may return None to drop one."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    save_file({rename(key): array for key, array in tensors.items() if rename(key)}, target / "model.safetensors")
    return target


def loaded(directory: Path) -> transformers.Gemma3ForCausalLM:
    """As transformers loads it: rope frequencies stay float32, which `.to(bfloat16)` would round."""
    return transformers.Gemma3ForCausalLM.from_pretrained(directory, attn_implementation="eager")


def logits(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits


KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    "bf16": {"dtype": torch.bfloat16, "tie_word_embeddings": False},
    "f16": {"dtype": torch.float16},
}
