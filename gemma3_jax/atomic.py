"""Files and directories that appear under their names whole, or not at all. All writers of the library use these.

The content is written in a temporary directory beside the target and gets its name by a rename. The writer holds a lock
on the temporary directory, which the kernel releases when the process ends, however it ends. So a temporary directory
without a lock was left by a process that was killed, and the next writer in the same place removes it.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_PREFIX = ".gemma3-jax-"
_LOCK = "lock"
# The signals that end a process, and that people and schedulers send. Ctrl-C is an exception in Python already.
_FATAL = (signal.SIGTERM, signal.SIGHUP)


def check_new_directory(directory: str | os.PathLike[str]) -> Path:
    """The absolute path of a directory to create; links are followed.

    Raises:
        FileExistsError: it exists and is not an empty directory.
        FileNotFoundError: its parent does not exist.
    """
    target = _resolved(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already and is not empty; nothing was written")
    if target.is_mount():
        raise FileExistsError(f"{target} is a mount point; give a new directory inside it")
    return target


def check_new_file(file: str | os.PathLike[str]) -> Path:
    """The absolute path of a file to create or replace; links are followed.

    Raises:
        FileExistsError: it is a directory or a device.
        FileNotFoundError: its parent does not exist.
    """
    target = _resolved(file)
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} exists and is not a file; nothing was written")
    return target


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory to fill. It gets the name `directory` if the block succeeds, and is removed if it fails.

    Ctrl-C, SIGTERM and SIGHUP remove it too; the last two only in the main thread, and if the program does not handle
    them itself. In any other case the next writer removes it.
    All files get the modes that the umask gives, whatever wrote them.

    Raises:
        FileExistsError: `directory` exists and is not empty, or another writer created it during the block.
        FileNotFoundError: its parent does not exist.
    """
    target = check_new_directory(directory)
    with _temporary(target.parent) as temporary:
        content = temporary / "content"
        content.mkdir()
        yield content
        _set_modes(content)
        try:
            content.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"another writer has made {target} in the meantime; it was left as it is") from error


@contextlib.contextmanager
def new_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a temporary file to write. It replaces `file` if the block succeeds, and is removed if it fails.

    Of several writers of one file, the last one wins. Signals and modes as for `new_directory`.

    Raises:
        FileExistsError: `file` is a directory or a device.
        FileNotFoundError: its parent does not exist.
    """
    target = check_new_file(file)
    with _temporary(target.parent) as temporary:
        content = temporary / "content"
        yield content
        _set_modes(temporary)
        content.replace(target)


@contextlib.contextmanager
def new_durable_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """`new_file`, whose content and name are on the disk after the block, even if the machine then fails."""
    target = Path(file)
    with new_file(target) as temporary:
        yield temporary
        _sync(temporary)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _resolved(path: str | os.PathLike[str]) -> Path:
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a directory; create it to write {target.name}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target.parent} is not writable; nothing was written")
    return target


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A locked directory, which is removed at the end, also when a signal ends the process."""
    remove_abandoned(parent)
    with _fatal_signals_wait(), contextlib.ExitStack() as stack:
        while True:
            # The process id is there for people who find the directory.
            temporary = parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir()
            if _locked(temporary, stack):
                break
        yield temporary


def _locked(temporary: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a new directory until the stack unwinds; False if another writer removed it before it was locked."""
    try:
        lock = os.open(temporary / _LOCK, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return False
    stack.callback(os.close, lock)
    with contextlib.suppress(OSError):  # a file system without locks: an abandoned directory will stay there
        fcntl.flock(lock, fcntl.LOCK_EX)
    return (temporary / _LOCK).exists()


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary directories in a directory whose writers were killed: their locks are free."""
    for temporary in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (temporary / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary, ignore_errors=True)


def _set_modes(directory: Path) -> None:
    """Give every file the mode that the umask gives: safetensors, for one, makes files that only their owner reads."""
    mode = directory.stat().st_mode & 0o666
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)


@contextlib.contextmanager
def _fatal_signals_wait() -> Iterator[None]:
    """A signal that would end the process raises an exception in the block, and ends the process after the block.

    Only the main thread can do this. Signals that the program ignores or handles are left to it.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in _FATAL if main and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, interrupt)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])
