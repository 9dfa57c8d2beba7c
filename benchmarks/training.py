"""One training step of a BatchTopK autoencoder, beside that of dictionary_learning, if that is installed.

Both keep the n k largest features of a batch, take the same gradients and Adam, and have no dead features yet.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.peers import installed
from benchmarks.rows import Row, Settings, ratio
from benchmarks.timing import interleaved
from gemma3_jax.features.training.step import Plan, Scaling, new_state, train_step

K = 50
# (width, tokens)
CASES = ((4_096, 1_024), (16_384, 1_024))
QUICK = ((512, 64),)


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each width, in float32."""
    d = settings.config.hidden_size
    for width, tokens in QUICK if settings.quick else CASES:
        x = np.random.default_rng(0).standard_normal((tokens, d), np.float32)
        runs = {"port": _port(x, width)}
        if installed("dictionary_learning"):
            runs["dictionary_learning"] = _peer(x, width)
        seconds = interleaved(runs, settings.rounds)
        figures = (ratio(seconds),) if len(runs) > 1 else ()
        # A product with the encoder and one with the decoder; of their derivatives, that by the input is not needed.
        flops = 2.0 * tokens * d * width * 5
        yield Row(f"step of {tokens:,} tokens of {d}, width {width:,}", "float32", seconds, figures, flops=flops)
        jax.clear_caches()


def _port(x: np.ndarray, width: int) -> Callable[[], Any]:
    values, plan = (jnp.asarray(x),), Plan("batchtopk", K, (width,))
    unit = (Scaling(jnp.zeros(x.shape[1]), jnp.float32(1.0)),)
    state, rate, patience = new_state(values, 1, plan, 0), jnp.float32(4e-4), jnp.int32(10_000)

    def step() -> Any:
        nonlocal state
        state, figures = train_step(state, values, unit, rate, patience, plan=plan)
        return figures.loss

    return step


def _peer(x: np.ndarray, width: int) -> Callable[[], Any]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        steps=10_000, activation_dim=x.shape[1], dict_size=width, k=K, layer=0, lm_name="", lr=4e-4, device="cpu"
    )
    values, step = torch.from_numpy(x), 0

    def update() -> Any:
        nonlocal step
        step += 1  # from 1: step 0 also finds the centre
        return np.float32(trainer.update(step, values))

    return update
