"""How well a model foresees given tokens: the answer to a prompt, and every token of a text.

Axes: b batch, p position, d hidden_size, V vocabulary, a tokens of an answer, k the most likely tokens.
"""

import dataclasses
import functools
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma3_jax.analysis.lens import in_chunks, read_rows, readout
from gemma3_jax.forward import forward
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.text import Input


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """How the model ranks each token of an answer, the tokens before it given; prints as a table.

    Attributes:
        prompt: the prompt's tokens, as strings.
        answer: the answer's a tokens, as strings.
        ranks: [a] int, how many tokens the model finds more likely (0 is the most likely).
        probabilities: [a] float32.
        top_tokens: for each token of the answer the k most likely ones in its place, as strings.
        top_probabilities: [a, k] float32.
    """

    prompt: list[str]
    answer: list[str]
    ranks: np.ndarray
    probabilities: np.ndarray
    top_tokens: list[list[str]]
    top_probabilities: np.ndarray

    def __rich__(self) -> Table:
        """One column for each token of the answer, one row for each of the k most likely tokens."""
        table = Table(title=Text("after " + " ".join(map(repr, self.prompt))))
        table.add_column("rank", justify="right")
        for token, rank, probability in zip(self.answer, self.ranks, self.probabilities, strict=True):
            table.add_column(Text(f"{token!r}\nrank {rank}, {probability:.2%}"))
        columns = [
            [Text(f"{token!r} {probability:.2%}") for token, probability in zip(*column, strict=True)]
            for column in zip(self.top_tokens, self.top_probabilities, strict=True)
        ]
        for i, row in enumerate(zip(*columns, strict=True)):
            table.add_row(str(i), *row)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=24 + 28 * len(self.answer))
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def test_prompt(
    model: HookedGemma3,
    prompt: str,
    answer: str,
    *,
    prepend_space_to_answer: bool = True,  # noqa: PT028
    k: int = 10,  # noqa: PT028
) -> PromptResult:
    """How likely the model finds an answer after a prompt, token by token, and what it finds most likely instead.

    Prompt and answer are tokenized each by itself: each must be whole tokens of the text that they make together.

    Args:
        model: the model, with a tokenizer.
        prompt: the text before; <bos> is prepended.
        answer: what should follow it.
        prepend_space_to_answer: begin the answer with a space unless it has one: to Gemma's tokenizer "Paris" and
            " Paris" are two tokens. Of no effect on a tokenizer that drops spaces.
        k: how many of the most likely tokens to list.

    Memory: what the forward pass takes up to the logits, and 8 * a * V bytes for those of the answer.

    Raises:
        ValueError: the model has no tokenizer, the answer no tokens, or `k` is out of range.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import test_prompt
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> result = test_prompt(model, "ba ke lo mu ti ba ke", "lo mu", k=3)
    >>> result.ranks.tolist(), [tokens[0] for tokens in result.top_tokens]
    ([0, 0], ['lo', 'mu'])
    """
    if not 1 <= k <= model.config.vocab_size:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary's {model.config.vocab_size}")
    spaced = f" {answer}" if prepend_space_to_answer and not answer.startswith(" ") else answer
    before, after = model.to_tokens(prompt), model.to_tokens(spaced, prepend_bos=False)
    tokens = jnp.concatenate([before, after], axis=1)
    read = _read_answer(model.config, model.params, tokens, length=after.shape[1], k=k)
    ids, _, log_probs, target_log_probs, ranks = jax.device_get(read)
    spell: Any = model.to_str_tokens  # a list for ids [p], a list of lists for ids [b, p]
    return PromptResult(
        prompt=spell(before[0]),
        answer=spell(after[0]),
        ranks=ranks,
        probabilities=np.exp(target_log_probs),
        top_tokens=spell(ids),
        top_probabilities=np.exp(log_probs),
    )


test_prompt.__test__ = False  # type: ignore[attr-defined] # pytest would take it for a test wherever it is imported


def loss_per_token(
    model: HookedGemma3, input: Input, attention_mask: Any = None, *, chunk_size: int = 128
) -> jax.Array:
    """Cross-entropy of each token given those before it: [b, p - 1] float32, in nats, from the second token on.

    NaN where the token or the one before it is padding; the mean of the others (`jnp.nanmean`) is the model's "loss".

    Args:
        model: the model.
        input: text, texts, or token ids.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.
        chunk_size: how many positions to unembed at a time.

    Memory: two copies of the last residual stream [b, p, d]; 8 * b * chunk_size * V bytes for the logits, 12 under
    `grad`, which computes each chunk anew; on a CPU in bfloat16 a transposed copy of the unembedding, two under
    `grad`; and what the forward pass takes up to there.

    Raises:
        ValueError: the input has one token; `chunk_size` is out of range.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import loss_per_token
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> losses = loss_per_token(model, "ba ke lo mu ti ba ke lo mu ti")
    >>> losses.shape, bool(losses[0, 6:].max() < losses[0, :5].min())  # it copies what it has seen
    ((1, 10), True)
    """
    tokens, mask = model.encode(input, attention_mask)
    if tokens.shape[1] < 2:
        raise ValueError("the input has one token; the loss of a token needs one before it")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 1 at least")
    return _losses(model.config, model.params, tokens, mask, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("config", "length", "k"))
def _read_answer(config, params, tokens, *, length, k):
    # [1, p, d]: the last residual stream, before the head
    residual, _ = forward(config, params, tokens, stop_at_layer=config.num_hidden_layers)
    return read_rows(config, params, residual[0, -length - 1 : -1], tokens[0, -length:], k, chunk_size=length)


@functools.partial(jax.jit, static_argnames=("config", "chunk_size"))
def _losses(config, params, tokens, attention_mask, *, chunk_size):
    residual, _ = forward(config, params, tokens, attention_mask=attention_mask, stop_at_layer=config.num_hidden_layers)

    @jax.checkpoint  # the gradient would keep the logits of every position
    def at_positions(chunk):
        rows, targets = chunk
        # [c, b, d] -> [c, b, V] -> [c, b]
        return optax.softmax_cross_entropy_with_integer_labels(readout(config, params, rows), targets)

    # [b, p - 1, d], [b, p - 1] -> [p - 1, b]
    by_position = jnp.swapaxes(residual[:, :-1], 0, 1), tokens[:, 1:].T
    losses = in_chunks(at_positions, by_position, chunk_size).T
    if attention_mask is None:
        return losses
    real = attention_mask.astype(bool)
    return jnp.where(real[:, :-1] & real[:, 1:], losses, jnp.nan)
