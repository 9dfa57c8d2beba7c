"""Several processes of one program load, save and export parameters that are cut over the devices of all of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import CheckpointError, convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import TINY
from tests.helpers.processes import run_in_processes


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory) -> Path:
    """The directory that so many processes wrote, with the report of each in a JSON file."""
    processes, directory = request.param, tmp_path_factory.mktemp("processes")
    for process in range(processes):
        write_part(directory / f"for process {process}", process, processes)
    run_in_processes("tests.conversion.on_processes", processes, directory)
    return directory


def write_part(directory: Path, process: int, processes: int) -> None:
    """The shipped model, whose embedding is NaN but for the rows of one process."""
    shutil.copytree(TINY, directory)
    tensors = load_file(TINY / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    rows = len(embedding) // processes
    partly = np.full_like(embedding, np.nan)
    partly[process * rows : (process + 1) * rows] = embedding[process * rows : (process + 1) * rows]
    save_file({**tensors, "model.embed_tokens.weight": partly}, directory / "model.safetensors")


def reports(results: Path) -> list[dict]:
    """The report of each process."""
    return [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]


@pytest.mark.parametrize(
    "name",
    [
        *("loaded", "some parts are elsewhere", "read its own parts alone", "restored", "restored from own devices"),
        *("restored from its own files alone", "nothing is left behind", "text", "sum"),
    ],
)
def test_every_process_has_the_right_bits(name, results):
    """After loading, after saving and restoring, and of what a process reads alone."""
    assert all(report[name] for report in reports(results))


def test_one_process_reads_without_the_others(results):
    """Saved parameters onto a device of its own, without an answer from the others."""
    assert reports(results)[1]["restored by one process"]


def test_each_file_without_its_other_parts_is_refused_by_one_process(results):
    """The control of what a process reads: reading all of it finds the NaN."""
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has NaN"):
        convert_checkpoint(results / "for process 0")


def test_exported_files_are_those_of_one_process(results, tmp_path):
    """Byte for byte; and other parameters give other files."""
    export_checkpoint(*convert_checkpoint(TINY), tmp_path / "one", tokenizer=TINY, max_shard_size="100KB")
    wanted = contents(tmp_path / "one")
    assert len(wanted) > 5
    assert contents(results / "exported") == wanted
    assert contents(results / "exported from own devices") == wanted
    assert contents(results / "exported with another embedding").items() - wanted.items()


def test_saved_files_are_those_of_one_process(results, tmp_path):
    """Byte for byte, however the parameters are cut, and each time; and other parameters give other files."""
    config, params = convert_checkpoint(TINY)
    for name in ("one", "two"):
        save_params(config, params, tmp_path / name)
    wanted = contents(tmp_path / "one")
    assert len(wanted) > 100
    for saved in (tmp_path / "two", *(results / f"saved{how}" for how in ("", " from own devices", " from columns"))):
        assert contents(saved) == wanted
    changed = contents(results / "saved with another embedding").items() - wanted.items()
    assert {name for name, _ in changed} == {f"params/embed.weight/{file}.0" for file in range(8)}


def test_one_process_lacks_the_files_of_the_others(results):
    """The control of what each reads: on one device, all files of the embedding are needed."""
    with pytest.raises(CheckpointError, match=r"embed\.weight/[2-7]\.0. is missing"):
        load_params(results / "saved for process 0")


def contents(directory: Path) -> dict[str, bytes]:
    """What is in each file."""
    files = filter(Path.is_file, directory.rglob("*"))
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


@pytest.mark.parametrize("call", ["save", "export"])
def test_what_fails_in_one_process_fails_in_all(call, results):
    """A weight that is NaN in the last process, and a directory that the first finds to be full."""
    *others, last = [report[f"{call} of NaN"] for report in reports(results)]
    assert last == "CheckpointError: embed/weight has NaN or infinity"
    reason = f"process {len(others)}: embed/weight has NaN or infinity"
    assert others == [f"RuntimeError: another process failed: {reason}"] * len(others)
    first, *others = [report[f"{call} where something is"] for report in reports(results)]
    assert first.startswith("CheckpointError")
    assert "is not empty" in first
    assert all(other.startswith("RuntimeError: another process failed: process 0: ") for other in others)
    assert not (results / "never").exists()


def test_ctrl_c_in_one_process_is_an_error_in_all(results):
    """While they save or export: otherwise the others wait for it."""
    *others, last = [report["Ctrl-C in the last"] for report in reports(results)]
    assert last == "KeyboardInterrupt: "
    reason = f"process {len(others)}: KeyboardInterrupt"
    assert others == [f"RuntimeError: another process failed: {reason}"] * len(others)
