"""Running out of memory says what was asked for."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gemma3_jax.generation.decoding import Decoding


def in_memory(function: Callable[..., Decoding], *arguments: Any, **static: Any) -> Decoding:
    """What the function returns, once it is computed.

    Raises:
        MemoryError: with what could not be allocated, and the bytes of the text that was asked for.
    """
    try:
        return jax.block_until_ready(function(*arguments, **static))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # From the shapes, so that it is the truth of any edit and capture; of donated arrays they are known still.
        program = jax.jit(functools.partial(function, **static)).lower(*arguments)
        analysis = program.compile().memory_analysis()  # which not every platform has
        beside = f", and running the model on it {analysis.temp_size_in_bytes:,} bytes" if analysis else ""
        raise MemoryError(
            f"out of memory ({error}) while the text needs {_size(program.out_info)}{beside}. Ask for fewer "
            "rows, tokens or captures."
        ) from error


def _size(text: Decoding) -> str:
    """What of it takes memory, in words."""
    b, c = text.tokens.shape
    parts = [
        f"{_bytes((text.cache.keys, text.cache.values)):,} bytes for the keys and values of {b} rows of {c} tokens"
    ]
    if text.captured:
        parts.append(f"{_bytes(text.captured):,} bytes for {len(text.captured)} captured sites")
    if text.logits is not None:
        parts.append(f"{_bytes(text.logits):,} bytes for logits")
    return ", ".join(parts)


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
