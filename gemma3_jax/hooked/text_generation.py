"""Text generation: continues texts and chat messages.

Axes: b batch, p columns of the prompt, n new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard, Unpack, cast

import jax.numpy as jnp
import numpy as np

from gemma3_jax.elsewhere import knows_arguments_from_elsewhere
from gemma3_jax.generation.decode import Decoding, Task, check_logits, go_on
from gemma3_jax.generation.loop import (
    Bounds,
    Generation,
    begin,
    finish,
    refuse_traced,
    stream,
    write_rest,
)
from gemma3_jax.generation.memory import in_memory
from gemma3_jax.generation.sampling import Options, check_names
from gemma3_jax.hooked.chat import render_chat
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooked.tokenizer import Input, ids_of, inputs, is_text, tokenizer_of
from gemma3_jax.run.selection import Capture, Edits
from gemma3_jax.types import Integers, IntegersLike

Message = Mapping[str, str]
Prompt = Input | Sequence[Message] | Sequence[Sequence[Message]]

# Number of tokens between two searches for stop strings, which the host does.
SEGMENT = 16

# How the pure functions call arguments of these methods.
_OTHER_NAMES = {"edits": "fwd_hooks", "capture": "names_filter"}


@knows_arguments_from_elsewhere
def generate(
    model: Model,
    input: Prompt,
    max_new_tokens: int = 32,
    *,
    stop_strings: str | Sequence[str] = (),
    return_type: Literal["text", "tokens", None] = None,
    names_filter: Capture | None = None,
    fwd_hooks: Edits = (),
    attention_mask: IntegersLike | None = None,
    return_logits: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Continue text, texts, chat messages or token ids, with edits and captures at every token.

    Args:
        input: one or several texts of any lengths; messages, `[{"role": "user", "content": "..."}]`, or several
            lists of messages, to which the checkpoint's chat template is applied; or ids [p] or [b, p]. Each text
            has one BOS.
        max_new_tokens: largest number of new tokens, a positive integer.
        stop_strings: end a row after the token that completes one of these. The host searches every 16 tokens, in
            text without special tokens; for these, use `eos_token_id`.
        return_type: "text" or "tokens"; by default the type of the input.
        names_filter: sites to capture, over prompt and continuation.
        fwd_hooks: (name, edit) pairs, as in `run_with_hooks`; they act on the prompt and on every new token.
            `edits.only(edit, phase="generation")` acts only on new tokens. Edits that need the whole text
            (`edits.Mean`, `edits.FromCache`, booleans as positions) need `phase="prompt"`.
        attention_mask: [b, p], 1 at real tokens; only with ids.
        return_logits: return the logits of every new token.
        **options: `temperature`, `top_k`, `seed` and others, see `gemma3_jax.generation.sampling.Options`. The default
            is greedy.

    Returns:
        Prompt and continuation: a text or a list of texts without special tokens (for messages, only the reply), or
        tokens [b, p + n] int32. Ids [p] give one text, or one row of tokens. With `names_filter` or
        `return_logits`, a pair of this and the `Generation`.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> model.generate("ba ke lo mu ti so re ba ke", max_new_tokens=3)
    'ba ke lo mu ti so re ba ke lo mu ti'
    """
    if return_type not in ("text", "tokens", None):
        raise ValueError(f"return_type is {return_type!r}; it must be 'text', 'tokens' or None")
    keep = () if names_filter is None else names_filter
    check_names(options, _OTHER_NAMES)
    stops = _checked_stop_strings(model, stop_strings)
    tokens, mask = _prompt(model, input, attention_mask)
    task, text, bounds = _begin(
        model, tokens, mask, max_new_tokens, fwd_hooks, keep, return_logits, in_steps=False, **options
    )
    text, ends = _write(model, task, text, bounds, stops, _shown_before(model, input, text, bounds))
    generation = finish(task, text, bounds, ends)
    kind = return_type or ("text" if _is_text(input) else "tokens")
    out = generation.tokens if kind == "tokens" else _texts(model, generation, bounds.prompt, input)
    return out if names_filter is None and not return_logits else (out, generation)


