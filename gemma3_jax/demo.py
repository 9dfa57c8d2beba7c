"""What the shipped model does, and how to see it: copying, its induction heads, and a picture of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax.hooked import HookedGemma3


def repeated_tokens(model: HookedGemma3, rows: int, half: int, seed: int = 0) -> np.ndarray:
    """[rows, 1 + 2 * half] ids: <bos>, then a random sequence of `half` tokens, twice."""
    first = 1 + max(model.config.pad_token_id or 0, model.config.bos_token_id or 0, 3)
    halves = np.random.default_rng(seed).integers(first, model.config.vocab_size, (rows, half))
    bos = np.full((rows, 1), model.config.bos_token_id)
    return np.concatenate([bos, halves, halves], axis=1)


def half_losses(model: HookedGemma3, tokens: np.ndarray) -> tuple[float, float]:
    """Mean next-token loss, in nats, on the first half of `repeated_tokens` and on its repetition.

    The token that begins the repetition cannot be foreseen, and counts with the first half.
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
    _, cache = model.run_with_cache(tokens, "blocks.*.attn.hook_pattern", return_type=None)
    return np.stack(jax.device_get(list(cache.values())))


def draw_heads(model: HookedGemma3, tokens: np.ndarray, heads: list[tuple[int, int]], file: Path) -> None:
    """Write a PNG with the attention pattern of each (layer, head) on the first row of `tokens`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    patterns = attention_patterns(model, tokens[:1])
    labels = model.to_str_tokens(tokens[0])
    figure = Figure(figsize=(5.2 * len(heads), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (layer, head) in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True):
        image = axes.imshow(patterns[layer, 0, head], cmap="Blues", vmin=0, vmax=1)
        reach = "local" if model.config.layer_types[layer] == "sliding_attention" else "global"
        axes.set_title(f"layer {layer} ({reach}), head {head}")
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    figure.colorbar(image, ax=figure.axes, label="attention", shrink=0.7)
    figure.savefig(file, dpi=120)
