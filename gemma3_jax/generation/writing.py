"""Generation for people: text, texts or chat messages in, text out; a part of `HookedGemma3`.

Axes: b batch, p columns of the prompt, n new tokens.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax.numpy as jnp
import numpy as np

from gemma3_jax.forward import Capture, Hooks, edits_of
from gemma3_jax.generation.decoding import Decoding, Task, go_on
from gemma3_jax.generation.generate import (
    Bounds,
    Generation,
    Options,
    begin,
    checked_count,
    finish,
    refuse_traced,
    stream,
    write_rest,
)
from gemma3_jax.generation.memory import in_memory
from gemma3_jax.text import Input, Text

Message = Mapping[str, str]
Prompt = Input | Sequence[Message] | Sequence[Sequence[Message]]

# How many tokens are written between two looks for stop strings, which only the host can spell.
SEGMENT = 16


class Writing(Text):
    """What a model writes."""

    params: Any

    def generate(
        self,
        input: Prompt,
        max_new_tokens: int = 32,
        *,
        stop_strings: str | Sequence[str] = (),
        return_type: Literal["text", "tokens", None] = None,
        names_filter: Capture | None = None,
        fwd_hooks: Hooks = (),
        attention_mask: Any = None,
        return_logits: bool = False,
        **options: Unpack[Options],
    ) -> Any:
        """Continue text, texts, chat messages or token ids, with edits and captures at every token.

        Args:
            input: a text or several, of any lengths; messages, `[{"role": "user", "content": "..."}]`, or several lists
                of these, which go through the checkpoint's chat template; or ids [p] or [b, p]. Each has one BOS.
            max_new_tokens: how many to write at most, any integer from 1.
            stop_strings: end a row behind the first token with which one of these is written. Looked for every 16
                tokens, on the host, in text without special tokens: those are for `eos_token_id`.
            return_type: "text" or "tokens"; by default what the input is.
            names_filter: sites to keep, over prompt and continuation.
            fwd_hooks: (name, edit) pairs, as in `run_with_hooks`; they act on the prompt and on every new token.
                `edits.only(edit, phase="generation")` acts on the latter alone, and what needs a whole text
                (`edits.Mean`, `edits.FromCache`, booleans as positions) must have `phase="prompt"`.
            attention_mask: [b, p], 1 at real tokens, with ids.
            return_logits: keep the logits of every new token.
            **options: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`, `stop_at_eos` and
                `eos_token_id`, see `gemma3_jax.generation.generate`. The default is greedy.

        Returns:
            Prompt and continuation: the text, or a list of texts, without special tokens (of messages the reply alone);
            or tokens [b, p + n] int32. Ids [p] give one text, or one row of tokens. With `names_filter` or
            `return_logits`, (that, `Generation`).

        >>> from gemma3_jax import TINY, HookedGemma3
        >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
        >>> model.generate("ba ke lo mu ti so re ba ke", max_new_tokens=3)
        'ba ke lo mu ti so re ba ke lo mu ti'
        """
        if return_type not in ("text", "tokens", None):
            raise ValueError(f"return_type is {return_type!r}; it takes 'text', 'tokens' and None")
        keep = () if names_filter is None else names_filter
        _check_names(options)
        stops = self._stop_strings(stop_strings)
        tokens, mask = self._prompt(input, attention_mask)
        task, text, bounds = self._begin(
            tokens, mask, max_new_tokens, fwd_hooks, capture=keep, return_logits=return_logits, **options
        )
        text, ends = self._write(task, text, bounds, stops, self._shown_before(input, text, bounds))
        found = finish(task, text, bounds, ends)
        kind = return_type or ("text" if _is_text(input) else "tokens")
        out = found.tokens if kind == "tokens" else self._texts(found, bounds.prompt, input)
        return out if names_filter is None and not return_logits else (out, found)

    def generate_stream(
        self,
        input: Prompt,
        max_new_tokens: int = 32,
        *,
        stop_strings: str | Sequence[str] = (),
        fwd_hooks: Hooks = (),
        attention_mask: Any = None,
        **options: Unpack[Options],
    ) -> Iterator[Any]:
        """The continuation piece by piece, with the tokens of `generate` and its arguments.

        Arguments are checked, and the prompt is read, when it is called.

        Returns:
            An iterator over texts for a text, over lists of texts for several (empty where a row has ended, or a letter
            is not complete), and over tokens [b] for ids.
        """
        _check_names(options)
        stops = self._stop_strings(stop_strings)
        tokens, mask = self._prompt(input, attention_mask)
        return self._pieces(input, *self._begin(tokens, mask, max_new_tokens, fwd_hooks, **options), stops)

    def _pieces(self, input: Prompt, task: Task, text: Decoding, bounds: Bounds, stops: Sequence[str]) -> Iterator[Any]:
        as_text = _is_text(input)
        before = self._shown_before(input, text, bounds)
        shown = [self._spelled(ids) if as_text else "" for ids in before]
        rows: list[list[int]] = [[] for _ in before]
        ended = np.zeros(len(rows), bool)
        for now in stream(task, text, bounds):
            was = ended
            new = np.where(was, int(task.pad), np.asarray(now.tokens[:, int(now.length) - 1]))
            for row, token in zip(rows, new, strict=True):
                row.append(int(token))
            stopped = [self._has_any(stops, *both) for both in zip(before, rows, strict=True)]
            ended = was | np.asarray(now.done) | stopped
            last = ended | (len(rows[0]) == bounds.new)
            pieces = []
            for i in range(len(rows) if as_text else 0):
                spelled = shown[i] if was[i] else self._spelled([*before[i], *rows[i]])
                # A letter of several tokens is shown once it is whole.
                spelled = shown[i] if spelled.endswith("\ufffd") and not last[i] else spelled
                pieces.append(spelled[len(shown[i]) :])
                shown[i] = spelled
            yield new if not as_text else pieces[0] if _is_single(input) else pieces
            if ended.all():
                return

    def _shown_before(self, input: Prompt, text: Decoding, bounds: Bounds) -> list[list[int]]:
        """The tokens of each row behind which its continuation is spelled: the prompt's; none of a chat."""
        first = bounds.extra + (bounds.prompt if _is_chat(input) else bounds.start)
        rows = np.asarray(text.tokens)[:, : bounds.extra + bounds.prompt].tolist()
        return [row[i:] for row, i in zip(rows, np.broadcast_to(first, len(rows)), strict=True)]

    def _begin(
        self, tokens: np.ndarray, mask: Any, max_new_tokens: int, fwd_hooks: Hooks, **options: Any
    ) -> tuple[Task, Decoding, Bounds]:
        edits = edits_of(self.config, fwd_hooks, tokens.shape, new=checked_count(max_new_tokens) - 1)
        return begin(self.config, self.params, tokens, max_new_tokens, attention_mask=mask, edits=edits, **options)

    def _write(
        self, task: Task, text: Decoding, bounds: Bounds, stops: Sequence[str], before: Sequence[list[int]]
    ) -> tuple[Decoding, np.ndarray | None]:
        """The whole text, and by row the column of the token that completed a stop string."""
        if not stops:
            return write_rest(task, text, bounds), None
        first = bounds.extra + bounds.prompt
        while True:
            rows = np.asarray(text.tokens)[:, first : int(text.length)]
            found = [self._stopped_at(stops, *both) for both in zip(before, rows.tolist(), strict=True)]
            ends = np.asarray([len(row) if at is None else at for row, at in zip(rows, found, strict=True)])
            text = text.replace(done=text.done | jnp.asarray([at is not None for at in found]))  # type: ignore[attr-defined]
            left = bounds.new - rows.shape[1]
            if not left or bool(text.done.all()):
                return text, bounds.prompt + ends
            text = in_memory(go_on, task, text, jnp.int32(min(SEGMENT, left)))

    def _stopped_at(self, stops: Sequence[str], before: list[int], row: list[int]) -> int | None:
        """The place of the first token with which the row has a stop string."""
        if not self._has_any(stops, before, row):
            return None
        return next(n for n in range(len(row)) if self._has_any(stops, before, row[: n + 1]))

    def _has_any(self, stops: Sequence[str], before: list[int], row: list[int]) -> bool:
        """Whether a stop string stands in what the row adds to the tokens before it, whose text it is joined to."""
        # A tokenizer may drop the space with which a text begins; of a continuation it counts.
        added = self._spelled([*before, *row])[len(self._spelled(before)) :] if stops else ""
        return any(stop in added for stop in stops)

    def _stop_strings(self, given: str | Sequence[str]) -> tuple[str, ...]:
        stops = (given,) if isinstance(given, str) else tuple(given)
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"a stop string is {stop!r}; it must be text, of one letter at least")
            ids = self._ids(stop, prepend_bos=False)
            if getattr(self._need_tokenizer(), "unk_token_id", None) in ids:
                raise ValueError(f"the stop string {stop!r} has what the tokenizer cannot write, so it never comes")
            if self._need_tokenizer().decode(ids, skip_special_tokens=False) != self._spelled(ids):
                raise ValueError(
                    f"the stop string {stop!r} has a special token, and texts are searched without these; give the "
                    "token's id as eos_token_id"
                )
        return stops

    def _prompt(self, input: Prompt, attention_mask: Any) -> tuple[np.ndarray, Any]:
        """Token ids [b, p] of any prompt, and their mask."""
        refuse_traced((self.params, input, attention_mask))
        if not isinstance(input, str) and hasattr(input, "__len__") and not len(input):
            raise ValueError("the prompt is empty; give one text, or one row of ids, at least")
        if _is_chat(input):
            if attention_mask is not None:
                raise ValueError("messages have no attention_mask: it belongs to token ids")
            conversations = [input] if isinstance(input[0], Mapping) else input
            tokens, mask = self.encode([self._chat(messages) for messages in conversations])
        else:
            tokens, mask = self.encode(input, attention_mask)  # type: ignore[arg-type]
        return np.asarray(tokens), mask

    def _chat(self, messages: Any) -> str:
        listed = not isinstance(messages, str | Mapping) and bool(messages)
        if not listed or not all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in messages):
            raise ValueError(
                f"a conversation is {messages!r}; it must be a list of messages, each with its role and content"
            )
        tokenizer = self._need_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this checkpoint's tokenizer has no chat template; write the turns as text")
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def _texts(self, found: Generation, prompt: int, input: Prompt) -> str | list[str]:
        first = prompt if _is_chat(input) else 0
        rows = zip(np.asarray(found.tokens), np.asarray(found.attention_mask).astype(bool), strict=True)
        texts = [self._spelled(tokens[first:][real[first:]]) for tokens, real in rows]
        return texts[0] if _is_single(input) else texts

    def _spelled(self, ids: Any) -> str:
        return self._need_tokenizer().decode([int(i) for i in ids], skip_special_tokens=True)


def _is_chat(input: Any) -> bool:
    if isinstance(input, str) or not isinstance(input, Sequence):
        return False
    # Wherever there is a message, all must be: what stands beside it is checked later.
    return any(
        isinstance(each, Mapping) or (isinstance(each, list | tuple) and any(isinstance(m, Mapping) for m in each))
        for each in input
    )


def _is_text(input: Any) -> bool:
    return isinstance(input, str) or _is_chat(input) or (isinstance(input, Sequence) and isinstance(input[0], str))


def _is_single(input: Any) -> bool:
    """One text, one conversation, or one row of ids [p]."""
    if _is_text(input):
        return isinstance(input, str) or (_is_chat(input) and isinstance(input[0], Mapping))
    return np.ndim(input) == 1


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuse arguments that there are not, and say which was meant."""
    here = {"edits": "fwd_hooks", "capture": "names_filter"}
    for name in options:
        if name not in Options.__annotations__:
            near = [here[name]] if name in here else difflib.get_close_matches(name, Options.__annotations__)
            meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(Options.__annotations__)}"
            raise TypeError(f"generation takes no argument {name}; {meant}")
