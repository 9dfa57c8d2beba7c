"""Prompts of 50 lengths, one after another, in a process of its own: programs, seconds and memory.

With an empty cache of programs, the first pass compiles and runs; a second pass over the same lengths only runs.

python -m benchmarks --only lengths
python -m benchmarks.lengths CHECKPOINT float32 "run_with_cache"
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.rows import Figure, Row, Settings
from gemma3_jax import HookedGemma3
from gemma3_jax.run import compiled

LENGTHS = range(5, 55)
# Runs of one prompt, at one site; the vector is another array for each prompt.
CASES: dict[str, Callable[[HookedGemma3, np.ndarray, str, np.ndarray], Any]] = {
    "run_with_cache": lambda model, ids, site, vector: model.run_with_cache(ids, site),
    "a hook that steers": lambda model, ids, site, vector: model.run_with_hooks(
        ids, [(site, lambda value, hook: value + vector)]
    ),
    "a hook at the last token": lambda model, ids, site, vector: model.run_with_hooks(
        ids, [(site, lambda value, hook: value.at[:, -1].set(vector))]
    ),
    "a metric of the last logits": lambda model, ids, site, vector: model.run_with_cache(
        ids, site, incl_bwd=True, loss_fn=lambda logits: logits[0, -1, 3]
    ),
    "a hook over all tokens": lambda model, ids, site, vector: model.run_with_hooks(
        ids, [(site, lambda value, hook: value - value.mean(1, keepdims=True))]
    ),
}


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each kind of run and dtype; the last kind has a program for each length."""
    from benchmarks import peers  # torch, which the processes that are measured do not load

    with tempfile.TemporaryDirectory() as scratch:
        for dtype in settings.dtypes:
            checkpoint = Path(scratch, dtype)
            peers.hf_model(settings.config, dtype).save_pretrained(checkpoint)
            for case in list(CASES)[: 1 if settings.quick else None]:
                yield _row(checkpoint, dtype, case)


def _row(checkpoint: Path, dtype: str, case: str) -> Row:
    with tempfile.TemporaryDirectory() as kept:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": kept, "JAX_ENABLE_COMPILATION_CACHE": "true"}
        command = [sys.executable, "-m", "benchmarks.lengths", str(checkpoint), dtype, case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed in a process of its own:\n{done.stderr}")
    found = json.loads(done.stdout)
    seconds = {"port": found["seconds"], "port, CPU time": found["cpu"], "port, second pass": found["again"]}
    several = case != list(CASES)[-1]
    figures = (
        Figure("programs for 50 lengths", found["programs"], 8 if several else None, at_least=False),
        Figure("memory added, MB", found["megabytes"], 300 if several else None, at_least=False),
    )
    return Row(case, dtype, seconds, figures)


def measure(checkpoint: str, dtype: str, case: str) -> dict[str, float]:
    """Programs, seconds of the first pass (elapsed, and of all cores) and of the second, and megabytes added."""
    model = HookedGemma3.from_pretrained(checkpoint, dtype=dtype)
    jax.block_until_ready(model.params)
    site = f"blocks.{model.config.num_hidden_layers // 2}.hook_resid_post"
    generator = np.random.default_rng(0)
    before, resident = compiled._program.cache_info().misses, _resident()
    times = [(time.perf_counter(), time.process_time())]
    for _ in range(2):
        for length in LENGTHS:
            ids = generator.integers(3, model.config.vocab_size, (1, length))
            vector = generator.normal(size=model.config.hidden_size).astype(np.float32)
            jax.block_until_ready(CASES[case](model, ids, site, vector))
        times.append((time.perf_counter(), time.process_time()))
    return {
        "programs": compiled._program.cache_info().misses - before,
        "seconds": times[1][0] - times[0][0],
        "cpu": times[1][1] - times[0][1],
        "again": times[2][0] - times[1][0],
        "megabytes": _resident() - resident,
    }


def _resident() -> float:
    """Megabytes of memory that the process has now; the largest so far where /proc does not say."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
