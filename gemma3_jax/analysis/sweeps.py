"""Many runs of one input, each with its own edits, as one compiled and batched computation.

Axes: n runs, c runs of a chunk, b batch, p position, d hidden_size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from gemma3_jax.config import Gemma3Config
from gemma3_jax.grids import named_grid
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of, traced_metric
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.hooks.indices import bad_index, may_index
from gemma3_jax.hooks.interception import Edit
from gemma3_jax.hooks.needs import indices_of
from gemma3_jax.hooks.restrictions import Index, check_values
from gemma3_jax.hooks.tracing import Traced, bad_index_message, check_callable, traced
from gemma3_jax.inputs import as_array, as_int32, positive
from gemma3_jax.meshes import part
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import run
from gemma3_jax.run.gradients import Metric
from gemma3_jax.run.request import Request, check_phases
from gemma3_jax.run.selection import Edits, captured_names, pairs_of, placed_edits
from gemma3_jax.run.traced import activation_dtype, with_traced_functions
from gemma3_jax.sites.names import block, layer_of, select
from gemma3_jax.types import IntegersLike, Params, PyTree

# Below this many tokens, a chunk leaves a matmul unit idle.
TOKENS_PER_CHUNK = 1024


class SweepOptions(TypedDict, total=False):
    """The options of `sweep` that other analyses pass on; see there."""

    logits_at: IntegersLike | None
    chunk_size: int | None
    memory_limit: float
    progress: bool
    resume: np.ndarray | None


def sweep(
    model: HookedGemma3,
    input: Input,
    edits: Callable[[PyTree], Edits],
    items: PyTree,
    metric: Metric,
    *,
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
    chunk_size: int | None = None,
    memory_limit: float = 2e9,
    progress: bool = True,
    resume: np.ndarray | None = None,
) -> np.ndarray:
    """Run the model on one input once for each item, with the edits of that item, and return the metric of every run.

    The items are traced, so one function is compiled for all of them. Runs are batched in chunks. A run skips the
    blocks before its first edit, because their output does not change, and starts from the residual stream of the
    unedited run. Under `jit`, `grad` or `vmap` the whole sweep is traced, without a progress bar and without skipping.

    Peak memory: the parameters, the residual streams [L + 1, b, p, d] of the unedited run, and `chunk_size` times
    `run_bytes`. The arrays that `edits` and `metric` hold come on top.

    Args:
        model: the model.
        input: text, texts or token ids; all runs have the same input.
        edits: `edits(item) -> {name: edit}`, the edits of one run in any form that `forward` takes, such as the pairs
            of `features.steer`; called once for all items.
        items: pytree of arrays [n, ...]; `edits` sees one slice of each, traced.
        metric: `metric(logits) -> array` for one run; called once for all items.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.
        logits_at: positions at which the metric needs logits; -1 is the last real token. The default computes
            logits at all positions, [b, p, V] for each run, which is most of the work for a small model.
        chunk_size: number of runs at a time; by default as many as make a good batch and fit in `memory_limit`.
        memory_limit: bytes that the runs of a chunk may take, on each device.
        progress: show a progress bar if the sweep takes longer than three seconds.
        resume: the result of an interrupted sweep with the same arguments; the sweep does only its unfinished runs.

    Returns:
        The stacked results of `metric`: a float32 NumPy array [n, ...], which shows the items of its extremes. After
        Ctrl-C, unfinished runs are NaN, and a warning says so.

    Raises:
        ValueError: an item has a layer, head, position or other index that does not exist; as in `forward`.

    >>> from gemma3_jax import TINY, HookedGemma3, edits
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> def ablated(item):
    ...     return {"blocks.*.attn.hook_z": edits.only(edits.Replace(0.0), layer=item["layer"], heads=item["head"])}
    >>> items = {"layer": [0, 1, 1], "head": [0, 0, 1]}
    >>> sweep(model, "ba ke lo ba ke", ablated, items, lambda logits: logits[0, -1].max()).shape
    (3,)
    """
    values = measured_sweep(
        model,
        input,
        edits,
        items,
        metric,
        check=_real_numbers,
        attention_mask=attention_mask,
        logits_at=logits_at,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        progress=progress,
        resume=resume,
    )[0]
    if not isinstance(values, np.ndarray):  # traced, as the items may be
        return values
    axes = "run", *(f"result {i}" for i in range(1, values.ndim))
    return named_grid(values, axes, "sweep", {"run": _item_texts(items)})


def _item_texts(items: PyTree) -> list[str]:
    """The numbers of each item, without its arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(items, is_leaf=lambda leaf: isinstance(leaf, list | tuple))
    named = [(jax.tree_util.keystr(path, simple=True), np.asarray(as_array(leaf))) for path, leaf in leaves]
    columns = [[f"{name} {x:.4g}".strip() for x in leaf.tolist()] for name, leaf in named if leaf.ndim == 1]
    texts = [", ".join(row) for row in zip(*columns, strict=True)]
    n = len(named[0][1])
    return [f"{i}: {text}" for i, text in enumerate(texts)] or [str(i) for i in range(n)]


