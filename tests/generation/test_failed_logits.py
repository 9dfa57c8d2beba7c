"""Logits that give no token: generation names the row and the step, and does not write token 0 in silence."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, edits
from gemma3_jax.generation import decode as decoding
from gemma3_jax.generation.loop import begin, finish, generate
from tests.helpers.greedy_texts import CONFIG, LENGTHS, MASK, TOKENS, P, parameters, tiny, write

NEW = 12
SITE = "blocks.1.hook_out"
TEXTS = ["ba ke lo mu ti so re ba ke", "lo mu ti"]


def _write_over(row, position, value, x, hook):
    # [b, p]
    here = (hook.positions == position) & (jnp.arange(x.shape[0])[:, None] == row)
    return jnp.where(here[..., None], value, x)


def broken(row: int, position: int, value: float = np.nan):
    """An edit that writes `value` over the whole vector of one token; all of them share a compilation."""
    return jax.tree_util.Partial(_write_over, row, position, value)


def in_row(row: int, new_token: int, value: float = np.nan):
    """The same, where the given new token of that row is drawn: at the token before it."""
    return broken(row, LENGTHS[row] + new_token - 1, value)


def named(row: int, new_token: int) -> str:
    return rf"the logits of row {row} are NaN, or all minus infinity, at new token {new_token} \(both counted from 0\)"


@pytest.mark.parametrize("new", [1, 2, NEW])
def test_weights_that_are_nan_are_named_at_the_first_token(new):
    """As parameters that training has broken are; by every way to write a text."""
    params = jax.tree.map(lambda leaf: leaf * np.nan, parameters())
    with pytest.raises(ValueError, match=named(0, 0)) as caught:
        write(new, params=params)
    assert "parameters" in str(caught.value)
    assert "\n" not in str(caught.value)
    model = HookedGemma3(tiny().config, jax.tree.map(lambda leaf: leaf * np.nan, tiny().params), tiny().tokenizer)
    for call in (
        lambda: model.generate(TEXTS, new),
        lambda: model.generate(TEXTS, new, stop_strings="lo"),
        lambda: next(model.generate_stream(TEXTS, new)),
    ):
        with pytest.raises(ValueError, match=named(0, 0)):
            call()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_an_edit_of_the_prompt_is_named(row, value):
    """At a row's last token, and at an earlier one, which reaches it through attention."""
    for position in (LENGTHS[row] - 1, 1):
        edit = broken(row, position, value)
        with pytest.raises(ValueError, match=named(row, 0)):
            write(NEW, edits={"blocks.0.hook_out": edit})
    write(2, edits={SITE: edits.only(broken(row, LENGTHS[row] - 1), phase="generation")})  # control


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("new_token", [2, 3, NEW - 1])
def test_an_edit_of_a_new_token_is_named(row, new_token):
    """The step is that whose token could not be drawn; a text that ends before it is written."""
    edit = edits.only(in_row(row, new_token), phase="generation")
    with pytest.raises(ValueError, match=named(row, new_token)):
        write(NEW, edits={SITE: edit})
    found = write(new_token, edits={SITE: edit})
    np.testing.assert_array_equal(found.tokens, write(NEW).tokens[:, : P + new_token])


def test_the_first_step_and_its_first_row_are_named():
    """Of several that fail."""
    for failing, first in (({0: 5, 1: 3, 2: 4}, 1), ({1: 4, 2: 4}, 1), ({0: 9, 2: 2}, 2)):
        several = [in_row(row, n) for row, n in failing.items()]
        with pytest.raises(ValueError, match=named(first, failing[first])):
            write(NEW, edits={SITE: several})


def test_the_loop_ends_where_a_row_fails():
    """No token is run for nothing."""
    task, text, bounds = begin(CONFIG, parameters(), TOKENS, 40, attention_mask=MASK, edits={SITE: in_row(2, 3)})
    text = jax.jit(decoding.go_on)(bounds.unstacked, task, text, jnp.int32(39))
    assert int(text.length) - bounds.extra == P + 4
    assert text.failed.tolist() == [-1, -1, 3]


@pytest.mark.parametrize("stop", [True, False])
def test_a_row_that_has_ended_does_not_count(stop):
    """Logits after a row's stop token are not checked; without the stop token they are (control)."""
    free = np.asarray(write(NEW).tokens)[:, P:]
    end = next(n for n in range(2, NEW - 2) if free[1, n] not in [*free[1, :n], *free[0], *free[2]])
    how = {"stop_at_eos": True, "eos_token_id": int(free[1, end])} if stop else {"stop_at_eos": False}
    edit = {SITE: broken(1, LENGTHS[1] + end + 1)}
    if not stop:
        with pytest.raises(ValueError, match=named(1, end + 2)):
            write(NEW, edits=edit, **how)
        return
    found = write(NEW, edits=edit, **how)
    np.testing.assert_array_equal(found.tokens, write(NEW, **how).tokens)
    assert found.attention_mask[1, P:].sum() == end + 1


