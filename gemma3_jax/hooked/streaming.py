"""Activations of many batches, copied to the host while the next batch runs.

Axes: b batch, p position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, cast

import jax
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.hooked.buckets import bucket
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooked.rows import rows_on_mesh, with_more_rows
from gemma3_jax.hooked.tokenizer import Input, inputs
from gemma3_jax.hooks.interception import Hook
from gemma3_jax.hooks.reductions import Steps
from gemma3_jax.hooks.tracing import traced
from gemma3_jax.meshes import own_rows
from gemma3_jax.positions import Extent
from gemma3_jax.run.selection import ReducedCapture, captures
from gemma3_jax.run.traced import activation_dtype
from gemma3_jax.sites.names import layer_of
from gemma3_jax.sites.table import shape_of, site


class Runnable(Model, Protocol):
    """A model that runs."""

    def run_with_cache(
        self, input: Input, names_filter: ReducedCapture | None = None, *, return_type: None
    ) -> tuple[None, ActivationCache]: ...


def activations(
    model: Runnable, batches: Iterable[Input], names_filter: ReducedCapture, *, whole: bool = False
) -> Iterator[ActivationCache]:
    """Run batches in order, and yield the activations of each batch in host memory.

    The next batch starts before the results of the current batch are copied, so the device computes while the host
    copies and the caller works. At most two batches of activations exist at a time, and a run stops after the last
    captured site. You can break out of the loop or interrupt it at any time; it holds no resources.

    Batches run at one of a few lengths, as in `run_with_cache`. Each length compiles at most once, and again for a
    batch with more rows than all before it of that length. A batch with fewer rows, such as the last one of a data set,
    is padded with copies of its last row; their results are removed. Sort texts by length to compute little padding.

    Args:
        batches: inputs as in `run_with_cache`; a mapping may also have positions and documents.
        names_filter: sites to capture, as in `run_with_cache`, with or without functions. A function must treat
            rows independently, and return arrays with the rows on their first axis.
        whole: with several processes, give each of them all rows; by default only those of its own devices, as in
            `ActivationCache.numpy`.

    Yields:
        An `ActivationCache` of NumPy arrays for each batch, equal to that of `run_with_cache`.

    Raises:
        UnknownSite, TypeError, ValueError: `names_filter` is wrong (raised at once), or a batch is wrong (the
            message has its number).

    >>> import numpy as np
    >>> from gemma3_jax import TINY, HookedGemma3, reductions
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> ids = np.arange(3, 53).reshape(10, 5)
    >>> last = {"blocks.1.hook_resid_post": reductions.At(-1)}
    >>> caches = model.activations([ids[:4], ids[4:8], ids[8:]], last)
    >>> [cache["resid_post", 1].shape[:2] for cache in caches]
    [(4, 1), (4, 1), (2, 1)]
    """
    if isinstance(batches, str | Mapping):
        raise TypeError("this is one batch; give an iterable of batches")
    if isinstance(names_filter, Iterable) and not isinstance(names_filter, str | Mapping):
        names_filter = tuple(names_filter)  # an iterator can be read only once
    if not captures(model.config, names_filter, Extent(1, None)):
        raise ValueError(f"names_filter {names_filter!r} does not match a site; name at least one")
    return _overlapped(_started(model, batches, names_filter), whole)


def _started(
    model: Runnable, batches: Iterable[Input], names_filter: ReducedCapture
) -> Iterator[tuple[ActivationCache, int]]:
    """The activations of each batch, possibly not computed yet, and its number of rows without padding."""
    most: dict[int, int] = {}  # most rows that ran, by the length at which a batch runs
    checked: set[int] = set()
    for number, batch in enumerate(batches):
        try:
            checked_batch = inputs(model, batch)
            b, p = checked_batch.tokens.shape
            if p not in checked:
                _check_rows(model, captures(model.config, names_filter, Extent(1, p)), p)
                checked.add(p)
            length = bucket(p)
            most[length] = max(rows_on_mesh(model.params, b), most.get(length, 0))
            filled = with_more_rows(checked_batch, most[length] - b, masked=False)
            _, cache = model.run_with_cache(filled, names_filter, return_type=None)
        except Exception as error:
            error.add_note(f"in batch {number}, counted from 0")
            raise
        yield cache, b


def _check_rows(model: Runnable, reductions: Mapping[str, Steps | None], p: int) -> None:
    """Raise ValueError if a function's results do not have the batch's rows on their first axis."""
    for name, steps in reductions.items():
        few, more = ([] if steps is None else _shapes(model, name, steps, b, p) for b in (2, 3))
        if any(shape[:1] != (2,) for shape in few) or more != [(3, *shape[1:]) for shape in few]:
            raise ValueError(
                f"the reduction {steps} at {name} returns {few} for 2 rows and {more} for 3; arrays must have the "
                "rows on their first axis, because a batch may be padded with rows that are removed again"
            )


def _shapes(model: Runnable, name: str, steps: Steps, b: int, p: int) -> list[tuple[int, ...]]:
    """The shapes of the arrays that a reduction returns for a batch of b rows and p positions."""
    row, dtype = site(name), activation_dtype(model.params)
    value = jax.ShapeDtypeStruct(shape_of(name, model.config, b, p), dtype if row.dtype == "activation" else row.dtype)
    integers = cast(jax.Array, jax.ShapeDtypeStruct((b, p), np.int32))
    reduce = traced(
        steps, value, Hook(name, layer_of(name), integers, integers), where=f"the reduction {steps} at {name}"
    )
    return [leaf.shape for leaf in jax.tree.leaves(reduce.results)]


def _overlapped(started: Iterator[tuple[ActivationCache, int]], whole: bool) -> Iterator[ActivationCache]:
    """Each cache in host memory, without padding rows; the next batch starts before this one is copied."""
    following, failed = next(started, None), None
    while following is not None:
        cache, rows = following
        for leaf in jax.tree.leaves(cache):
            leaf.copy_to_host_async()
        try:
            following = next(started, None)
        except Exception as error:  # raised after the caches before it have been yielded
            following, failed = None, error
        assert cache.tokens is not None  # as after every run
        first = 0 if whole else own_rows(jax.tree.leaves(cache), len(cache.tokens)).start
        host = cache.numpy(whole=whole)
        assert host.tokens is not None
        assert host.attention_mask is not None
        n = max(rows - first, 0)
        del cache  # while the caller works, the device holds only the batch that it runs
        own = jax.tree.map(lambda value, n=n: value[:n], host).with_params(host.params)
        yield own.with_inputs(host.tokens[:n], host.attention_mask[:n])
        del own
        del host
    if failed is not None:
        raise failed
