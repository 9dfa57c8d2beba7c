"""How well a model predicts given tokens: the answer to a prompt, and every token of a text.

Axes: b batch, p position, d hidden_size, V vocabulary, a tokens of an answer, k most likely tokens.
"""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma3_jax.analysis.lens import LensArrays, check_k, read_rows
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.hooked.buckets import longest
from gemma3_jax.hooked.cropping import shortened
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.inputs import positive
from gemma3_jax.positions import packed_documents
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import run
from gemma3_jax.run.loss import counted_labels
from gemma3_jax.run.pieces import token_losses
from gemma3_jax.run.request import Request
from gemma3_jax.types import IntegersLike, Method, Params


@dataclasses.dataclass(frozen=True)
class PromptResult(Described):
    """How the model ranks each token of an answer, given the tokens before it; prints as a table.

    Attributes:
        prompt: the prompt's tokens, as strings.
        answer: the a tokens of the answer, as strings.
        ranks: [a] int, the number of tokens that the model finds more likely (0 is the most likely).
        probabilities: [a] float32.
        top_tokens: for each token of the answer, the k most likely tokens at its position, as strings.
        top_probabilities: [a, k] float32.
    """

    prompt: list[str]
    answer: list[str]
    ranks: np.ndarray
    probabilities: np.ndarray
    top_tokens: list[list[str]]
    top_probabilities: np.ndarray

    def _description(self) -> Description:
        """One column for each token of the answer, one row for each of the k most likely tokens."""
        answers = zip(self.answer, self.ranks, self.probabilities, strict=True)
        header = ("rank", *(f"{token!r}\nrank {rank}, {probability:.2%}" for token, rank, probability in answers))
        columns = [
            [f"{token!r} {probability:.2%}" for token, probability in zip(*column, strict=True)]
            for column in zip(self.top_tokens, self.top_probabilities, strict=True)
        ]
        rows = [(str(i), *row) for i, row in enumerate(zip(*columns, strict=True))]
        return Description("after " + " ".join(map(repr, self.prompt)), (header, *rows))

    def __rich__(self) -> Table:
        """The same, as a table for terminals."""
        shown = self._description()
        header, *rows = shown.rows
        table = Table(title=Text(shown.title))
        for cell in header:
            table.add_column(Text(cell), justify="right" if cell == "rank" else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    def __str__(self) -> str:
        written = io.StringIO()
        Console(file=written, width=24 + 28 * len(self.answer)).print(self)
        return written.getvalue().rstrip()

    __repr__ = __str__


def test_prompt(
    model: HookedGemma3,
    prompt: str,
    answer: str,
    *,
    prepend_space_to_answer: bool = True,  # noqa: PT028
    k: int = 10,  # noqa: PT028
) -> PromptResult:
    """The probability of an answer after a prompt, token by token, and the most likely tokens at each position.

    Prompt and answer are tokenized separately, so no token of the joined text may span both.

    Args:
        model: the model, with a tokenizer.
        prompt: the text before; <bos> is prepended.
        answer: the expected continuation.
        prepend_space_to_answer: begin the answer with a space unless it has one. For Gemma's tokenizer, "Paris" and
            " Paris" are different tokens. It has no effect with a tokenizer that drops spaces.
        k: the number of most likely tokens to list.

    Memory: that of the forward pass up to the logits, and 8 * a * V bytes for the logits of the answer.

    Raises:
        ValueError: the model has no tokenizer, the answer has no tokens, `k` is out of range, or logits are NaN or
            infinite.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import test_prompt
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> result = test_prompt(model, "ba ke lo mu ti ba ke", "lo mu", k=3)
    >>> result.ranks.tolist(), [tokens[0] for tokens in result.top_tokens]
    ([0, 0], ['lo', 'mu'])
    """
    check_k(model.config, k)
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}; it must be one text (model.to_string makes texts of ids)")
    spaced = f" {answer}" if prepend_space_to_answer and not answer.startswith(" ") else answer
    before, after = model.to_tokens(prompt), model.to_tokens(spaced, prepend_bos=False)
    tokens = jnp.concatenate([before, after], axis=1)
    request = request_of(model, model.inputs(tokens), stop_at_layer=model.config.num_hidden_layers)
    read = run_compiled(_read_answer, model.params, request, length=after.shape[1], k=k)
    ids, _, log_probs, target_log_probs, ranks = jax.device_get(read)
    if (ranks < 0).any():
        raise ValueError(
            f"the logits of token {int(ranks.argmin())} of the answer (counted from 0) are NaN or infinite: look for "
            "NaN or infinity in the parameters"
        )
    spell: Method = model.to_str_tokens  # a list for ids [p], a list of lists for ids [b, p]
    return PromptResult(
        prompt=spell(before[0]),
        answer=spell(after[0]),
        ranks=ranks,
        probabilities=np.exp(target_log_probs),
        top_tokens=spell(ids),
        top_probabilities=np.exp(log_probs),
    )


