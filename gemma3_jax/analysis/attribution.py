"""Attribution: patching by its first derivative, for all places at once, from two forward passes and one backward.

Axes: b batch, p position, k key position, h query heads, d hidden_size, s senders, r receivers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.analysis import nodes
from gemma3_jax.analysis.patching import Axis, clean_cache, grid_letters
from gemma3_jax.analysis.paths import reads_at
from gemma3_jax.cache import ActivationCache
from gemma3_jax.edits import Replace
from gemma3_jax.forward import captured_names, checked_logits_at, forward
from gemma3_jax.gradients import Metric, grad_at
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.hooks import as_pytree
from gemma3_jax.products import matmul
from gemma3_jax.sites import get_act_name, resolve, site
from gemma3_jax.text import Input


def attribution_patching(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    name: str | Sequence[str],
    by: tuple[Axis, ...],
    *,
    attention_mask: Any = None,
    logits_at: Any = None,
) -> Any:
    """How much the metric would change with each clean activation patched in, to first order.

    `(clean - corrupted) . gradient`, summed over the axes that are not in `by`; the gradient is that of the corrupted
    run. An estimate of `activation_patching(...)` minus the metric of the corrupted run, with the same arguments and
    shape, for the price of about four forward passes in place of one for each place. It is exact where the metric is
    linear in the activation, and poor where a softmax or a norm saturates: check what matters by `activation_patching`.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv 2310.10348).

    Peak memory: a backward pass without the parameters' gradients, and the site in every layer three times.

    Args:
        model, corrupted, clean, metric, by, attention_mask: as in `activation_patching`.
        name: as in `activation_patching`, or several of them, for the price of one.
        logits_at: positions at which the metric needs logits; see `forward`.

    Returns:
        Float32, one axis for each of `by`: [L, p], [L, h], ... With several names, a dictionary of these by name.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> answer = model.to_single_token("lo")
    >>> scores = attribution_patching(
    ...     model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1, answer], "z", ("layer", "head"))
    >>> scores.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)
    True
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    first = {each: get_act_name(each, 0, config=model.config) for each in names}
    tokens, mask = model.encode(corrupted, attention_mask)
    reductions = {each: f"{site(at).axes} -> {' '.join(grid_letters(at, by))}" for each, at in first.items()}
    globs = {each: at.replace("blocks.0.", "blocks.*.") for each, at in first.items()}
    found = _attributions(
        model.config,
        model.params,
        tokens,
        as_pytree(metric),
        clean_cache(model, clean, tuple(globs.values()), tokens.shape, mask),
        mask,
        checked_logits_at(logits_at, tokens.shape, None),
        sites=tuple((each, globs[each], reductions[each]) for each in names),
    )
    return found[name] if isinstance(name, str) else found


@functools.partial(jax.jit, static_argnames=("config", "sites"))
def _attributions(config, params, tokens, metric, clean, attention_mask, logits_at, *, sites) -> dict[str, jax.Array]:
    options = {"attention_mask": attention_mask, "logits_at": logits_at}
    _, cache = grad_at(config, params, tokens, [glob for _, glob, _ in sites], metric, **options)

    def by_layer(glob: str, reduction: str) -> jax.Array:
        moved = [_moved(clean, cache, name) * cache.grads[name] for name in captured_names(config, glob)]
        return jnp.stack([einops.reduce(value, reduction, "sum") for value in moved])

    return {name: by_layer(glob, reduction) for name, glob, reduction in sites}


def _moved(clean: ActivationCache, corrupted: ActivationCache, name: str) -> jax.Array:
    """By how much patching moves a value; 0 where masked scores, which are the same in both runs, would overflow."""
    a, b = (cache[name].astype(jnp.float32) for cache in (clean, corrupted))
    return jnp.where(a == b, 0.0, a - b)


def edge_attribution(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    *,
    attention_mask: Any = None,
    logits_at: Any = None,
) -> jax.Array:
    """How much the metric would change with each edge between two components made clean, to first order.

    The estimate of `path_patching` from each sender to each receiver: what the sender's clean output adds to the
    residual stream, through the real post-norm, times the gradient of the metric at what the receiver reads.

    Source: Syed et al. 2023 (arXiv 2310.10348), edge attribution patching.

    Peak memory: a backward pass without the parameters' gradients; 4 s b p d bytes for what the senders write; and
    per layer two copies of the residual stream for each head.

    Args:
        model, corrupted, metric, attention_mask, logits_at: as in `attribution_patching`.
        clean: the other run's `ActivationCache`, with `nodes.sites_written(config)`, or its input.

    Returns:
        [s, r] float32, for `nodes.senders(config)` and `nodes.receivers(config)`; 0 where the receiver does not hear
        the sender.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import nodes
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> scores = edge_attribution(model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1].max())
    >>> scores.shape == (len(nodes.senders(model.config)), len(nodes.receivers(model.config)))
    True
    """
    config = model.config
    tokens, mask = model.encode(corrupted, attention_mask)
    cache = clean_cache(model, clean, nodes.sites_written(config), tokens.shape, mask)
    logits_at = checked_logits_at(logits_at, tokens.shape, None)
    return _edges(config, model.params, tokens, as_pytree(metric), cache, mask, logits_at)


