"""Raise MemoryError with the requested sizes when the device runs out of memory."""

import functools
from collections.abc import Callable, Hashable

import jax

from gemma3_jax.generation.decode import Decoding
from gemma3_jax.meshes import set_mesh_of
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.types import Params, PyTree


def in_memory(
    function: Callable[..., Decoding], params: Params, *arguments: PyTree, donate: int | None = None, **static: Hashable
) -> Decoding:
    """The result of the compiled function, after it has been computed; arguments as in `run_compiled`.

    Raises:
        MemoryError: the device is out of memory; the message has the failed allocation and the bytes of the text.
    """
    try:
        return jax.block_until_ready(
            run_compiled(function, params, *arguments, donate=donate, replicate=False, **static)
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Sizes come from abstract shapes, so they include all edits and captures. Donated arrays still have their
        # shapes.
        with set_mesh_of(params):
            program = jax.jit(functools.partial(function, **static)).lower(params, *arguments)
            analysis = program.compile().memory_analysis()  # not available on every platform
        running = f", and running the model on it {analysis.temp_size_in_bytes:,} bytes" if analysis else ""
        raise MemoryError(
            f"out of memory ({error}) while the text needs {_size(program.out_info)}{running}. Ask for fewer "
            "rows, tokens or captures."
        ) from error


def _size(text: Decoding) -> str:
    """The memory of a text, in words."""
    b, c = text.tokens.shape
    parts = [
        f"{_bytes((text.cache.keys, text.cache.values)):,} bytes for the keys and values of {b} rows of {c} tokens"
    ]
    if text.captured:
        parts.append(f"{_bytes(text.captured):,} bytes for {len(text.captured)} captured sites")
    if text.logits is not None:
        parts.append(f"{_bytes(text.logits):,} bytes for logits")
    return ", ".join(parts)


def _bytes(arrays: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
