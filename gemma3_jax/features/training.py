"""Training of sparse autoencoders and transcoders, on activations of any scale.

Axes: n tokens, d features of a site (i of the input, o of the output), f features of the dictionary.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gemma3_jax.config import Gemma3Config
from gemma3_jax.features.activations import Activation, JumpRelu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder, check_k
from gemma3_jax.features.training_batches import Source, Store, Values, batches, source_of
from gemma3_jax.features.training_step import Figures, Kind, Scaling, State, new_state, threshold_of, train_step
from gemma3_jax.sites.names import resolve

_log = logging.getLogger(__name__)
_FIRST = 4096  # tokens from which centre and scale are found
_EVERY = 50  # steps from one report to the next
_ADAM_RATE, _RATE_WIDTH = 2e-4, 2**14  # the rate at this width; https://arxiv.org/abs/2406.04093, by sqrt(width)
_DEAD_TOKENS = 10_000_000


def train(
    activations: Any,
    width: int,
    kind: Kind = "batchtopk",
    *,
    k: int | None = None,
    site_in: str | None = None,
    site_out: str | None = None,
    batch: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    report: Callable[[Figures], object] | None = None,
) -> Any:
    """Train a sparse autoencoder, or, with `site_out`, a transcoder.

    Activations may have any scale and centre. Both are found from the first tokens, and folded into the weights in the
    end, so the result is for raw values. Decoder rows have length 1, and dead features learn from what is missing.
    The rate rises over the first twentieth of the steps, and falls to 0 over the last fifth. The result depends on the
    arguments alone.

    Args:
        activations: one of

            - an array [n, d] of NumPy, JAX or torch; for a transcoder a tuple (x, y) of arrays. The order is by chance.
            - an iterable of batches [n, d], or of pairs (x, y). Their order is kept, so shuffle them before.
            - an `ActivationStore`, which is shuffled, or its `shuffled(batch, seed)`.
            - what `model.activations` yields, in the order of the texts.

            Of the last two, the first token of each text is left out, as `check` does: its norm is many times that of
            others, and would set the scale. From arrays and batches leave it out yourself.
        width: number of features.
        kind: "batchtopk" (the result is a JumpReLU with one threshold), "jumprelu" (a threshold for each feature) or
            "topk" (a `TopK`, which Gemma Scope cannot hold, and SAELens in autoencoders alone).
        k: active features of a token: exactly so many in "topk", on average in the others. By default 32, or a
            sixteenth of a width below 512.
        site_in: name of the site that is read; not needed for a store of one site.
        site_out: name of the site that is written, which makes a transcoder.
        batch: tokens of a step; by default those of the first batch, and 1,024 of an array or a store. Batches of other
            sizes are joined and cut. Tokens at the end that do not fill a batch are left out.
        steps: by default, one pass over the activations. With more, passes are repeated, which an iterator cannot be.
            Give it for an iterable without a length: otherwise the rate does not fall at its end.
        learning_rate: by default 2e-4 sqrt(16384 / width).
        seed: of the initial weights, and of the order of arrays and stores.
        progress: show a bar; by default in a terminal.
        report: called every 50 steps and at the last with `Figures`: step, loss, l0, fvu, dead. With the `append` of a
            list, this gives a history to draw.

    Returns:
        A `SparseAutoencoder` or `Transcoder` in float32, which `save` writes.

    Raises:
        ValueError: an argument is wrong; activations do not fill a batch; or the loss is not finite.
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
    for name, value in (("width", width), ("batch", batch), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    k = min(32, max(width // 16, 1)) if k is None else k
    check_k(k, width)
    sites = _sites(activations, site_in, site_out)
    source = source_of(activations, sites, batch, seed)
    total = steps if steps is not None or source.rows is None else max(source.rows // source.batch, 1)
    first, stream = _beginning(itertools.islice(batches(source, once=steps is None), steps), source)
    scalings = tuple(map(_scaling, first))
    scaled = tuple(scaling(values[: source.batch]) for scaling, values in zip(scalings, first, strict=True))
    state = new_state(scaled, width, kind, k, seed)
    rate = _ADAM_RATE * math.sqrt(_RATE_WIDTH / width) if learning_rate is None else learning_rate
    patience = jnp.int32(_patience(width, k, source.batch, total))
    with tqdm(total=total, desc="train", unit=" steps", disable=None if progress is None else not progress) as bar:
        for step, values in enumerate(stream):
            at = jnp.float32(rate * _share_of_rate(step, total))
            state, figures = train_step(state, values, scalings, at, patience, kind=kind, k=k)
            bar.update()
            if (step + 1) % _EVERY == 0:
                _report(figures, bar, report)
        if int(state.step) % _EVERY:
            _report(figures, bar, report)
    if steps is not None and int(state.step) < steps:
        _log.warning("the activations ended after %s of %s steps", f"{int(state.step):,}", f"{steps:,}")
    return _folded(state, scalings, kind, k, sites)


def _sites(activations: Any, site_in: str | None, site_out: str | None) -> tuple[str, ...]:
    """The canonical names of the sites that are read and written; one, for an autoencoder."""
    if site_in is None:
        if not isinstance(activations, Store) or len(activations.sites) != 1:
            there = f"; the store has {', '.join(activations.sites)}" if isinstance(activations, Store) else ""
            raise ValueError(f"give site_in=, the name of the site that has these activations{there}")
        site_in = activations.sites[0]
    deepest = Gemma3Config.preset("27b")
    return tuple(resolve(name, deepest).name for name in (site_in, site_out) if name is not None)


def _beginning(stream: Iterator[Values], source: Source) -> tuple[Values, Iterator[Values]]:
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


def _scaling(values: np.ndarray) -> Scaling:
    """The geometric median of values [n, d], and what makes their mean distance from it sqrt(d)."""
    centre = values.mean(axis=0)
    for _ in range(10):  # Weiszfeld's iteration
        distances = np.linalg.norm(values - centre, axis=1)
        pull = 1 / np.maximum(distances, max(1e-6 * float(distances.mean()), 1e-30))
        # [n] x [n, d] -> [d]
        centre = pull @ values / pull.sum()
    distance = float(np.linalg.norm(values - centre, axis=1).mean())
    if distance == 0:
        raise ValueError("all activations are equal; there is nothing to learn")
    return Scaling(jnp.asarray(centre, jnp.float32), jnp.float32(values.shape[1] ** 0.5 / distance))


def _share_of_rate(step: int, total: int | None) -> float:
    """The part of the learning rate at a step, counted from 0."""
    rise = 100 if total is None else max(total // 20, 1)
    fall = 1.0 if total is None else max(total - step, 1) / max(total / 5, 1)
    return min((step + 1) / rise, fall, 1.0)


def _patience(width: int, k: int, batch: int, total: int | None) -> int:
    """Steps after which an idle feature counts as dead: a twentieth of them, and ten times what it waits on average."""
    waits = math.ceil(10 * width / (batch * k))
    return min(max(waits, 100 if total is None else total // 20), -(-_DEAD_TOKENS // batch))


def _report(figures: Figures, bar: Any, report: Callable[[Figures], object] | None) -> None:
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


def _folded(
    state: State, scalings: tuple[Scaling, ...], kind: Kind, k: int, sites: tuple[str, ...]
) -> SparseAutoencoder | Transcoder:
    """The dictionary for raw values. Features have the scale of the output, so that decoder rows keep their length."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in state.weights.items()}
    (centre_in, scale_in), (centre_out, scale_out) = (
        (np.asarray(each.centre, np.float64), float(each.scale)) for each in (scalings[0], scalings[-1])
    )
    W_enc = weights["W_enc"] * (scale_in / scale_out)
    threshold = np.asarray(threshold_of(state.weights)) if kind == "jumprelu" else np.asarray(state.threshold)
    activation: Activation = TopK(k) if kind == "topk" else JumpRelu(jnp.asarray(threshold / scale_out, jnp.float32))
    arrays = {
        "W_enc": W_enc,
        "b_enc": weights["b_enc"] / scale_out - centre_in @ W_enc,
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"] / scale_out + centre_out,
    }
    made: dict[str, Any] = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    if len(sites) == 2:
        return Transcoder(**made, activation=activation, site_in=sites[0], site_out=sites[1])
    return SparseAutoencoder(**made, activation=activation, site_in=sites[0])
