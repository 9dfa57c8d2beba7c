"""Generation for people: text, chat, streams and stop strings; and what is refused, in which words."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gemma3_jax import TINY, Gemma3Config, HookedGemma3, edits
from gemma3_jax.generation import memory
from gemma3_jax.generation.loop import generate
from tests.helpers.greedy_texts import BAR, CONFIG, MASK, TOKENS, P, parameters, tiny, write
from tests.helpers.small_model import difference

# Text


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ 'ba ' + message['content'] + ' ke ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'lo' }}{% endif %}"
)
TEXT = "ba ke lo mu ti so re ba ke"
TEXTS = [TEXT, "so re mu so", "ti lo lo ba mu ti lo"]


@functools.cache
def chatty():
    """The shipped model, with a chat template on a tokenizer of its own."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    model.tokenizer.chat_template = CHAT
    return model


def test_text_in_text_out():
    """One text, several, and ids; each by default comes back as it came, or as asked for."""
    one = tiny().generate(TEXT, 20)
    assert one.startswith(TEXT)
    tokens = tiny().generate(TEXT, 20, return_type="tokens")
    assert (tokens.shape, tokens.dtype) == ((1, 30), jnp.int32)
    assert int(tokens[0, 0]) == tiny().config.bos_token_id
    assert tiny().to_string(tokens[0, 1:]) == one
    np.testing.assert_array_equal(tiny().generate(np.asarray(tokens)[0, :10], 20), tokens)
    assert tiny().generate(np.asarray(tokens)[:, :10], 20, return_type="text") == [one]
    assert tiny().generate(TEXTS, 20) == [one, *(tiny().generate(text, 20) for text in TEXTS[1:])]
    text, found = tiny().generate(TEXT, 20, names_filter="blocks.*.hook_resid_post", return_logits=True)
    assert text == one
    assert found.cache["resid_post", 0].shape[1] == 29
    assert found.logits.shape[:2] == (1, 20)


def test_hooks_of_the_model_object():
    """`fwd_hooks` are those of `run_with_hooks`, plain functions included, and act on every token."""
    steer = edits.only(edits.Add(np.full(tiny().config.hidden_size, 3.0, np.float32)), features=[0, 1, 2])
    hooks = [("blocks.1.hook_resid_post", steer), ("blocks.*.mlp.hook_out", lambda value, hook: 1.5 * value)]
    tokens, found = tiny().generate(TEXT, 6, fwd_hooks=hooks, return_type="tokens", return_logits=True)
    theirs = tiny().run_with_hooks(tokens[:, :-1], hooks)
    assert difference(found.logits, theirs[:, -6:]) < BAR
    assert difference(found.logits, tiny()(tokens[:, :-1])[:, -6:]) > 0.01


def test_chat_goes_through_the_template_with_one_bos():
    """Messages become the template's text; the reply alone comes back, or all tokens."""
    messages = [{"role": "user", "content": "ke lo mu ti"}]
    reply = chatty().generate(messages, 4)
    tokens = np.asarray(chatty().generate(messages, 4, return_type="tokens"))
    written = "ba ke lo mu ti ke lo"
    np.testing.assert_array_equal(tokens[:, :-4], chatty().to_tokens(written))
    assert (tokens == chatty().config.bos_token_id).sum() == 1
    assert chatty().tokenizer.decode(tokens[0, -4:]) == reply
    both = chatty().generate([messages, [{"role": "user", "content": "so"}]], 4)
    assert both[0] == reply
    assert len(both) == 2
    assert "".join(chatty().generate_stream(messages, 4)) == reply
    with pytest.raises(ValueError, match="no chat template"):
        tiny().generate(messages, 4)


def test_a_stream_has_the_tokens_of_generate():
    """Text, texts of several lengths, and ids; rows that end go on in silence, or as padding."""
    model, how = tiny(), {"temperature": 2.0, "seed": 3}
    assert TEXT + "".join(model.generate_stream(TEXT, 20, **how)) == model.generate(TEXT, 20, **how)
    tokens = np.asarray(model.generate(TEXTS, 20, return_type="tokens", stop_at_eos=False, **how))
    stop = {"eos_token_id": [int(tokens[0, 14]), int(tokens[1, 18])], **how}
    pieces = np.asarray(list(model.generate_stream(TEXTS, 20, **stop)))
    whole = model.generate(TEXTS, 20, **stop)
    assert [text + "".join(row) for text, row in zip(TEXTS, pieces.T, strict=True)] == whole
    ids, mask = model.encode(TEXTS)
    streamed = np.stack(list(model.generate_stream(np.asarray(ids), 20, attention_mask=mask, **stop)), axis=1)
    np.testing.assert_array_equal(streamed, model.generate(TEXTS, 20, return_type="tokens", **stop)[:, ids.shape[1] :])


