"""Directories of `save_params` that are broken or hostile: each costs seconds, and is one line that names a path."""

import gc
import shutil
from pathlib import Path

import pytest

from conversion import CheckpointError, convert_checkpoint, load_params, save_params
from gemma3_jax import TINY
from gemma3_jax.conversion.description import describe
from tests.helpers.hostile_files import NESTED, NOT_A_FILE, replace


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_params(*convert_checkpoint(TINY), directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def data_file(directory: Path) -> str:
    """The largest file, which holds weights."""
    largest = max(directory.rglob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    return str(largest.relative_to(directory))


def said(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(directory)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert message.isprintable()
    return message


@pytest.mark.parametrize("kind", ["fifo", "device", "LFS pointer"])
@pytest.mark.parametrize("name", ["params/_METADATA", "params/manifest.ocdbt", data_file])
def test_what_is_not_a_file_is_named(name, kind, directory):
    """Orbax would wait for a FIFO; a description says the same. Git LFS leaves pointers in place of large files."""
    content, says = NOT_A_FILE[kind]
    file = directory / (name(directory) if callable(name) else name)
    replace(file, content)
    assert said(directory).startswith(f"{file} {says}")
    assert says in describe(directory).error


@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "_CHECKPOINT_METADATA"])
def test_bad_json(name, directory):
    """Orbax's own errors are of any class: a list that is nested too deeply is a RecursionError."""
    replace(directory / "params" / name, NESTED)
    assert "params is damaged: " in said(directory)


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated_weights(size, directory, caplog, capfd):
    """The error of Orbax has a hundred lines; ours has its first. Orbax's other reads fail without a word."""
    file = directory / data_file(directory)
    file.write_bytes(file.read_bytes()[:size])
    assert "params is damaged: Encountered error while reading array index" in said(directory)
    assert printed_later(caplog, capfd) == ""


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d/*"])
def test_truncated_index(file, directory, caplog, capfd):
    """Orbax looks for all parameters at once: each of the searches that fail would print an error of its own."""
    (file,) = (directory / "params").glob(file)
    file.write_bytes(file.read_bytes()[:10])
    assert "params is damaged: its list of parameters cannot be read" in said(directory)
    assert printed_later(caplog, capfd) == ""


def printed_later(caplog, capfd) -> str:
    """What reads that were dropped print when they end, and asyncio when it finds errors that no one took."""
    gc.collect()
    return "".join(record.message for record in caplog.records if record.name == "asyncio") + capfd.readouterr().err


def test_control_what_was_saved_loads(directory):
    """A copy of it too."""
    assert load_params(directory)[0] == convert_checkpoint(TINY)[0]
