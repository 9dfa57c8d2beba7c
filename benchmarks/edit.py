"""The time that an edit adds to a forward pass: a ready-made edit, a user's function, and a hook on Hugging Face."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.rows import Row, Settings, added, ratio
from benchmarks.timing import interleaved
from gemma3_jax import HookedGemma3, edits, forward


def rows(settings: Settings) -> Iterator[Row]:
    """Two rows for each dtype."""
    config = settings.config
    shape = (1, 16) if settings.quick else (1, 128)
    layer = config.num_hidden_layers // 2
    vector = np.random.default_rng(1).standard_normal(config.hidden_size).astype(np.float32)
    steer = {f"blocks.{layer}.hook_resid_post": edits.Add(jnp.asarray(vector))}
    run = jax.jit(lambda params, tokens, edits: forward(config, params, tokens, edits=edits)[0])
    for dtype in settings.dtypes:
        model, params, torch_ids, ids = peers.pair(config, dtype, shape)

        def hooked(model: Any = model, torch_ids: Any = torch_ids) -> Any:
            with peers.steered(model, layer, vector):
                return peers.run_torch(model, torch_ids)

        seconds = interleaved(
            {
                "port": functools.partial(run, params, jnp.asarray(ids), steer),
                "port, plain": functools.partial(run, params, jnp.asarray(ids), {}),
                "HF hooks": hooked,
            },
            settings.rounds,
        )
        figures = (ratio(seconds), added("added", seconds["port"], seconds["port, plain"], 0.03))
        yield Row(f"steering at one site, {shape[0]} x {shape[1]}", dtype, seconds, figures)
        yield _users_functions(HookedGemma3(config, params), ids, vector, settings, dtype)


def _users_functions(model: HookedGemma3, ids: np.ndarray, vector: np.ndarray, settings: Settings, dtype: str) -> Row:
    """A row for a new function at every call; it is traced at each of its sites before the compiled program runs."""

    def steered(sites: str) -> jax.Array:
        return model.run_with_hooks(ids, [(sites, lambda value, hook: value + vector)])

    layer = model.config.num_hidden_layers // 2
    seconds = interleaved(
        {
            "port": functools.partial(steered, f"blocks.{layer}.hook_resid_post"),
            "port, all layers": functools.partial(steered, "blocks.*.hook_resid_post"),
            "port, plain": functools.partial(model, ids),
        },
        settings.rounds,
    )
    figures = (
        added("a new function at one site adds", seconds["port"], seconds["port, plain"], 0.03),
        added("a new function at every layer adds", seconds["port, all layers"], seconds["port, plain"]),
    )
    return Row(f"a new function at each call, {ids.shape[0]} x {ids.shape[1]}", dtype, seconds, figures)