def test_a_stop_token_does_not_hide_a_row_that_fails():
    """The largest of NaNs is token 0, which may be a stop token."""
    with pytest.raises(ValueError, match=named(1, 2)):
        write(NEW, edits={SITE: in_row(1, 2)}, stop_at_eos=True, eos_token_id=0)


def test_a_row_that_a_stop_string_ended_does_not_count():
    """Tokens are written sixteen at a time before stop strings are looked for."""
    model = tiny()
    word = model.to_string(model.generate(TEXTS[0], 3, return_type="tokens")[0, -1:])
    prompt = model.to_tokens(TEXTS[0]).shape[1]
    hooks = [(SITE, broken(0, prompt + 5))]
    assert model.generate(TEXTS[0], 20, stop_strings=word, fwd_hooks=hooks) == model.generate(TEXTS[0], 3)
    with pytest.raises(ValueError, match=named(0, 6)):  # control: a stop string that does not come
        model.generate(TEXTS[0], 20, stop_strings="re re re", fwd_hooks=hooks)


def test_a_stream_shows_what_was_written_before():
    """The error comes where the piece would have come."""
    model = tiny()
    prompt = model.to_tokens(TEXTS[0]).shape[1]
    pieces = model.generate_stream(TEXTS[0], 8, fwd_hooks=[(SITE, broken(0, prompt + 2))])
    shown = [next(pieces) for _ in range(3)]
    assert TEXTS[0] + "".join(shown) == model.generate(TEXTS[0], 3)
    with pytest.raises(ValueError, match=named(0, 3)):
        next(pieces)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_infinite_logits_that_leave_a_choice_are_no_failure(temperature):
    """Minus infinity forbids a token, and infinity forces it; minus infinity throughout leaves none."""

    def tokens(others, seventh):
        logits = np.full(CONFIG.vocab_size, others, np.float32)
        logits[7] = seventh
        edit = edits.Replace(logits)
        return np.asarray(write(4, edits={"unembed.hook_out": edit}, temperature=temperature).tokens)[:, P:]

    assert (tokens(-np.inf, 0.0) == 7).all()
    assert (tokens(0.0, np.inf) == 7).all()
    with pytest.raises(ValueError, match=named(0, 0)):
        tokens(-np.inf, -np.inf)


def test_no_more_is_written_than_there_is_room_for():
    """More steps than were foreseen do not overwrite the last token."""
    task, text, bounds = begin(CONFIG, parameters(), TOKENS, 8, attention_mask=MASK, stop_at_eos=False)
    room = text.tokens.shape[1]
    text = jax.jit(decoding.go_on)(bounds.unstacked, task, text, jnp.int32(1000))
    assert int(text.length) == room
    np.testing.assert_array_equal(finish(task, text, bounds).tokens[:, : P + 8], write(8).tokens)


@pytest.mark.parametrize("pad", [None, -1, CONFIG.vocab_size, 5])
def test_a_pad_token_outside_the_vocabulary_changes_nothing(pad):
    """It stands where nothing is read; id 0 takes its place."""
    config = dataclasses.replace(CONFIG, pad_token_id=pad)
    assert config.padding == (5 if pad == 5 else 0)
    free = np.asarray(write(NEW).tokens)
    how = {"eos_token_id": int(free[1, P + 2]), "stop_at_eos": True}
    ours, theirs = write(NEW, config, **how), write(NEW, **how)
    real = np.asarray(theirs.attention_mask).astype(bool)
    np.testing.assert_array_equal(ours.attention_mask, theirs.attention_mask)
    np.testing.assert_array_equal(np.asarray(ours.tokens)[real], np.asarray(theirs.tokens)[real])
    assert (np.asarray(ours.tokens)[~real] == config.padding).all()
    np.testing.assert_array_equal(ours.log_probs, theirs.log_probs)


def test_a_stop_token_of_the_config_outside_the_vocabulary_says_what_to_do():
    """Prompts have no such token, and a forward pass runs; only generation needs one."""
    config = dataclasses.replace(CONFIG, eos_token_id=(1, CONFIG.vocab_size))
    says = "it is from the config: give eos_token_id, or stop_at_eos=False"
    with pytest.raises(ValueError, match=re.escape(says)):
        generate(config, parameters(), TOKENS, 2)
    generate(config, parameters(), TOKENS, 2, eos_token_id=1)
