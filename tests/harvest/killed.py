"""A harvest in a process of its own, which the tests kill: `python -m tests.harvest.killed OUT PART`."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
WORDS = ["ba", "ke", "lo", "mu", "ti", "so", "re"]
SITES = "blocks.{1,3}.hook_out"
SHAPE = {"rows": 2, "length": 32}


def texts() -> list[str]:
    """A corpus of some twenty units."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, n)) for n in generator.integers(1, 40, 60)]


def start(out: Path, part: str) -> "subprocess.Popen[bytes]":
    """Begin to harvest a part in a new process."""
    command = [sys.executable, "-m", "tests.harvest.killed", str(out), part]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def finish(processes: list["subprocess.Popen[bytes]"]) -> None:
    """Wait for processes, none of which may fail."""
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


def kill_at_random(out: Path, parts: list[str], seed: int) -> None:
    """Begin to harvest in several processes, and kill them all soon after the first of them has begun to write."""
    generator = random.Random(seed)
    before = len(list(out.rglob("*")))
    processes = [start(out, part) for part in parts]
    while len(list(out.rglob("*"))) == before and all(process.poll() is None for process in processes):
        time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.3))
    for process in processes:
        process.kill()
        process.communicate()


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def main() -> None:
    from gemma3_jax import TINY, HookedGemma3
    from gemma3_jax.harvest import harvest

    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    slow = float(os.environ.get("HARVEST_TEST_SLOW", "0.03"))

    def keep(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        time.sleep(slow)  # so that there are moments to be killed at
        return np.ones(len(tokens), bool)

    harvest(model, texts(), SITES, sys.argv[1], part=sys.argv[2], keep=keep, **SHAPE)


if __name__ == "__main__":
    main()
