"""The gradient of any scalar at any set of sites, by one backward pass.

Axes: b batch, p position, h query heads, g key/value heads, r = h / g, n either kind of heads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import Capture, Edits, captured_names, forward, next_token_loss, placed_edits
from gemma3_jax.hooks import Edit, Hook
from gemma3_jax.sites import shape_of, site

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
        ValueError: `embed.hook_in` by name, or a metric that returns no scalar.

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
    b, p = tokens.shape
    n = p if logits_at is None else jnp.atleast_1d(logits_at).shape[-1]
    shapes = {name: shape_of(name, config, b, n if name.startswith("unembed.") else p) for name in named}

    def run(shifts: dict[str, jax.Array]) -> tuple[jax.Array, ActivationCache]:
        shifted = _with_shifts(config, edits or {}, shifts, (b, p), stop_at_layer)
        out, cache = forward(
            config,
            params,
            tokens,
            [*named, *seen],
            shifted,
            attention_mask,
            logits_at=logits_at,
            stop_at_layer=stop_at_layer,
        )
        value = _apply(metric, out, cache, seen, tokens, attention_mask)
        return value, ActivationCache(config, {name: _as_shared(cache[name], shapes[name]) for name in named})

    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    (value, cache), grads = jax.value_and_grad(run, has_aux=True)(zeros)
    values = dict(cache)
    return value, ActivationCache(config, values, grads=ActivationCache(config, {name: grads[name] for name in named}))


def _differentiable(config: Gemma3Config, names: Capture, stop_at_layer: int | None) -> tuple[str, ...]:
    found = captured_names(config, names, stop_at_layer=stop_at_layer)
    kept = tuple(name for name in found if site(name).dtype != "int32")
    if not kept:
        raise ValueError(f"{names} has no gradient: it holds token ids")
    return kept


def _apply(metric, out, cache, seen, tokens, attention_mask) -> jax.Array:
    if metric is None:
        return next_token_loss(out, tokens, attention_mask)
    value = jnp.asarray(metric(out, cache) if seen else metric(out))
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the metric returned {value.dtype} of shape {value.shape}; a gradient needs one real number")
    return value.astype(jnp.float32)


def _with_shifts(
    config: Gemma3Config,
    edits: Edits,
    shifts: Mapping[str, jax.Array],
    shape: tuple[int, ...],
    stop_at_layer: int | None,
) -> dict[str, list[Edit]]:
    """The edits by canonical name, each site's followed by its shift."""
    placed = {name: [*given] for name, given in placed_edits(config, edits, shape, stop_at_layer=stop_at_layer).items()}
    for name, shift in shifts.items():
        placed.setdefault(name, []).append(jax.tree_util.Partial(_shift, shift))
    return placed


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
    """A value that was copied for every head, as the one that is shared."""
    if value.ndim > len(shape):
        return value[:, :, 0]
    return value if value.shape == shape else value[:, :, :: value.shape[2] // shape[2]]
