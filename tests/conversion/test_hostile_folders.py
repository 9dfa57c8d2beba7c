"""Broken and hostile checkpoint folders: each costs seconds, and is one line that names the file."""

import json
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import CheckpointError, convert_checkpoint
from gemma3_jax import TINY, ConfigError, Gemma3Config, HookedGemma3
from gemma3_jax.conversion.files import read_config
from gemma3_jax.messages import printable
from gemma3_jax.reading import read_json
from tests.helpers.hostile_files import NESTED, NOT_A_FILE, replace, safetensors

SINGLE, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
CONFIG = json.loads((TINY / "config.json").read_text())


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def _a_few_seconds():
    """No test of this file takes longer: a folder that hangs would fail here, if it ever ended."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20  # on a machine with other work; alone, each takes less than a second


FILES = ["config.json", GENERATION, SINGLE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("content", "says"), NOT_A_FILE.values(), ids=NOT_A_FILE)
def test_what_is_not_a_file_is_named(content, says, file, folder):
    """Whichever of the files it replaces; nothing waits for a FIFO, and nothing reads a device."""
    replace(folder / file, content)
    with pytest.raises(CheckpointError) as caught:
        HookedGemma3.from_pretrained(folder)
    assert str(caught.value).startswith(f"{folder / file} {says}")


@pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
@pytest.mark.parametrize("kind", ["fifo", "device", "broken link", "circle of links"])
def test_sources_that_are_no_files(kind, name, tmp_path):
    """A GGUF file, or what a user takes for a checkpoint."""
    content, says = NOT_A_FILE[kind]
    replace(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name} {says}")):
        convert_checkpoint(tmp_path / name)


def test_snapshots_of_the_hub_are_links(folder):
    """Control: links to files outside of the folder are followed, as in the cache of the hub."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../blobs/{i}")
    assert HookedGemma3.from_pretrained(folder).to_tokens("ba ke").shape == (1, 3)


BAD_JSON = {
    "nested objects": (NESTED, "is nested too deeply"),
    "nested lists": (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
    "integer of 5,000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "key twice": (b'{"hidden_size": 96, "hidden_size": 64}', "the key 'hidden_size' occurs twice"),
    "key twice inside": (b'{"a": [{"b": 1, "b": 1}]}', "the key 'b' occurs twice"),
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "UTF-16": ("{}".encode("utf-16"), "is not valid JSON"),
}


@pytest.mark.parametrize("file", ["config.json", GENERATION, INDEX])
@pytest.mark.parametrize(("content", "says"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_named(content, says, file, folder):
    """In every JSON file that conversion reads."""
    if file == INDEX:
        (folder / SINGLE).unlink()
    replace(folder / file, content)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / file))
    assert says in message
    assert len(message) < 2500


def test_a_json_file_of_a_terabyte_is_not_read(tmp_path):
    """A sparse file has any size."""
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "config.json")


def test_a_byte_order_mark_is_skipped(folder):
    """Some editors write one."""
    file = folder / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_config(folder) == read_config(TINY)


@pytest.mark.parametrize("layers", [10_001, 10**9, 10**300])
def test_absurd_numbers_of_layers_are_refused(layers, folder):
    """With and without layer_types, and by the class itself; 1,000 layers are not absurd."""
    config = {**CONFIG, "num_hidden_layers": layers}
    for types in ({}, {"layer_types": ["full_attention"]}, {"layer_types": None}):
        raw = {name: value for name, value in config.items() if name != "layer_types"} | types
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="num_hidden_layers") as caught:
            convert_checkpoint(folder)
        assert str(folder / "config.json") in str(caught.value)
    shape = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 2)
    shape |= dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "query_pre_attn_scalar"), 2)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        Gemma3Config(num_hidden_layers=layers, **shape)
    assert len(Gemma3Config(num_hidden_layers=1000, **shape).layer_types) == 1000


HEADERS = {
    "absurd size": safetensors(b"{}", 2**63),
    "larger than the file": safetensors(b"{}", 1000),
    "nested": safetensors(NESTED),
    "not an object": safetensors(b"[]"),
    "huge shape": safetensors(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 0]}}'),
    "huge empty shape": safetensors(b'{"a": {"dtype": "F32", "shape": [0, 115292150460684697], "data_offsets":[0,0]}}'),
    "negative shape": safetensors(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}1234'),
    "key twice": safetensors(b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": {"dtype":"F32","shape":[0],'
                             b'"data_offsets":[0,0]}}'),
    "key with 10 MB": safetensors(b'{"' + b"a" * 10**7 + b'": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'),
}  # fmt: skip


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_bad_headers_are_one_short_line(content, folder):
    """Whether the file cannot be read or its tensors are those of no model."""
    replace(folder / SINGLE, content)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2500


OUTSIDE = [
    "../outside.safetensors",
    "{root}/outside.safetensors",
    "sub/../../outside.safetensors",
    "..",
    ".",
    "",
    "a\0b",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_an_index_opens_no_file_outside_its_folder(name, folder):
    """It may name files of its folder only; the same file inside the folder is read."""
    outside = folder.parent / "outside.safetensors"
    (folder / SINGLE).rename(outside)
    (folder / "sub").mkdir()
    keys = read_headers_of(outside)
    name = name.format(root=folder.parent)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    with pytest.raises(CheckpointError, match="is not the name of a file in"):
        convert_checkpoint(folder)
    shutil.copy(outside, folder / "inside.safetensors")  # control
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "inside.safetensors")}))
    convert_checkpoint(folder)


def read_headers_of(file: Path) -> list[str]:
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    return [key for key in json.loads(file.read_bytes()[8 : 8 + size]) if key != "__metadata__"]


def test_an_index_with_a_name_that_is_too_long(folder):
    """The file system's own error would name neither file nor index."""
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError):
        convert_checkpoint(folder)


NASTY = "\x1b[2J\x07\nCRITICAL forged\u202e\ud800"


@pytest.mark.parametrize("key", ["{}", "model.vision_tower.{}", "model.layers.0.{}"])
def test_control_characters_in_keys_are_escaped(key, folder, caplog):
    """In errors and in logs: neither the terminal nor a log can be made to show something else."""
    replace(folder / SINGLE, add_tensor((TINY / SINGLE).read_bytes(), key.format(NASTY.replace("\ud800", ""))))
    if "layers" not in key:  # a tensor of the vision half, or of another head
        convert_checkpoint(folder)
        said = caplog.messages[-1]
    else:
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(folder)
        said = str(caught.value)
    assert said.isprintable()
    assert r"\x1b[2J\x07\nCRITICAL forged\u202e" in said


def add_tensor(file: bytes, key: str) -> bytes:
    """A safetensors file with one more tensor, which is empty."""
    size = struct.unpack("<Q", file[:8])[0]
    data = file[8 + size :]
    header = json.loads(file[8 : 8 + size])
    header[key] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    return safetensors(json.dumps(header).encode()) + data


def test_control_characters_in_a_config_are_escaped(folder):
    """In values and in names of fields."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": {NASTY: {}}}))
    with pytest.raises(ConfigError) as caught:
        convert_checkpoint(folder)
    assert str(caught.value).isprintable()
    assert r"\x1b[2J" in str(caught.value)


@given(st.text())
def test_messages_are_one_printable_line(text):
    """And ordinary text does not change."""
    assert printable(text).isprintable()
    printable(text).encode()  # a lone surrogate cannot be encoded
    assert not text.isprintable() or printable(text) == text
