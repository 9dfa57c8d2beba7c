"""The user's functions of a request, traced in their present state for the shapes of the run.

Axes: b batch, p position, k key position, V vocabulary, h query heads, g key/value heads, d hidden_size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.hooks.interception import Edit, Hook, Reading, at_least_float32, call_edit
from gemma3_jax.hooks.needs import nested, phases, with_functions
from gemma3_jax.hooks.reductions import Steps, is_ready
from gemma3_jax.hooks.tracing import Traced, traced
from gemma3_jax.run.request import Request
from gemma3_jax.sites.names import block, layer_of
from gemma3_jax.sites.table import HEAD_COPIES, axis_size, site
from gemma3_jax.types import Params


def with_traced_functions(request: Request, dtype: DTypeLike, keys: int | None = None) -> Request:
    """The request with every user function traced in its present state: see `gemma3_jax.hooks.tracing`.

    Args:
        request: as `new_request` returns it.
        dtype: dtype of the model's activations.
        keys: number of columns of the KV cache, if the run continues a text.
    """
    moment = object()

    def trace_edit(name: str, edit: Edit) -> Edit:
        value = _value(request, name, dtype, keys)
        value = jax.ShapeDtypeStruct(value.shape, at_least_float32(value.dtype))
        trace = functools.partial(traced, where=f"the edit at {name}", call=call_edit, moment=moment)
        hook = _hook(request, name, keys)
        read = [other for each in nested(edit) if isinstance(each, Reading) for other in each.sites]
        if read:
            shapes: Any = {other: _value(request, other, dtype, keys) for other in read}
            hook = dataclasses.replace(hook, read=shapes)
        return with_functions(edit, value, hook, trace)

    def trace_reduction(name: str, steps: Steps | Traced | None) -> Steps | Traced | None:
        if steps is None or is_ready(steps):
            return steps
        where = f"the reduction {steps} at {name}"
        return traced(steps, _value(request, name, dtype, keys), _hook(request, name, keys), where=where, moment=moment)

    # Edits that do not act in this phase are not traced for its shapes.
    acting = {
        name: [each for each in several if request.phase in phases(each)] for name, several in request.edits.items()
    }
    return dataclasses.replace(
        request,
        edits={name: tuple(trace_edit(name, edit) for edit in several) for name, several in acting.items()},
        reductions=tuple(map(trace_reduction, request.names, request.reductions)),
    )


def activation_dtype(params: Params) -> np.dtype:
    """The dtype in which a model with these parameters computes."""
    return np.dtype(params["embed"]["weight"].dtype)


def output_of(request: Request, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the logits, the residual stream or the embedding that the request returns."""
    b, p = request.source.shape[:2]
    if request.return_type == "embedding":
        return jax.ShapeDtypeStruct((b, axis_size("n", request.config, b, p)), jnp.float32)
    if request.stop_at_layer is not None:
        return jax.ShapeDtypeStruct((b, p, request.config.hidden_size), dtype)
    return jax.ShapeDtypeStruct((b, _logits_of(request), request.config.vocab_size), jnp.float32)


def _logits_of(request: Request) -> int:
    """The number of positions of each row with logits."""
    return request.source.shape[1] if request.logits_at is None else jnp.atleast_1d(request.logits_at).shape[-1]


def _value(request: Request, name: str, dtype: DTypeLike, keys: int | None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a site's value in the run."""
    row, layer = site(name), layer_of(name)
    b, p = request.source.shape[:2]
    letters = row.axes.split()
    edited = [] if layer is None else [copy for copy in HEAD_COPIES if block(layer, copy) in request.edits]
    if "hook_attn_in" in edited:
        # Every query head has its own keys and values.
        letters = ["h" if letter == "g" else letter for letter in letters]
    if edited and name.endswith((".attn.q.hook_in", ".attn.k.hook_in", ".attn.v.hook_in")):
        own = "hook_attn_in" in edited or name.endswith(".q.hook_in")
        letters = ["b", "p", "h" if own else "g", "d"]
    sizes = {letter: axis_size(letter, request.config, b, p) for letter in letters}
    if name.startswith("unembed."):
        sizes["p"] = _logits_of(request)
    if keys is not None and letters[-1] == "k":
        sizes["k"] = keys
    shape = tuple(sizes[letter] for letter in letters)
    return jax.ShapeDtypeStruct(shape, dtype if row.dtype == "activation" else row.dtype)


def _has_documents(request: Request, keys: int | None) -> bool:
    """Whether rows may hold several documents: see `positions.packed_documents`."""
    inferred = request.positions is not None and request.attention_mask is None and keys is None
    return request.segment_ids is not None or inferred


def _hook(request: Request, name: str, keys: int | None) -> Hook:
    """The `Hook` of a site in the run, with shapes in place of arrays."""
    b, p = request.source.shape[:2]
    chosen = name.startswith("unembed.") and request.logits_at is not None
    n = _logits_of(request) if chosen else p
    integers: Callable[..., Any] = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Hook(
        name,
        layer_of(name),
        integers((b, n)),
        integers((b, n)) if chosen or request.attention_mask is not None else None,
        integers((b, n)) if _has_documents(request, keys) else None,
        None if keys is None else integers((b, keys)),
        None if keys is None else integers((b, keys)),
        request.phase,
    )
