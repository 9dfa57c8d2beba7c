"""Forward passes: logits everywhere, or at the last position only.

Axes: b batch, p position.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import deepmind, peers
from benchmarks.rows import Row, Settings, forward_flops, ratio
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config, forward

# (b, p), and whether every logit is asked for.
CASES = (((1, 128), True), ((4, 512), True), ((1, 4096), False))
QUICK = (((1, 16), True), ((2, 80), False))


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config: Gemma3Config, params: Any, tokens: jax.Array, logits_at: jax.Array | None = None) -> jax.Array:
    """One forward pass."""
    return forward(config, params, tokens, logits_at=logits_at)[0]


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each dtype and shape."""
    config = settings.config
    for dtype in settings.dtypes:
        for (b, p), everywhere in QUICK if settings.quick else CASES:
            model, params, torch_ids, ids = peers.pair(config, dtype, (b, p))
            tokens, at = jnp.asarray(ids), None if everywhere else jnp.int32(-1)
            options = {} if everywhere else {"logits_to_keep": 1}
            runs = {"port": functools.partial(logits_of, config, params, tokens, at)}
            runs |= peers.forward_peers(model, torch_ids, compiled=not settings.quick, **options)
            if peers.installed("gemma"):
                runs["DeepMind gemma"] = deepmind.forward_peer(config, params, tokens, dtype, last=not everywhere)
            seconds = interleaved(runs, settings.rounds)
            where = "all logits" if everywhere else "last logits"
            # Torch's bfloat16 has no goal where its products are slower than float32's.
            goal = 1.0 if dtype == "float32" or jax.default_backend() != "cpu" else None
            flops = forward_flops(config, b, p, None if everywhere else 1)
            yield Row(f"{b} x {p}, {where}", dtype, seconds, (ratio(seconds, goal),), flops=flops)
            jax.clear_caches()
