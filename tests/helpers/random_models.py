"""Random Hugging Face Gemma 3 models for the tests: small, and with every parameter random, norms included."""

import numpy as np
import torch
import transformers

# Small enough to be fast, and with no two sizes equal, so that no swapped axis can hide.
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "sliding_window": 7,
    "query_pre_attn_scalar": 13,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values: transformers initialises norms to 0, which hides a swapped norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def hf_config(**overrides) -> transformers.Gemma3TextConfig:
    """A small text config, with eager attention."""
    return transformers.Gemma3TextConfig(**{**SMALL, "attn_implementation": "eager", **overrides})


def hf_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> transformers.Gemma3ForCausalLM:
    """A small causal language model with every parameter random, in `dtype`."""
    model = randomize(transformers.Gemma3ForCausalLM(hf_config(**overrides)), seed)
    for parameter in model.parameters():
        # Not model.to(dtype), which would round the rotary frequencies too; from_pretrained does not.
        parameter.data = parameter.data.to(dtype)
    return model


def hf_multimodal(seed: int = 0, **overrides) -> transformers.Gemma3ForConditionalGeneration:
    """A small image-and-text model with every parameter random."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {key: value for key, value in hf_config(**overrides).to_dict().items() if key != "model_type"}
    config = transformers.Gemma3Config(
        text_config={**text, "model_type": "gemma3_text"},
        vision_config=vision,
        mm_tokens_per_image=1,
        tie_word_embeddings=overrides.get("tie_word_embeddings", True),
        attn_implementation="eager",
    )
    return randomize(transformers.Gemma3ForConditionalGeneration(config), seed)


def random_tokens(shape: tuple[int, int], vocab_size: int = SMALL["vocab_size"], seed: int = 0) -> np.ndarray:
    """[b, p] int64 ids, none of them padding."""
    return np.random.default_rng(seed).integers(3, vocab_size, shape)