def _real_numbers(value: PyTree) -> jax.Array:
    """The result of a metric in float32; ValueError for complex numbers, which a cast would cut."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"the metric returned {array.dtype}; it must return real numbers")
    return array.astype(jnp.float32)


def measured_sweep(
    model: HookedGemma3,
    input: Input,
    edits: Callable[[PyTree], Edits],
    items: PyTree,
    metric: Metric,
    *,
    check: Callable[[PyTree], jax.Array],
    attention_mask: IntegersLike | None = None,
    logits_at: IntegersLike | None = None,
    chunk_size: int | None = None,
    memory_limit: float = 2e9,
    progress: bool = True,
    resume: np.ndarray | None = None,
) -> tuple[np.ndarray, bool]:
    """`sweep` with a `check` of the result of the metric, before anything runs; and whether all runs were done."""
    check_callable("edits", edits)
    chunk_size = None if chunk_size is None else positive("chunk_size", chunk_size)
    if not memory_limit > 0:
        raise ValueError(f"memory_limit is {memory_limit}; it must be above 0, in bytes")
    request = request_of(model, model.inputs(input, attention_mask), logits_at=logits_at)
    measure = traced_metric(model, request, metric, check=check)
    items = jax.tree.map(_as_item, items, is_leaf=lambda leaf: isinstance(leaf, list | tuple))
    n = _length(items)
    edit = _traced_edits(request, edits, items, activation_dtype(model.params))
    n_logits = request.source.shape[1] if request.logits_at is None else np.atleast_1d(request.logits_at).shape[-1]
    if any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((request, model.params, measure, edit, items))
    ):
        chunk = chunk_size or _chunk_size(model.config, request.source.shape, n_logits, memory_limit, n, n, model.mesh)
        run_one = functools.partial(_measured, model.params, request, measure, edit)
        return jax.lax.map(run_one, items, batch_size=chunk), True

    first = _checked_layers(request, edit, items)
    skips = bool((first >= 0).all())
    streams = run_compiled(_residual_streams, model.params, request, replicate=False) if skips else None
    chunk = chunk_size or _chunk_size(
        model.config, request.source.shape, n_logits, memory_limit, n, len(set(first.tolist())), model.mesh
    )
    results = np.full((n, *measure.results.shape), np.nan, np.float32)
    if resume is not None:
        if np.shape(resume) != results.shape:
            raise ValueError(
                f"resume has shape {np.shape(resume)}; this sweep has {n} runs, and a result of shape {results.shape}"
            )
        results = np.array(resume, np.float32)
    pending = np.argsort(first, kind="stable")
    pending = pending[_unfinished(results, n)[pending]]
    chunk = math.ceil(len(pending) / max(1, math.ceil(len(pending) / chunk)))
    bar = tqdm(total=n, initial=n - len(pending), delay=3, unit="run", disable=not progress)
    finished = True
    try:
        for i in range(0, len(pending), max(chunk, 1)):
            at = pending[i : i + chunk]
            # The last chunk is padded with copies of its last run, so it uses the same program.
            padded = np.pad(at, (0, chunk - len(at)), mode="edge")
            start = jnp.int32(first[at].min()) if skips else None
            picked = jax.tree.map(lambda leaf, rows=padded: leaf[rows], items)
            results[at] = run_compiled(_chunk, model.params, request, measure, edit, picked, streams, start)[: len(at)]
            bar.update(len(at))
    except KeyboardInterrupt:
        finished, left = False, int(_unfinished(results, n).sum())
        if left == n:
            raise
        warnings.warn(f"interrupted: {left} of {n} runs are NaN; pass the result as `resume` to continue", stacklevel=3)
    finally:
        bar.close()
    return results, finished


def run_bytes(
    config: Gemma3Config,
    shape: tuple[int, ...],
    logits: int,
    itemsize: int = 4,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """Peak bytes of the activations of one run of tokens [b, p], on each device of a mesh.

    `logits` is the number of positions of each row that have logits; activations have `itemsize` bytes.
    """
    b, p, d, e = part("b", shape[0], mesh), shape[1], config.hidden_size, config.head_dim
    h, g = part("h", config.num_attention_heads, mesh), part("g", config.num_key_value_heads, mesh)
    # Norms and RoPE need float32 copies of their input and output; scores, pattern and its copy are [b, h, p, k].
    attention = p * (h + g) * e * (8 + 2 * itemsize) + 12 * h * p * p
    mlp = p * part("f", config.intermediate_size, mesh) * (4 + 3 * itemsize)
    head = 8 * logits * part("V", config.vocab_size, mesh)
    return b * (p * d * (8 + 4 * itemsize) + max(attention, mlp, head))


def _chunk_size(
    config: Gemma3Config,
    shape: tuple[int, ...],
    logits: int,
    memory_limit: float,
    n: int,
    starts: int,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """The runs per first layer, or a good batch if that is more, within the memory limit."""
    fits = int(memory_limit // run_bytes(config, shape, logits, mesh=mesh))
    target = max(math.ceil(n / starts), math.ceil(TOKENS_PER_CHUNK / math.prod(shape)))
    return max(1, min(n, fits, target))


def _as_item(leaf: ArrayLike) -> jax.Array:
    """An array of items; integers of 64 bits become int32, after a check that they fit."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(as_array(leaf))
    return jnp.asarray(as_int32("items", array) if array.dtype in (np.int64, np.uint64) else array)


