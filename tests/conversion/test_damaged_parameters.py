"""Directories of `save_params` that are broken or hostile: each costs seconds, and is one line that names a path."""

import gc
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
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


@pytest.fixture(scope="module")
def saved_earlier(saved, tmp_path_factory) -> Path:
    """As earlier versions wrote it: all arrays are in one database, beside more files of Orbax."""
    directory = tmp_path_factory.mktemp("saved earlier") / "model"
    shutil.copytree(saved, directory, ignore=shutil.ignore_patterns("params"))
    ocp.PyTreeCheckpointer().save(directory / "params", convert_checkpoint(TINY)[1])
    return directory


@pytest.fixture
def earlier(saved_earlier, tmp_path) -> Path:
    return shutil.copytree(saved_earlier, tmp_path / "earlier")


def largest(directory: Path, files: str) -> Path:
    """The largest of these files."""
    return max(directory.glob(files), key=lambda file: file.stat().st_size)


def said(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(directory)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert message.isprintable()
    return message


@pytest.mark.parametrize("kind", ["fifo", "device", "LFS pointer"])
@pytest.mark.parametrize("name", ["_METADATA", "embed.weight/.zarray", "embed.weight/3.0"])
def test_what_is_not_a_file_is_named(name, kind, directory):
    """Reading would wait for a FIFO; a description says the same. Git LFS leaves pointers in place of large files."""
    content, says = NOT_A_FILE[kind]
    file = directory / "params" / name
    replace(file, content)
    assert said(directory).startswith(f"{file} {says}")
    assert says in describe(directory).error


@pytest.mark.parametrize("name", ["_METADATA", "embed.weight/.zarray"])
def test_bad_json(name, directory):
    """The errors of Orbax are of any class: a list that is nested too deeply is a RecursionError."""
    replace(directory / "params" / name, NESTED)
    assert "params is damaged: " in said(directory)


@pytest.mark.parametrize("size", [0, 1000, None])
@pytest.mark.parametrize("name", ["embed.weight/3.0", "embed.weight/.zarray", "_METADATA"])
def test_truncated_and_missing_files(name, size, directory, caplog, capfd):
    """The error of TensorStore has a hundred lines; ours has its first, with the file. Nothing is printed later."""
    file = directory / "params" / name
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: size // 20 if name.endswith(".zarray") else size])
    message = said(directory)
    assert "params is damaged: " in message
    assert name == "_METADATA" or f'{file}" ' in message or f'{file}":' in message
    assert "tensorstore_spec" not in message
    assert printed_later(caplog, capfd) == ""


def test_another_shape_than_the_config_has(directory):
    """Before any array is read: a shape may be larger than the memory."""
    file = directory / "params/embed.weight/.zarray"
    file.write_text(file.read_text().replace('"shape":[', '"shape":[9999'))
    assert "embed/weight has shape [9999" in said(directory)


def test_what_earlier_versions_saved(earlier):
    """Loads with the same bits."""
    _, wanted = convert_checkpoint(TINY)
    _, params = load_params(earlier)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), params, wanted))


@pytest.mark.parametrize("files", ["manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_truncated_database(files, earlier, caplog, capfd):
    """Of earlier versions: the manifest, the index, and the weights."""
    file = largest(earlier / "params", files)
    file.write_bytes(file.read_bytes()[:10])
    assert "in OCDBT database" in said(earlier)
    assert printed_later(caplog, capfd) == ""


def test_orbax_alone_reads_what_is_saved(directory):
    """Without this library, as NumPy arrays."""
    read = ocp.PyTreeCheckpointer().restore(directory / "params")
    assert jax.tree.all(jax.tree.map(np.array_equal, read, convert_checkpoint(TINY)[1]))


def printed_later(caplog, capfd) -> str:
    """What reads that were dropped print when they end, and asyncio when it finds errors that no one took."""
    gc.collect()
    return "".join(record.message for record in caplog.records if record.name == "asyncio") + capfd.readouterr().err


def test_control_what_was_saved_loads(directory):
    """A copy of it too."""
    assert load_params(directory)[0] == convert_checkpoint(TINY)[0]
