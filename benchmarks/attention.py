"""Attention of one layer, kernel by kernel: milliseconds, and the memory that XLA sets aside for what is between.

    python -m benchmarks.attention --tokens 512,2048 --dtypes float32 [--gradient]

One row of random q, k and v at the 270m and 1b shapes: 4 query heads, 1 key/value head, head_dim 256, window 512. On a
full layer the band is the whole triangle.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import typer

from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config
from gemma3_jax.attention import visible
from gemma3_jax.config import LayerType
from gemma3_jax.kernels import Mask, banded, chunked, dense

CONFIG = Gemma3Config.preset("270m")
SCALE = CONFIG.query_pre_attn_scalar**-0.5


def all_at_once(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask) -> jax.Array:
    """`dense`, called as the others are."""
    columns = jnp.arange(q.shape[1])
    return dense(q, k, v, scale, mask.seen(columns, columns))


KERNELS = {"dense": all_at_once, "banded": banded, "chunked": chunked}


def compiled(kernel: Callable[..., jax.Array], qkv: Any, mask: Mask, gradient: bool) -> Any:
    """The kernel, or its gradient in q, k and v, as XLA's program."""

    def run(*qkv: jax.Array) -> jax.Array:
        return kernel(*qkv, SCALE, mask)

    def total(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(run(*qkv).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)) if gradient else run).lower(*qkv).compile()


def measure(kind: LayerType, tokens: int, dtype: str, gradient: bool, rounds: int) -> str:
    """A line of the table."""
    heads = (CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.num_key_value_heads)
    random = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, tokens, n, CONFIG.head_dim) for n in heads]
    qkv = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(random, shapes, strict=True)]
    mask = visible(CONFIG, kind, tokens, None)
    programs = {name: compiled(kernel, qkv, mask, gradient) for name, kernel in KERNELS.items()}
    seconds = interleaved({name: functools.partial(run, *qkv) for name, run in programs.items()}, rounds)
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in programs.items()}
    cells = [f"{seconds[name] * 1e3:.1f} ms, {memory[name] / 1e6:.0f} MB" for name in programs]
    return f"| {' | '.join([kind, dtype, str(tokens), *cells])} |"


def main(
    tokens: str = "512,1024,2048", dtypes: str = "float32,bfloat16", gradient: bool = False, rounds: int = 5
) -> None:
    columns = ["layer", "dtype", "tokens", *KERNELS]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for dtype in dtypes.split(","):
        for kind in ("sliding_attention", "full_attention"):
            for length in tokens.split(","):
                print(measure(kind, int(length), dtype, gradient, rounds), flush=True)


if __name__ == "__main__":
    typer.run(main)