def _length(items: PyTree) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(items)}
    if len(lengths) != 1 or 0 in lengths:
        shapes = jax.tree.map(jnp.shape, items)
        raise ValueError(f"items have shapes {shapes}; all must have the same first axis, with one entry for each run")
    return lengths.pop()


def _unfinished(results: np.ndarray, n: int) -> np.ndarray:
    """[n] bool: True for runs without a result."""
    return np.isnan(results).reshape(n, -1).any(axis=1)


@flax.struct.dataclass
class _Placed:
    """The result of `edits(item)`, checked as far as possible without the numbers in the item.

    Attributes:
        edits: {canonical name: edits}, as in a request.
        indices: for each key and each of its edits, the indices that restrict it.
        names: for each key, the canonical names of its sites (static).
    """

    edits: Mapping[str, Sequence[Edit]]
    indices: list[list[list[dict[str, Index]]]]
    names: tuple[tuple[str, ...], ...] = flax.struct.field(pytree_node=False)


def _traced_edits(request: Request, edits: Callable[[PyTree], Edits], items: PyTree, dtype: np.dtype) -> Traced:
    """A traced function from an item to its `_Placed` edits."""
    config, extent = request.config, request.extent

    def place(edits: Callable[[PyTree], Edits], item: PyTree) -> _Placed:
        returned = edits(item)
        if returned is None or not (pairs := pairs_of(returned)):
            raise TypeError(
                f"edits(item) returned {type(returned).__name__}; it must return {{name: edit}} or (name, edit) pairs"
            )
        each = dataclasses.replace(request, edits=placed_edits(config, returned, extent))
        check_phases(each)
        several = [edit if isinstance(edit, Sequence) else [edit] for _, edit in pairs]
        return _Placed(
            with_traced_functions(each, dtype).edits,
            [[indices_of(edit) for edit in key] for key in several],
            tuple(tuple(match.name for match in select(name, config)) for name, _ in pairs),
        )

    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), items)
    return traced(edits, item, where="edits(item)", call=place)