test_prompt.__test__ = False  # type: ignore[attr-defined] # pytest would collect it in every module that imports it


def loss_per_token(
    model: HookedGemma3,
    input: Input,
    attention_mask: IntegersLike | None = None,
    *,
    labels: IntegersLike | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """Cross-entropy of each token given the tokens before it: [b, p - 1] float32, in nats, from the second token on.

    It is NaN if the token or the token before it is padding, if the two are in different documents, and for labels that
    do not count. The mean of the other entries (`jnp.nanmean`) is the model's "loss"; with `axis=1`, its
    "loss_per_row". Where the logits are NaN, the loss is infinite.

    Args:
        model: the model.
        input: text, texts, or token ids.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.
        labels: [b, p] the tokens to predict, as in `forward`; -100 does not count.
        chunk_size: the number of positions to unembed at a time.

    Memory: two copies of the last residual stream [b, p, d]; 8 * b * chunk_size * V bytes for the logits, 12 under
    `grad`, which computes each chunk again; on a CPU in bfloat16 a transposed copy of the unembedding, two under
    `grad`; and the memory of the forward pass up to the last residual stream.

    Raises:
        ValueError: the input has one token; `chunk_size` is out of range.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import loss_per_token
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> losses = loss_per_token(model, "ba ke lo mu ti ba ke lo mu ti")
    >>> losses.shape, bool(losses[0, 6:].max() < losses[0, :5].min())  # it copies what it has seen
    ((1, 10), True)
    """
    inputs = model.inputs(input, attention_mask, return_type="loss", labels=labels)
    if inputs.tokens.shape[1] < 2:
        raise ValueError("the input has one token; a loss needs a token before it, so give at least two")
    positive("chunk_size", chunk_size)
    request = request_of(model, inputs, return_type="loss")
    wide, _ = longest(model.params, request)
    losses = run_compiled(_losses, model.params, wide, chunk_size=chunk_size)
    result: jax.Array = shortened(losses, 1, request.source.shape[1] - 1)
    return result


def _read_answer(params: Params, request: Request, *, length: int, k: int) -> LensArrays:
    # [1, p, d]: the last residual stream, before the head
    residual, _ = run(params, request)
    targets = jnp.asarray(request.source)[0, -length:]
    return read_rows(request.config, params, residual[0, -length - 1 : -1], targets, k, chunk_size=length)


def _losses(params: Params, request: Request, *, chunk_size: int) -> jax.Array:
    losses, _ = token_losses(run, params, request, chunk_size)
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    labels, mask = request.source if request.labels is None else request.labels, request.attention_mask
    counted, known, _ = counted_labels(labels, request.config.vocab_size)
    losses = jnp.where(counted & known, losses, jnp.nan)
    documents = packed_documents(request.segment_ids, request.positions, mask)
    if mask is not None:
        real = mask.astype(bool)
        losses = jnp.where(real[:, :-1] & real[:, 1:], losses, jnp.nan)
    if documents is not None:
        losses = jnp.where(documents[:, :-1] == documents[:, 1:], losses, jnp.nan)
    return losses
