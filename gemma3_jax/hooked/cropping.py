"""The results of a run at the length of a bucket, cut to the length of the prompt.

A compiled cut would be a program for each length. On a CPU, NumPy cuts without one, and without a copy where the cut
is one block of memory. On other devices, one small program cuts all arrays.

Axes: b batch, p position, k key position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.hooks.reductions import At, Mean, Steps
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.run.request import Request
from gemma3_jax.sites.table import site, token_axis
from gemma3_jax.types import PyTree

Result = TypeVar("Result")
Shape = tuple[int, ...]


def cropped(result: tuple[Result, ActivationCache], request: Request, kept: int) -> tuple[Result, ActivationCache]:
    """The output and the cache of a run, with the shapes of `request`, of which the run had more columns.

    Args:
        result: the output [b, p, ...] or [...], and the cache.
        request: the request at the prompt's length.
        kept: number of positions of the captured values.
    """
    p = request.source.shape[1]
    reductions = dict(zip(request.names, request.reductions, strict=True))
    of_functions = {
        name: iter(jax.tree.leaves(steps.results)) for name, steps in reductions.items() if isinstance(steps, Traced)
    }

    def shape_of(path: Sequence[object], x: jax.Array) -> Shape:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names:
            # Logits and residual streams have an axis of tokens; losses and embeddings do not.
            return (x.shape[0], p, *x.shape[2:]) if x.ndim == 3 and request.logits_at is None else x.shape
        if names[0] in of_functions:
            exact: Shape = next(of_functions[names[0]]).shape
            return exact
        if request.logits_at is not None and names[0].startswith("unembed."):
            return x.shape
        steps = reductions.get(names[0])
        if isinstance(steps, Steps):
            return _reduced_shape(steps, names[0], x, p)
        return _captured_shape(names[0], x.shape, kept, p)

    leaves, structure = jax.tree.flatten(result)
    shapes = [shape_of(path, x) for path, x in jax.tree_util.tree_leaves_with_path(result)]
    del result
    cut: tuple[Result, ActivationCache] = jax.tree.unflatten(structure, _crop(leaves, shapes))
    return cut


def shortened(tree: PyTree, axis: int, size: int) -> PyTree:
    """The first `size` entries of every array along an axis."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for x in leaves]
    return jax.tree.unflatten(structure, _crop(leaves, shapes))


def _captured_shape(name: str, shape: Shape, kept: int, p: int) -> Shape:
    """The shape of a captured value [b, p, ...] or [p, ...], with `kept` tokens and p keys."""
    axes = site(name).axes.split()
    if not {"p", "k"} & set(axes):
        return shape
    tokens = token_axis(name)
    sizes = {axis: p if axis > tokens else kept for axis, letter in enumerate(axes) if letter in "pk"}
    missing = len(axes) - len(shape)  # without the batch axis
    return tuple(sizes.get(axis + missing, size) for axis, size in enumerate(shape))


def _reduced_shape(steps: Steps, name: str, x: jax.Array, p: int) -> Shape:
    """The shape of a reduced value: steps that neither choose positions nor average over them keep their axis."""
    if not {"p", "k"} & set(site(name).axes.split()) or any(isinstance(step, At | Mean) for step in steps.steps):
        return x.shape
    axis = token_axis(name, steps.layout)
    return (*x.shape[:axis], p, *x.shape[axis + 1 :])


def _crop(leaves: list[jax.Array], shapes: Sequence[Shape]) -> list[jax.Array]:
    """The start of each array, in these shapes; arrays that are the same stay the same."""
    keys = [(id(x), shape) for x, shape in zip(leaves, shapes, strict=True)]
    longer = {key: x for key, x in zip(keys, leaves, strict=True) if x.shape != key[1]}
    if any(isinstance(x, jax.core.Tracer) or not _in_host_memory(x) for x in longer.values()):
        cut = dict(zip(longer, _sliced(list(longer.values()), tuple(shape for _, shape in longer)), strict=True))
    else:
        cut = {key: _copied(x, key[1]) for key, x in longer.items()}
    return [cut.get(key, x) for key, x in zip(keys, leaves, strict=True)]


def _in_host_memory(x: jax.Array) -> bool:
    return x.is_fully_addressable and {device.platform for device in x.devices()} == {"cpu"} and len(x.devices()) == 1


def _copied(x: jax.Array, shape: Shape) -> jax.Array:
    """The start of an array in host memory, on the same device, through a NumPy view."""
    part = np.asarray(x)[tuple(map(slice, shape))]
    return jax.device_put(part, x.sharding if x.committed else None)


@functools.partial(jax.jit, static_argnames="shapes")
def _sliced(arrays: list[jax.Array], shapes: tuple[Shape, ...]) -> list[jax.Array]:
    return [x[tuple(map(slice, shape))] for x, shape in zip(arrays, shapes, strict=True)]
