"""What the machine can do at best, measured: the limits that the benchmarks' results are held against."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def measure(quick: bool = False) -> dict[str, float]:
    """Per second: operations of a float32 and of a bfloat16 matrix product, bytes read, and bytes moved to the device.

    Medians of several runs; a matrix product in the precision that the port asks for.
    """
    n = 256 if quick else 3072
    read = 2**20 if quick else 2**29
    # As a matrix by a vector, which is faster than a sum, and what decoding does.
    matrix, vector = jnp.ones((2**8, read // 2**10)), jnp.ones(read // 2**10)
    host = np.ones(read // 8, np.float32)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32))
    limits = {"bytes read": read / _seconds(lambda: jnp.dot(matrix, vector, precision="highest"))}
    for dtype in ("float32", "bfloat16"):
        square = jnp.ones((n, n), dtype)
        limits[f"{dtype} operations"] = 2 * n**3 / _seconds(lambda square=square: product(square, square))
    limits["bytes to the device"] = host.nbytes / _seconds(lambda: jax.device_put(host.copy()))
    return limits


def shares(row: dict[str, Any], limits: dict[str, float]) -> dict[str, float]:
    """How much of each limit a row's port reaches: of the time that it takes, what the limit alone would take."""
    needed = {"operations": (row["flops"], f"{row['dtype']} operations"), "bandwidth": (row["bytes"], "bytes read")}
    return {
        name: work / limits[limit] / row["seconds"]["port"]
        for name, (work, limit) in needed.items()
        if work and limit in limits
    }


def _seconds(run: Callable[[], Any], rounds: int = 7) -> float:
    jax.block_until_ready(run())
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