@functools.partial(jax.jit, static_argnames="config")
def _edges(config, params, tokens, metric, clean, attention_mask, logits_at) -> jax.Array:
    senders, receivers = nodes.senders(config), nodes.receivers(config)
    written_at = nodes.sites_written(config)
    _, corrupted = forward(config, params, tokens, written_at, attention_mask=attention_mask, return_type=None)
    written = nodes.written_differences(config, params, clean, corrupted)
    # Of a kind and layer the receivers stand together: one site has them all.
    read_at = tuple(dict.fromkeys(reads_at(node) for node in receivers))
    options = {"attention_mask": attention_mask, "logits_at": logits_at}
    _, cache = grad_at(config, params, tokens, read_at, metric, **options)
    scores = jnp.concatenate([_heard(written, cache.grads[name]) for name in read_at], axis=1)
    hears = np.asarray([[nodes.writes_before(sender, receiver) for receiver in receivers] for sender in senders])
    return jnp.where(hears, scores, 0.0)


def _heard(written: jax.Array, gradient: jax.Array) -> jax.Array:
    # [b, p, d] -> [b, p, 1, d]
    gradient = gradient if gradient.ndim == 4 else gradient[:, :, None]
    # [s, b, p, d] x [b, p, n, d] -> [s, n]
    return matmul("sbpd,bpnd->sn", written, gradient)


def integrated_gradients(
    model: HookedGemma3,
    input: Input,
    name: str,
    metric: Metric,
    baseline: Any = 0.0,
    *,
    steps: int = 16,
    attention_mask: Any = None,
    logits_at: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Each element's share in the change of the metric, as a site goes from a baseline to the value it has.

    `(value - baseline) * mean gradient` on the straight line between them, by Gauss-Legendre quadrature. The shares sum
    to the metric minus its value at the baseline: the second result is what is missing from that, so that you can tell
    whether `steps` suffices.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365).

    Peak memory: one backward pass without the parameters' gradients, whatever the number of steps.

    Args:
        model: the model.
        input: text, texts or ids [b, p].
        name: one site, by any of its names; `"hook_embed"` gives the shares of the tokens, summed over d.
        metric: `metric(logits) -> []`, see `grad_at`.
        baseline: what the site's value starts from: an array that broadcasts to it, or another run's.
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
    if steps < 1:
        raise ValueError(f"steps is {steps}; it takes one at least")
    match = resolve(name, model.config)
    if site(match.name).dtype == "int32" or match.layout is not None:
        raise ValueError(f"{name} has token ids or another layout; name {match.name} by our name, or hook_embed")
    tokens, mask = model.encode(input, attention_mask)
    logits_at = checked_logits_at(logits_at, tokens.shape, None)
    # Nodes and weights on [-1, 1] -> on [0, 1]
    points, weights = np.polynomial.legendre.leggauss(steps)
    line = jnp.asarray((points + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)
    baseline = jnp.asarray(baseline, jnp.float32)
    return _integrated(
        model.config, model.params, tokens, as_pytree(metric), baseline, line, mask, logits_at, name=match.name
    )


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _integrated(config, params, tokens, metric, baseline, line, attention_mask, logits_at, *, name):
    options = {"attention_mask": attention_mask, "logits_at": logits_at}
    at_value, cache = grad_at(config, params, tokens, name, metric, **options)
    value = cache[name].astype(jnp.float32)
    way = value - baseline

    def at(edit):
        return grad_at(config, params, tokens, name, metric, edits={name: edit}, **options)

    def add(total, point):
        where, weight = point
        _, there = at(Replace(baseline + where * way))
        return total + weight * there.grads[name], None

    mean, _ = jax.lax.scan(add, jnp.zeros_like(value), line)
    shares = way * mean
    at_baseline, _ = at(Replace(jnp.broadcast_to(baseline, value.shape)))
    return shares, at_value - at_baseline - jnp.sum(shares)
