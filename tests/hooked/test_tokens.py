"""Text to ids and back: one BOS and never two, padding on either side, and the mask of padded ids."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.hooked.word_model import BOS, PAD, PADDED, SENTENCE, SENTENCE_IDS, VOCABULARY, WORDS, hooked


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain tokenizer", "tokenizer that adds BOS"])
@pytest.mark.parametrize("text", [SENTENCE, f"<bos> {SENTENCE}", f"<bos>{SENTENCE}"])
def test_one_bos_and_never_two(adds_bos, text):
    """A row starts with one BOS, whether the tokenizer adds it, the text spells it, or neither."""
    tokenizer = hooked(adds_bos).tokenizer
    assert (tokenizer(SENTENCE)["input_ids"][0] == BOS) == adds_bos
    if adds_bos and text != SENTENCE:  # control: the tokenizer alone gives two
        assert tokenizer(text)["input_ids"][:2] == [BOS, BOS]
    tokens = hooked(adds_bos).to_tokens(text)
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == [[BOS, *SENTENCE_IDS]]
    assert hooked(adds_bos).to_tokens([text, SENTENCE]).tolist() == [[BOS, *SENTENCE_IDS]] * 2


@pytest.mark.parametrize("adds_bos", [False, True])
def test_no_bos_when_none_is_wanted(adds_bos):
    """`prepend_bos=False` adds none, not even the tokenizer's; one that the text spells out stays."""
    model = hooked(adds_bos)
    assert model.to_tokens(SENTENCE, prepend_bos=False).tolist() == [SENTENCE_IDS]
    assert model.to_tokens(f"<bos>{SENTENCE}", prepend_bos=False).tolist() == [[BOS, *SENTENCE_IDS]]
    assert model.to_tokens("").tolist() == [[BOS]]


def test_padding():
    """Texts of unequal length are padded to the longest, on the side that is asked for."""
    texts = ["sun", SENTENCE, "red moon"]
    rows = [[BOS, *(VOCABULARY[word] for word in text.split())] for text in texts]
    right = hooked().to_tokens(texts).tolist()
    left = hooked().to_tokens(texts, padding_side="left").tolist()
    for row, padded_right, padded_left in zip(rows, right, left, strict=True):
        padding = [PAD] * (6 - len(row))
        assert padded_right == row + padding
        assert padded_left == padding + row
    assert hooked().to_tokens(["sun", "red moon"], prepend_bos=False).tolist() == [
        [VOCABULARY["sun"], PAD],
        [VOCABULARY["red"], VOCABULARY["moon"]],
    ]


def test_to_string():
    """Ids of one row or of several, as lists or arrays, become the text; special tokens are spelled out."""
    model = hooked()
    text = f"<bos> {SENTENCE}"
    tokens = model.to_tokens(SENTENCE)
    for row in (tokens[0], np.asarray(tokens[0]), tokens[0].tolist()):
        assert model.to_string(row) == text
    assert model.to_string(tokens) == [text]
    assert model.to_string(model.to_tokens(["sun", "red moon"])) == ["<bos> sun <pad>", "<bos> red moon"]
    assert model.to_string(VOCABULARY["sun"]) == model.to_string(np.int32(VOCABULARY["sun"])) == "sun"


def test_to_str_tokens():
    """Each token on its own: of a text, of several, and of ids."""
    model = hooked()
    words = ["<bos>", *SENTENCE.split()]
    assert model.to_str_tokens(SENTENCE) == words
    assert model.to_str_tokens(SENTENCE, prepend_bos=False) == words[1:]
    assert model.to_str_tokens(["sun", SENTENCE]) == [["<bos>", "sun"], words]
    tokens = model.to_tokens(SENTENCE)
    for ids in (tokens[0], np.asarray(tokens[0]), tokens[0].tolist()):
        assert model.to_str_tokens(ids) == words
    assert model.to_str_tokens(tokens) == [words]


def test_to_single_token():
    """A word is its id, never with a BOS; more than one token, or none, is an error that shows them."""
    assert [hooked().to_single_token(word) for word in WORDS] == [VOCABULARY[word] for word in WORDS]
    assert hooked().to_single_token("<eos>") == VOCABULARY["<eos>"]
    with pytest.raises(ValueError, match=r"2 tokens.*'red', 'sun'"):
        hooked().to_single_token("red sun")
    with pytest.raises(ValueError, match="0 tokens"):
        hooked().to_single_token("")


def test_the_mask_of_padded_ids():
    """Padding is what rows begin or end with; the same id between two real tokens is one of them."""
    mask = hooked().attention_mask([[PAD, PAD, BOS, 5, PAD, 6], [BOS, 5, 6, 7, PAD, PAD]])
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    for side in ("left", "right"):
        tokens = hooked().to_tokens(PADDED, padding_side=side)
        assert hooked().attention_mask(tokens).sum(axis=1).tolist() == [2, 9]


@pytest.mark.parametrize("call", ["to_string", "to_str_tokens", "attention_mask"])
@pytest.mark.parametrize("ids", [[len(VOCABULARY) + 500], [-1], [1.7, 2.2]])
def test_ids_that_do_not_exist_are_not_decoded(call, ids):
    """An id beyond the vocabulary was spelled as nothing, and a fraction as the token below it."""
    with pytest.raises(ValueError, match=r"token ids? .*(outside the vocabulary|must be integers)"):
        getattr(hooked(), call)(ids)


def test_a_mapping_is_no_array_of_ids():
    """`attention_mask` of what a tokenizer returns was [[1, 1]], one for each key."""
    with pytest.raises(ValueError, match="must be integers"):
        hooked().attention_mask({"input_ids": [[2, 5]], "attention_mask": [[1, 1]]})


def test_encode_refuses_what_it_would_drop():
    """It returns neither documents nor positions."""
    ids = np.array([SENTENCE_IDS])
    for name in ("segment_ids", "position_ids"):
        with pytest.raises(ValueError, match=r"model\.inputs"):
            hooked().encode({"input_ids": ids, name: np.arange(ids.size)[None]})
    hooked().encode({"input_ids": ids})  # control
