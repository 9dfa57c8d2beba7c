"""Files and directories appear whole or not at all, whatever ends the writer: exceptions, signals, or other writers."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conversion import CheckpointError, convert_checkpoint, export_checkpoint, save_params
from gemma3_jax import TINY, atomic
from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.cli import main as cli
from gemma3_jax.pictures.drawing import Drawing
from gemma3_jax.pictures.picture import Picture

ROOT = Path(__file__).parents[2]
# A process inherits signals that are ignored, as under nohup.
DEFAULT_SIGNALS = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
WRITER = f"""{DEFAULT_SIGNALS}
import sys
from pathlib import Path
from gemma3_jax import atomic

kind, target = sys.argv[1:]
with getattr(atomic, kind)(target) as temporary:
    half = temporary / "half" if kind == "new_directory" else temporary
    half.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
"""
KINDS = ["new_directory", "new_file"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def writer(kind: str, target: Path):
    """Another process that has written half of the target, and goes on when it reads a line."""
    command = [sys.executable, "-c", WRITER, kind, str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_leaves_nothing(kind, number, tmp_path):
    """The process ends by the signal, as it would without this library, after the temporary directory is removed."""
    with writer(kind, tmp_path / "target") as process:
        assert names(tmp_path) != []  # control
        process.send_signal(number)
        assert process.wait(10) == -number
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_write_removes_what_a_killed_process_left(kind, tmp_path):
    """And does not touch the temporary directory of a writer that is alive, nor other hidden files."""
    (tmp_path / ".mine").write_text("mine")
    with writer(kind, tmp_path / "killed") as killed:
        killed.kill()
        killed.wait(10)
    [abandoned] = set(names(tmp_path)) - {".mine"}  # control: SIGKILL cannot be handled
    with writer(kind, tmp_path / "alive") as alive:
        assert abandoned not in names(tmp_path)
        with atomic.new_file(tmp_path / "other") as temporary:
            temporary.write_text("whole")
        alive.communicate("\n", 10)
        assert alive.returncode == 0
    assert names(tmp_path) == [".mine", "alive", "other"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_the_former_target(kind, error, tmp_path):
    """Nothing else is left, and the signals have their former handlers."""
    target = tmp_path / "target"
    target.mkdir() if kind == "new_directory" else target.write_text("former")

    def write() -> None:
        with getattr(atomic, kind)(target) as temporary:
            (temporary / "half" if kind == "new_directory" else temporary).write_text("half")
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # control
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == ["target"]
    assert kind == "new_directory" or target.read_text() == "former"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def write_together(write) -> list[BaseException | None]:
    """Call `write(i)` in two threads; what each raised."""
    errors: list[BaseException | None] = [None, None]

    def call(i: int) -> None:
        try:
            write(i)
        except OSError as error:
            errors[i] = error

    threads = [threading.Thread(target=call, args=[i]) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_writers_of_one_file_both_succeed(tmp_path):
    """The file is one of the two, whole."""
    both = threading.Barrier(2)

    def write(i: int) -> None:
        with atomic.new_file(tmp_path / "file") as temporary:
            temporary.write_text(str(i) * 1000)
            both.wait(10)

    assert write_together(write) == [None, None]
    assert (tmp_path / "file").read_text() in ("0" * 1000, "1" * 1000)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_of_two_writers_of_one_directory_one_says_so(exists, tmp_path):
    """The directory is what the other wrote, whole."""
    both = threading.Barrier(2)
    target = tmp_path / "directory"
    if exists:
        target.mkdir()

    def write(i: int) -> None:
        with atomic.new_directory(target) as temporary:
            (temporary / str(i)).touch()
            both.wait(10)

    errors = write_together(write)
    [late] = [i for i in range(2) if errors[i]]
    assert isinstance(errors[late], FileExistsError)
    assert str(target) in str(errors[late])
    assert names(target) == [str(1 - late)]
    assert names(tmp_path) == ["directory"]


class Dot(Picture):
    """The smallest picture."""

    title = "dot"

    def drawing(self) -> Drawing:
        return Drawing(1, 1)


def write_everything(directory: Path) -> None:
    from benchmarks import report

    config, params = convert_checkpoint(TINY)
    export_checkpoint(config, params, directory / "exported", tokenizer=TINY)
    save_params(config, params, directory / "saved", tokenizer=TINY)
    ActivationCache(config, {"embed.hook_out": params["embed"]["weight"][None, :3]}).save(directory / "cache")
    Dot().save(directory / "dot.html")
    report.write({}, directory / "report.json")


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_files_have_the_modes_that_the_umask_gives(umask, tmp_path):
    """Of every writer, whatever library writes the bytes: safetensors makes files that only their owner can read."""
    former = os.umask(umask)
    try:
        write_everything(tmp_path)
        (tmp_path / "control").touch()
    finally:
        os.umask(former)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes[tmp_path / "control"] == 0o666 & ~umask
    assert {file for file in modes if file.is_file() and modes[file] != 0o666 & ~umask} == set()
    assert {file for file in modes if file.is_dir() and modes[file] != 0o777 & ~umask} == set()
    assert len(modes) > 15


def test_links_are_followed_and_devices_refused(tmp_path):
    """A link stays, and what it names is replaced; the null device is not replaced, also not by root."""
    (tmp_path / "file").write_text("former")
    (tmp_path / "link").symlink_to("file")
    with atomic.new_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", tmp_path, Path(os.devnull)):
        with pytest.raises(FileExistsError, match="is not a file"):
            atomic.check_new_file(target)
    with pytest.raises(FileExistsError, match="is not empty"):
        atomic.check_new_directory(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        atomic.check_new_directory(tmp_path / "nowhere" / "target")


def test_a_name_of_any_length_can_be_written(tmp_path):
    """The temporary name does not contain it: 255 bytes are all that a file system allows."""
    with atomic.new_file(tmp_path / ("x" * 255)) as temporary:
        temporary.touch()
    assert names(tmp_path) == ["x" * 255]


def test_refused_targets_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    """By the functions, and by the commands before they convert or compare."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for write in (export_checkpoint, save_params):
        with pytest.raises(CheckpointError, match="is not empty"):
            write(None, None, tmp_path / "full")
        with pytest.raises(CheckpointError, match="has no tokenizer files"):
            write(None, None, tmp_path / "new", tokenizer=tmp_path / "full")
    with pytest.raises(CheckpointError, match="is not empty"):
        cli.convert("no/such/model", tmp_path / "full")
    with pytest.raises(CheckpointError, match="is not empty"):
        cli.export(tmp_path / "nowhere", tmp_path / "full")
    with pytest.raises(FileExistsError, match="is not a file"):
        cli.parity("no/such/model", json_file=tmp_path / "full")
    with pytest.raises(FileExistsError, match="is not a file"):
        cli.demo(picture=tmp_path / "full")
    with pytest.raises(CheckpointError, match="no/such/model"):  # control: a new target
        cli.convert("no/such/model", tmp_path / "new")


ORBAX = f"""{DEFAULT_SIGNALS}
import os, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp
from conversion import convert_checkpoint, save_params
from gemma3_jax import TINY, atomic
from gemma3_jax.conversion import store

root = Path(sys.argv[1])
store.check_params = lambda config, params: params
config, params = convert_checkpoint(TINY)
params["blocks_0"]["large"] = jnp.zeros((60, 1000, 1000)) + jax.random.normal(jax.random.key(0), (1000,))

def kill():
    while not any(root.glob(".gemma3-jax-*/content/params/blocks_0.large/*")):
        pass
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

threading.Thread(target=kill, daemon=True).start()
save_params(config, params, root / "saved")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_nothing_while_orbax_writes(name, tmp_path):
    """Its thread goes on writing when the main thread is interrupted: its directory is removed after it ends."""
    command = [sys.executable, "-c", ORBAX, tmp_path, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -getattr(signal, name), done.stderr
    assert names(tmp_path) == []
