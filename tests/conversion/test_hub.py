"""What is downloaded from the hub: the files that a load needs, and no others. The hub is a directory here."""

import dataclasses
import fnmatch
import shutil
import struct
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from conversion import CheckpointError, convert_checkpoint, read_heads
from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.conversion import gguf_header
from gemma3_jax.conversion.description import describe
from gemma3_jax.placing import fits
from tests.conversion.key_map import flat


class Hub:
    """Copies files of models in `root` to `cache`, as downloads."""

    def __init__(self, root: Path, cache: Path):
        self.root, self.cache = root, cache

    def downloaded(self) -> set[str]:
        return {file.name for file in self.cache.rglob("*") if file.is_file()}

    def snapshot_download(self, name, revision=None, allow_patterns=()):
        (self.cache / name).mkdir(parents=True, exist_ok=True)
        for file in (self.root / name).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache / name)
        return str(self.cache / name)

    def hf_hub_download(self, name, file, revision=None):
        if not (self.root / name / file).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{name} has no {file}\nmore")
        self.snapshot_download(name, allow_patterns=[file])
        return str(self.cache / name / file)

    def list_repo_files(self, name, revision=None):
        return sorted(file.name for file in (self.root / name).iterdir())


class Ranges:
    """A file of the hub that is read in pieces, as `HfFileSystem` reads it; `read` counts the bytes."""

    def __init__(self, file: Path):
        self.opened, self.size, self.bytes_read = file.open("rb"), file.stat().st_size, 0

    def read(self, n: int) -> bytes:
        piece = self.opened.read(n)
        self.bytes_read += len(piece)
        return piece

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.opened.close()


@pytest.fixture
def hub(good, gguf_file, tmp_path, monkeypatch) -> Hub:
    """A model in shards, and one that has GGUF files only."""
    shutil.copytree(good["sharded"], tmp_path / "hub" / "org" / "shards")
    for repository in ("gguf", "gguf_with_config"):
        directory = tmp_path / "hub" / "org" / repository
        directory.mkdir()
        for name in ("a.gguf", "b.gguf"):
            shutil.copy(gguf_file, directory / name)
    shutil.copy(good["single"] / "config.json", directory)
    fake = Hub(tmp_path / "hub", tmp_path / "cache")
    for name in ("snapshot_download", "hf_hub_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def test_first_layers_need_few_shards(hub, good):
    """Shards of later layers stay on the hub; what was loaded is equal. Control: all layers need all shards."""
    config, params = convert_checkpoint("org/shards", first_n_layers=1)
    few = {name for name in hub.downloaded() if name.endswith(".safetensors")}
    _, wanted = convert_checkpoint(good["sharded"], first_n_layers=1)
    assert config.truncated_from is not None
    assert flat(params).keys() == flat(wanted).keys()
    assert all(np.array_equal(value, flat(wanted)[key]) for key, value in flat(params).items())
    convert_checkpoint("org/shards")
    assert few < {name for name in hub.downloaded() if name.endswith(".safetensors")}


def test_a_gguf_file_on_the_hub(hub, gguf_file):
    """One file of several is downloaded."""
    config, params = convert_checkpoint("org/gguf/a.gguf")
    assert hub.downloaded() == {"a.gguf"}
    same_config, wanted = convert_checkpoint(gguf_file)
    assert config == same_config
    assert all(np.array_equal(value, flat(wanted)[key]) for key, value in flat(params).items())


@pytest.fixture
def opened(hub, monkeypatch) -> list[Ranges]:
    """What `HfFileSystem` opened; pieces of 2,048 bytes, which are less than the header."""
    files = []

    def open_range(self, name, revision=None, cache_type=None):
        if not (hub.root / name).exists():
            raise FileNotFoundError(f"{name} (repository not found)\nmore")
        files.append(Ranges(hub.root / name))
        return files[-1]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", type("FileSystem", (), {"open": open_range}))
    monkeypatch.setattr(gguf_header, "_PIECE", 2048)
    return files


def test_a_gguf_file_is_described_by_its_header(hub, opened, gguf_file):
    """It is not downloaded, and the description is that of the file. Control: a load downloads it."""
    described, local = describe("org/gguf/a.gguf"), describe(gguf_file)
    size, start = gguf_file.stat().st_size, min(t.start for t in gguf_header.read_header(gguf_file).tensors.values())
    assert (hub.downloaded(), described.error) == (set(), "")
    assert 2048 < opened[0].bytes_read < start + 2048 < size
    assert dataclasses.replace(described, files=local.files, tokenizer=local.tokenizer) == local
    assert described.files == ("a.gguf",)
    convert_checkpoint("org/gguf/a.gguf")
    assert hub.downloaded() == {"a.gguf"}


def test_a_gguf_file_that_is_here_is_not_asked_for(hub, opened, gguf_file, monkeypatch):
    """It is read from the cache."""
    hub.hf_hub_download("org/gguf", "a.gguf")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name, revision: str(hub.cache / "a.gguf"))
    assert describe("org/gguf/a.gguf").error == ""
    assert opened == []


def test_remote_gguf_files_that_are_damaged(hub, opened, gguf_file):
    """One line, whatever is wrong; a header without end is not read to the end of the file."""
    with pytest.raises(CheckpointError, match=r"header of org/gguf/c\.gguf cannot be read from the hub: .*found\)$"):
        describe("org/gguf/c.gguf")
    file, data = hub.root / "org/gguf/c.gguf", gguf_file.read_bytes()
    file.write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        describe("org/gguf/c.gguf")
    file.write_bytes(data[:3000])
    with pytest.raises(CheckpointError, match="truncated or corrupt: its header goes on after the last of 3,000 bytes"):
        describe("org/gguf/c.gguf")
    with file.open("wb") as written:
        written.write(data[:24] + struct.pack("<Q", 2**33))  # the length of the first key
        written.truncate(2**34)
    with pytest.raises(CheckpointError, match="is truncated or corrupt"):
        describe("org/gguf/c.gguf")
    assert opened[-1].bytes_read == 2**26


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/gguf", r"GGUF files only: a\.gguf, b\.gguf; give one, such as org/gguf/a\.gguf"),
        ("org/gguf_with_config", r"GGUF files only: a\.gguf, b\.gguf; give one, such as org/gguf_with_config/a\.gguf"),
        ("org/gguf/c.gguf", r"there is no file org/gguf/c\.gguf, and the model .* org/gguf has no c\.gguf"),
        ("org/gguf/deep/c.gguf", r"there is no file org/gguf/deep/c\.gguf"),
        ("c.gguf", r"there is no file c\.gguf"),
    ],
)
def test_what_cannot_be_loaded(source, message, hub):
    """One line that says what to give."""
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [convert_checkpoint, read_heads, describe, HookedGemma3.from_pretrained, lambda s, **o: fits(s, on="v5e-8", **o)],
    ids=["convert", "heads", "describe", "load", "fits"],
)
def test_a_revision_of_a_directory_is_refused(call):
    """It was ignored, as if the directory were of that revision."""
    with pytest.raises(CheckpointError, match=r"revision is 'v2', but .* only a model on the hub has revisions"):
        call(TINY, revision="v2")
    with pytest.raises(ValueError, match="only a model on the hub has revisions"):
        fits("270m", on="v5e-8", revision="v2")
