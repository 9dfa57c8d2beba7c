"""Requests of a model: the user's inputs and functions, traced in their present state, as `run_compiled` takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp

from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooks.tracing import Traced, traced
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.gradients import Metric
from gemma3_jax.run.request import Request, check_phases, new_request
from gemma3_jax.run.selection import Edits, ReducedCapture, ReturnType
from gemma3_jax.run.traced import activation_dtype, output_of, with_traced_functions
from gemma3_jax.types import IntegersLike, PyTree


class Options(TypedDict, total=False):
    """The options of `new_request` that requests of a model take."""

    stop_at_layer: int | None
    logits_at: IntegersLike | None
    return_type: ReturnType


class RunOptions(TypedDict, total=False):
    """The options of every method of `HookedGemma3` that runs the model; `run_with_cache` describes them."""

    stop_at_layer: int | None
    attention_mask: IntegersLike | None
    positions: IntegersLike | None
    segment_ids: IntegersLike | None
    labels: IntegersLike | None
    logits_at: IntegersLike | None


class CaptureOptions(RunOptions, total=False):
    """The options of the methods that capture."""

    remove_batch_dim: bool
    pos_slice: int | slice | None


def request_of(
    model: Model, inputs: Inputs, capture: ReducedCapture = (), edits: Edits = (), **options: Unpack[Options]
) -> Request:
    """A request for `run_compiled`, with the user's functions traced in their present state.

    Args:
        model: the model.
        inputs: as `model.inputs` returns them.
        capture: as in `forward`.
        edits: (name, edit) pairs.
        **options: options of `new_request`.
    """
    request = new_request(
        model.config,
        inputs.tokens,
        capture,
        edits,
        inputs.attention_mask,
        positions=inputs.positions,
        segment_ids=inputs.segment_ids,
        labels=inputs.labels,
        **options,
    )
    check_phases(request)
    return with_traced_functions(request, activation_dtype(model.params))


def traced_metric(
    model: Model,
    request: Request,
    metric: Metric,
    where: str = "the metric",
    check: Callable[[PyTree], jax.Array] = jnp.asarray,
) -> Traced:
    """A metric of the request's result, traced in its present state; `check` is applied to the result of the metric."""
    out = output_of(request, activation_dtype(model.params))
    return traced(metric, out, where=where, call=lambda metric, out: check(metric(out)))