def test_stop_strings_end_each_row_at_its_own():
    """Behind the first token with which one is written: text and tokens are cut, with padding and zeros behind."""
    model = tiny()
    free = np.asarray(model.generate(TEXTS, 40, return_type="tokens"))
    p = free.shape[1] - 40
    spelled = [[model.tokenizer.decode(row[p : p + n + 1].tolist()) for n in range(40)] for row in free]
    # Of two tokens, so that the second completes it; the second row's comes after the first look, at 16 tokens.
    stops = [spelled[0][4][-5:], spelled[1][20][-8:]]
    ends = [next((n for n, text in enumerate(row) if any(s in text for s in stops)), 39) for row in spelled]
    assert len(set(ends)) > 1
    texts, found = model.generate(TEXTS, 40, stop_strings=stops, return_logits=True)
    assert texts == [
        text + row[end] if row[end][0] == " " else text + " " + row[end]
        for text, row, end in zip(TEXTS, spelled, ends, strict=True)
    ]
    np.testing.assert_array_equal(
        found.attention_mask.sum(axis=1) - found.attention_mask[:, :p].sum(axis=1), np.asarray(ends) + 1
    )
    for row, end, log_probs in zip(np.asarray(found.tokens), ends, np.asarray(found.log_probs), strict=True):
        assert (row[p + end + 1 :] == model.config.pad_token_id).all()
        assert (log_probs[end + 1 :] == 0).all()
        assert (log_probs[: end + 1] < 0).all()
    pieces = np.asarray(list(model.generate_stream(TEXTS, 40, stop_strings=stops)))
    assert [text + "".join(row) for text, row in zip(TEXTS, pieces.T, strict=True)] == texts
    ids, mask = model.encode(TEXTS)
    streamed = np.stack(list(model.generate_stream(np.asarray(ids), 40, attention_mask=mask, stop_strings=stops)), 1)
    np.testing.assert_array_equal(streamed, found.tokens[:, p:])


def test_a_stop_string_may_begin_with_the_space_before_the_first_new_token():
    """The continuation is searched as it stands behind the prompt; what the prompt has ends nothing."""
    model = tiny()
    [ids] = np.asarray(model.generate(TEXT, 3, return_type="tokens"))
    word = model.to_string(ids[-3:-2])
    assert model.generate(TEXT, 8, stop_strings=f" {word}") == f"{TEXT} {word}"
    assert "".join(model.generate_stream(TEXT, 8, stop_strings=f" {word}")) == f" {word}"
    absent = next(word for word in ("ti", "so", "re") if word not in model.generate(TEXT, 4)[len(TEXT) :])
    assert len(model.generate(TEXT, 4, stop_strings=absent).split()) == len(TEXT.split()) + 4


def test_one_row_of_ids_is_one_text():
    """And several are several, also where there is one of them."""
    ids = np.asarray(tiny().to_tokens(TEXT))
    text = tiny().generate(TEXT, 4)
    assert tiny().generate(ids[0], 4, return_type="text") == text
    assert tiny().generate(ids[0].tolist(), 4, return_type="text") == text
    assert tiny().generate(ids, 4, return_type="text") == [text]


# Errors


