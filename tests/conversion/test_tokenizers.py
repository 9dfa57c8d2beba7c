"""Tokenizers are tried before the weights: each works, or one line says which file or package is missing or damaged."""

import json
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from conversion import CheckpointError, convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.conversion import tokenizers as ours
from gemma3_jax.hooked import loading

TEXT = "ba ke lo mu"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint without a tokenizer."""
    directory = shutil.copytree(TINY, tmp_path / "checkpoint")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    return directory


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> bytes:
    """A `tokenizer.model` that sentencepiece trained, with the special tokens of Gemma."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("sentencepiece")
    words = [f"{a}{b}{c}{d}" for a in "bklm" for b in "aeio" for c in "bklm" for d in "aeio"]
    (directory / "corpus").write_text("\n".join(" ".join(words[i::7]) for i in range(7)) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return (directory / "tokenizer.model").read_bytes()


CLASSES = [
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "LlamaTokenizer",
    None,
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_tokenizer_is_that_of_auto_tokenizer(name, folder, monkeypatch):
    """Its class, its content and its settings, whether or not `AutoTokenizer` is asked."""
    from transformers import AutoTokenizer

    monkeypatch.setattr(ours, "_trial", lambda tokenizer: "")  # not every class reads this vocabulary

    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | {
        "padding_side": "right",
        "add_bos_token": True,
    }
    settings = {**settings, "tokenizer_class": name} if name else {"padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    wanted, found = AutoTokenizer.from_pretrained(folder, local_files_only=True), ours.load_tokenizer(folder)
    assert type(found) is type(wanted)
    assert found.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()
    assert found.init_kwargs | {"trust_remote_code": None} == wanted.init_kwargs | {"trust_remote_code": None}
    assert found(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    assert (found.padding_side, found.special_tokens_map) == ("right", wanted.special_tokens_map)


PARTIAL = {
    "chat_template.jinja": "{{ messages }}",
    "added_tokens.json": '{"<image_soft_token>": 200}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": '{"bos_token": "<bos>"}',
}


@pytest.mark.parametrize("names", [*[[name] for name in PARTIAL], list(PARTIAL)], ids=lambda names: "+".join(names))
def test_half_a_tokenizer_is_none(names, folder, caplog):
    """Files beside a tokenizer make one of special tokens, which reads any text as <unk>. The model takes ids."""
    for name in names:
        (folder / name).write_text(PARTIAL[name])
    with caplog.at_level(logging.WARNING, "gemma3_jax"):
        model = HookedGemma3.from_pretrained(folder)
    assert model.tokenizer is None
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("gemma3_jax")]
    assert str(folder) in message
    assert all(name in message for name in [*names, "tokenizer.json"])
    assert model(np.array([[2, 10, 20]])).shape == (1, 3, model.config.vocab_size)
    with pytest.raises(ValueError, match=r"no tokenizer\.json or tokenizer\.model that works"):
        model.to_tokens(TEXT)


def test_no_tokenizer_is_no_warning(folder, caplog):
    """Control: a checkpoint without any tokenizer file was meant so."""
    assert HookedGemma3.from_pretrained(folder).tokenizer is None
    assert caplog.records == []


def test_a_tokenizer_that_loses_text_is_none(folder, caplog):
    """What it decodes must be what it encoded; here every word but one is unknown to its model."""
    whole = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ours_text = whole.decode(whole.encode(TEXT, add_special_tokens=False).ids)
    assert ours_text == TEXT  # control
    raw = json.loads((TINY / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "e"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(TINY / "tokenizer_config.json", folder)
    assert HookedGemma3.from_pretrained(folder).tokenizer is None
    assert "reads 'ba be" in caplog.messages[-1]


CORRUPT = {
    "truncated tokenizer.json": ("tokenizer.json", lambda content: content[:1000]),
    "empty tokenizer.json": ("tokenizer.json", lambda content: b""),
    "another JSON": ("tokenizer.json", lambda content: b'{"a": 1}'),
    "nested tokenizer.json": ("tokenizer.json", lambda content: b"[" * 100_000),
    "truncated tokenizer_config.json": ("tokenizer_config.json", lambda content: content[:30]),
    "nested tokenizer_config.json": ("tokenizer_config.json", lambda content: b'{"a":' * 100_000),
}


@pytest.mark.parametrize(("name", "ruin"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_named_before_the_weights_are_read(name, ruin, folder, monkeypatch):
    """With the remedy, which works: another tokenizer in its place."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = (TINY / file).read_bytes()
        (folder / file).write_bytes(ruin(content) if file == name else content)
    with monkeypatch.context() as unread:
        unread.setattr(loading, "assemble", lambda *_, **__: pytest.fail("the weights were read"))
        with pytest.raises(CheckpointError) as caught:
            HookedGemma3.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder / name))
    assert "download it again, or pass tokenizer=" in str(caught.value)
    assert str(caught.value).isprintable()
    assert HookedGemma3.from_pretrained(folder, tokenizer=TINY).to_tokens(TEXT).shape == (1, 5)


def test_tokenizer_model_alone_works(folder, sentencepiece_model):
    """With the ids that sentencepiece itself gives."""
    import sentencepiece

    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    model = HookedGemma3.from_pretrained(folder)
    expected = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model).encode("bake  lomu é")
    assert model.tokenizer("bake  lomu é", add_special_tokens=False)["input_ids"] == expected
    assert model.to_string(expected) == "bake  lomu é"


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_tokenizer_model_needs_an_extra(package, folder, sentencepiece_model, monkeypatch):
    """Without one of its packages, the error has the command that installs it; a tokenizer.json needs none of them."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"model needs {package}: pip install 'gemma3-jax\[sen"):
        HookedGemma3.from_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    assert HookedGemma3.from_pretrained(folder).to_tokens(TEXT).shape == (1, 5)


def test_a_corrupt_tokenizer_model_is_named(folder, sentencepiece_model):
    """A truncated download."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged") as caught:
        HookedGemma3.from_pretrained(folder)
    assert str(caught.value).isprintable()


def test_code_of_a_stranger_is_not_run(folder, caplog):
    """Nor does anything ask on the terminal whether it may."""
    config = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text("raise SystemExit('this was run')")
    assert HookedGemma3.from_pretrained(folder).tokenizer is None
    assert str(folder) in caplog.messages[-1]


def test_another_tokenizer_takes_the_place(folder, tmp_path):
    """A tokenizer as it is, whatever its class; a directory, tried; and what is neither names itself."""
    tokenizer = ours.load_tokenizer(TINY)
    assert HookedGemma3.from_pretrained(folder, tokenizer=tokenizer).tokenizer is tokenizer
    for directory in (TINY, str(TINY)):
        model = HookedGemma3.from_pretrained(folder, tokenizer=directory)
        assert model.to_tokens(TEXT).tolist() == [[2, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for source, says in ((folder, "no tokenizer that works"), (tmp_path, "no tokenizer files"), ("./no", "./no")):
        with pytest.raises(CheckpointError, match=says):
            HookedGemma3.from_pretrained(TINY, tokenizer=source)


def test_exports_carry_the_settings_of_generation(tmp_path):
    """Through both formats: the special tokens of the config, and the other settings of the source."""
    from transformers import GenerationConfig

    source = shutil.copytree(TINY, tmp_path / "source")
    settings = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106]}
    (source / "generation_config.json").write_text(json.dumps(settings))
    config, params = convert_checkpoint(source)
    save_params(config, params, tmp_path / "saved", tokenizer=source)
    export_checkpoint(*load_params(tmp_path / "saved"), tmp_path / "exported", tokenizer=tmp_path / "saved")
    export_checkpoint(config.stopping_at(7), params, tmp_path / "plain")
    whole, plain = (GenerationConfig.from_pretrained(tmp_path / name) for name in ("exported", "plain"))
    assert (whole.do_sample, whole.top_k, whole.top_p, whole.eos_token_id) == (True, 64, 0.95, [1, 106])
    assert (whole.bos_token_id, whole.pad_token_id) == (2, 0)
    assert (plain.do_sample, plain.eos_token_id) == (None, 7)
    again, restored = convert_checkpoint(tmp_path / "exported")
    assert again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, params))
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert not {key for key in written if "quantization" in key or "adapter" in key or "peft" in key}
