"""From the tensors of a checkpoint to the parameter pytree, tensor by tensor."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.dtypes import loaded_dtype, parameter_dtype
from gemma3_jax.conversion.finite import first_not_finite, is_finite
from gemma3_jax.conversion.gemma3 import EMBEDDING, Entry
from gemma3_jax.conversion.placement import placements_of
from gemma3_jax.conversion.plan import check_tied, plan_of
from gemma3_jax.conversion.tensors import Tensors
from gemma3_jax.conversion.transforms import AddOne
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Params, Shardings

with epy.lazy_imports():  # a third of a second, which `gemma3-jax info` does not need
    import flax.traverse_util

_THREADS = min(8, os.cpu_count() or 1)  # a few threads saturate the memory bus
_STRIP = 256  # elements


def assemble(
    config: Gemma3Config, tensors: Tensors, dtype: DTypeLike | None, shardings: Shardings | None = None
) -> Params:
    """Check every key and shape, then convert tensor by tensor.

    `shardings` as in `convert_checkpoint`: of each tensor, only the parts of this process's devices are read.
    """
    plan = plan_of(config, tensors)
    dtypes = parameter_dtypes(tensors, plan, dtype)
    placements = placements_of({entry.path: entry.shape for entry in plan}, shardings)
    if config.tie_word_embeddings:
        check_tied(tensors, plan, placements[EMBEDDING].parts)
    # In file order, because the disk reads ahead.
    order = {key: i for i, key in enumerate(tensors.shapes)}
    keys = sorted(((order[key], entry, key) for entry, key in plan.items()), key=lambda item: item[0])
    size = {key: math.prod(tensors.shapes[key]) for key in plan.values()}
    room = max(size.values())

    def convert(
        item: tuple[int, Entry, str], spread: Callable[..., Iterable[bool]] = map
    ) -> tuple[tuple[str, ...], jax.Array]:
        _, entry, key = item
        reader = tensors.open(key)
        is_ready = isinstance(entry.step, AddOne) and tensors.norms_hold_one

        def part(index: tuple[slice, ...], target: Sharding | None) -> jax.Array:
            stored = reader(entry.rows(index))
            converted = stored if is_ready else np.asarray(entry.step.convert(stored))
            array = _on_device(converted[index], dtypes[entry], target, spread)
            if array is None:
                raise CheckpointError(f"{tensors.file_of(key)}: {key} {_not_finite(reader(slice(None)))}")
            return array

        return entry.path, placements[entry.path].place(part, dtypes[entry])

    # A tensor is in memory twice during conversion. Tensors are converted together if _THREADS of them need no more
    # memory than the largest tensor.
    alone = [item for item in keys if size[item[2]] * _THREADS > room]
    together = [item for item in keys if size[item[2]] * _THREADS <= room]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(keys), desc="convert", unit=" tensors", disable=None) as bar,
    ):
        flat = {}
        # All threads copy a tensor that is converted alone.
        one_by_one = (convert(item, pool.map) for item in alone)
        for path, parameter in itertools.chain(one_by_one, pool.map(convert, together)):
            flat[path] = parameter
            bar.update()
    return flax.traverse_util.unflatten_dict(flat)


def parameter_dtypes(
    tensors: Tensors, plan: Mapping[Entry, str], dtype: DTypeLike | None = None
) -> dict[Entry, np.dtype]:
    """The dtype of each parameter of a plan: norms are always float32."""
    requested = parameter_dtype(tensors.default_dtype if dtype is None else dtype)
    stored = {entry: tensors.dtypes[key] for entry, key in plan.items() if not isinstance(entry.step, AddOne)}
    target = loaded_dtype(requested, "float16" in stored.values(), tensors.checkpoint)
    return {entry: target or jnp.dtype(stored[entry]) if entry in stored else np.dtype("float32") for entry in plan}


def _on_device(
    view: np.ndarray, dtype: np.dtype, target: Sharding | None, spread: Callable[..., Iterable[bool]]
) -> jax.Array | None:
    """A copy of a view, which may be transposed, in `dtype` on one device; None if it has NaN or infinity.

    `target` as in `Placement`. `spread` is `map`, or the `map` of a thread pool.
    """
    straight = view.flags.c_contiguous
    if view.dtype == dtype and not straight:
        # JAX transposes several times faster than NumPy.
        return jax.block_until_ready(jax.device_put(view, target, may_alias=False)) if is_finite(view) else None
    # NumPy casts and copies faster than JAX: it does not compile, and it uses large pages.
    copy = files.aligned_empty(view.shape, dtype)
    # In a narrower copy, numbers that are too large become infinite. A wider copy has more bytes to check.
    checked = copy if dtype.itemsize <= view.dtype.itemsize else view

    def fill(starts: range) -> bool:
        # Work in strips that stay in the processor's cache until they are written and checked.
        for start in starts:
            strip = slice(start, start + _STRIP)
            at = strip if straight else (..., strip)
            copy[at] = view[at]
            if not is_finite(checked[at]):
                return False
        return True

    starts = range(0, view.shape[0 if straight else -1], _STRIP)
    shares = [starts[i * len(starts) // _THREADS : (i + 1) * len(starts) // _THREADS] for i in range(_THREADS)]
    return jax.device_put(copy, target, may_alias=True) if all(spread(fill, shares)) else None


def _not_finite(tensor: np.ndarray) -> str:
    """The error message for a tensor whose parameter is not finite."""
    if is_finite(tensor):
        return f"has weights beyond {jnp.finfo(jnp.bfloat16).max}, too large for bfloat16; use float32"
    return f"has NaN or infinity, first at {first_not_finite(tensor)}"
