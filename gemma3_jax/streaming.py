"""Activations of many batches in host memory, copied there while the next batch runs; a part of `HookedGemma3`.

Axes: b batch, p position.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import ReducedCapture, placed_captures
from gemma3_jax.hooks import Hook
from gemma3_jax.positions import check_mask, default_positions
from gemma3_jax.reductions import Steps
from gemma3_jax.sites import layer_of, shape_of, site
from gemma3_jax.text import Input, Text, is_text

# The mapping is what a Hugging Face tokenizer returns: `input_ids`, and `attention_mask` where there is padding.
Batch = Input | Mapping[str, Any]


class Streaming(Text):
    """What a model does with a data set."""

    config: Gemma3Config
    params: Any
    _run: Callable[..., tuple[Any, ActivationCache]]

    def activations(self, batches: Iterable[Batch], names_filter: ReducedCapture) -> Iterator[ActivationCache]:
        """Run batch after batch, and yield each one's activations in host memory, in order.

        A batch is started before the results of the one before it are waited for, so that the device computes while
        the host copies and the caller works. It holds the activations of two batches at most, and runs no further than
        the last kept site needs. Nothing is left to be cleaned up: leave the loop, or interrupt it, at any time.

        Each number of positions compiles once, and again where a batch has more rows than all before it. One with
        fewer, such as the last of a data set, is filled up with masked copies of its last row, which are cut off its
        results.

        Args:
            batches: of each a text, texts, token ids [p] or [b, p], or a mapping with `input_ids` and, where there is
                padding, `attention_mask`, as Hugging Face's tokenizers return it. Ids alone have no padding.
            names_filter: sites to keep, as in `run_with_cache`, with functions or without. A function treats each row
                by itself, and returns arrays that have the rows on their first axis.

        Yields:
            An `ActivationCache` of NumPy arrays for each batch: what `run_with_cache` gives.

        Raises:
            UnknownSite, TypeError, ValueError: at once where `names_filter` is wrong, and with the number of the batch
                where that is.

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
        if not (isinstance(names_filter, str | Mapping) or callable(names_filter)):
            names_filter = tuple(names_filter)  # an iterator could be read once only
        if not placed_captures(self.config, names_filter, (1, None)):
            raise ValueError(f"names_filter {names_filter!r} keeps nothing; name a site at least")
        return _overlapped(self._started(batches, names_filter))

    def _started(self, batches: Iterable[Batch], names_filter: ReducedCapture) -> Iterator[tuple[ActivationCache, int]]:
        """The activations of each batch, which are on their way, and how many rows are its own."""
        most: dict[int, int] = {}  # rows, by the number of positions
        kept: dict[int, dict[str, Steps | None]] = {}
        for number, batch in enumerate(batches):
            try:
                tokens, mask = self._rows(batch)
                b, p = tokens.shape
                if p not in kept:
                    kept[p] = placed_captures(self.config, names_filter, (1, p))
                    self._check_rows(kept[p], p)
                most[p] = max(b, most.get(p, 0))
                # A mask for all, so that a batch that is filled up compiles nothing.
                extra = (0, most[p] - b), (0, 0)
                filled, mask = np.pad(tokens, extra, mode="edge"), np.pad(mask, extra)
                _, cache = self._run(filled, kept[p], (), None, None, mask, None)
            except Exception as error:
                error.add_note(f"in batch {number}, counted from 0")
                raise
            yield cache, b

    def _rows(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, each [b, p]. On the host: what the device sends back waits for the batch that it runs."""
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        if "input_ids" not in given:
            raise ValueError(f"the batch has {', '.join(map(str, given))}; it must have input_ids")
        ids, mask = given["input_ids"], given.get("attention_mask")
        if is_text(ids):
            ids, padding = self._padded(ids, prepend_bos=True, padding_side="right")
            mask = padding if mask is None else mask
        try:
            tokens = np.atleast_2d(np.asarray(ids))
        except ValueError as error:
            raise ValueError("rows have different lengths; pad them, and give input_ids with attention_mask") from error
        mask = np.ones(tokens.shape, np.int32) if mask is None else np.atleast_2d(np.asarray(mask))
        if tokens.ndim != 2 or mask.shape != tokens.shape or not tokens.size:
            raise ValueError(
                f"ids have shape {tokens.shape} and attention_mask {mask.shape}; both must be [b, p], with a token"
            )
        check_mask(mask)
        return tokens, mask.astype(np.int32)

    def _check_rows(self, kept: Mapping[str, Steps | None], p: int) -> None:
        """Refuse functions whose results do not have the batch's rows on the first axis."""
        for name, steps in kept.items():
            few, more = ([] if steps is None else self._shapes(name, steps, b, p) for b in (2, 3))
            if any(shape[:1] != (2,) for shape in few) or more != [(3, *shape[1:]) for shape in few]:
                raise ValueError(
                    f"the reduction {steps} at {name} makes {few} of 2 rows and {more} of 3; arrays must have the rows "
                    "on their first axis, as a batch may be filled up with rows that are cut off again"
                )

    def _shapes(self, name: str, steps: Steps, b: int, p: int) -> list[tuple[int, ...]]:
        """Of the arrays that a reduction returns for a batch of that shape."""
        dtype = site(name).dtype
        value = jax.ShapeDtypeStruct(
            shape_of(name, self.config, b, p), self.params["embed"]["weight"].dtype if dtype == "activation" else dtype
        )
        mask = jax.ShapeDtypeStruct((b, p), np.int32)

        def reduced(steps: Steps, value: jax.Array, mask: jax.Array) -> Any:
            return steps(value, Hook(name, layer_of(name), default_positions((b, p), mask), mask))

        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(reduced, steps, value, mask))]


def _overlapped(started: Iterator[tuple[ActivationCache, int]]) -> Iterator[ActivationCache]:
    """Each in host memory, cut to its own rows; the next is started before one is waited for."""
    following, failed = next(started, None), None
    while following is not None:
        cache, rows = following
        for leaf in jax.tree.leaves(cache):
            leaf.copy_to_host_async()
        try:
            following = next(started, None)
        except Exception as error:  # once what came before it has been handed over
            following, failed = None, error
        host = cache.numpy()
        del cache  # while the caller works, the device holds the batch that it runs, and no other
        yield jax.tree.map(lambda value, rows=rows: value[:rows], host).with_params(host.params)
        del host
    if failed is not None:
        raise failed
