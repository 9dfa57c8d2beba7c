"""Which tokens make two texts similar? Attribute the similarity of their embeddings to the tokens of both.

    python examples/attribute_similarity.py google/embeddinggemma-300m \
        --query "Which planet is red?" --document "Mars is red with rust, and Venus is hot."

Three answers for each token:

1. state: the contribution of the token's last state. The head is linear up to its norm, so the contributions of a text
   add up to the similarity, exactly. A state also holds what attention brought from other tokens.
2. gradient: how much the similarity falls if the token's embedding becomes the mean embedding of its text, to first
   order, by one backward pass for all tokens.
3. without: the same fall, measured with an edit for each token.

The last line says how far the second may be trusted. On EmbeddingGemma it may not be (a correlation of 0.02 on the
texts above): a token is far from the mean, and the similarity is not linear there.

Without a model, the shipped model with a random embedding head shows that everything runs.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gemma3_jax import TINY, ActivationCache, EmbeddingHead, Hook, HookedGemma3

EMBED = "hook_embed"


def similarity(embeddings: jax.Array) -> jax.Array:
    """The cosine [] of two embeddings [2, n] of length 1."""
    return embeddings[0] @ embeddings[1]


def means(value: jax.Array, mask: np.ndarray) -> jax.Array:
    """[b, 1, d]: the mean of value [b, p, d] over the real tokens of each text."""
    return jnp.mean(value, axis=1, keepdims=True, where=mask[..., None].astype(bool))


def of_states(model: HookedGemma3, cache: ActivationCache, mask: np.ndarray) -> jax.Array:
    """[2, p]: the contribution of each token's last state to the similarity; those of a text add up to it."""
    # [b, p, d], what a token adds to the mean
    x = cache["pooled.hook_in"].astype(jnp.float32) * (mask / mask.sum(axis=1, keepdims=True))[..., None]
    for j in range(1, len(model.config.embedding_head.dense) + 1):
        # [b, p, in] x [in, out] -> [b, p, out]
        x = x @ model.params[f"dense_{j}"]["weight"].astype(jnp.float32)
    lengths = jnp.linalg.norm(x.sum(axis=1), axis=-1)
    # [b, p, n] x [b, n] of the other text -> [b, p]
    return jnp.einsum("bpn,bn->bp", x, cache["embedding"][::-1]) / lengths[:, None]


def without_each(model: HookedGemma3, inputs, baseline: jax.Array, before: float, mask: np.ndarray) -> np.ndarray:
    """How much the similarity falls without each token, [2, p]; 0 at padding."""
    falls = np.zeros(mask.shape)
    for at in np.argwhere(mask):
        token = jnp.asarray(at)  # an array, so that one program serves all tokens

        def left_out(value: jax.Array, hook: Hook, token: jax.Array = token) -> jax.Array:
            row, column = token
            return value.at[row, column].set(baseline[row, 0])

        embeddings = model.run_with_hooks(inputs, [(EMBED, left_out)], return_type="embedding")
        falls[tuple(at)] = before - float(similarity(embeddings))
    return falls


def with_random_head() -> HookedGemma3:
    """The shipped model with a random embedding head."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    d, keys = model.config.hidden_size, jax.random.split(jax.random.key(0))
    dense = {f"dense_{j}": {"weight": jax.random.normal(key, (d, d)) / d**0.5} for j, key in enumerate(keys, 1)}
    config = dataclasses.replace(
        model.config, use_bidirectional_attention=True, embedding_head=EmbeddingHead((d, d), max_length=64)
    )
    return HookedGemma3(config, model.params | dense, model.tokenizer)


def main(
    source: Annotated[str | None, typer.Argument(help="A directory with an EmbeddingGemma, or its hub id.")] = None,
    query: str = "ba ke lo mu ti",
    document: str = "so re na lo mu pi",
) -> tuple[float, dict[str, np.ndarray]]:
    """Print the three answers for each token; return the similarity, and each answer [2, p]."""
    model = with_random_head() if source is None else HookedGemma3.from_pretrained(source, dtype="float32")
    prompts = dict(model.config.embedding_head.prompts)
    texts = [prompts.get("query", "") + query, prompts.get("document", "") + document]
    inputs = model.inputs(texts, return_type="embedding")
    mask = np.ones_like(inputs.tokens) if inputs.attention_mask is None else inputs.attention_mask
    sites = [EMBED, "pooled.hook_in", "embedding"]
    value, cache = model.run_with_cache(inputs, sites, return_type="embedding", incl_bwd=True, loss_fn=similarity)
    baseline = means(cache[EMBED], mask)
    answers = {
        "state": np.asarray(of_states(model, cache, mask)),
        # [b, p, d] x [b, p, d] -> [b, p]
        "gradient": np.asarray(jnp.sum((cache[EMBED] - baseline) * cache.grads[EMBED], axis=-1)),
        "without": without_each(model, inputs, baseline, float(value), mask),
    }
    table = Table("text", "token", *answers, title=f"similarity {value:.3f}")
    for row, column in np.argwhere(mask):
        token = model.to_string(inputs.tokens[row, column : column + 1])
        shown = (f"{answer[row, column]:+.4f}" for answer in answers.values())
        table.add_row(("query", "document")[row], repr(token), *shown)
    console = Console()
    console.print(table)
    gradient, without = (answers[name][mask.astype(bool)] for name in ("gradient", "without"))
    console.print(f"correlation of gradient and without: {np.corrcoef(gradient, without)[0, 1]:.2f}")
    return float(value), answers


if __name__ == "__main__":
    typer.run(main)
