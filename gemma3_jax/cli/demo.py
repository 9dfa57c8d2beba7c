"""Demonstrates the shipped model: it copies, it has induction heads, and a picture shows them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax import pictures
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.sites.names import block


def repeated_tokens(model: HookedGemma3, rows: int, half: int, seed: int = 0) -> np.ndarray:
    """[rows, 1 + 2 * half] ids: <bos>, then a random sequence of `half` tokens, twice."""
    first = 1 + max(model.config.pad_token_id or 0, model.config.bos_token_id or 0, 3)
    halves = np.random.default_rng(seed).integers(first, model.config.vocab_size, (rows, half))
    bos = np.full((rows, 1), model.config.bos_token_id)
    return np.concatenate([bos, halves, halves], axis=1)


def half_losses(model: HookedGemma3, tokens: np.ndarray) -> tuple[float, float]:
    """Mean next-token loss, in nats, on the first half of `repeated_tokens` and on its repetition.

    The first token of the repetition cannot be predicted, so it counts with the first half.
    """
    logits = model(tokens)
    # [b, p - 1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.asarray(tokens[:, 1:]))
    half = tokens.shape[1] // 2
    return float(jnp.mean(losses[:, : half + 1])), float(jnp.mean(losses[:, half + 1 :]))


def induction_scores(model: HookedGemma3, tokens: np.ndarray) -> np.ndarray:
    """[L, h]: on the repetition, the mean attention from each token to the one after its first occurrence."""
    patterns = attention_patterns(model, tokens)
    half = tokens.shape[1] // 2
    queries = np.arange(half + 1, 2 * half + 1)
    # [L, b, h, half] -> [L, h]
    return patterns[:, :, :, queries, queries - half + 1].mean(axis=(1, 3))


def attention_patterns(model: HookedGemma3, tokens: np.ndarray) -> np.ndarray:
    """[L, b, h, p, k], captured from every layer."""
    _, cache = model.run_with_cache(tokens, block("*", "attn.hook_pattern"), return_type=None)
    return np.stack(jax.device_get(list(cache.values())))


def draw_heads(model: HookedGemma3, tokens: np.ndarray, heads: list[tuple[int, int]], file: Path) -> None:
    """Write a picture, PNG or HTML, with the attention pattern of each (layer, head) on the first row of `tokens`."""
    patterns = attention_patterns(model, tokens[:1])
    # [L, b, h, p, k] -> [n, p, k]
    chosen = [patterns[layer, 0, head] for layer, head in heads]
    labels = [str(token) for token in model.to_str_tokens(tokens[0])]
    pictures.attention_patterns(chosen, labels, heads, model.config, title="Induction heads").save(file)
