"""`generate`: continues prompts in one compiled loop, and the functions behind `generate_stream`, token by token.

Axes: b batch, p columns of the prompt, n new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex, Unpack, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description, fields_of
from gemma3_jax.generation.ahead import compile_together
from gemma3_jax.generation.decode import Decoding, Task, check_logits, go_on, read
from gemma3_jax.generation.memory import in_memory
from gemma3_jax.generation.sampling import Options, check_names, row_keys, sampling
from gemma3_jax.hooks.needs import check_generation, some_depend_on_length
from gemma3_jax.inputs import as_array, padding_mask, token_ids
from gemma3_jax.model.layout import check_model, unstack_layers
from gemma3_jax.positions import check_mask
from gemma3_jax.run.request import Request, new_request
from gemma3_jax.run.selection import Capture, Edits, captured_names
from gemma3_jax.run.traced import activation_dtype, with_traced_functions
from gemma3_jax.sites.table import site
from gemma3_jax.types import IntegersLike, Params, PyTree


@flax.struct.dataclass
class Generation(Described):
    """The result of `generate`.

    Attributes:
        tokens: [b, p + n] int32, prompt and continuation, padded on the left of shorter prompts and after a row's
            stop token.
        attention_mask: [b, p + n] int32, 1 at real tokens.
        log_probs: [b, n] float32, log-probabilities of the new tokens without temperature and filters; 0 after a row's
            end.
        logits: [b, n, V] float32 before any filter, or None. After a row's end, logits and captures are those of
            padding.
        cache: activations at the captured sites over prompt and continuation, aligned with `tokens`. There are
            p + n - 1 positions, because the model does not run on the last token.
    """

    tokens: jax.Array
    attention_mask: jax.Array
    log_probs: jax.Array
    logits: jax.Array | None
    cache: ActivationCache

    __repr__ = Described.__repr__  # dataclass would write one with every number

    def _description(self) -> Description:
        cache = repr(self.cache).splitlines()[0]
        rows = [row for row in fields_of(self) if row[0] != "cache"]
        return Description(f"Generation of {self.log_probs.shape[-1]} tokens", (*rows, ("cache", cache)))


def generate(
    config: Gemma3Config,
    params: Params,
    tokens: IntegersLike,
    max_new_tokens: int = 32,
    *,
    attention_mask: IntegersLike | None = None,
    capture: Capture = (),
    edits: Edits | None = None,
    return_logits: bool = False,
    **options: Unpack[Options],
) -> Generation:
    """Continue prompts, with edits and captures at every token.

    The prefill is one pass over the prompts. One compiled decode loop then writes all tokens, and ends when every row
    has a stop token. Prompts of similar lengths share a compilation, and changing the values of parameters does not
    trigger recompilation. With functions as edits, the prompt keeps its length, so that they see the shapes of
    `forward`; so it does with ready-made edits that depend on the length, such as `edits.Noise`.

    The hook of an edit has the absolute `positions` of the tokens, [b, p] for the prompt and then [b, 1] for each new
    token, and the `phase`, "prompt" or "generation". `edits.only` restricts an edit to a phase. Steering during
    generation gives the same result as steering in one `forward` over the whole text.

    New tokens come one by one, so these edits need the whole text and must be restricted to the prompt with
    `edits.only(edit, phase="prompt")`:

    - `edits.Mean` and `edits.FromCache`,
    - positions or keys that are booleans or count from the end,
    - arrays with a value for each position.

    `edits.Noise` draws the same numbers at every new token. Rows are aligned at their ends, so prompts that are padded
    on the right are moved. Ready-made edits with values for positions raise an error then; if your own edit has such
    values, pad the prompts on the left.

    Arguments are checked and results are cut on the host, so call it outside of `jit`, `vmap` and `grad`. The functions
    that it calls, `read` and `go_on` of `gemma3_jax.generation.decode`, are pure. A call traces each edit twice: for
    the prefill and for a decode step.

    Stacked parameters are unstacked first, because a scan would copy the weights of every layer at every token.

    Memory: the KV cache, see `cache_bytes`; a second copy of stacked parameters; p + n positions of every captured
    site; with `return_logits`, 4 b n V bytes. For this memory, n is rounded up to the next power of two up to 64, at
    least 8, and above 64 to the next multiple of 64.

    Args:
        config: shape of the model.
        params: parameter pytree.
        tokens: [b, p] integer ids; `attention_mask` marks padding on either side.
        max_new_tokens: largest number of new tokens, a positive integer.
        attention_mask: [b, p], 1 at real tokens and 0 at padding.
        capture: sites to capture, as in `forward`.
        edits: as in `forward`.
        return_logits: return the logits of every new token.
        **options: see `gemma3_jax.generation.sampling.Options`; the default is greedy.

    Returns:
        A `Generation`.

    Raises:
        ValueError: an argument is out of range; the text exceeds the model's context; an edit needs the whole text, or
            never acts; or the logits of a new token are NaN or all minus infinity.
        TypeError: an argument is traced, or unknown.
        MemoryError: the device is out of memory; the message has the requested bytes.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY, dtype="float32")
    >>> generate(config, params, [[2, 10, 20, 30, 40, 10, 20]], max_new_tokens=3).tokens[0, -3:].tolist()
    [30, 40, 10]
    """
    task, text, bounds = begin(
        config,
        params,
        tokens,
        max_new_tokens,
        attention_mask=attention_mask,
        capture=capture,
        edits=edits,
        return_logits=return_logits,
        in_steps=False,
        **options,
    )
    return finish(task, write_rest(task, text, bounds), bounds)


@flax.struct.dataclass
class Bounds:
    """The sizes of a generation and its parameters, on the host.

    Attributes:
        params: parameters as passed by the caller.
        unstacked: the same parameters, with an entry for each block.
        new: largest number of new tokens.
        prompt: columns of the prompt.
        start: [b], the padding of each row of the prompt.
        extra: columns of padding that bucketing added before the prompt.
    """

    params: Params
    unstacked: Params
    new: int
    prompt: int
    start: np.ndarray
    extra: int


def begin(
    config: Gemma3Config,
    params: Params,
    tokens: IntegersLike,
    max_new_tokens: int,
    *,
    attention_mask: IntegersLike | None = None,
    capture: Capture = (),
    edits: Edits | None = None,
    return_logits: bool = False,
    in_steps: bool = True,
    **options: Unpack[Options],
) -> tuple[Task, Decoding, Bounds]:
    """Check the arguments of `generate` and do the prefill.

    Args:
        in_steps: compile only the prefill, so that the first token comes as soon as possible. Otherwise the decode loop
            is compiled at the same time.
    """
    refuse_traced((params, tokens, attention_mask, edits, options))
    check_model(config, params)
    given = prepare(
        config,
        activation_dtype(params),
        tokens,
        max_new_tokens,
        attention_mask=attention_mask,
        capture=capture,
        edits=edits,
        **options,
    )
    unstacked = unstack_layers(config, params)
    if given.new > 1 and not in_steps:
        compile_together(unstacked, given.task, given.tokens, given.start, new=given.room, keep_logits=return_logits)
    text = in_memory(read, unstacked, given.task, given.tokens, given.start, new=given.room, keep_logits=return_logits)
    start, extra = np.asarray(given.start) - given.extra, given.extra
    return given.task, text, Bounds(params, unstacked, given.new, given.tokens.shape[1] - extra, start, extra)


class Prompt(NamedTuple):
    """The arguments of the prefill.

    Attributes:
        task: settings of the generation.
        tokens: [b, p] int32, each row padded on the left.
        start: [b] int32, the padding of each row.
        new: largest number of new tokens.
        room: columns for new tokens, as many or more.
        extra: columns of padding that bucketing added before the prompt.
    """

    task: Task
    tokens: jax.Array
    start: jax.Array
    new: int
    room: int
    extra: int


def prepare(
    config: Gemma3Config,
    dtype: np.dtype,
    tokens: IntegersLike,
    max_new_tokens: int,
    *,
    attention_mask: IntegersLike | None = None,
    capture: Capture = (),
    edits: Edits | None = None,
    **options: Unpack[Options],
) -> Prompt:
    """Check the arguments of `generate`; `dtype` is that of the activations."""
    check_names(options)
    rows, start, moved = _aligned(config, tokens, attention_mask)
    b, p = rows.shape
    if config.use_bidirectional_attention:
        raise ValueError("a model with use_bidirectional_attention (an encoder) does not generate")
    new = checked_count(max_new_tokens)
    longest, shortest = int(p - start.min()), int(p - start.max())
    if longest + new > config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {longest} tokens; with {new} new tokens, the text exceeds the model's context of "
            f"{config.max_position_embeddings} tokens"
        )
    request = new_request(
        config, rows, captured_names(config, capture), edits, np.arange(p) >= start[:, None], new=new - 1
    )
    for name, several in request.edits.items():
        for each in several:
            check_generation(each, name, shortest, new - 1, moved)
    # Functions see the prompt without extra columns. Without them, prompts of similar lengths share a program.
    extra = 0 if some_depend_on_length(request.edits) else _bucket(p) - p
    prompt, step = _traced(request, dtype, p + _bucket(new))
    task = Task(
        prompt,
        step,
        sampling(b, **options),
        row_keys(options.get("seed", 0), b),
        _stop_tokens(config, options),
        jnp.int32(config.padding),
    )
    padded = jnp.asarray(np.pad(rows, ((0, 0), (extra, 0)), constant_values=config.padding), jnp.int32)
    return Prompt(task, padded, jnp.asarray(start + extra, jnp.int32), new, _bucket(new), extra)


def _traced(request: Request, dtype: np.dtype, capacity: int) -> tuple[Request, Request]:
    """The requests of the prefill and of a decode step, in a text of `capacity` columns, with functions traced now."""
    # Captures and edits of the unembedding see every token, as in `forward`.
    everywhere = any(name.startswith("unembed.") for name in (*request.names, *request.edits))
    prompt = dataclasses.replace(request, logits_at=None if everywhere else jnp.int32(-1))
    one = np.zeros((request.source.shape[0], 1), np.int32)
    step = dataclasses.replace(request, source=one, attention_mask=None, phase="generation")
    both = with_traced_functions(prompt, dtype), with_traced_functions(step, dtype, keys=capacity)
    refuse_traced(both)
    # Copy NumPy arrays: the caller may change them before later tokens are written.
    copied = jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf, both)
    # The tokens are set for each run. Left in the request, their shape would make a separate program.
    prompt, step = (each.replace(source=None, attention_mask=None) for each in copied)
    return prompt, step


def write_rest(task: Task, text: Decoding, bounds: Bounds) -> Decoding:
    """The text with all its tokens. For one new token, no decode step is compiled."""
    if bounds.new > 1:
        text = in_memory(go_on, bounds.unstacked, task, text, jnp.int32(bounds.new - 1), donate=1)
    return check_logits(text)


def finish(task: Task, text: Decoding, bounds: Bounds, ends: np.ndarray | None = None) -> Generation:
    """The `Generation` without the padding of bucketing; `ends` [b] are the last columns of rows that the host cuts."""
    prompt = bounds.prompt
    tokens = np.asarray(text.tokens)[:, bounds.extra : int(text.length)]
    columns = np.arange(tokens.shape[1])
    # A row ends with its first stop token.
    stops = np.isin(tokens, np.asarray(task.stop)) & (columns >= prompt)
    last = np.where(stops.any(axis=1), stops.argmax(axis=1), len(columns) - 1)
    last = last if ends is None else np.minimum(last, ends)
    p_n = last.max() + 1
    real = ((columns >= bounds.start[:, None]) & (columns <= last[:, None]))[:, :p_n]
    tokens = np.where(real, tokens[:, :p_n], int(task.pad))
    run = slice(bounds.extra, bounds.extra + p_n - 1)
    # In the model's order, because jit returns a dict sorted.
    captured = {name: _cut(name, text.captured[name], run) for name in task.capture}
    cache = ActivationCache(task.config, captured, bounds.params)
    return Generation(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(real, jnp.int32),
        jnp.where(real[:, prompt:], text.log_probs[:, : p_n - prompt], 0.0),
        None if text.logits is None else text.logits[:, : p_n - prompt],
        cache.with_inputs(np.asarray(tokens[:, :-1], np.int32), np.asarray(real[:, :-1], np.int32)),
    )


def stream(task: Task, text: Decoding, bounds: Bounds) -> Iterator[Decoding]:
    """The text after each new token, until all rows have ended; the tokens are those of `generate`."""
    yield check_logits(text)
    for _ in range(bounds.new - 1):
        if bool(text.done.all()):
            return
        text = in_memory(go_on, bounds.unstacked, task, text, jnp.int32(1), donate=1)
        yield check_logits(text)


def refuse_traced(arguments: PyTree) -> None:
    """Raise TypeError for values that `jit`, `vmap` or `grad` is tracing: the host must read the tokens."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        raise TypeError(
            "generation compiles its own loop and reads its tokens on the host: call it outside of jit, vmap and grad; "
            "for a gradient, or in a compiled function, call `forward` on the generated tokens"
        )


