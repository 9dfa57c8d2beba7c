"""Time from a checkpoint's file to parameters in memory, against `from_pretrained` and against restoring with Orbax.

Each measurement is the first call in a new process, as users make it, so one-time setup counts.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings, ratio
from conversion import convert_checkpoint, save_params

# Each call reads every page of the arrays that it loaded: a file that is only mapped into memory has not been read.
_TOUCH = """
def touch(arrays):
    for array in arrays:
        array.view(np.uint8).reshape(-1)[::4096].sum()
"""
_PORT = "params = jax.block_until_ready({call}(source)[1]); touch(np.asarray(leaf) for leaf in jax.tree.leaves(params))"
_CALLS = {
    "port": ("import jax; from conversion import convert_checkpoint", _PORT.format(call="convert_checkpoint")),
    "HF from_pretrained": (
        "import torch, transformers; transformers.logging.disable_progress_bar(); transformers.Gemma3ForCausalLM",
        "model = transformers.Gemma3ForCausalLM.from_pretrained(source, dtype='auto')\n"
        "touch(leaf.detach().view(torch.uint8).numpy() for leaf in model.parameters())",
    ),
    "port, restored by Orbax": ("import jax; from conversion import load_params", _PORT.format(call="load_params")),
}


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype, from a warm and a cold page cache."""
    transformers.logging.disable_progress_bar()
    for dtype in settings.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, converted = Path(scratch, "checkpoint"), Path(scratch, "converted")
            peers.hf_model(settings.config, dtype).save_pretrained(checkpoint)
            save_params(*convert_checkpoint(checkpoint), converted)
            caches = ("warm",) if settings.quick or not hasattr(os, "posix_fadvise") else ("warm", "cold")
            for cache in caches:
                yield _row(checkpoint, converted, dtype, cache, settings.rounds)


def _row(checkpoint: Path, converted: Path, dtype: str, cache: str, rounds: int) -> Row:
    seconds: dict[str, list[float]] = {name: [] for name in _CALLS}
    for _ in range(rounds):
        for name in _CALLS:
            source = converted if name.endswith("Orbax") else checkpoint
            for file in filter(Path.is_file, source.rglob("*")):
                _forget(file) if cache == "cold" else file.read_bytes()
            seconds[name].append(_first_call(name, source))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    restored = Figure("converting / restoring", medians["port"] / medians["port, restored by Orbax"], 1.0)
    return Row(f"{cache} page cache", dtype, medians, (ratio(medians, 1.0), restored))


def _first_call(name: str, source: Path) -> float:
    """Seconds of one call in a new process, without its imports."""
    imports, call = _CALLS[name]
    lines = "import sys, time\nimport numpy as np", _TOUCH, imports, "source = sys.argv[1]"
    script = "\n".join([*lines, "start = time.perf_counter()", call, "print(time.perf_counter() - start)"])
    done = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed in a process of its own:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def _forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
