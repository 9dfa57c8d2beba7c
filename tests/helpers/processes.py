"""Several processes of one program, as on several hosts, with so many devices in all."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax

from tests.helpers.environment import on_devices

ROOT = Path(__file__).parents[2]
DEVICES = 8
SECONDS = 600  # a process that waits for another waits for ever


def run_in_processes(module: str, processes: int, directory: Path, devices: int = DEVICES) -> None:
    """Run a module in several processes that know each other; the arguments of each are those of `joined`.

    Raises:
        AssertionError: one of them failed; the message has what each printed.
    """
    environment = on_devices(devices // processes)
    command = [sys.executable, "-m", module, str(processes)]
    port = str(_free_port())
    logs = [directory / f"{process}.log" for process in range(processes)]
    started = []
    for process, log in enumerate(logs):
        with log.open("w") as opened:
            arguments = [*command, str(process), port, str(directory)]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=opened, stderr=opened))
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                break  # the others would wait for it
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()  # SIGKILL: a distributed process ignores SIGTERM
            process.wait()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(log.read_text() for log in logs)


def joined(arguments: list[str]) -> tuple[int, Path]:
    """In such a process, join the others: the number of this one, and the directory that all of them share."""
    processes, process, port, directory = arguments
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    return int(process), Path(directory)


def _free_port() -> int:
    """A port that is not in use now."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]