def _checked_layers(request: Request, edit: Traced, items: PyTree) -> np.ndarray:
    """[n]: the first block that each item's edits change; -1 for the embedding, L for sites after the blocks.

    Raises:
        ValueError: an item has a layer, head, position, row, feature, key or index that does not exist.
    """
    placed, functions = jax.device_get(run_compiled(_known_indices, None, edit, items))
    n = _length(items)
    first = np.full(n, request.config.num_hidden_layers)
    for names, edits in zip(placed.names, placed.indices, strict=True):
        for restrictions in edits:
            for indices in restrictions:
                check_values(indices, names, request.config, request.extent)
            layers = [each["layer"].reshape(n, -1).min(axis=1) for each in restrictions if "layer" in each]
            first = np.minimum(first, np.max(layers, axis=0) if layers else _first_layer(names, request.config))
    numbers = jax.device_get(jax.tree.leaves(items))
    for i in range(n):
        _check_function(
            edit, [*map(_as_index, edit.arrays), *(leaf[i] for leaf in numbers)], f"edits(item) of item {i}"
        )
        for function in functions:
            arrays = [None if array is None else array[i] for array in function.arrays]
            _check_function(function, arrays, f"an edit of item {i}")
    return first


def _known_indices(params: None, edit: Traced, items: PyTree) -> tuple[_Placed, list[Traced]]:
    """For all items [n, ...]: the restrictions of their edits, and the integers that their functions may index with."""

    def of_item(item: PyTree) -> tuple[_Placed, list[Traced]]:
        placed = edit(item)
        leaves = jax.tree.leaves(placed.edits, is_leaf=lambda node: isinstance(node, Traced))
        functions = [leaf for leaf in leaves if isinstance(leaf, Traced) and leaf.computation.indexed]
        return placed.replace(edits={}), list(map(_with_indices, functions))

    return jax.vmap(of_item)(items)


def _with_indices(function: Traced) -> Traced:
    """The function with None in place of arrays that cannot be an index."""
    arrays: PyTree = tuple(map(_as_index, function.arrays))
    return dataclasses.replace(function, arrays=arrays)


def _as_index(array: ArrayLike) -> ArrayLike | None:
    """The array, if it can be an index; else None."""
    return array if may_index(jax.typeof(array)) else None


def _check_function(function: Traced, values: Sequence[ArrayLike | None], where: str) -> None:
    """Raise ValueError if a function indexes out of range, given the values of some of its arrays and inputs."""
    if not function.computation.indexed:
        return
    pairs = zip(function.computation.jaxpr.invars, values, strict=False)
    bad = bad_index(function.computation.jaxpr, {x: np.asarray(value) for x, value in pairs if value is not None})
    if bad is not None:
        raise ValueError(bad_index_message(bad, where))


def _first_layer(names: Sequence[str], config: Gemma3Config) -> int:
    """The first block that has one of these sites; -1 for the embedding, L for sites after the blocks."""
    after = config.num_hidden_layers
    layers = [layer_of(name) for name in names]
    outside = [-1 if name.startswith("embed.") else after for name in names]
    return min(out if layer is None else layer for layer, out in zip(layers, outside, strict=True))


def _residual_streams(params: Params, request: Request) -> jax.Array:
    """[L + 1, b, p, d]: the residual stream entering each block, and the final norm."""
    names = captured_names(request.config, (block("*", "hook_in"), "ln_final.hook_in"))
    whole = (None,) * len(names)
    request = dataclasses.replace(request, names=names, reductions=whole, reduced=whole, return_type=None)
    _, cache = run(params, request)
    return jnp.stack(list(cache.values()))


def _measured(params: Params, request: Request, metric: Traced, edit: Traced, item: PyTree) -> jax.Array:
    """The metric of one item's run."""
    out, _ = run(params, dataclasses.replace(request, edits=edit(item).edits))
    return metric(out)


def _chunk(
    params: Params,
    request: Request,
    metric: Traced,
    edit: Traced,
    items: PyTree,
    streams: jax.Array | None,
    start: jax.Array | None,
) -> jax.Array:
    """[c, ...]: the metric of each run of a chunk."""
    if start is not None:
        embeddings = jax.lax.dynamic_index_in_dim(streams, start, keepdims=False)
        request = dataclasses.replace(request, source=embeddings, first_layer=start)
    return jax.vmap(functools.partial(_measured, params, request, metric, edit))(items)
