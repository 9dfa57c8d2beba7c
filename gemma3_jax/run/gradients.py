"""The gradient of any scalar at any set of sites, by one backward pass.

Axes: b batch, p position, h query heads, g key/value heads, r = h / g, n either kind of heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks.interception import Edit, Hook
from gemma3_jax.hooks.tracing import check_callable
from gemma3_jax.renamed import renamed
from gemma3_jax.run.forward import run
from gemma3_jax.run.request import Request, check_phases, new_request, warn_of_constants, warn_of_padding
from gemma3_jax.run.selection import Capture, Edits, ReturnType, captured_names
from gemma3_jax.sites.names import site_names
from gemma3_jax.sites.table import site
from gemma3_jax.types import IntegersLike, Params

Metric = Callable[..., jax.Array]


@renamed(names="capture")
def grad_at(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array,
    capture: Capture,
    metric: Metric | None = None,
    *,
    edits: Edits | None = None,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    labels: jax.Array | None = None,
    metric_sites: Capture = (),
    logits_at: IntegersLike | None = None,
    stop_at_layer: int | None = None,
    return_type: Literal["logits", "embedding"] = "logits",
    remat: bool = False,
) -> tuple[jax.Array, ActivationCache]:
    """The value of a metric, the activations at the named sites, and the metric's gradients there. Pure.

    A site's gradient has the site's shape and is float32. It is the change of the metric per unit added to the value at
    the site, where everything after the site is recomputed. Sites with the same value (`hook_out` and `attn.hook_in`)
    have different gradients, because their edits affect different places; see docs/sites.md. The call costs about
    three forward passes, whatever the number of sites. Memory is that of a backward pass without the parameters'
    gradients, and twice the named sites.

    Args:
        config: shape of the model.
        params: parameter pytree.
        tokens: [b, p] integer ids.
        capture: sites of the gradients. Globs leave out token ids, which do not have a gradient.
        metric: `metric(logits) -> []`; by default the mean next-token cross-entropy. With `metric_sites`,
            `metric(logits, cache)`, where the cache has those sites. It is plain JAX: the token 300,000 of a smaller
            vocabulary is its last one. `run_with_cache(incl_bwd=True)` raises an error instead.
        edits: as in `forward`; gradients are taken at the edited values.
        attention_mask: [b, p], 1 at real tokens.
        positions: [b, p] integers, as in `forward`.
        segment_ids: [b, p], the document of each token, as in `forward`.
        labels: [b, p], for the cross-entropy without a metric, as in `forward`.
        metric_sites: sites that the metric reads.
        logits_at: as in `forward`.
        stop_at_layer: as in `forward`; the metric takes the residual stream in place of logits.
        return_type: "embedding" if the metric takes the embeddings [b, n] in place of logits.
        remat: as in `forward`.

    Returns:
        The metric, and a cache of the values at `capture`, whose `.grads` has the gradients.

    Raises:
        UnknownSite: a name is not a site.
        ValueError: `capture` matches only the token ids; the metric does not return a scalar; or the arguments are
            invalid for `forward`, with a loss if there is no metric.
        TypeError: an edit or the metric is not callable.

    >>> import jax
    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY, dtype="float32")
    >>> tokens = jax.numpy.array([[2, 10, 20, 30, 10]])
    >>> metric = lambda logits: logits[0, -1, 20] - logits[0, -1, 30]
    >>> value, cache = grad_at(config, params, tokens, "blocks.*.hook_resid_post", metric)
    >>> cache.grads["blocks.1.hook_resid_post"].shape == (1, 5, config.hidden_size)
    True
    """
    if metric is not None:
        check_callable("the metric", metric)
    elif return_type == "embedding":
        raise ValueError("the gradient of an embedding needs a metric(embedding) -> []")
    request = new_request(
        config,
        tokens,
        (),
        edits,
        attention_mask,
        positions=positions,
        segment_ids=segment_ids,
        labels=labels,
        logits_at=logits_at,
        stop_at_layer=stop_at_layer,
        return_type="loss" if metric is None else return_type,
        remat=remat,
    )
    check_phases(request)
    warn_of_padding(request)
    warn_of_constants(params)
    named = differentiable(config, capture, stop_at_layer, return_type)
    seen = captured_names(config, metric_sites, stop_at_layer=stop_at_layer, return_type=return_type)
    return gradients(params, request, metric, named=named, seen=seen)


def gradients(
    params: Params,
    request: Request,
    metric: Metric | None,
    *,
    named: Sequence[str],
    seen: Sequence[str] = (),
) -> tuple[jax.Array, ActivationCache]:
    """Run a request without captures and return the results of `grad_at`. Pure.

    Args:
        params: parameter pytree.
        request: its `return_type` is "loss" if there is no metric.
        metric: as in `grad_at`.
        named: canonical names of the sites of the gradients, in the model's order.
        seen: canonical names of the sites that the metric reads.
    """
    config, edits = request.config, request.edits
    cache_of = functools.partial(ActivationCache, config, some_logits=request.logits_at is not None)

    def captured(names: Container[str], edits: Mapping[str, Sequence[Edit]]) -> tuple[jax.Array, ActivationCache]:
        names = tuple(name for name in site_names(config) if name in names)
        whole = (None,) * len(names)
        return run(params, dataclasses.replace(request, names=names, reductions=whole, reduced=whole, edits=edits))

    # Shapes without the shifts: shifts at the per-head copies would change the shapes at q, k and v.
    every = {*named, *seen, *edits}
    shapes = {name: each.shape for name, each in jax.eval_shape(lambda: captured(every, edits)[1]).items()}

    def value_at(shifts: dict[str, jax.Array]) -> tuple[jax.Array, ActivationCache]:
        out, cache = captured({*named, *seen}, _with_shifts(edits, shifts, shapes))
        values = {name: _as_shared(cache[name], shapes[name]) for name in cache}
        read = cache_of({name: values[name] for name in seen})
        value = out if metric is None else scalar(metric(out, read) if seen else metric(out))
        return value, cache_of({name: values[name] for name in named})

    zeros = {name: jnp.zeros(shapes[name], jnp.float32) for name in named}
    (value, cache), grads = jax.value_and_grad(value_at, has_aux=True)(zeros)
    return value, cache_of(cache, grads=cache_of({name: grads[name] for name in named}))


def differentiable(
    config: Gemma3Config,
    capture: Capture,
    stop_at_layer: int | None = None,
    return_type: ReturnType = "logits",
) -> tuple[str, ...]:
    """The canonical names of the sites in `capture` that have a gradient.

    Raises:
        ValueError: there is no such site.
    """
    matched = captured_names(config, capture, stop_at_layer=stop_at_layer, return_type=return_type)
    chosen = tuple(name for name in matched if site(name).dtype != "int32")
    if not chosen:
        raise ValueError(f"{capture} does not match a site with a gradient; token ids do not have one")
    return chosen


def scalar(value: ArrayLike) -> jax.Array:
    """The result of a metric as one float32 number.

    Raises:
        ValueError: the result is not one real number.
    """
    if value is None:
        raise ValueError("the metric returned None; it must return the number")
    array = jnp.asarray(value)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"the metric returned {array.dtype} of shape {array.shape}; a gradient needs one real number")
    return array.astype(jnp.float32)


def _with_shifts(
    placed: Mapping[str, Sequence[Edit]], shifts: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Edit]]:
    """Each site's edits, followed by its shift."""
    both: dict[str, list[Edit]] = {
        name: [functools.partial(_on_each_copy, edit, shapes[name]) for edit in edits] for name, edits in placed.items()
    }
    for name, shift in shifts.items():
        both.setdefault(name, []).append(functools.partial(_shift, shift))
    return both