@knows_arguments_from_elsewhere
def generate_stream(
    model: Model,
    input: Prompt,
    max_new_tokens: int = 32,
    *,
    stop_strings: str | Sequence[str] = (),
    fwd_hooks: Edits = (),
    attention_mask: IntegersLike | None = None,
    **options: Unpack[Options],
) -> Iterator[str | list[str] | np.ndarray]:
    """The continuation in pieces, with the arguments and the tokens of `generate`.

    The call checks the arguments and does the prefill.

    Returns:
        An iterator over texts for a text, over lists of texts for several texts (a text is empty if its row has
        ended, or a character is not complete), and over tokens [b] for ids.
    """
    check_names(options, _OTHER_NAMES)
    stops = _checked_stop_strings(model, stop_strings)
    tokens, mask = _prompt(model, input, attention_mask)
    begun = _begin(model, tokens, mask, max_new_tokens, fwd_hooks, in_steps=True, **options)
    return _pieces(model, input, *begun, stops)


def _pieces(
    model: Model, input: Prompt, task: Task, text: Decoding, bounds: Bounds, stops: Sequence[str]
) -> Iterator[str | list[str] | np.ndarray]:
    as_text = _is_text(input)
    before = _shown_before(model, input, text, bounds)
    shown = [decoded(model, ids) if as_text else "" for ids in before]
    rows: list[list[int]] = [[] for _ in before]
    ended = np.zeros(len(rows), bool)
    for now in stream(task, text, bounds):
        was = ended
        new = np.where(was, int(task.pad), np.asarray(now.tokens[:, int(now.length) - 1]))
        for row, token in zip(rows, new, strict=True):
            row.append(int(token))
        stopped = [_has_any(model, stops, *both) for both in zip(before, rows, strict=True)]
        ended = was | np.asarray(now.done) | stopped
        last = ended | (len(rows[0]) == bounds.new)
        pieces = []
        for i in range(len(rows) if as_text else 0):
            spelled = shown[i] if was[i] else decoded(model, [*before[i], *rows[i]])
            # A character that takes several tokens is shown when it is complete.
            spelled = shown[i] if spelled.endswith("\ufffd") and not last[i] else spelled
            pieces.append(spelled[len(shown[i]) :])
            shown[i] = spelled
        yield new if not as_text else pieces[0] if _is_single(input) else pieces
        if ended.all():
            return


def _shown_before(model: Model, input: Prompt, text: Decoding, bounds: Bounds) -> list[list[int]]:
    """The tokens of each row before its continuation: those of the prompt, or none for a chat."""
    first = bounds.extra + (bounds.prompt if _is_chat(input) else bounds.start)
    rows = np.asarray(text.tokens)[:, : bounds.extra + bounds.prompt].tolist()
    return [row[i:] for row, i in zip(rows, np.broadcast_to(first, len(rows)), strict=True)]


def _begin(
    model: Model,
    tokens: np.ndarray,
    mask: IntegersLike | None,
    max_new_tokens: int,
    fwd_hooks: Edits,
    capture: Capture = (),
    return_logits: bool = False,
    *,
    in_steps: bool,
    **options: Unpack[Options],
) -> tuple[Task, Decoding, Bounds]:
    return begin(
        model.config,
        model.params,
        tokens,
        max_new_tokens,
        attention_mask=mask,
        capture=capture,
        edits=fwd_hooks,
        return_logits=return_logits,
        in_steps=in_steps,
        **options,
    )


def _write(
    model: Model, task: Task, text: Decoding, bounds: Bounds, stops: Sequence[str], before: Sequence[list[int]]
) -> tuple[Decoding, np.ndarray | None]:
    """The whole text, and for each row the column of the token that completed a stop string."""
    if not stops:
        return write_rest(task, text, bounds), None
    first = bounds.extra + bounds.prompt
    while True:
        rows = np.asarray(text.tokens)[:, first : int(text.length)]
        stops_at = [_stopped_at(model, stops, *both) for both in zip(before, rows.tolist(), strict=True)]
        ends = np.asarray([len(row) if at is None else at for row, at in zip(rows, stops_at, strict=True)])
        text = dataclasses.replace(text, done=text.done | jnp.asarray([at is not None for at in stops_at]))
        check_logits(text)
        left = bounds.new - rows.shape[1]
        if not left or bool(text.done.all()):
            return text, bounds.prompt + ends
        text = in_memory(go_on, bounds.unstacked, task, text, jnp.int32(min(SEGMENT, left)), donate=1)


