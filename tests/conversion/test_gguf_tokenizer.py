"""The tokenizer of a GGUF file: the one that `transformers` reads, made once."""

import dataclasses
import json
from pathlib import Path

import pytest
import transformers

from conversion import CheckpointError
from gemma3_jax import HookedGemma3
from gemma3_jax.conversion import gguf_tokenizer
from gemma3_jax.conversion.gguf import config_of
from gemma3_jax.conversion.gguf_header import read_header
from gemma3_jax.conversion.gguf_tokenizer import load_tokenizer
from tests.conversion.gguf_files import ONE_LAYER, TEXTS, TOKENS, write

pytestmark = pytest.mark.usefixtures("gguf_cache")


def test_the_tokenizer_is_the_one_that_transformers_reads(gguf_file, gguf_cache):
    """Equal as files: vocabulary, merges, added tokens, spaces. Control: merges in another order."""
    mine = load_tokenizer(read_header(gguf_file))
    their = transformers.GemmaTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert json.loads(mine.backend_tokenizer.to_str()) == json.loads(their.backend_tokenizer.to_str())
    assert mine.special_tokens_map == their.special_tokens_map
    assert [mine(text)["input_ids"] for text in TEXTS] == [their(text)["input_ids"] for text in TEXTS]
    fields = {**read_header(gguf_file).fields}
    fields["tokenizer.ggml.tokens"] = [*TOKENS[:38], *TOKENS[38:53][::-1], *TOKENS[53:]]
    other = gguf_tokenizer.tokenizer_of(fields)
    assert (mine.tokenize("ther"), other.tokenize("ther")) == (["the", "r"], ["th", "er"])


def test_the_tokenizer_is_made_once(gguf_file, gguf_cache, monkeypatch):
    """It is kept for every file with this vocabulary, under a name that is its content's, whole or not at all."""
    made = load_tokenizer(read_header(gguf_file))
    [kept] = gguf_cache.iterdir()
    other = write(gguf_file.parent / "other.gguf", ONE_LAYER)
    monkeypatch.setattr(gguf_tokenizer, "tokenizer_of", lambda fields: pytest.fail("made again"))
    again = load_tokenizer(read_header(other))
    assert [again(text)["input_ids"] for text in TEXTS] == [made(text)["input_ids"] for text in TEXTS]
    assert again.padding_side == "left"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf_cache.parents[1]))
    changed = write(gguf_file.parent / "changed.gguf", ONE_LAYER, tokens=[*TOKENS[:-1], "zz"])
    assert load_tokenizer(read_header(changed)).convert_ids_to_tokens(len(TOKENS) - 1) == "zz"
    assert len(list(gguf_cache.iterdir())) == 2
    assert kept in gguf_cache.iterdir()


def test_a_chat_template_comes_along(tmp_path):
    """Also out of the cache."""
    file = write(tmp_path / "a.gguf", ONE_LAYER, fields={"chat_template": ("{{ messages[0].content }}!",)})
    for _ in range(2):
        assert load_tokenizer(read_header(file)).apply_chat_template([{"content": "the"}], tokenize=False) == "the!"


def test_turn_tokens_that_a_file_calls_ordinary(gguf_file):
    """Some files do; text could not give them then."""
    fields = {**read_header(gguf_file).fields}
    fields["tokenizer.ggml.token_type"] = [1] * len(TOKENS)
    assert gguf_tokenizer.tokenizer_of(fields)("<end_of_turn>", add_special_tokens=False)["input_ids"] == [7]


def test_a_cache_that_cannot_be_written(gguf_file, tmp_path, monkeypatch):
    """The tokenizer is used all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_tokenizer(read_header(gguf_file))("the")["input_ids"][0] == 2


def test_a_user_without_a_home(gguf_file, monkeypatch):
    """As in some containers: nothing can be kept, and the tokenizer is made each time."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # `Path.home` then asks the list of users, and raises an error
    with pytest.raises(RuntimeError):
        Path.home()
    assert load_tokenizer(read_header(gguf_file))("the")["input_ids"][0] == 2


def test_a_tokenizer_beside_the_file(tmp_path, gguf_cache):
    """It is taken; that of another model is refused."""
    file = write(tmp_path / "a.gguf", ONE_LAYER)
    beside = load_tokenizer(read_header(file))
    beside.add_tokens(["mine"])
    beside.save_pretrained(tmp_path)
    assert load_tokenizer(read_header(file)).convert_tokens_to_ids("mine") == len(TOKENS)
    write(file, ONE_LAYER, tokens=[*TOKENS[:8], *TOKENS[:7:-1]])
    with pytest.raises(CheckpointError, match=r"beside .*a\.gguf has another vocabulary than the file"):
        load_tokenizer(read_header(file))


def test_no_vocabulary(tmp_path, caplog):
    """The model is usable, and a warning says why there is no tokenizer."""
    file = write(tmp_path / "a.gguf", ONE_LAYER)
    file.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mode_"))
    assert HookedGemma3.from_pretrained(file).tokenizer is None
    assert "a.gguf has no SentencePiece vocabulary" in caplog.text


DAMAGED = {
    "numbers": {"tokenizer.ggml.tokens": [1, 2, 3]},
    "no list": {"tokenizer.ggml.tokens": 7},
    "no such token": {"tokenizer.ggml.bos_token_id": 10_000},
    "a token id that is text": {"tokenizer.ggml.unknown_token_id": "three"},
}


@pytest.mark.parametrize("fields", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_vocabulary(fields, gguf_file, caplog):
    """No tokenizer, and one warning, in place of an error of a library. Nothing is kept for later."""
    header = read_header(gguf_file)
    assert load_tokenizer(dataclasses.replace(header, fields={**header.fields, **fields})) is None
    [record] = caplog.records
    assert "without a tokenizer" in record.getMessage()
    assert load_tokenizer(header) is not None  # control
    config_of(dataclasses.replace(header, fields={**header.fields, "tokenizer.ggml.tokens": [1, 2]}))