def checked_count(max_new_tokens: object) -> int:
    """The number of new tokens as an int, after a check that it is a positive integer."""
    try:
        count = 0 if isinstance(max_new_tokens, bool) else operator.index(cast(SupportsIndex, max_new_tokens))
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be a positive integer")
    return count


def _aligned(
    config: Gemma3Config, tokens: IntegersLike, attention_mask: IntegersLike | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The prompts [b, p], padded on the left only, the padding [b] of each, and whether a row was moved for that."""
    ids = np.asarray(token_ids(tokens, config.vocab_size))
    marks = padding_mask(config, ids) if attention_mask is None else np.atleast_2d(np.asarray(as_array(attention_mask)))
    if marks.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {marks.shape}; the prompt has {ids.shape}")
    check_mask(marks)
    mask = marks.astype(bool)
    rows = []
    for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
        at = np.flatnonzero(real)
        if not at.size:
            raise ValueError(f"row {i} of attention_mask is all padding; a prompt needs at least one token")
        if at[-1] - at[0] + 1 != at.size:
            raise ValueError(f"row {i} of attention_mask has padding between tokens; padding must be at the ends")
        rows.append(row[real])
    p = ids.shape[1]
    start = np.asarray([p - len(row) for row in rows], np.int32)
    aligned = np.stack([np.pad(row, (p - len(row), 0), constant_values=config.padding) for row in rows])
    return aligned, start, not mask[:, -1].all()


def _stop_tokens(config: Gemma3Config, options: Options) -> jax.Array:
    """[m] int32, padded with -1, which is not a token, so the number of stop tokens rarely causes recompilation."""
    stop_at_eos, eos_token_id = options.get("stop_at_eos", True), options.get("eos_token_id")
    if not isinstance(stop_at_eos, bool | np.bool_):
        raise ValueError(f"stop_at_eos is {stop_at_eos!r}; it must be True or False")
    if eos_token_id is not None and not stop_at_eos:
        raise ValueError(f"eos_token_id is {eos_token_id!r}, but stop_at_eos=False ignores it: leave one of them out")
    ids = config.eos_token_id if eos_token_id is None else eos_token_id
    stop = np.atleast_1d(np.asarray([] if ids is None or not stop_at_eos else ids))
    if stop.size and not (
        stop.ndim == 1
        and np.issubdtype(stop.dtype, np.integer)
        and (stop >= 0).all()
        and (stop < config.vocab_size).all()
    ):
        remedy = " (it is from the config: give eos_token_id, or stop_at_eos=False)" if eos_token_id is None else ""
        allowed = f"an id or several ids within the vocabulary of {config.vocab_size}"
        raise ValueError(f"eos_token_id is {ids!r}; it must be {allowed}{remedy}")
    return jnp.asarray(np.pad(stop, (0, _bucket(stop.size) - stop.size), constant_values=-1), jnp.int32)


def _bucket(length: int) -> int:
    """The length to compile for: the next power of two up to 64, then the next multiple of 64."""
    return 1 << max(3, (length - 1).bit_length()) if length <= 64 else -(-length // 64) * 64


def _cut(name: str, value: jax.Array, run: slice) -> jax.Array:
    """A captured value with only the columns in `run`, on the axes of tokens and of keys."""
    letters = site(name).axes.split()
    return value[tuple(run if letter in "pk" else slice(None) for letter in letters)]