def _on_each_copy(edit: Edit, shape: tuple[int, ...], value: jax.Array, hook: Hook) -> jax.Array:
    """Edit every copy of a value like the shared value of that shape, so that gradients do not change edits."""
    if value.shape == shape:
        return edit(value, hook)
    # [b, p, n, d], a copy for each head, or [b, p, g, r, e], one for each query head of the group
    copies = value if value.ndim > len(shape) else value.reshape(*shape[:3], -1, shape[3])
    axis = copies.ndim - 2
    return jax.vmap(lambda copy: edit(copy, hook), axis, axis)(copies).reshape(value.shape)


def _shift(shift: jax.Array, value: jax.Array, hook: Hook) -> jax.Array:
    """Add zeros with respect to which the gradient is taken.

    If the per-head copies of the residual are edited, k, v and the inputs of the projections have more heads than
    otherwise. These heads share the shift, and its gradient is the sum over them.
    """
    if shift.ndim < value.ndim:
        # [b, p, d] -> [b, p, 1, d]
        shift = shift[:, :, None]
    elif shift.shape != value.shape:
        # [b, p, g, e] -> [b, p, h, e]
        shift = jnp.repeat(shift, value.shape[2] // shift.shape[2], axis=2)
    return value + shift


def _as_shared(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The shared value of equal per-head copies: their mean."""
    if value.shape == shape:
        return value
    if value.ndim > len(shape):
        # [b, p, n, d] -> [b, p, d]
        return jnp.mean(value, axis=2)
    # [b, p, g, r, e] -> [b, p, g, e]
    return jnp.mean(value.reshape(*shape[:3], -1, shape[3]), axis=3)