@pytest.mark.parametrize("call", [HookedGemma3.generate, HookedGemma3.generate_stream])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("temprature", "generation does not take the argument temprature; did you mean temperature?"),
        ("edits", "generation does not take the argument edits; did you mean fwd_hooks?"),
        ("capture", "generation does not take the argument capture; did you mean names_filter?"),
        ("xyz", "generation does not take the argument xyz; there are temperature, top_k"),
    ],
)
def test_an_argument_that_there_is_not(call, name, says):
    """With the one that was meant, before anything is run."""
    with pytest.raises(TypeError, match=re.escape(says)):
        call(tiny(), TEXT, 4, **{name: 1})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 250}, "has 12 tokens; with 250 new tokens, the text exceeds the model's context of 256"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a positive integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"stop_at_eos": "no"}, "stop_at_eos is 'no'; it must be True or False"),
        ({"tokens": np.zeros((0, 4), int)}, "at least one token"),
        ({"tokens": np.zeros((2, 0), int)}, "at least one token"),
        ({"tokens": np.full((1, 4), 300)}, "token id 300 is outside the vocabulary of 101"),
        ({"tokens": np.full((1, 4), 0.5)}, "token ids"),
        ({"attention_mask": MASK * [[1], [0], [1]]}, "row 1 of attention_mask is all padding"),
        ({"attention_mask": MASK * (np.arange(P) != 9)}, "row 0 of attention_mask has padding between tokens"),
        ({"attention_mask": np.full((3, P), "1")}, "attention_mask must be 1 at real tokens and 0 at padding"),
        ({"attention_mask": np.where(MASK, 1.0, np.nan)}, "attention_mask must be 1 at real tokens and 0 at padding"),
        ({"attention_mask": MASK[:, 1:]}, "attention_mask has shape (3, 11); the prompt has (3, 12)"),
        ({"eos_token_id": 101}, "eos_token_id is 101; it must be an id or several ids within the vocabulary of 101"),
        ({"eos_token_id": [[1, 2]]}, "eos_token_id is [[1, 2]]"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is [1, -1]"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"seed": [1, 2]}, "seed is [1, 2]; it must be an integer, or one for each of 3 rows"),
        ({"capture": "blocks.7.hook_out"}, "blocks.7.hook_out"),
        ({"edits": {"blocks.1.hook_out": edits.only(edits.Scale(0.0), positions=70)}}, "positions has 70"),
    ],
)
def test_bad_input_is_named(arguments, says):
    """One message with what is wrong, before anything is compiled."""
    config = Gemma3Config.from_hf({**CONFIG.to_hf(), "max_position_embeddings": 256})
    given = {"tokens": TOKENS, "max_new_tokens": 8, "attention_mask": None, **arguments}
    with pytest.raises(ValueError, match=re.escape(says)):
        generate(config, parameters(), **given)


def test_an_encoder_does_not_generate():
    """A bidirectional model has no next token."""
    config = Gemma3Config.from_hf({**CONFIG.to_hf(), "use_bidirectional_attention": True})
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        generate(config, parameters(), TOKENS, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input": ""}, None),
        ({"input": []}, "the prompt is empty"),
        ({"input": [[]]}, "at least one token"),
        ({"stop_strings": "xylophone"}, "the stop string 'xylophone' has characters that the tokenizer cannot write"),
        ({"stop_strings": [""]}, "a stop string is ''"),
        ({"stop_strings": [7]}, "a stop string is 7"),
        ({"input": [TEXT, 5]}, "the list of texts has 5; give only texts, or only ids"),
        ({"return_type": "str"}, "return_type is 'str'; it must be 'text', 'tokens' or None"),
    ],
)
def test_bad_prompts_and_strings_are_named(arguments, says):
    """The same for people; an empty text is its BOS."""
    if says is None:
        assert tiny().generate(**arguments, max_new_tokens=2, return_type="tokens").shape == (1, 3)
        return
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny().generate(**{"input": TEXT, **arguments})


