"""The user's functions of a request, traced in their present state for the shapes of the run.

Axes: b batch, p position, k key position, V vocabulary, h query heads, g key/value heads, d hidden_size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.hooks.axes import DependsOnLength
from gemma3_jax.hooks.interception import Edit, Hook, Reading, at_least_float32, call_edit
from gemma3_jax.hooks.longer import Growing, Longer, LongerMetric, longer
from gemma3_jax.hooks.needs import nested, phases, with_functions
from gemma3_jax.hooks.reductions import Steps, is_ready
from gemma3_jax.hooks.tracing import Traced, traced
from gemma3_jax.run.request import Reduced, Request
from gemma3_jax.sites.names import block, layer_of
from gemma3_jax.sites.table import HEAD_COPIES, axis_size, site
from gemma3_jax.types import Params, PyTree


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
        hook = _hook(request, name, keys)
        read = [other for each in nested(edit) if isinstance(each, Reading) for other in each.sites]
        if read:
            shapes: Any = {other: _value(request, other, dtype, keys) for other in read}
            hook = dataclasses.replace(hook, read=shapes)

        def trace(edit: Edit, values: Sequence[jax.ShapeDtypeStruct], hook: Hook) -> Edit:
            if isinstance(edit, Traced):
                return edit
            return traced(edit, *values, hook, where=f"the edit at {name}", call=call_edit, moment=moment)

        return with_functions(edit, [value], hook, trace)

    def trace_reduction(name: str, steps: Reduced) -> Reduced:
        if not isinstance(steps, Steps) or is_ready(steps):
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


def with_longer_functions(request: Request, wide: Request, dtype: DTypeLike) -> Request:
    """`wide`, with the traced functions of `request` for its columns.

    Args:
        request: as `with_traced_functions` returns it.
        wide: the same request with more columns, which `present` marks.
        dtype: dtype of the model's activations.

    Raises:
        DependsOnLength: a function's results may depend on the number of columns; the message names it.
    """
    columns = wide.source.shape[1] - request.source.shape[1]
    one_more = _with_one_more_column(request)

    def change(name: str, function: Edit, values: Sequence[jax.ShapeDtypeStruct], hook: Hook) -> Edit:
        if not isinstance(function, Traced):
            raise DependsOnLength(f"the edit at {name} is not traced")
        inputs = (values[0], hook), (values[1], _hook(one_more, name, None))
        grow = _growing(*inputs)
        with _naming(f"the edit at {name}"):
            traced_wide = longer(function, grow, columns, grow[:1])
        return Longer(traced_wide, wide.present, _indices(grow[0]), hook.attention_mask is not None)

    def longer_edit(name: str, edit: Edit) -> Edit:
        values = [_value(each, name, dtype, None) for each in (request, one_more)]
        values = [jax.ShapeDtypeStruct(x.shape, at_least_float32(x.dtype)) for x in values]
        return with_functions(edit, values, _hook(request, name, None), functools.partial(change, name))

    def longer_reduction(name: str, steps: Reduced) -> Reduced:
        if not isinstance(steps, Traced):
            return steps
        inputs = [(_value(each, name, dtype, None), _hook(each, name, None)) for each in (request, one_more)]
        with _naming(f"the reduction at {name}"):
            traced_wide = longer(steps, _growing(*inputs), columns)
        return Longer(traced_wide, None, (), inputs[0][1].attention_mask is not None)

    return dataclasses.replace(
        wide,
        edits={name: tuple(longer_edit(name, edit) for edit in several) for name, several in request.edits.items()},
        reductions=tuple(map(longer_reduction, request.names, request.reductions)),
    )


def longer_metric(metric: Traced, request: Request, wide: Request, dtype: DTypeLike) -> LongerMetric:
    """A traced metric of the result of `request` for that of `wide`; arguments and errors as above."""
    grow = _growing(*(output_of(each, dtype) for each in (request, _with_one_more_column(request))))
    with _naming("the metric"):
        function = longer(metric, grow, wide.source.shape[1] - request.source.shape[1], derivatives=True)
    assert wide.present is not None  # as in every request with more columns
    return LongerMetric(function, wide.present, _indices(grow[0]))


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except DependsOnLength as error:
        raise DependsOnLength(f"{what} ({error})") from None


def _with_one_more_column(request: Request) -> Request:
    """A request whose shapes show which axes have columns."""
    b, p = request.source.shape
    return dataclasses.replace(request, source=np.zeros((b, p + 1), np.int32))


def _growing(inputs: PyTree, one_more: PyTree) -> Growing:
    """For each leaf, which of its axes have columns, from its shape and that with one column more."""
    pairs = zip(jax.tree.leaves(inputs), jax.tree.leaves(one_more), strict=True)
    return tuple(tuple(a != b for a, b in zip(x.shape, y.shape, strict=True)) for x, y in pairs)


def _indices(grow: Sequence[bool]) -> tuple[int, ...]:
    return tuple(axis for axis, grows in enumerate(grow) if grows)


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
