"""Attribution to features: how much each feature of some dictionaries contributes to a metric, to first order.

Axes: b batch, p position, d features of a site, f features of a dictionary, k largest ones, l layers that are read;
`...` tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.descriptions import Described, Description, fields_of
from gemma3_jax.features.parts import LAYERED, Part, parts_of, written
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.unchecked import warn_if_unchecked
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of, traced_metric
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.hooks.edits import Add
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.gradients import Metric, differentiable, gradients, scalar
from gemma3_jax.run.request import Request
from gemma3_jax.types import IntegersLike, Params

_SHOWN = 5  # scores of each dictionary
# By written site, the gradient of the metric there: [..., d].
Gradients = Mapping[str, jax.Array]


class FeatureScores(NamedTuple):
    """The scores of one dictionary's features; with a leading axis l for a dictionary of several layers.

    Attributes:
        scores: [b, p, k] float32, those of the largest size first; or [b, p, f].
        indices: [b, p, k] int32 features; or None.
        activations: the features themselves, like the scores.
    """

    scores: jax.Array
    indices: jax.Array | None
    activations: jax.Array


@flax.struct.dataclass(repr=False)
class FeatureAttribution(Described):
    """The result of `feature_attribution`. At the prompt it shows the largest scores of each dictionary.

    Attributes:
        metric: [] float32, its value in the run.
        of: the scores of each dictionary, in the order that they were given in.
        missing: [] float32, with `steps`: the change of the metric from no features to all, minus the sum of all
            scores. It shows whether `steps` suffices. None otherwise.
    """

    metric: jax.Array
    of: tuple[FeatureScores, ...]
    missing: jax.Array | None

    def _description(self) -> Description:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return Description("FeatureAttribution", fields_of(self))
        left = "" if self.missing is None else f", missing {float(np.mean(self.missing)):+.3g}"
        title = f"FeatureAttribution: metric {float(np.mean(self.metric)):.4g}{left}; the largest scores"
        rows = []
        for number, (scores, indices, _) in enumerate(self.of):
            for at in np.argsort(-np.abs(scores), axis=None)[:_SHOWN]:
                *token, place = map(int, np.unravel_index(at, scores.shape))
                feature = place if indices is None else int(indices[*token, place])
                score = float(scores[*token, place])
                rows.append((f".of[{number}]", f"feature {feature}", f"at {token}", f"{score:+.4g}"))
        return Description(title, tuple(rows))


def feature_attribution(
    model: HookedGemma3,
    prompt: Input,
    metric: Metric,
    saes: Sequence[Dictionary] | Dictionary,
    *,
    k: int | None = 64,
    steps: int | None = None,
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
) -> FeatureAttribution:
    """The score of every feature at every position: the feature times the metric's gradient in it.

    The dictionaries are as `splice` puts them in with their error terms, which change nothing, so one backward pass
    through the model serves all of them. A score estimates how much the metric would fall if the feature were 0 there;
    `splice(sae, ablate=[f], positions=p)` measures it. A feature's effect on later dictionaries counts in full: scores
    of dictionaries along one path overlap.

    With `steps`, the gradient is the mean on the line from the run without all these features to the run itself
    (integrated gradients). The scores then sum to the change of the metric between both, up to `missing`.

    Sources: Marks et al. 2024 (arXiv 2403.19647); Sundararajan et al. 2017 (arXiv 1703.01365).

    Args:
        model: the model.
        prompt: text, texts or ids [b, p].
        metric: `metric(logits) -> []`, see `grad_at`.
        saes: dictionaries of any kind, or one.
        k: how many features of each position, those with the largest scores in size; None for all.
        steps: points on the line, each as costly as a call without steps; None for the gradient at the run itself.
        attention_mask: [b, p], 1 at real tokens.
        logits_at: positions at which the metric needs logits; see `forward`.

    Raises:
        ValueError: `steps` or k is less than 1, or there is no dictionary.
        UnknownSite: the model does not have a site of a dictionary.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> one, zero = jnp.eye(model.config.hidden_size), jnp.zeros(model.config.hidden_size)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=zero, W_dec=one, b_dec=zero, activation=features.Relu(), site_in="blocks.1.hook_out"
    ... )
    >>> found = features.feature_attribution(model, "ba ke lo", lambda logits: logits[0, -1, 9], [sae], k=5)
    >>> found.of[0].scores.shape, found.of[0].indices.shape
    ((1, 4, 5), (1, 4, 5))
    """
    saes = [saes] if isinstance(saes, Dictionary) else saes
    if not saes or min(1 if k is None else k, 1 if steps is None else steps) < 1:
        raise ValueError(f"k is {k}, steps is {steps}, with {len(saes)} dictionaries; each must be at least 1")
    for sae in saes:
        warn_if_unchecked(sae)
    request = request_of(model, model.inputs(prompt, attention_mask), logits_at=logits_at)
    measure = traced_metric(model, request, metric, check=scalar)
    line = None
    if steps is not None:
        # Nodes and weights on [-1, 1] -> on [0, 1]
        points, weights = np.polynomial.legendre.leggauss(steps)
        line = jnp.asarray((points + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)
    return run_compiled(_attributed, model.params, request, measure, tuple(saes), line, k=k)


def _attributed(
    params: Params,
    request: Request,
    metric: Traced,
    saes: tuple[Dictionary, ...],
    line: tuple[jax.Array, jax.Array] | None,
    *,
    k: int | None,
) -> FeatureAttribution:
    parts = [parts_of(sae) for sae in saes]
    outputs = tuple(dict.fromkeys(name for each in parts for name in each))
    inputs = [part.site_in for each in parts for readers in each.values() for part in readers.values()]
    value, cache = gradients(params, request, metric, named=differentiable(request.config, [*outputs, *inputs]))
    found = [_features(each, cache) for each in parts]
    missing, mean = None, {name: cache[f"{name}_grad"] for name in outputs}
    if line is not None:
        mean, at_zero = _mean_gradients(params, request, metric, _all_written(parts, found, cache), line)
        missing = value - at_zero
    scores = [_scores(each, f, cache, mean) for each, f in zip(parts, found, strict=True)]
    if missing is not None:
        missing -= sum(jnp.sum(score) for each in scores for score in each.values())
    return FeatureAttribution(value, tuple(map(_result, saes, scores, found, [k] * len(saes))), missing)


Parts = Mapping[str, Mapping[int | None, Part]]
# By the layer that they read.
Features = dict[int | None, jax.Array]


def _features(parts: Parts, cache: Mapping[str, jax.Array]) -> Features:
    """The features [b, p, f] of each layer that is read."""
    readers = {reader: part for several in parts.values() for reader, part in several.items()}
    return {reader: part.encode(part.flat(cache[part.site_in])) for reader, part in readers.items()}


def _scores(parts: Parts, f: Features, cache: Mapping[str, jax.Array], grads: Gradients) -> Features:
    """Each feature times the gradient in it, which is the sum over the sites that it writes to."""
    slopes: dict[int | None, jax.Array | float] = dict.fromkeys(f, 0.0)
    for name, readers in parts.items():
        for reader, part in readers.items():
            x = part.flat(cache[part.site_in])
            _, back = jax.vjp(lambda f, part=part, x=x: written(part, f, x), f[reader])
            slopes[reader] += back(grads[name].reshape(*x.shape[:-1], -1))[0]
    return {reader: f[reader] * slope for reader, slope in slopes.items()}


def _all_written(
    parts: Sequence[Parts], found: Sequence[Features], cache: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """By site, what all features together write there, in the shape of the site."""
    total: dict[str, jax.Array] = {}
    for each, f in zip(parts, found, strict=True):
        for name, readers in each.items():
            for reader, part in readers.items():
                y = written(part, f[reader], part.flat(cache[part.site_in]))
                total[name] = total.get(name, 0.0) + y.reshape(cache[name].shape)
    return total


def _mean_gradients(
    params: Params, request: Request, metric: Traced, features: Gradients, line: tuple[jax.Array, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The mean gradients on the line from the run without what features write, and the metric there."""
    named = differentiable(request.config, list(features))

    def at(share: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        edits = {name: (Add(vector, share - 1.0),) for name, vector in features.items()}
        value, cache = gradients(params, dataclasses.replace(request, edits=edits), metric, named=named)
        return value, {name: cache[f"{name}_grad"] for name in named}

    def add(total: dict[str, jax.Array], point: tuple[jax.Array, jax.Array]) -> tuple[dict[str, jax.Array], None]:
        share, weight = point
        return jax.tree.map(lambda sum, new: sum + weight * new, total, at(share)[1]), None

    zeros = {name: jnp.zeros(features[name].shape, jnp.float32) for name in named}
    mean, _ = jax.lax.scan(add, zeros, line)
    return mean, at(jnp.float32(0.0))[0]


def _result(sae: Dictionary, scores: Features, found: Features, k: int | None) -> FeatureScores:
    all_scores, f = (jnp.stack([*each.values()]) for each in (scores, {reader: found[reader] for reader in scores}))
    if not isinstance(sae, LAYERED):
        all_scores, f = all_scores[0], f[0]
    if k is None:
        return FeatureScores(all_scores, None, f)
    # [..., f] -> [..., k]
    _, indices = jax.lax.top_k(jnp.abs(all_scores), min(k, sae.width))
    largest, active = (jnp.take_along_axis(x, indices, axis=-1) for x in (all_scores, f))
    return FeatureScores(largest, indices, active)
