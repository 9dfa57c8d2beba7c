"""The rows and positions of captured values that a run returns, and whether they have a batch axis.

Axes: b batch, p position, n kept positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.cache.components import require_whole
from gemma3_jax.hooked.buckets import bucket, in_bucket
from gemma3_jax.hooked.cropping import cropped
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.inputs import Inputs, section
from gemma3_jax.run.forward import run
from gemma3_jax.run.gradients import Metric, gradients
from gemma3_jax.run.request import Output, Request
from gemma3_jax.sites.table import site, token_axis
from gemma3_jax.types import Integers, IntegersLike, Params

Result = TypeVar("Result")


@flax.struct.dataclass
class Cut:
    """The part of the results that a run returns; a pytree, so that other positions do not recompile.

    Attributes:
        columns: [n] int32, the columns of captured values to keep; None for all columns.
        remove_batch_dim: whether to drop the batch axis (static).
        rows: number of rows to keep, of the output too, if others were added for a mesh; or None (static).
    """

    columns: Integers | None = None
    remove_batch_dim: bool = flax.struct.field(pytree_node=False, default=False)
    rows: int | None = flax.struct.field(pytree_node=False, default=None)


def in_bucket_or_exact(
    compiled: Callable[[Request, Cut, Metric | None], tuple[Result, ActivationCache]],
    params: Params,
    request: Request,
    cut: Cut,
    metric: Traced | None = None,
) -> tuple[Result, ActivationCache]:
    """`compiled(request, cut, metric)`, for the bucket of its length where that is exact.

    The results have the shapes of `request` in both cases. See `gemma3_jax.hooked.buckets`.

    Args:
        compiled: runs `run_and_cut` or `gradients_and_cut`, compiled.
        params: parameter pytree.
        request: the request at the prompt's length.
        cut: the cut of its results.
        metric: of the result, if gradients of one are taken.
    """
    found = in_bucket(params, request, metric)
    if found is None or cut.rows is not None:
        return compiled(request, cut, metric)
    kept, wide = request.source.shape[1], cut
    if cut.columns is not None:
        kept = len(cut.columns)
        extra = bucket(kept, shortest=1) - kept
        wide = dataclasses.replace(cut, columns=np.pad(cut.columns, (0, extra), mode="edge"))
    try:
        return cropped(compiled(found[0], wide, found[1]), request, kept)
    except (TypeError, ValueError) as error:
        failed = error
    compiled(request, cut, metric)  # raises the same error, with the shapes of the prompt in its message
    raise failed


def run_and_cut(params: Params, request: Request, cut: Cut) -> tuple[Output, ActivationCache]:
    """`run`, and the cut of its cache, as one program."""
    out, cache = run(params, request)
    if cut.rows is not None:
        out = jax.tree.map(lambda x: x[: cut.rows] if x.ndim else x, out)  # a loss has no rows
    return out, _cut_cache(cache, cut)


def gradients_and_cut(
    params: Params, request: Request, cut: Cut, metric: Metric | None, *, named: tuple[str, ...]
) -> tuple[jax.Array, ActivationCache]:
    """`gradients`, and the cut of its cache, as one program."""
    value, cache = gradients(params, request, metric, named=named)
    return value, _cut_cache(cache, cut)


def cut_inputs(inputs: Integers, cut: Cut) -> Integers:
    """Token ids or a mask [b, p] with the rows and columns of the cut, and without the batch axis if that is asked."""
    inputs = inputs[: cut.rows]
    inputs = inputs if cut.columns is None else inputs[:, cut.columns]
    return inputs[0] if cut.remove_batch_dim else inputs


def _cut_cache(cache: ActivationCache, cut: Cut) -> ActivationCache:
    """The cache with these rows and positions, and without the batch axis if that is asked for."""
    cache = cache if cut.rows is None else cache.sliced(batch=slice(cut.rows))
    cache = cache if cut.columns is None else _at_columns(cache, cut.columns)
    return cache.remove_batch_dim() if cut.remove_batch_dim else cache


def _at_columns(cache: ActivationCache, columns: Integers) -> ActivationCache:
    """The cache, and its gradients, at these tokens; scores and patterns keep all keys."""
    require_whole(cache, cache)

    def at(path: tuple[jax.tree_util.KeyEntry, ...], x: jax.Array) -> jax.Array:
        name = path[-1].key
        if not {"p", "k"} & set(site(name).axes.split()):
            return x
        return jnp.take(x, columns, token_axis(name), mode="clip")

    return jax.tree_util.tree_map_with_path(at, cache)


def checked_cut(
    inputs: Inputs, remove_batch_dim: bool, pos_slice: int | slice | None, logits_at: IntegersLike | None
) -> Cut:
    """The cut that the arguments of a run describe.

    Raises:
        ValueError: they select nothing, or exclude each other; or the batch has more than one row to drop.
    """
    b, p = inputs.tokens.shape
    if pos_slice is not None and logits_at is not None:
        raise ValueError("pos_slice and logits_at both choose positions of the logits' sites; give one of them")
    if remove_batch_dim and b != 1:
        raise ValueError(f"remove_batch_dim needs a batch of 1; this one has {b} rows")
    if pos_slice is None:
        return Cut(None, remove_batch_dim)
    columns = np.arange(p, dtype=np.int32)[section("pos_slice", pos_slice)]
    if not columns.size:
        raise ValueError(f"pos_slice does not select a position; the input has {p} positions")
    return Cut(columns, remove_batch_dim)
