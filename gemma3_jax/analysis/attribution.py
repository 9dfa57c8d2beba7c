"""Attribution: a first-order estimate of patching at all places at once, from two forward passes and one backward pass.

Axes: b batch, p position, k key position, h query heads, d hidden_size, s senders, r receivers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.analysis import nodes
from gemma3_jax.analysis.patching import Axis, clean_cache, grid_letters, grid_of_inputs
from gemma3_jax.analysis.paths import reads_at
from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.compute.matmul import matmul
from gemma3_jax.grids import named_grid
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of, traced_metric
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.hooks.edits import Replace
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.inputs import as_array, positive
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import run
from gemma3_jax.run.gradients import Metric, differentiable, gradients, scalar
from gemma3_jax.run.request import Request
from gemma3_jax.run.selection import captured_names
from gemma3_jax.sites.names import get_act_name, resolve
from gemma3_jax.sites.table import site
from gemma3_jax.types import ArrayLike, IntegersLike, Params


def attribution_patching(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    name: str | Sequence[str],
    by: tuple[Axis, ...],
    *,
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
) -> np.ndarray | dict[str, np.ndarray]:
    """How much the metric would change with each clean activation patched in, to first order.

    This is `(clean - corrupted) . gradient`, summed over the axes that are not in `by`, with the gradient of the
    corrupted run. It estimates `activation_patching(...)` minus the metric of the corrupted run, with the same
    arguments and shape. It costs about four forward passes, while patching costs one for each place. The estimate is
    exact where the metric is linear in the activation, and poor where a softmax or a norm saturates.

    Warning: on the residual stream of a token that differs between the runs, even the sign can be wrong. On the 270m,
    at the second subject of an indirect object prompt, it is wrong in layers 0 to 13; over layers and positions the
    correlation with patching is 0.08 to 0.23, and on the outputs of heads 0.96 to 0.98. Check important values with
    `activation_patching`.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv 2310.10348).

    Peak memory: a backward pass without the parameters' gradients, and three copies of the site in every layer.

    Args:
        model, corrupted, clean, metric, by, attention_mask: as in `activation_patching`.
        name: as in `activation_patching`, or several names, at no extra cost.
        logits_at: positions at which the metric needs logits; see `forward`.

    Returns:
        Float32, one axis for each of `by`: [L, p], [L, h], ... It is a NumPy array that shows its extremes. With
        several names, a dictionary of these by name.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> answer = model.to_single_token("lo")
    >>> scores = attribution_patching(
    ...     model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1, answer], "z", ("layer", "head"))
    >>> scores.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)
    True
    """
    names = tuple(name) if isinstance(name, Sequence) and not isinstance(name, str) else (name,)
    first = {each: get_act_name(each, 0, config=model.config) for each in names}
    inputs = model.inputs(corrupted, attention_mask)
    request = request_of(model, inputs, logits_at=logits_at)
    reductions = {each: f"{site(at).axes} -> {' '.join(grid_letters(at, by))}" for each, at in first.items()}
    globs = {each: at.replace("blocks.0.", "blocks.*.") for each, at in first.items()}
    scores = run_compiled(
        _attributions,
        model.params,
        request,
        traced_metric(model, request, metric, check=scalar),
        clean_cache(model, clean, tuple(globs.values()), inputs, attention_mask),
        sites=tuple((each, globs[each], reductions[each]) for each in names),
    )
    grids = {each: grid_of_inputs(x, by, f"attribution patching {each}", model, inputs) for each, x in scores.items()}
    return grids[name] if isinstance(name, str) else grids


def _attributions(
    params: Params, request: Request, metric: Traced, clean: ActivationCache, *, sites: tuple[tuple[str, str, str], ...]
) -> dict[str, jax.Array]:
    config = request.config
    named = differentiable(config, [glob for _, glob, _ in sites])
    _, cache = gradients(params, request, metric, named=named)

    def by_layer(glob: str, reduction: str) -> jax.Array:
        moved = [_moved(clean, cache, name) * cache[f"{name}_grad"] for name in captured_names(config, glob)]
        return jnp.stack([einops.reduce(value, reduction, "sum") for value in moved])

    return {name: by_layer(glob, reduction) for name, glob, reduction in sites}


def _moved(clean: ActivationCache, corrupted: ActivationCache, name: str) -> jax.Array:
    """The change of a value under patching; 0 where both runs agree, because masked scores would overflow."""
    a, b = (cache[name].astype(jnp.float32) for cache in (clean, corrupted))
    return jnp.where(a == b, 0.0, a - b)


def edge_attribution(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    *,
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
) -> np.ndarray:
    """How much the metric would change if each edge between two components became clean, to first order.

    This estimates `path_patching` from each sender to each receiver. It multiplies the change that the sender's clean
    output makes in the residual stream, through the real post-norm, by the gradient of the metric at the receiver's
    input.

    Source: Syed et al. 2023 (arXiv 2310.10348), edge attribution patching.

    Peak memory: a backward pass without the parameters' gradients; 4 s b p d bytes for the outputs of the senders; and
    per layer two copies of the residual stream for each head.

    Args:
        model, corrupted, metric, attention_mask, logits_at: as in `attribution_patching`.
        clean: the other run's `ActivationCache`, with `nodes.sites_written(config)`, or its input.

    Returns:
        [s, r] float32, for `nodes.senders(config)` and `nodes.receivers(config)`; 0 where the receiver does not
        read the sender's output. It is a NumPy array that shows its extremes.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import nodes
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> scores = edge_attribution(model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1].max())
    >>> scores.shape == (len(nodes.senders(model.config)), len(nodes.receivers(model.config)))
    True
    """
    inputs, written_at = model.inputs(corrupted, attention_mask), nodes.sites_written(model.config)
    request = request_of(model, inputs, written_at, logits_at=logits_at)
    cache = clean_cache(model, clean, written_at, inputs, attention_mask)
    scores = run_compiled(_edges, model.params, request, traced_metric(model, request, metric, check=scalar), cache)
    ends = nodes.senders(model.config), nodes.receivers(model.config)
    labels = dict(zip(("sender", "receiver"), ([str(node) for node in each] for each in ends), strict=True))
    return named_grid(scores, tuple(labels), "edge attribution", labels, config=model.config)


def _edges(params: Params, request: Request, metric: Traced, clean: ActivationCache) -> jax.Array:
    config = request.config
    senders, receivers = nodes.senders(config), nodes.receivers(config)
    _, corrupted = run(params, dataclasses.replace(request, return_type=None, logits_at=None))
    written = nodes.written_differences(config, params, clean, corrupted)
    # The receivers of one kind and layer are adjacent: one site holds them all.
    read_at = tuple(dict.fromkeys(reads_at(node) for node in receivers))
    _, cache = gradients(params, request, metric, named=read_at)
    scores = jnp.concatenate([_scores(written, cache[f"{name}_grad"]) for name in read_at], axis=1)
    reads = np.asarray([[nodes.writes_before(sender, receiver) for receiver in receivers] for sender in senders])
    return jnp.where(reads, scores, 0.0)


def _scores(written: jax.Array, gradient: jax.Array) -> jax.Array:
    # [b, p, d] -> [b, p, 1, d]
    gradient = gradient if gradient.ndim == 4 else gradient[:, :, None]
    # [s, b, p, d] x [b, p, n, d] -> [s, n]
    return matmul("sbpd,bpnd->sn", written, gradient)


def integrated_gradients(
    model: HookedGemma3,
    input: Input,
    name: str,
    metric: Metric,
    baseline: ArrayLike = 0.0,
    *,
    steps: int = 16,
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each element's share in the change of the metric when a site goes from a baseline to its value.

    A share is `(value - baseline) * mean gradient` on the straight line between them, by Gauss-Legendre quadrature.
    Exact shares would sum to the metric minus its value at the baseline. The second result is the missing part of that
    sum; it shows whether `steps` suffices.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365).

    Peak memory: one backward pass without the parameters' gradients, whatever the number of steps.

    Args:
        model: the model.
        input: text, texts or ids [b, p].
        name: one site, by any of its names; `"hook_embed"` gives the shares of the tokens, summed over d.
        metric: `metric(logits) -> []`, see `grad_at`.
        baseline: the value at the start of the line: an array that broadcasts to the site's value, or the value in
            another run.
        steps: points on the line; each costs about three forward passes.
        attention_mask: [b, p], 1 at real tokens.
        logits_at: positions at which the metric needs logits; see `forward`.

    Returns:
        The shares, float32 of the site's shape, and the missing part [], float32.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> shares, missing = integrated_gradients(model, "ba ke lo ba ke", "hook_embed", lambda logits: logits[0, -1, 9])
    >>> shares.shape == (1, 6, model.config.hidden_size)
    True
    """
    steps = positive("steps", steps)
    match = resolve(name, model.config)
    if site(match.name).dtype == "int32" or match.layout is not None:
        raise ValueError(
            f"{name} has token ids, or Hugging Face's layout; use the canonical name {match.name}, or hook_embed"
        )
    request = request_of(model, model.inputs(input, attention_mask), logits_at=logits_at)
    # Nodes and weights on [-1, 1] -> on [0, 1]
    points, weights = np.polynomial.legendre.leggauss(steps)
    line = jnp.asarray((points + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)
    baseline = jnp.array(as_array(baseline), jnp.float32)
    measure = traced_metric(model, request, metric, check=scalar)
    return run_compiled(_integrated, model.params, request, measure, baseline, line, name=match.name)


def _integrated(
    params: Params,
    request: Request,
    metric: Traced,
    baseline: jax.Array,
    line: tuple[jax.Array, jax.Array],
    *,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    at_value, cache = gradients(params, request, metric, named=(name,))
    value = cache[name].astype(jnp.float32)
    try:
        baseline = jnp.broadcast_to(baseline, value.shape)
    except ValueError:
        raise ValueError(
            f"baseline has shape {list(baseline.shape)}; it must broadcast to the value at {name}, {list(value.shape)}"
        ) from None
    change = value - baseline

    def at(edit: Replace) -> tuple[jax.Array, ActivationCache]:
        edited = dataclasses.replace(request, edits={name: (edit,)})
        return gradients(params, edited, metric, named=(name,))

    def add(total: jax.Array, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        fraction, weight = point
        _, edited_cache = at(Replace(baseline + fraction * change))
        return total + weight * edited_cache[f"{name}_grad"], None

    mean, _ = jax.lax.scan(add, jnp.zeros_like(value), line)
    shares = change * mean
    at_baseline, _ = at(Replace(baseline))
    return shares, at_value - at_baseline - jnp.sum(shares)
