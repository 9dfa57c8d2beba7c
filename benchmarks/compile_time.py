"""How long programs take to compile, unrolled and scanned over layers: shapes only, no weights.

    python -m benchmarks.compile_time --json benchmarks/results/compile-time-cpu.json

Seconds to trace, lower and compile, all of it, medians; JAX's caches are cleared before each. What is set up once per
process is in a first program that is not counted.
"""

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from benchmarks.timing import machine
from gemma3_jax import Gemma3, Gemma3Config, forward, stack_layers

TOKENS = (1, 128)
NEW_CAPTURE = ("blocks.3.attn.hook_pattern", "blocks.*.mlp.hook_post")


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


def narrow(layers: int) -> Gemma3Config:
    """A model of that depth with the published pattern of layer types, and nothing else of size."""
    return dataclasses.replace(
        Gemma3Config.preset("270m"),
        num_hidden_layers=layers,
        layer_types=(),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        sliding_window=32,
    )


def measure(rounds: int = 3) -> dict[str, float]:
    """Every figure, in seconds."""
    seconds(narrow(2), False, rounds=1)
    one_b = Gemma3Config.preset("1b")
    return {
        "18 layers, unrolled": seconds(narrow(18), False, rounds=rounds),
        "62 layers, unrolled": seconds(narrow(62), False, rounds=rounds),
        "62 layers, scanned": seconds(narrow(62), True, rounds=rounds),
        "62 layers, scanned, residuals captured": seconds(narrow(62), True, "blocks.*.hook_resid_post", rounds),
        "1b, new captures, unrolled": seconds(one_b, False, NEW_CAPTURE, rounds),
        "1b, new captures, scanned": seconds(one_b, True, NEW_CAPTURE, rounds),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Times that each is compiled.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure, print, and write what is asked for."""
    figures = measure(rounds)
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.2f} s")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "seconds": figures}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
