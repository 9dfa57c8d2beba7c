"""The chat template of a tokenizer: a program that comes with the checkpoint, run with a limit on its time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from gemma3_jax.messages import printable
from gemma3_jax.types import Settings, Tokenizer

_SECONDS = 5.0  # published templates take a few milliseconds


def render_chat(tokenizer: Tokenizer | None, messages: Sequence[Settings], *, to_continue: bool = True) -> str:
    """The text of a conversation; with `to_continue`, up to the beginning of the model's turn.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the conversation, fails or does not end.
    """
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or not template:
        raise ValueError("this checkpoint's tokenizer has no chat template; write the turns as text")
    try:
        _refuse_powers(template)
        with _time_limit(_SECONDS):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_continue)
    except Exception as error:
        why = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"the chat template cannot write this conversation: {why}") from error


def _refuse_powers(template: str | Mapping[str, str]) -> None:
    """Raise an error for `**`: `9 ** 9 ** 9` is one step of Python, which no limit of time can end."""
    import jinja2  # as transformers does, when there is a template

    for source in template.values() if isinstance(template, Mapping) else [template]:
        if any(kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(source)):
            raise ValueError("it has the operator **, which is not allowed")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the block when it has run for `seconds`, in any thread.

    Python calls a trace function before each line that it runs, and a template is compiled to Python.
    """
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds")
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(former)
