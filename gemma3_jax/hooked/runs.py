"""Runs of a model with captures, gradients and edits.

Axes: b batch, p position, n chosen positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Unpack, overload

import jax
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.elsewhere import knows_arguments_from_elsewhere
from gemma3_jax.hooked import tokenizer as text
from gemma3_jax.hooked.cut import Cut, checked_cut, cut_inputs, gradients_and_cut, in_bucket_or_exact, run_and_cut
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooked.requests import CaptureOptions, request_of, traced_metric
from gemma3_jax.hooked.rows import rows_on_mesh, with_more_rows
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.gradients import Metric, differentiable, scalar
from gemma3_jax.run.request import Output, Request
from gemma3_jax.run.selection import Edits, OneArray, ReducedCapture, ReturnType
from gemma3_jax.types import IntegersLike


@overload
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = ...,
    *,
    return_type: Literal["logits"] = ...,
    incl_bwd: bool = ...,
    loss_fn: Metric | None = ...,
    **options: Unpack[CaptureOptions],
) -> tuple[jax.Array, ActivationCache]: ...
@overload
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = ...,
    *,
    return_type: OneArray,
    **options: Unpack[CaptureOptions],
) -> tuple[jax.Array, ActivationCache]: ...
@overload
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = ...,
    *,
    return_type: Literal["both"],
    **options: Unpack[CaptureOptions],
) -> tuple[tuple[jax.Array, jax.Array], ActivationCache]: ...
@overload
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = ...,
    *,
    return_type: None,
    **options: Unpack[CaptureOptions],
) -> tuple[None, ActivationCache]: ...
@overload
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = ...,
    *,
    return_type: ReturnType,
    **options: Unpack[CaptureOptions],
) -> tuple[Output, ActivationCache]: ...
@knows_arguments_from_elsewhere
def run_with_cache(
    model: Model,
    input: Input,
    names_filter: ReducedCapture | None = None,
    *,
    return_type: ReturnType = "logits",
    stop_at_layer: int | None = None,
    attention_mask: IntegersLike | None = None,
    positions: IntegersLike | None = None,
    segment_ids: IntegersLike | None = None,
    labels: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
    remove_batch_dim: bool = False,
    pos_slice: int | slice | None = None,
    incl_bwd: bool = False,
    loss_fn: Metric | None = None,
) -> tuple[Output, ActivationCache]:
    """Run the model and capture activations, and with `incl_bwd` also their gradients.

    Args:
        input: text, texts, token ids, or what a tokenizer returns: see `HookedGemma3`.
        names_filter: sites to capture: a name, a glob, a list of them, or a predicate on names. None captures every
            site, including the per-head copies of the residual stream; for a large model, name the sites that you
            need. A mapping from names or globs to functions, of `gemma3_jax.reductions` or your own, captures the
            results of the functions.
        return_type: "logits", "loss" (mean next-token cross-entropy in nats), "loss_per_row" (the mean of each
            row, [b]), "both" (logits and "loss"), "embedding" (of a model with an embedding head, [b, n] float32:
            see `embed`), or None, which stops the run after the last captured site.
        stop_at_layer: run only the blocks before this one and return the residual stream entering it.
        attention_mask: [b, p], 1 at real tokens and 0 at padding; by default 0 at padding tokens at the
            ends of rows.
        positions: [b, p] integer positions for the rotary embedding, as in `forward`.
        segment_ids: [b, p] integers, the document of each token; documents do not attend to each other, as in
            `forward`.
        labels: [b, p] the tokens that a loss predicts, as in `forward`; -100 does not count.
        logits_at: compute logits only at these positions, [], [n] or [b, n]. They count from each row's first real
            token, and -1 is its last, as in `forward`.
        remove_batch_dim: drop the batch axis of the captured activations; the batch must be 1.
        pos_slice: capture only these columns of every site with positions (an int keeps an axis of length 1).
            They are taken on the device, and other columns do not recompile. In rows that are padded on the right,
            -1 may be padding: `reductions.At(-1)` takes each row's last token.
        incl_bwd: also return the gradient of `loss_fn` at every captured site: `cache.grads[name]`. The first
            result is then the value of `loss_fn`. `grad_at` is the pure function for this.
        loss_fn: `loss_fn(logits) -> []`, any scalar; by default the mean next-token cross-entropy. With
            return_type="embedding" it takes the embeddings [b, n].

    Returns:
        (the result of `return_type`, `ActivationCache`).

    Raises:
        UnknownSite: a name in `names_filter` is not a site.
        ValueError: arguments do not match, this call never runs a site, or ids are outside the vocabulary.
        TypeError: a reduction is not callable.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> _, cache = model.run_with_cache("ba ke lo", ["blocks.*.hook_resid_post"])
    >>> cache["resid_post", -1].shape
    (1, 4, 96)
    """
    keep = names_filter if names_filter is not None else "**"
    result = "loss" if incl_bwd and loss_fn is None else return_type
    inputs = text.inputs(model, input, attention_mask, positions, segment_ids, result, labels)
    cut = checked_cut(inputs, remove_batch_dim, pos_slice, logits_at)
    if not incl_bwd:
        if loss_fn is not None:
            raise ValueError("loss_fn needs incl_bwd=True")
        if not isinstance(keep, Mapping):
            inputs, cut = _filled(model, inputs, cut, logits_at)
        request = request_of(
            model, inputs, keep, stop_at_layer=stop_at_layer, logits_at=logits_at, return_type=return_type
        )
        return _run(model, request, cut)
    if return_type not in ("logits", "embedding"):
        raise ValueError(
            f"return_type is {return_type!r}; with incl_bwd the result is the value of loss_fn (the loss): "
            "leave return_type out"
        )
    if return_type == "embedding" and loss_fn is None:
        raise ValueError("the gradient of an embedding needs a loss_fn(embedding) -> []")
    request = request_of(
        model,
        inputs,
        stop_at_layer=stop_at_layer,
        logits_at=logits_at,
        return_type=result,
    )
    metric = None if loss_fn is None else traced_metric(model, request, loss_fn, "loss_fn", scalar)
    named = differentiable(model.config, keep, stop_at_layer, return_type)

    def compiled(request: Request, cut: Cut, metric: Metric | None) -> tuple[jax.Array, ActivationCache]:
        return run_compiled(gradients_and_cut, model.params, request, cut, metric, replicate=False, named=named)

    value, cache = in_bucket_or_exact(compiled, model.params, request, cut, metric)
    return value, _completed(model, cache, request, cut)


@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: None = ...,
    return_type: OneArray = ...,
    **options: Unpack[CaptureOptions],
) -> jax.Array: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: None = ...,
    return_type: Literal["both"],
    **options: Unpack[CaptureOptions],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: None = ...,
    return_type: None,
    **options: Unpack[CaptureOptions],
) -> None: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: None = ...,
    return_type: ReturnType,
    **options: Unpack[CaptureOptions],
) -> Output: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: ReducedCapture,
    return_type: OneArray = ...,
    **options: Unpack[CaptureOptions],
) -> tuple[jax.Array, ActivationCache]: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: ReducedCapture,
    return_type: Literal["both"],
    **options: Unpack[CaptureOptions],
) -> tuple[tuple[jax.Array, jax.Array], ActivationCache]: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: ReducedCapture,
    return_type: None,
    **options: Unpack[CaptureOptions],
) -> tuple[None, ActivationCache]: ...
@overload
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = ...,
    *,
    names_filter: ReducedCapture,
    return_type: ReturnType,
    **options: Unpack[CaptureOptions],
) -> tuple[Output, ActivationCache]: ...
@knows_arguments_from_elsewhere
def run_with_hooks(
    model: Model,
    input: Input,
    fwd_hooks: Edits = (),
    *,
    names_filter: ReducedCapture | None = None,
    return_type: ReturnType = "logits",
    stop_at_layer: int | None = None,
    attention_mask: IntegersLike | None = None,
    positions: IntegersLike | None = None,
    segment_ids: IntegersLike | None = None,
    labels: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
    remove_batch_dim: bool = False,
    pos_slice: int | slice | None = None,
) -> Output | tuple[Output, ActivationCache]:
    """Run the model with edits.

    Args:
        input: text, texts, token ids, or what a tokenizer returns: see `HookedGemma3`.
        fwd_hooks: (name, edit) pairs, one such pair, or {name: edit}; the name of a pair may be a glob, a list or
            a predicate, and `edit(value, hook)` returns the new value. Pairs on one site run in their order.
        names_filter: sites to capture from the edited run. None captures nothing here, and everything in
            `run_with_cache`.

    The other arguments are those of `run_with_cache`.

    Returns:
        The result of `return_type`; with `names_filter`, a pair of it and the `ActivationCache`.

    Raises:
        UnknownSite, ValueError, TypeError: as in `run_with_cache`, for hooks too; or a hook returns a value of
            another shape, stores values or needs concrete numbers.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> logits = model.run_with_hooks("ba ke lo", [("blocks.1.hook_resid_post", lambda value, hook: 0 * value)])
    >>> logits.shape
    (1, 4, 104)
    """
    inputs = text.inputs(model, input, attention_mask, positions, segment_ids, return_type, labels)
    cut = checked_cut(inputs, remove_batch_dim, pos_slice, logits_at)
    if not fwd_hooks and not isinstance(names_filter, Mapping):
        inputs, cut = _filled(model, inputs, cut, logits_at)
    request = request_of(
        model,
        inputs,
        () if names_filter is None else names_filter,
        fwd_hooks,
        stop_at_layer=stop_at_layer,
        logits_at=logits_at,
        return_type=return_type,
    )
    out, cache = _run(model, request, cut)
    return out if names_filter is None else (out, cache)


def _filled(model: Model, inputs: Inputs, cut: Cut, logits_at: IntegersLike | None) -> tuple[Inputs, Cut]:
    """The inputs with as many rows as the mesh divides, and the cut that drops those that were added.

    Not for runs with functions, which would see these rows.
    """
    b = inputs.tokens.shape[0]
    rows = rows_on_mesh(model.params, b)
    if rows == b or (logits_at is not None and np.ndim(logits_at) == 2):
        return inputs, cut
    return with_more_rows(inputs, rows - b), dataclasses.replace(cut, rows=b)


def _run(model: Model, request: Request, cut: Cut) -> tuple[Output, ActivationCache]:
    def compiled(request: Request, cut: Cut, metric: Metric | None) -> tuple[Output, ActivationCache]:
        return run_compiled(run_and_cut, model.params, request, cut, replicate=False)

    out, cache = in_bucket_or_exact(compiled, model.params, request, cut)
    return out, _completed(model, cache, request, cut)


def _completed(model: Model, cache: ActivationCache, request: Request, cut: Cut) -> ActivationCache:
    """The cache with parameters, tokens and their mask, which do not pass through the compiled function."""
    tokens, mask = request.source, request.attention_mask
    mask = None if mask is None else cut_inputs(mask, cut)
    return cache.with_params(model.params).with_inputs(cut_inputs(tokens, cut), mask)