def test_stop_strings_of_special_tokens_are_refused():
    """Texts are searched without these, so that they would never come; also those that a tokenizer only adds."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    model.tokenizer.add_tokens([tokenizers.AddedToken("<turn>", special=True)])
    for stop in ("<eos>", "<turn>", "mu <turn>"):
        with pytest.raises(ValueError, match=re.escape(f"the stop string {stop!r} has a special token")):
            model.generate(TEXT, 4, stop_strings=stop)
    assert model.generate(TEXT, 4, stop_strings="mu").startswith(TEXT)  # control


def test_any_integer_counts_tokens():
    """Of NumPy and JAX too, as a length of an array is."""
    for n in (np.int32(20), np.uint8(20), jnp.int32(20)):
        assert generate(tiny().config, tiny().params, [[2] * 10], n, stop_at_eos=False).tokens.shape == (1, 30)
        assert tiny().generate([2] * 10, n, stop_at_eos=False).shape == (1, 30)
        assert len(list(tiny().generate_stream([2] * 10, n, stop_at_eos=False))) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"fwd_hooks": [("blocks.9.hook_out", edits.Scale(0.0))]}, "blocks.9.hook_out"),
        ({"stop_strings": ""}, "a stop string is ''"),
    ],
)
def test_a_stream_reports_bad_arguments_when_it_is_called(arguments, says):
    """And not when the first piece is asked for."""
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny().generate_stream(TEXT, **arguments)


def test_messages_that_are_none_are_refused():
    """By name, whatever stands first; and a mask, which only ids have. Whole messages in the same places pass."""
    whole = {"role": "user", "content": "ti"}
    for prompt in ([{"role": "user"}], [whole, "ba"], [[whole], "ba"], [[], [whole]], [[whole], []], [[whole, 3]]):
        with pytest.raises(ValueError, match="it must be a list of messages, each with its role and content"):
            chatty().generate(prompt, 2)
    with pytest.raises(ValueError, match="messages do not take attention_mask"):
        chatty().generate([whole], 2, attention_mask=np.ones((1, 3), int))
    assert len(chatty().generate([[whole, whole], [whole]], 2)) == 2


def test_traced_arguments_are_refused():
    """Generation reads what it writes on the host; the message says so, whatever is traced, and what to do instead."""
    says = "outside of jit, vmap and grad"

    def steered(strength):
        return generate(
            CONFIG, parameters(), TOKENS, 2, edits={"blocks.0.hook_out": edits.Scale(strength)}
        ).log_probs.sum()

    for function, argument in (
        (lambda model: model.generate(TOKENS, 2), HookedGemma3(CONFIG, parameters())),
        (lambda tokens: HookedGemma3(CONFIG, parameters()).generate(tokens, 2), TOKENS),
        (lambda tokens: generate(CONFIG, parameters(), tokens, 2).tokens, TOKENS),
        (lambda heat: generate(CONFIG, parameters(), TOKENS, 2, temperature=heat).tokens, 0.5),
        (steered, 1.0),
    ):
        with pytest.raises(TypeError, match=says):
            jax.jit(function)(argument)
    with pytest.raises(TypeError, match=says):
        jax.grad(steered)(1.0)
    assert np.isfinite(steered(1.0))


@pytest.mark.parametrize("function", ["read", "go_on"])
def test_out_of_memory_says_what_was_asked_for(function, monkeypatch):
    """How many bytes, and by what; any other failure passes through."""
    execute = memory.run_compiled

    def fail(called, *arguments, **static):
        if called.__name__ != function or function == "go_on":
            done = execute(called, *arguments, **static)
        if called.__name__ != function:
            return done
        # The text is used up, as a loop that fails may have.
        raise jax.errors.JaxRuntimeError(says)

    monkeypatch.setattr(memory, "run_compiled", fail)
    says = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
    with pytest.raises(MemoryError) as error:
        write(capture="blocks.*.hook_out")
    # 3 rows of 16 + 64 columns: keys and values of 2 heads of 10, in a full layer and two rings of 7
    asked = 2 * 3 * 2 * 10 * 4 * (80 + 2 * 7)
    captured = 3 * 3 * 80 * CONFIG.hidden_size * 4
    assert f"{asked:,} bytes for the keys and values of 3 rows of 80 tokens" in str(error.value)
    assert f"{captured:,} bytes for 3 captured sites" in str(error.value)
    assert "allocating 1 bytes" in str(error.value)
    # Scores of the prompt take 8 heads of 16 x 16 at least; those of a token have 80 keys.
    beside = int(re.search(r"running the model on it ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    assert beside >= 3 * 8 * 4 * (16 * 16 if function == "read" else 80)
    # Where hook_attn_in is edited, each of the 8 query heads has keys and values of its own.
    with pytest.raises(MemoryError, match=f"{2 * 3 * 10 * 4 * (8 * 80 + 2 * 2 * 7):,} bytes for the keys and values"):
        write(edits={"blocks.1.hook_attn_in": edits.Scale(2.0)})
    with pytest.raises(MemoryError, match="keys and values"):
        HookedGemma3(CONFIG, parameters()).generate(TOKENS, 5)
    says = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        write()
