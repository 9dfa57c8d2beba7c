"""Many edited runs of one input, as one compiled and batched computation.

Axes: n runs, c runs of a chunk, b batch, p position, d hidden_size, V vocabulary.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from gemma3_jax.config import Gemma3Config
from gemma3_jax.edits import Only
from gemma3_jax.forward import Edits, checked_logits_at, forward
from gemma3_jax.gradients import Metric
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.hooks import as_pytree
from gemma3_jax.sites import layer_of, select
from gemma3_jax.text import Input

# Below this many tokens, a chunk leaves a matmul unit idle.
TOKENS_PER_CHUNK = 1024


def sweep(
    model: HookedGemma3,
    input: Input,
    edits: Callable[[Any], Edits],
    items: Any,
    metric: Metric,
    *,
    attention_mask: Any = None,
    logits_at: Any = None,
    chunk_size: int | None = None,
    memory_limit: float = 2e9,
    progress: bool = True,
    resume: np.ndarray | None = None,
) -> Any:
    """Run the model on one input once for each item, each time with that item's edits, and measure every run.

    One function is compiled for all items: they are data. Runs are batched in chunks; a run skips the blocks before its
    first edit, whose output no edit changes, and starts from the residual stream of the unedited run. Under `jit`,
    `grad` or `vmap` the whole sweep is traced, without a progress bar and without skipping.

    Peak memory: the parameters, the residual streams [L + 1, b, p, d] of the unedited run, and `chunk_size` times
    `run_bytes`. On top comes what `edits` and `metric` hold.

    Args:
        model: the model.
        input: text, texts or token ids, the same for all runs.
        edits: `edits(item) -> {name: edit}`, the edits of one run as `forward` takes them. Arrays that all runs share
            (another run's activations) are leaves of a callable pytree such as a `jax.tree_util.Partial`; a plain
            function is compiled in, by identity.
        items: pytree of arrays [n, ...]; `edits` sees one slice of each, traced.
        metric: `metric(logits) -> array`, of one run. Like `edits`, a function or a callable pytree.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text.
        logits_at: positions at which the metric needs logits; -1 is the last real token. The default computes them
            everywhere, [b, p, V] for each run, which is most of the work for a small model: say what you need.
        chunk_size: runs at a time; by default what `memory_limit` allows, and no more than a good batch.
        memory_limit: bytes that the runs of a chunk may take.
        progress: show a progress bar when the sweep takes longer than three seconds.
        resume: the result of an interrupted sweep with the same arguments; only its unfinished runs are run.

    Returns:
        What `metric` returns, stacked: a float32 NumPy array [n, ...]. After Ctrl-C the runs that are not finished are
        NaN, and a warning says so.

    >>> from gemma3_jax import TINY, HookedGemma3, edits
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> def ablated(item):
    ...     return {"blocks.*.attn.hook_z": edits.only(edits.Replace(0.0), layer=item["layer"], heads=item["head"])}
    >>> items = {"layer": [0, 1, 1], "head": [0, 0, 1]}
    >>> sweep(model, "ba ke lo ba ke", ablated, items, lambda logits: logits[0, -1].max()).shape
    (3,)
    """
    tokens, mask = model.encode(input, attention_mask)
    logits_at = checked_logits_at(logits_at, tokens.shape, None)
    items = jax.tree.map(jnp.asarray, items, is_leaf=lambda leaf: isinstance(leaf, list | tuple))
    n = _length(items)
    shared = model.params, as_pytree(edits), as_pytree(metric), mask, logits_at
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((shared, tokens, items))):
        chunk = chunk_size or _chunk_size(model.config, tokens.shape, logits_at, memory_limit, n, n)
        run = functools.partial(_run, model.config, *shared, embeddings=None, start=None, tokens=tokens)
        return jax.lax.map(run, items, batch_size=chunk)

    first = np.asarray(_first_layers(model.config, shared[1], items, tokens.shape))
    skips = bool((first >= 0).all())
    streams = _residual_streams(model.config, model.params, tokens, mask) if skips else None
    chunk = chunk_size or _chunk_size(model.config, tokens.shape, logits_at, memory_limit, n, len(set(first.tolist())))
    pending = np.argsort(first, kind="stable")
    if resume is not None:
        pending = pending[_unfinished(resume, n)[pending]]
    chunk = math.ceil(len(pending) / max(1, math.ceil(len(pending) / chunk)))
    results = None if resume is None else np.array(resume, np.float32)
    bar = tqdm(total=n, initial=n - len(pending), delay=3, unit="run", disable=not progress)
    try:
        for i in range(0, len(pending), max(chunk, 1)):
            at = pending[i : i + chunk]
            # The last chunk is filled up with its last run, so that it needs no program of its own.
            padded = np.pad(at, (0, chunk - len(at)), mode="edge")
            start = jnp.int32(first[at].min()) if skips else None
            picked = jax.tree.map(lambda leaf, rows=padded: leaf[rows], items)
            found = np.asarray(_chunk(model.config, *shared, tokens, picked, streams, start), np.float32)
            if results is None:
                results = np.full((n, *found.shape[1:]), np.nan, np.float32)
            results[at] = found[: len(at)]
            bar.update(len(at))
    except KeyboardInterrupt:
        if results is None:
            raise
        left = int(_unfinished(results, n).sum())
        warnings.warn(f"interrupted: {left} of {n} runs are NaN; pass the result as `resume` to go on", stacklevel=2)
    finally:
        bar.close()
    return results


def run_bytes(config: Gemma3Config, shape: tuple[int, ...], logits: int, itemsize: int = 4) -> int:
    """Bytes that one run of tokens [b, p] holds at its largest, in activations of `itemsize`.

    `logits` is the number of positions of each row that have logits.
    """
    b, p = shape
    d, e, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    # Norms and RoPE work in float32 beside what they read and write; scores, pattern and its copy are [b, h, p, k].
    attention = p * (h + g) * e * (8 + 2 * itemsize) + 12 * h * p * p
    mlp = p * config.intermediate_size * (4 + 3 * itemsize)
    head = 8 * logits * config.vocab_size
    return b * (p * d * (8 + 4 * itemsize) + max(attention, mlp, head))


def _chunk_size(
    config: Gemma3Config,
    shape: tuple[int, ...],
    logits_at: jax.Array | None,
    memory_limit: float,
    n: int,
    starts: int,
) -> int:
    """As many runs as share a first layer, or as make a good batch if that is more, within the memory limit."""
    logits = shape[1] if logits_at is None else jnp.atleast_1d(logits_at).shape[-1]
    fits = int(memory_limit // run_bytes(config, shape, logits))
    wanted = max(math.ceil(n / starts), math.ceil(TOKENS_PER_CHUNK / math.prod(shape)))
    return max(1, min(n, fits, wanted))


def _length(items: Any) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(items)}
    if len(lengths) != 1 or 0 in lengths:
        shapes = jax.tree.map(jnp.shape, items)
        raise ValueError(f"items have shapes {shapes}; all need the same first axis, with one entry for each run")
    return lengths.pop()


def _unfinished(results: np.ndarray, n: int) -> np.ndarray:
    """[n] bool: which runs have no result yet."""
    results = np.asarray(results)
    if results.shape[:1] != (n,):
        raise ValueError(f"resume has shape {results.shape}; this sweep has {n} runs")
    return np.isnan(results).reshape(n, -1).any(axis=1)


@functools.partial(jax.jit, static_argnames="config")
def _residual_streams(config, params, tokens, attention_mask) -> jax.Array:
    """[L + 1, b, p, d]: the residual stream entering each block, and the final norm."""
    names = "blocks.*.hook_in", "ln_final.hook_in"
    _, cache = forward(config, params, tokens, names, attention_mask=attention_mask)
    return jnp.stack(list(cache.values()))


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _first_layers(config, edits, items, shape) -> jax.Array:
    """[n]: the first block that each item's edits touch; -1 for the embedding, L for what follows the blocks."""

    def first(item):
        return jnp.min(jnp.stack([jnp.min(_layers(config, *pair)) for pair in _pairs(edits(item))]))

    return jax.vmap(first)(items)


def _pairs(edits: Edits) -> list[tuple[Any, Any]]:
    if not isinstance(edits, Mapping) or not edits:
        raise TypeError(f"edits(item) returned {type(edits).__name__}; it must return {{name: edit}} with one at least")
    return [
        (key, edit) for key, given in edits.items() for edit in (given if isinstance(given, list | tuple) else [given])
    ]


def _layers(config: Gemma3Config, name: Any, edit: Any) -> jax.Array:
    """The blocks that an edit under that name touches: those of the sites, or those it is restricted to."""
    if isinstance(edit, Only) and edit.layer is not None:
        return jnp.atleast_1d(edit.layer)
    after = config.num_hidden_layers
    layers = [
        layer if (layer := layer_of(match.name)) is not None else (-1 if match.name.startswith("embed.") else after)
        for match in select(name, config)
    ]
    return jnp.asarray(layers)


def _run(config, params, edits, metric, attention_mask, logits_at, item, *, tokens, embeddings, start) -> jax.Array:
    logits, _ = forward(
        config,
        params,
        tokens if start is None else None,
        edits=edits(item),
        attention_mask=attention_mask,
        inputs_embeds=embeddings,
        start_at_layer=start,
        logits_at=logits_at,
    )
    return jnp.asarray(metric(logits), jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _chunk(config, params, edits, metric, attention_mask, logits_at, tokens, items, streams, start) -> jax.Array:
    """[c, ...]: the metric of each run of a chunk."""
    embeddings = None if start is None else jax.lax.dynamic_index_in_dim(streams, start, keepdims=False)
    run = functools.partial(_run, config, params, edits, metric, attention_mask, logits_at)
    return jax.vmap(functools.partial(run, tokens=tokens, embeddings=embeddings, start=start))(items)
