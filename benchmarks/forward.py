"""Forward passes: logits everywhere, or at the last position only; and their matrix products alone, as a profile.

Axes: b batch, p position.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import deepmind, peers, products
from benchmarks.rows import Figure, Row, Settings, forward_flops, ratio
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
    for dtype in settings.dtypes:
        for shape, everywhere in QUICK if settings.quick else CASES:
            yield _row(settings, dtype, shape, everywhere)
            jax.clear_caches()


def _row(settings: Settings, dtype: str, shape: tuple[int, int], everywhere: bool) -> Row:
    config = settings.config
    model, params, torch_ids, ids = peers.pair(config, dtype, shape)
    tokens, at = jnp.asarray(ids), None if everywhere else jnp.int32(-1)
    options = {} if everywhere else {"logits_to_keep": 1}
    runs = {"port": functools.partial(logits_of, config, params, tokens, at)}
    runs |= peers.forward_peers(model, torch_ids, compiled=not settings.quick, **options)
    if peers.installed("gemma"):
        runs["DeepMind gemma"] = deepmind.forward_peer(config, params, tokens, dtype, last=not everywhere)
    x, torch_x = products.inputs(config, model, dtype, shape)
    alone = {
        "port's products": functools.partial(products.port, config, params, x, everywhere),
        "torch's products": functools.partial(products.peer, model, torch_x, everywhere),
    }
    taken = interleaved(runs | alone, settings.rounds)
    seconds = {name: taken[name] for name in runs}
    ours, theirs = (taken[name] for name in alone)
    # On a CPU the goal in bfloat16 is what XLA allows, which the products alone show.
    goal = 1.0 if dtype == "float32" or jax.default_backend() != "cpu" else None
    figures = (
        ratio(seconds, goal),
        Figure("the products alone take", ours / seconds["port"], percent=True),
        Figure("torch's products / port's", theirs / ours),
    )
    where = "all logits" if everywhere else "last logits"
    flops = forward_flops(config, *shape, None if everywhere else 1)
    return Row(f"{shape[0]} x {shape[1]}, {where}", dtype, seconds, figures, flops=flops)
