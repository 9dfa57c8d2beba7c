"""Chat templates are programs of a stranger: they end, and their errors are one line."""

import sys
import threading
import time

import pytest

from gemma3_jax.hooked import chat

MESSAGES = [{"role": "user", "content": "ba ke"}]
NEST = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


class Tokenizer:
    """What `apply_chat_template` of transformers does, without a vocabulary."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], _ = render_jinja_template([messages], chat_template=self.chat_template)
        return text


@pytest.mark.parametrize("template", [NEST, TREE, {"default": "{{ 9 ** 9 ** 9 }}"}, "{{ 9**9**9 }}"], ids=range(4))
@pytest.mark.parametrize("thread", [False, True])
def test_templates_that_do_not_end(template, thread, monkeypatch):
    """In any thread: the call ends after the limit, and tracing is as it was."""
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    said = []

    def call() -> None:
        former = sys.gettrace()
        with pytest.raises(ValueError, match="the chat template cannot write this conversation") as caught:
            chat.render_chat(Tokenizer(template), MESSAGES)
        assert sys.gettrace() is former
        said.append(str(caught.value))

    Tokenizer("").apply_chat_template(MESSAGES, False, True)  # the import is not timed
    start = time.monotonic()
    if thread:
        worker = threading.Thread(target=call)
        worker.start()
        worker.join(20)
    else:
        call()
    assert time.monotonic() - start < 10
    assert "has not ended after 0.3 seconds" in said[0] or "operator **" in said[0]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('one\\ntwo\\x1b[2J') }}", r"one\ntwo\x1b[2J"),
        ("{{ x", "TemplateSyntaxError"),
        ("{% for i in range(10**9) %}{% endfor %}", "operator **"),
        ("{% for i in range(999999999) %}{% endfor %}", "range"),
    ],
)
def test_errors_of_templates_are_one_line(template, says):
    """Of the template's author, of its syntax and of the sandbox."""
    with pytest.raises(ValueError, match="the chat template cannot write this conversation") as caught:
        chat.render_chat(Tokenizer(template), MESSAGES)
    assert says in str(caught.value).replace("Range", "range")
    assert str(caught.value).isprintable()


def test_a_template_that_ends():
    """Control: two stars in text are not an operator."""
    template = "**{% for m in messages %}{{ m.role }}: {{ '**' + m['content'] }}{% endfor %}"
    assert chat.render_chat(Tokenizer(template), MESSAGES) == "**user: **ba ke"
    with pytest.raises(ValueError, match="has no chat template"):
        chat.render_chat(Tokenizer(None), MESSAGES)
