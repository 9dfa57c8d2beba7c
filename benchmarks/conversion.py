"""From a checkpoint's file to parameters in memory, against `from_pretrained`; and from what was converted before."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers

from benchmarks import peers
from benchmarks.rows import Figure, Row, Settings, ratio
from conversion import convert_checkpoint, load_params, save_params


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype, from a warm and a cold page cache."""
    transformers.logging.disable_progress_bar()
    for dtype in settings.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, converted = Path(scratch, "checkpoint"), Path(scratch, "converted")
            peers.hf_model(settings.config, dtype).save_pretrained(checkpoint)
            save_params(*convert_checkpoint(checkpoint), converted)
            for cold in (False, True) if hasattr(os, "posix_fadvise") else (False,):
                yield _row(checkpoint, converted, dtype, cold, settings.rounds)


def _row(checkpoint: Path, converted: Path, dtype: str, cold: bool, rounds: int) -> Row:
    def before() -> None:
        if cold:
            _forget(checkpoint.parent)

    runs = {
        "port": lambda: _touched(convert_checkpoint(checkpoint)[1]),
        "HF from_pretrained": lambda: _from_pretrained(checkpoint, dtype),
        "port, restored by Orbax": lambda: _touched(load_params(converted)[1]),
    }
    seconds = _interleaved(runs, rounds, before)
    restored = seconds["port"] / seconds["port, restored by Orbax"]
    figures = ratio(seconds, 1.0), Figure("converting / restoring", restored, 1.0)
    return Row(f"{'cold' if cold else 'warm'} page cache", dtype, seconds, figures)


def _interleaved(runs: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], None]) -> dict[str, float]:
    """As `timing.interleaved`, with something to do before each run that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def _touched(params: Any) -> None:
    """Every page of the parameters is read, as a file that is only mapped into memory has not been read."""
    for leaf in jax.tree.leaves(jax.block_until_ready(params)):
        np.asarray(leaf).view(np.uint8).reshape(-1)[::4096].sum()


def _from_pretrained(checkpoint: Path, dtype: str) -> None:
    model = transformers.Gemma3ForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    for leaf in model.parameters():
        leaf.detach().reshape(-1)[:: 4096 // leaf.element_size()].sum()


def _forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
