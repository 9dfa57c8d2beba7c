"""Embeddings of texts, in batches of similar length.

Axes: b batch, p position, n size of an embedding.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooked.requests import request_of
from gemma3_jax.hooked.tokenizer import embedding_ids, padded
from gemma3_jax.inputs import Inputs
from gemma3_jax.model.embedding import of_unit_length
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import run
from gemma3_jax.run.request import Request, embedding_head_of
from gemma3_jax.sites.table import axis_size
from gemma3_jax.types import Params

# Most tokens of a batch, with padding; a longer text is a batch. A CPU is busy with few tokens, and small batches have
# less padding.
CPU_TOKENS, OTHER_TOKENS = 1024, 8192
_SHORTEST = 16


def embed(model: Model, texts: str | Sequence[str], prompt: str | None = None, dim: int | None = None) -> jax.Array:
    """The embeddings of texts, as `sentence_transformers` computes them.

    The tokenizer adds BOS and EOS as its checkpoint says. The mean is over all real tokens, with those of the prompt.
    Longer texts than the head's `max_length` (2,048 tokens in EmbeddingGemma) are truncated. To capture, edit or
    differentiate inside the model, use `run_with_cache(texts, ..., return_type="embedding")`, which encodes texts in
    the same way, without a prompt.

    Texts of similar length share a batch. Batches are padded to one of a few lengths (1 and 1.5 times a power of 2),
    so that a corpus of any size needs few programs.

    Args:
        texts: one or several texts.
        prompt: name of the prompt in front of each text: "query", "document" or another name in
            `config.embedding_head.prompts`. None is the checkpoint's default prompt; EmbeddingGemma has none.
        dim: size of the embeddings; None keeps all. Smaller embeddings are truncated and normalized again.
            EmbeddingGemma was trained for 768, 512, 256 and 128.

    Returns:
        [n, dim] float32, in the order of the texts; [dim] for one text. Their products are cosine similarities.

    Raises:
        ValueError: the model has no embedding head or no tokenizer; there are no texts; or the prompt or size does not
            exist.

    >>> from gemma3_jax import HookedGemma3
    >>> model = HookedGemma3.from_pretrained("google/embeddinggemma-300m")  # doctest: +SKIP
    >>> queries = model.embed(["Which planet is red?"], prompt="query")  # doctest: +SKIP
    >>> documents = model.embed(["Mars is red.", "Venus is hot."], prompt="document")  # doctest: +SKIP
    >>> queries @ documents.T  # doctest: +SKIP
    """
    head = embedding_head_of(model.config)
    several = [texts] if isinstance(texts, str) else list(texts)
    size = axis_size("n", model.config, 1, 1)
    if dim is not None and not 0 < dim <= size:
        raise ValueError(f"dim is {dim}; the embeddings of this model have {size} features")
    rows = embedding_ids(model, several, head.prompt(prompt))
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    tokens = CPU_TOKENS if jax.default_backend() == "cpu" else OTHER_TOKENS
    batches = _batches(longest_first, rows, tokens)
    parts = [_batch(model, [rows[i] for i in chosen], *shape) for chosen, shape in batches]
    back = np.argsort(longest_first)
    # [n, size] in the order of the texts
    embeddings = jnp.concatenate(parts)[back, :dim]
    if dim is not None and head.normalize:
        embeddings = of_unit_length(embeddings)
    return embeddings[0] if isinstance(texts, str) else embeddings


def _batches(
    order: Sequence[int], rows: Sequence[Sequence[int]], tokens: int
) -> Iterator[tuple[Sequence[int], tuple[int, int]]]:
    """The indices of the texts in each batch, and its shape (b, p) of at most so many tokens; the longest texts first.

    `order` has the indices of all texts by falling length.
    """
    start = 0
    while start < len(order):
        p = _padded_length(len(rows[order[start]]))
        most = max(1, tokens // p)
        chosen = order[start : start + most]
        start += len(chosen)
        # Only the last batch may have fewer texts: it is padded to a power of 2, to keep programs few.
        yield chosen, (min(most, 1 << (len(chosen) - 1).bit_length()), p)


def _padded_length(length: int) -> int:
    """The smallest length that is 1 or 1.5 times a power of 2, and at least `length`.

    >>> [_padded_length(n) for n in (3, 17, 25, 513, 2048)]
    [16, 24, 32, 768, 2048]
    """
    power = max(_SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _SHORTEST and length <= power * 3 // 4 else power


def _batch(model: Model, rows: Sequence[Sequence[int]], b: int, p: int) -> jax.Array:
    """[len(rows), n]: the embeddings of a batch, which is padded to b rows of p tokens."""
    tokens, mask = padded(model, rows, "right", length=p)
    extra = (0, b - len(rows)), (0, 0)
    inputs = Inputs(np.pad(tokens, extra, mode="edge"), np.pad(mask, extra, mode="edge"))
    request = request_of(model, inputs, return_type="embedding")
    return run_compiled(_embedding, model.params, request)[: len(rows)]


def _embedding(params: Params, request: Request) -> jax.Array:
    return run(params, request)[0]
