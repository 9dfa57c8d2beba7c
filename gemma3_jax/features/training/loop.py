"""Training of sparse autoencoders, transcoders and cross-layer transcoders, on activations of any scale.

Axes: n tokens, d features of a site, l layers of a dictionary of several.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder, check_k
from gemma3_jax.features.layered import CrossLayerTranscoder
from gemma3_jax.features.training.batches import Source, Values, batches, source_of
from gemma3_jax.features.training.checkpoint import Checkpoint, fingerprint
from gemma3_jax.features.training.scale import dictionary_of, scaling_of
from gemma3_jax.features.training.sites import Names, sites_of
from gemma3_jax.features.training.step import Figures, Kind, Plan, Scaling, State, new_state, train_step

_log = logging.getLogger(__name__)
_FIRST = 4096  # tokens from which centre and scale are found
_EVERY = 50  # steps from one report to the next
_ADAM_RATE, _RATE_WIDTH = 2e-4, 2**14  # the rate at this width; https://arxiv.org/abs/2406.04093, by sqrt(width)
_DEAD_TOKENS = 10_000_000


def train(
    activations: object,
    width: int,
    kind: Kind = "batchtopk",
    *,
    k: int | None = None,
    site_in: Names | None = None,
    site_out: Names | None = None,
    prefixes: Sequence[int] = (),
    batch: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    progress: bool | None = None,
    report: Callable[[Figures], object] | None = None,
) -> SparseAutoencoder | Transcoder | CrossLayerTranscoder:
    """Train a sparse autoencoder, or, with `site_out`, a transcoder; of several layers, a cross-layer transcoder.

    Activations may have any scale and centre. Both are found from the first tokens, and folded into the weights in the
    end, so the result is for raw values. Decoder rows have length 1 (those of a cross-layer transcoder, of all layers
    together and in units of each layer's scale), and dead features learn from what is missing.
    The rate rises over the first twentieth of the steps, and falls to 0 over the last fifth. The result depends on the
    arguments alone.

    Args:
        activations: one of

            - an array [n, d] of NumPy, JAX or torch; for a transcoder a tuple (x, y) of arrays. The order is by chance.
            - an iterable of batches [n, d], or of pairs (x, y). Their order is kept, so shuffle them before.
            - an `ActivationStore`, which is shuffled, or its `shuffled(batch, seed)`.
            - what `model.activations` yields, in the order of the texts.

            For a cross-layer transcoder x and y are [l, n, d].
            Of the last two, the first token of each text is left out, as `check` does: its norm is many times that of
            others, and would set the scale. From arrays and batches leave it out yourself.
        width: number of features; of a cross-layer transcoder, those of each layer.
        kind: "batchtopk" (the result is a JumpReLU with one threshold), "jumprelu" (a threshold for each feature) or
            "topk" (a `TopK`, which Gemma Scope cannot hold, and SAELens in autoencoders alone).
        k: active features of a token: exactly so many in "topk", on average in the others. By default 32, or a
            sixteenth of a width below 512. Of a cross-layer transcoder, in each layer.
        site_in: name of the site that is read; not needed for a store of one site. For a cross-layer transcoder a list,
            or for a store and for arrays a name with "*" for the layer.
        site_out: name of the site that is written, which makes a transcoder; several, likewise.
        prefixes: numbers of features, such as (256, 1024), of which the first that many alone should explain the value,
            too: a Matryoshka dictionary, whose first features are the general ones (Bussmann et al. 2025). The loss is
            the mean over these and the width.
        batch: tokens of a step; by default those of the first batch, and 1,024 of an array or a store. Batches of other
            sizes are joined and cut. Tokens at the end that do not fill a batch are left out.
        steps: by default, one pass over the activations. With more, passes are repeated, which an iterator cannot be.
            Give it for an iterable without a length: otherwise the rate does not fall at its end.
        learning_rate: by default 2e-4 sqrt(16384 / width).
        seed: of the initial weights, and of the order of arrays and stores.
        checkpoint: a file that holds the run, so that the same call goes on where it was after it was killed, and gives
            the same bits. The activations must begin anew: their first batches are read again, without a step.
        checkpoint_every: steps from one writing of it to the next; it is also written at the end.
        progress: show a bar; by default in a terminal.
        report: called every 50 steps and at the last with `Figures`: step, loss, l0, fvu, dead. With the `append` of a
            list, this gives a history to draw.

    Returns:
        A `SparseAutoencoder`, `Transcoder` or `CrossLayerTranscoder` in float32, which `save` writes.

    Raises:
        ValueError: an argument is wrong; activations do not fill a batch; or the loss is not finite.
        CheckpointError: the checkpoint is damaged, or has a run with other settings or on other activations, which the
            message names.
        UnknownSite: no site has the name.

    >>> import numpy as np
    >>> from gemma3_jax import features
    >>> r = np.random.default_rng(0)
    >>> directions = r.normal(size=(16, 8))
    >>> x = (r.random((4096, 16)) < 0.1) @ directions
    >>> history = []
    >>> sae = features.train(x, 16, k=2, site_in="blocks.0.hook_out", batch=64, steps=300, report=history.append)
    >>> sae
    SparseAutoencoder: 16 features, JumpRelu
      reads   blocks.0.hook_out  8
      writes  blocks.0.hook_out  8
    >>> history[-1].step, history[-1].fvu < 0.3
    (300, True)
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, get_args(Kind)))}")
    counts = {"width": width, "batch": batch, "steps": steps, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    k = min(32, max(width // 16, 1)) if k is None else k
    check_k(k, width)
    plan = Plan(kind, k, _prefixes(prefixes, width))
    sites = sites_of(activations, site_in, site_out)
    layers = len(sites[0])
    source = source_of(activations, sites, batch, seed)
    total = steps if steps is not None or source.rows is None else max(source.rows // source.batch, 1)
    first, stream = _beginning(itertools.islice(batches(source, once=steps is None), steps), source)
    scalings = tuple(scaling_of(values, layers) for values in first)
    scaled = tuple(scaling(jnp.asarray(x[: source.batch])) for scaling, x in zip(scalings, first, strict=True))
    rate = _ADAM_RATE * math.sqrt(_RATE_WIDTH / width) if learning_rate is None else learning_rate
    settings = plan._asdict() | {"site_in": sites[0], "site_out": sites[-1], "batch": source.batch, "steps": total}
    settings |= {"learning_rate": rate, "seed": seed, "activations": fingerprint(first)}
    kept = Checkpoint(None if checkpoint is None else Path(checkpoint), checkpoint_every, settings)
    state = kept.restored(new_state(scaled, layers, plan, seed))
    run = _Run(plan, scalings, rate, jnp.int32(_patience(width, k, source.batch, total)), total)
    done, hidden = int(state.step), None if progress is None else not progress
    rest = itertools.islice(stream, done, None)
    with tqdm(rest, total=total, initial=done, desc="train", unit=" steps", disable=hidden) as bar:
        state = _trained(state, bar, run, kept, report)
    if steps is not None and int(state.step) < steps:
        _log.warning("the activations ended after %s of %s steps", f"{int(state.step):,}", f"{steps:,}")
    return dictionary_of(state, scalings, plan, sites)


class _Run(NamedTuple):
    """What stays as it is from step to step."""

    plan: Plan
    scalings: tuple[Scaling, ...]
    rate: float
    patience: jax.Array
    total: int | None


def _trained(state: State, bar: tqdm, run: _Run, kept: Checkpoint, report: Callable[[Figures], object] | None) -> State:
    """The state after a step on each batch, of which `bar` is an iterable."""
    figures = None
    for step, values in enumerate(bar, start=int(state.step)):
        at = jnp.float32(run.rate * _share_of_rate(step, run.total))
        state, figures = train_step(state, values, run.scalings, at, run.patience, plan=run.plan)
        if (step + 1) % _EVERY == 0:
            _report(figures, bar, report)
        if (step + 1) % kept.every == 0:
            kept.keep(state)
    if figures is not None:
        if int(state.step) % _EVERY:
            _report(figures, bar, report)
        kept.keep(state)
    return state


def _prefixes(prefixes: Sequence[int], width: int) -> tuple[int, ...]:
    """The prefixes of the width, with the width itself."""
    whole = (*prefixes, *(() if width in prefixes[-1:] else (width,)))
    if list(whole) != sorted(set(whole)) or whole[0] < 1:
        raise ValueError(f"prefixes are {tuple(prefixes)}; they must rise from 1 on, to at most the width, {width}")
    return whole


def _beginning(stream: Iterator[Values], source: Source) -> tuple[tuple[np.ndarray, ...], Iterator[Values]]:
    """The first tokens, on the host, and all batches from the first on."""
    held = list(itertools.islice(stream, max(1, -(-_FIRST // source.batch))))
    if not held:
        raise ValueError(f"the activations do not fill a batch of {source.batch} tokens; give a smaller batch=")
    first = tuple(
        np.concatenate([np.asarray(each, np.float32) for each in part])[:_FIRST] for part in zip(*held, strict=True)
    )
    if not all(np.isfinite(each).all() for each in first):
        raise ValueError("activations have NaN or infinity")
    return first, itertools.chain(held, stream)


def _share_of_rate(step: int, total: int | None) -> float:
    """The part of the learning rate at a step, counted from 0."""
    rise = 100 if total is None else max(total // 20, 1)
    fall = 1.0 if total is None else max(total - step, 1) / max(total / 5, 1)
    return min((step + 1) / rise, fall, 1.0)


def _patience(width: int, k: int, batch: int, total: int | None) -> int:
    """Steps after which an idle feature counts as dead: a twentieth of them, and ten times what it waits on average."""
    waits = math.ceil(10 * width / (batch * k))
    return min(max(waits, 100 if total is None else total // 20), -(-_DEAD_TOKENS // batch))


def _report(figures: Figures, bar: tqdm, report: Callable[[Figures], object] | None) -> None:
    """Show how training goes, and stop it if it cannot go on."""
    step, *shares = jax.device_get(figures)
    known = Figures(int(step), *map(float, shares))
    if not math.isfinite(known.loss):
        raise ValueError(
            f"the loss is {known.loss} at step {known.step}; give a smaller learning_rate, or look for NaN in the "
            "activations"
        )
    bar.set_postfix(loss=f"{known.loss:.3f}", L0=f"{known.l0:.1f}", FVU=f"{known.fvu:.3f}", dead=f"{known.dead:.1%}")
    if report is not None:
        report(known)
