"""Measures the best rates of the machine: the limits that the results of the benchmarks are compared with."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def measure(quick: bool = False) -> dict[str, float]:
    """Rates per second: operations of float32 and bfloat16 matrix products, bytes read, and bytes moved to the device.

    Each is the median of several runs. The matrix products have the precision that the port uses.
    """
    n = 256 if quick else 3072
    read = 2**20 if quick else 2**29
    # A product of a matrix and a vector reads faster than a sum, and decoding does the same.
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
    """The share of each limit that the port reaches in a row: (work / limit) / measured seconds."""
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