def _stopped_at(model: Model, stops: Sequence[str], before: list[int], row: list[int]) -> int | None:
    """The index of the token that completes a stop string in the row, or None."""
    if not _has_any(model, stops, before, row):
        return None
    return next(n for n in range(len(row)) if _has_any(model, stops, before, row[: n + 1]))


def _has_any(model: Model, stops: Sequence[str], before: list[int], row: list[int]) -> bool:
    """Whether the text that the row adds to the tokens before it contains a stop string."""
    # A tokenizer may drop a space at the beginning of a text, but a continuation must keep it.
    added = decoded(model, [*before, *row])[len(decoded(model, before)) :] if stops else ""
    return any(stop in added for stop in stops)


def _checked_stop_strings(model: Model, strings: str | Sequence[str]) -> tuple[str, ...]:
    stops = (strings,) if isinstance(strings, str) else tuple(strings)
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"a stop string is {stop!r}; it must be text with at least one character")
        ids = ids_of(model, stop, prepend_bos=False)
        if getattr(tokenizer_of(model), "unk_token_id", None) in ids:
            raise ValueError(f"the stop string {stop!r} has characters that the tokenizer cannot write; change it")
        if tokenizer_of(model).decode(ids, skip_special_tokens=False) != decoded(model, ids):
            raise ValueError(
                f"the stop string {stop!r} has a special token, but the search skips special tokens; give the "
                "token's id as eos_token_id"
            )
    return stops


def _prompt(model: Model, input: Prompt, attention_mask: IntegersLike | None) -> tuple[np.ndarray, Integers | None]:
    """Token ids [b, p] of any prompt, and their mask."""
    refuse_traced((model.params, input, attention_mask))
    if not isinstance(input, str) and hasattr(input, "__len__") and not len(input):
        raise ValueError("the prompt is empty; give at least one text or one row of ids")
    if _is_chat(input):
        if attention_mask is not None:
            raise ValueError("messages do not take attention_mask; leave it out, or give token ids")
        conversations: Any = [input] if isinstance(input[0], Mapping) else input
        prompt = inputs(model, [_chat_text(model, messages) for messages in conversations])
    else:
        prompt = inputs(model, cast(Input, input), attention_mask)
    if prompt.positions is not None or prompt.segment_ids is not None:
        raise ValueError(
            "generation counts positions itself, with one text per row: leave positions and segment_ids out"
        )
    return np.asarray(prompt.tokens), prompt.attention_mask


def _chat_text(model: Model, messages: Sequence[Message]) -> str:
    listed = not isinstance(messages, str | Mapping) and bool(messages)
    if not listed or not all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in messages):
        raise ValueError(
            f"a conversation is {messages!r}; it must be a list of messages, each with its role and content"
        )
    return render_chat(tokenizer_of(model), list(messages))


def _texts(model: Model, generation: Generation, prompt: int, input: Prompt) -> str | list[str]:
    first = prompt if _is_chat(input) else 0
    rows = zip(np.asarray(generation.tokens), np.asarray(generation.attention_mask).astype(bool), strict=True)
    texts = [decoded(model, tokens[first:][real[first:]]) for tokens, real in rows]
    return texts[0] if _is_single(input) else texts


def decoded(model: Model, ids: Iterable[int]) -> str:
    return tokenizer_of(model).decode([int(i) for i in ids], skip_special_tokens=True)


def _is_chat(input: object) -> TypeGuard[Sequence[Message] | Sequence[Sequence[Message]]]:
    if isinstance(input, str) or not isinstance(input, Sequence):
        return False
    # If one entry is a message, all must be messages; the other entries are checked later.
    return any(
        isinstance(each, Mapping) or (isinstance(each, list | tuple) and any(isinstance(m, Mapping) for m in each))
        for each in input
    )


def _is_text(input: Prompt) -> bool:
    ids = input.get("input_ids") if isinstance(input, Mapping) else input
    return is_text(ids) or _is_chat(ids)


def _is_single(input: Prompt) -> bool:
    """Whether the input is one text, one conversation, or one row of ids [p]."""
    ids = input.get("input_ids") if isinstance(input, Mapping) else input
    if is_text(ids) or _is_chat(ids):
        return isinstance(ids, str) or isinstance(ids[0], Mapping)
    return np.ndim(cast(IntegersLike, ids)) == 1
