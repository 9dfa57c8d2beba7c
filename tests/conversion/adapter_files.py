"""Adapters that PEFT writes over a small base, and the comparison of merged parameters."""

import dataclasses
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 7},
    "all_linear": {"target_modules": "all-linear", "r": 3},
    "regex": {"target_modules": r".*layers\.[02]\.(self_attn\.q|mlp\.up)_proj"},
    "rslora": {"target_modules": ["v_proj"], "r": 8, "use_rslora": True},
    "dora": {"target_modules": ALL, "r": 4, "use_dora": True},
    "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3},
    },
    "excluded": {"target_modules": ALL, "exclude_modules": r".*\.1\..*"},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "dora_embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "unembedding": {"target_modules": ["lm_head", "q_proj"], "r": 4},
    "saved_unembedding": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved_norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "saved_mlp": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def write_base(directory):
    """A random tied model of three layers, with a tokenizer nowhere."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, eos_token_id=[1, 5],
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


def hf(base, dtype="float32"):
    return transformers.Gemma3ForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))


def trained(base, directory, config, model=None):
    """Write an adapter whose weights are random."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(hf(base) if model is None else model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(directory)
    return directory


def lora(base, directory, **options):
    return trained(base, directory, peft.LoraConfig(**options))


def of_hf(model, dtype=None):
    """Config and parameters of a model that PEFT has merged, whose config may still say that it is tied."""
    tied = torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    config = dataclasses.replace(Gemma3Config.from_hf(model.config), tie_word_embeddings=tied)
    return config, convert_state_dict(model.state_dict(), config, dtype)


def merged(base, adapter, dtype):
    return of_hf(peft.PeftModel.from_pretrained(hf(base, dtype), adapter).merge_and_unload())


def unequal(ours, theirs, ulps=0):
    """The parameters that differ by more than this many units of 2**-23, relative to the largest magnitude."""
    ours, theirs = (flax.traverse_util.flatten_dict(params) for params in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert {path: leaf.dtype for path, leaf in ours.items()} == {path: leaf.dtype for path, leaf in theirs.items()}
    names = []
    for path, leaf in ours.items():
        a, b = np.asarray(leaf, np.float32), np.asarray(theirs[path], np.float32)
        if np.any(np.abs(a - b) > ulps * 2.0**-23 * np.abs(b).max()):
            names.append("/".join(path))
    return names


def near(ours, theirs, terms):
    """Whether parameters are equal but for the order in which torch adds these many products; its CPU chooses it.

    Each addition rounds float32 once. In bfloat16, the last step of one number in a thousand may then be another.
    """
    if all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(ours)):
        return unequal(ours, theirs, ulps=terms) == []
    pairs = [(np.float32(a), np.float32(b)) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
    one_step = all(np.all(np.abs(a - b) <= 2.0**-7 * np.abs(b)) for a, b in pairs)
    return one_step and sum((a != b).sum() for a, b in pairs) <= sum(a.size for a, _ in pairs) / 1000


def edit_config(adapter, **values):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
