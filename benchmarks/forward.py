"""Forward passes, with logits at every position or only at the last.

Axes: b batch, p position.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import deepmind, peers
from benchmarks.rows import Figure, Row, Settings, forward_flops, ratio
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config, forward

# (b, p), and whether every position has logits.
Cases = tuple[tuple[tuple[int, int], bool], ...]
CASES: Cases = (((1, 128), True), ((4, 512), True), ((1, 4096), False))
QUICK: Cases = (((1, 16), True), ((2, 80), False))


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config: Gemma3Config, params: Any, tokens: jax.Array, logits_at: jax.Array | None = None) -> jax.Array:
    """One forward pass."""
    return forward(config, params, tokens, logits_at=logits_at)[0]


def cases(settings: Settings) -> Cases:
    """The shapes to measure."""
    return QUICK if settings.quick else CASES


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype and shape."""
    for dtype in settings.dtypes:
        for shape, everywhere in cases(settings):
            yield _row(settings, dtype, shape, everywhere)
            jax.clear_caches()


def row_of(
    config: Gemma3Config,
    dtype: str,
    shape: tuple[int, int],
    everywhere: bool,
    seconds: dict[str, float],
    figures: tuple[Figure, ...],
) -> Row:
    """The row of a case, named by its shape, with the operations of a forward pass."""
    where = "all logits" if everywhere else "last logits"
    flops = forward_flops(config, *shape, None if everywhere else 1)
    return Row(f"{shape[0]} x {shape[1]}, {where}", dtype, seconds, figures, flops=flops)


def _row(settings: Settings, dtype: str, shape: tuple[int, int], everywhere: bool) -> Row:
    config = settings.config
    model, params, torch_ids, ids = peers.pair(config, dtype, shape)
    tokens, at = jnp.asarray(ids), None if everywhere else jnp.int32(-1)
    options = {} if everywhere else {"logits_to_keep": 1}
    runs = {"port": functools.partial(logits_of, config, params, tokens, at)}
    runs |= peers.forward_peers(model, torch_ids, compiled=not settings.quick, **options)
    if peers.installed("gemma"):
        runs["DeepMind gemma"] = deepmind.forward_peer(config, params, tokens, dtype, last=not everywhere)
    seconds = interleaved(runs, settings.rounds)
    # On a CPU, XLA's products limit bfloat16, so there is no goal; `benchmarks.parts` measures them.
    goal = 1.0 if dtype == "float32" or jax.default_backend() != "cpu" else None
    return row_of(config, dtype, shape, everywhere, seconds, (ratio(seconds, goal),))
