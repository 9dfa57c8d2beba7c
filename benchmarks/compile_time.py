"""Compile times of unrolled and of scanned layers, from shapes without weights.

The seconds cover tracing, lowering and compilation. JAX's caches are cleared before each measurement. A first program,
which is not counted, takes the one-time setup of the process.
"""

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.rows import Figure, Row, Settings, narrow
from gemma3_jax import Gemma3, Gemma3Config, forward, stack_layers

TOKENS = (1, 128)
NEW_CAPTURE = ("blocks.1.attn.hook_pattern", "blocks.*.mlp.hook_post")


def rows(settings: Settings) -> Iterator[Row]:
    """A row for depth, at a narrow width, and a row for a new set of captures, at the size of the settings."""
    rounds = 1 if settings.quick else 3
    seconds(narrow(2), False, rounds=1)
    deep = {
        "port, unrolled": seconds(narrow(4 if settings.quick else 18), False, rounds=rounds),
        "port": seconds(narrow(12 if settings.quick else 62), True, rounds=rounds),
    }
    scanned = Figure("scanned / 18 unrolled", deep["port"] / deep["port, unrolled"], 2.0, at_least=False)
    yield Row("62 narrow layers scanned, 18 unrolled", "float32", deep, (scanned,))
    new = {
        "port": seconds(settings.config, False, NEW_CAPTURE, rounds),
        "port, scanned": seconds(settings.config, True, NEW_CAPTURE, rounds),
    }
    figures = tuple(Figure(f"seconds, {name}", value, 2.0, at_least=False) for name, value in new.items())
    yield Row("a new set of captures", "float32", new, figures)


def seconds(config: Gemma3Config, scan_layers: bool, capture: Any = (), rounds: int = 3) -> float:
    """Median seconds from a call to a compiled forward pass with these captures."""
    shapes = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros(TOKENS, jnp.int32))["params"]
    if scan_layers:
        shapes = jax.eval_shape(functools.partial(stack_layers, config), shapes)
    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    taken = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(lambda params, tokens: forward(config, params, tokens, capture)).lower(shapes, tokens).compile()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
