"""Small random folders of `sentence_transformers` with EmbeddingGemma's modules, and texts for them."""

from pathlib import Path

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing

from gemma3_jax import (
    TINY,
)

# Float32 embeddings of length 1: the two sum in other orders.
BAR = 1e-6
WORDS = ["ba", "ke", "lo", "mu", "ti", "so", "re", "na", "du", "pi"]
PROMPTS = {"query": "ba ke ba ", "document": "so "}
D, WIDE, OUT, LONGEST = 48, 80, 24, 70


def text(n: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


TEXTS = [text(n, n) for n in (1, 40, 3, 17, 0, 90, 2, 16, 33)]


def tokenizer():
    """The shipped tokenizer, with BOS and EOS as EmbeddingGemma's has them."""
    made = transformers.AutoTokenizer.from_pretrained(TINY)
    special = [(made.bos_token, made.bos_token_id), (made.eos_token, made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{made.bos_token} $A {made.eos_token}", special_tokens=special
    )
    return made


def write(folder: Path, **overrides) -> SentenceTransformer:
    """A random model with EmbeddingGemma's modules; returned as `sentence_transformers` loads it."""
    made = tokenizer()
    config = transformers.Gemma3TextConfig(
        vocab_size=len(made),
        hidden_size=D,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        sliding_window=8,
        query_pre_attn_scalar=13,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=LONGEST,
        use_bidirectional_attention=True,
        pad_token_id=made.pad_token_id,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        **overrides,
    )
    model = transformers.Gemma3TextModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if "norm" in name else 0.15))
    model.save_pretrained(folder / "text")
    made.save_pretrained(folder / "text")
    dense = [Dense(a, b, bias=False, activation_function=torch.nn.Identity()) for a, b in ((D, WIDE), (WIDE, OUT))]
    modules = [Transformer(str(folder / "text"), max_seq_length=LONGEST), Pooling(D), *dense, Normalize()]
    SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu").save(str(folder / "model"))
    return load(folder / "model")


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def apart(ours, theirs) -> float:
    """Largest difference; shapes must match."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max())
