"""The gradient of any scalar at any set of sites, by one backward pass.

Axes: b batch, p position, h query heads, g key/value heads, r = h / g, n either kind of heads.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import Capture, Edits, captured_names, forward, placed_edits
from gemma3_jax.hooks import Edit, Hook
from gemma3_jax.sites import site

Metric = Callable[..., jax.Array]


def grad_at(
    config: Gemma3Config,
    params: Mapping[str, Any],
    tokens: jax.Array,
    names: Capture,
    metric: Metric | None = None,
    *,
    edits: Edits | None = None,
    attention_mask: jax.Array | None = None,
    metric_sites: Capture = (),
    logits_at: Any = None,
    stop_at_layer: int | None = None,
) -> tuple[jax.Array, ActivationCache]:
    """The value of a metric, the activations at the named sites, and the metric's gradients there. Pure.

    A site's gradient has the site's shape and is float32: how the metric moves per unit that is added to the value
    there, all else running on. Sites that share a value (`hook_out` and `attn.hook_in`) each have their own, as their
    edits reach different places; see docs/sites.md. Costs about three forward passes, whatever the number of sites;
    memory is that of a backward pass without the parameters' gradients, and the named sites twice.

    Args:
        config: shape of the model.
        params: parameter pytree.
        tokens: [b, p] integer ids.
        names: sites of which to take the gradient. Globs leave out the token ids, which have none.
        metric: `metric(logits) -> []`; by default the mean next-token cross-entropy. With `metric_sites`,
            `metric(logits, cache)`, where the cache holds those sites.
        edits: as in `forward`; the gradient is that at the edited value.
        attention_mask: [b, p], 1 at real tokens.
        metric_sites: sites that the metric reads.
        logits_at: as in `forward`.
        stop_at_layer: as in `forward`; the metric is given the residual stream in place of logits.

    Returns:
        The metric, and a cache of the values at `names`, whose `.grads` holds the gradients.

    Raises:
        UnknownSite: a name that no site has.
        ValueError: `names` selects no site but the token ids; the metric returns no scalar; arguments that `forward`
            refuses, for a loss where there is no metric.

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
    named = _differentiable(config, names, stop_at_layer)
    seen = captured_names(config, metric_sites, stop_at_layer=stop_at_layer)
    edits = edits or {}

    def run(capture: Capture, edits: Edits) -> tuple[jax.Array, ActivationCache]:
        return forward(
            config,
            params,
            tokens,
            capture,
            edits,
            attention_mask,
            logits_at=logits_at,
            stop_at_layer=stop_at_layer,
            return_type="loss" if metric is None else "logits",
        )

    # As they are without the shifts, of which those at the copies for each head give others to q, k and v.
    shapes = {name: each.shape for name, each in jax.eval_shape(lambda: run([*named, *seen, *edits], edits)[1]).items()}
    placed = placed_edits(config, edits, jnp.shape(tokens), stop_at_layer=stop_at_layer)

    def value_at(shifts: dict[str, jax.Array]) -> tuple[jax.Array, ActivationCache]:
        out, cache = run([*named, *seen], _with_shifts(placed, shifts, shapes))
        values = {name: _as_shared(cache[name], shapes[name]) for name in cache}
        read = ActivationCache(config, {name: values[name] for name in seen})
        value = out if metric is None else _scalar(metric(out, read) if seen else metric(out))
        return value, ActivationCache(config, {name: values[name] for name in named})

    zeros = {name: jnp.zeros(shapes[name], jnp.float32) for name in named}
    (value, cache), grads = jax.value_and_grad(value_at, has_aux=True)(zeros)
    return value, ActivationCache(config, cache, grads=ActivationCache(config, {name: grads[name] for name in named}))


def _differentiable(config: Gemma3Config, names: Capture, stop_at_layer: int | None) -> tuple[str, ...]:
    found = captured_names(config, names, stop_at_layer=stop_at_layer)
    kept = tuple(name for name in found if site(name).dtype != "int32")
    if not kept:
        raise ValueError(f"{names} selects no site that has a gradient; the token ids have none")
    return kept


def _scalar(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the metric returned {value.dtype} of shape {value.shape}; a gradient needs one real number")
    return value.astype(jnp.float32)


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
    """Edit every copy of a value as if it were the shared one, of that shape: to ask for gradients changes no edit."""
    if value.shape == shape:
        return edit(value, hook)
    # [b, p, n, d], a copy for each head, or [b, p, g, r, e], one for each query head of the group
    copies = value if value.ndim > len(shape) else value.reshape(*shape[:3], -1, shape[3])
    axis = copies.ndim - 2
    return jax.vmap(lambda copy: edit(copy, hook), axis, axis)(copies).reshape(value.shape)


def _shift(shift: jax.Array, value: jax.Array, hook: Hook) -> jax.Array:
    """Add zeros, of which the gradient is asked for.

    While the copies of the residual for each head are edited, k, v and the inputs of the projections have more heads
    than they share otherwise: the shift is shared among those, and its gradient is the sum over them.
    """
    if shift.ndim < value.ndim:
        # [b, p, d] -> [b, p, 1, d]
        shift = shift[:, :, None]
    elif shift.shape != value.shape:
        # [b, p, g, e] -> [b, p, h, e]
        shift = jnp.repeat(shift, value.shape[2] // shift.shape[2], axis=2)
    return value + shift


def _as_shared(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value that was copied for every head, as the one that is shared: the mean of its copies, which are equal."""
    if value.shape == shape:
        return value
    if value.ndim > len(shape):
        # [b, p, n, d] -> [b, p, d]
        return jnp.mean(value, axis=2)
    # [b, p, g, r, e] -> [b, p, g, e]
    return jnp.mean(value.reshape(*shape[:3], -1, shape[3]), axis=3)
