"""`generate`: a prompt's continuation, by one compiled loop; and `generate_stream`, the same token by token.

Axes: b batch, p columns of the prompt, n new tokens, V vocabulary.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.edits import check_generation
from gemma3_jax.forward import Capture, Edits, captured_names, placed_edits
from gemma3_jax.generation.decoding import Decoding, Task, go_on, read
from gemma3_jax.generation.memory import in_memory
from gemma3_jax.generation.sampling import row_keys, sampling
from gemma3_jax.hooks import as_pytree
from gemma3_jax.positions import check_mask
from gemma3_jax.sites import site
from gemma3_jax.stacking import unstack_layers

Params = Mapping[str, Any]


class Options(TypedDict, total=False):
    """The arguments of `generate` that say how tokens are drawn and where they end."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any
    stop_at_eos: bool
    eos_token_id: int | Sequence[int] | None


@flax.struct.dataclass
class Generation:
    """What was generated.

    Attributes:
        tokens: [b, p + n] int32, prompt and continuation; padded on the left where a prompt is shorter than others,
            and behind a row's stop token.
        attention_mask: [b, p + n] int32, 1 at real tokens.
        log_probs: [b, n] float32, of the new tokens under the model's own distribution; 0 behind a row's end.
        logits: [b, n, V] float32 before any filter, or None. Behind a row's end they are those of padding, as captures
            are, where other rows went on.
        cache: activations at the named sites over prompt and continuation, aligned with `tokens`: p + n - 1 positions,
            as the last token is never run.
    """

    tokens: jax.Array
    attention_mask: jax.Array
    log_probs: jax.Array
    logits: jax.Array | None
    cache: ActivationCache


def generate(
    config: Gemma3Config,
    params: Params,
    tokens: Any,
    max_new_tokens: int = 32,
    *,
    attention_mask: Any = None,
    temperature: Any = 0.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    seed: Any = 0,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    capture: Capture = (),
    edits: Edits | None = None,
    return_logits: bool = False,
) -> Generation:
    """Continue prompts, with edits and captures at every token.

    The prompts are read in one pass, and all tokens are written by one compiled loop, which ends when every row has met
    a stop token. Prompts of similar lengths share a compilation, as do all values of the parameters; with edits the
    prompt keeps its length, so that they see the shapes that they see in `forward`.

    An edit is told the absolute `positions` of the tokens that it sees, [b, p] of the prompt and then [b, 1] of every
    new token, and the `phase`, "prompt" or "generation"; `edits.only` restricts it to either. Steering a text while
    it is written is the same as steering it in one `forward` over the whole text. What needs a whole text, as new
    tokens come one by one, must be kept to the prompt by `edits.only(edit, phase="prompt")`: `edits.Mean`,
    `edits.FromCache`, positions or keys that are booleans or count from the end, and arrays with a value for each
    position. `edits.Noise` draws the same numbers at every new token. An edit sees rows that end together: where the
    prompts are padded on the right, they are moved. Ready-made edits with values for their places are refused then;
    an edit of your own with such values must be given prompts that are padded on the left.

    Arguments are checked and results are cut on the host: call it outside of `jit`, `vmap` and `grad`. The compiled
    functions below it, `read` and `go_on` of `gemma3_jax.generation.decoding`, are pure.

    A token's step under a scan would copy the weights of every layer, so that stacked parameters are unstacked first.

    Memory: the KV cache, see `cache_bytes`; a second copy of stacked parameters; p + n positions of every captured
    site; with `return_logits` 4 b n V bytes. There, n is rounded up: to the next power of two up to 64, 8 at least,
    and then to the next multiple of 64.

    Args:
        config: shape of the model.
        params: parameter pytree.
        tokens: [b, p] integer ids, padded on either side where `attention_mask` says so.
        max_new_tokens: how many to write at most, any integer from 1.
        attention_mask: [b, p], 1 at real tokens and 0 at padding.
        temperature: 0 takes the likeliest token. This and the next four: one number, or one for each row.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that have this probability together.
        min_p: draw from tokens with this share of the likeliest one's probability at least.
        repetition_penalty: divide (multiply, if negative) the logits of tokens in the text by this.
        seed: an integer of 32 bits, or one for each row: a row's draws do not depend on the other rows then.
        stop_at_eos: end a row at a stop token.
        eos_token_id: the stop tokens; default: the config's.
        capture: sites to keep, as in `forward`.
        edits: as in `forward`.
        return_logits: keep the logits of every new token.

    Returns:
        A `Generation`.

    Raises:
        ValueError: a parameter out of range; no room for the tokens in the model's positions; an edit that needs a
            whole text, or never acts.
        TypeError: an argument is being traced.
        MemoryError: with the bytes that were asked for.

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
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_at_eos=stop_at_eos,
        eos_token_id=eos_token_id,
        capture=capture,
        edits=edits,
        return_logits=return_logits,
    )
    return finish(task, write_rest(task, text, bounds), bounds)


@flax.struct.dataclass
class Bounds:
    """What a generation was asked for, on the host.

    Attributes:
        params: as they were given.
        new: how many tokens to write at most.
        prompt: columns of the prompt.
        start: [b], the padding of each of its rows.
        extra: columns of padding that bucketing added before it.
    """

    params: Params
    new: int
    prompt: int
    start: np.ndarray
    extra: int


def begin(
    config: Gemma3Config,
    params: Params,
    tokens: Any,
    max_new_tokens: int,
    *,
    attention_mask: Any = None,
    seed: Any = 0,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    capture: Capture = (),
    edits: Edits | None = None,
    return_logits: bool = False,
    **how: Any,
) -> tuple[Task, Decoding, Bounds]:
    """Check the arguments of `generate`, read the prompt and write the first token."""
    refuse_traced((params, tokens, attention_mask, seed, eos_token_id, edits, how))
    rows, start = _aligned(config, tokens, attention_mask)
    b, p = rows.shape
    if config.use_bidirectional_attention:
        raise ValueError("a model with use_bidirectional_attention (an encoder) does not generate")
    new = checked_count(max_new_tokens)
    longest, shortest = int(p - start.min()), int(p - start.max())
    if longest + new > config.max_position_embeddings:
        raise ValueError(
            f"{longest} tokens of the prompt and {new} new ones are more than the "
            f"{config.max_position_embeddings} positions that the model has"
        )
    placed: Mapping[str, Sequence[Any]] = placed_edits(config, _as_pytrees(edits or {}), (b, p), new=new - 1)
    moved = attention_mask is not None and not np.array_equal(
        np.atleast_2d(attention_mask).astype(bool), np.arange(p) >= start[:, None]
    )
    for name, several in placed.items():
        for each in several:
            check_generation(each.edit, name, shortest, new - 1, moved)
    task = Task(
        unstack_layers(config, params),
        placed,
        sampling(b, **how),
        row_keys(seed, b),
        _stop_tokens(config, stop_at_eos, eos_token_id),
        jnp.int32(config.pad_token_id or 0),
        config,
        captured_names(config, capture),
    )
    extra = 0 if placed else _bucket(p) - p
    padded = jnp.asarray(np.pad(rows, ((0, 0), (extra, 0)), constant_values=config.pad_token_id or 0), jnp.int32)
    begun = in_memory(
        read, task, padded, jnp.asarray(start + extra, jnp.int32), new=_bucket(new), keep_logits=return_logits
    )
    return task, begun, Bounds(params, new, p, start, extra)


def write_rest(task: Task, text: Decoding, bounds: Bounds) -> Decoding:
    """The text with all its tokens; where there is one, none is run, and no step is compiled."""
    return text if bounds.new == 1 else in_memory(go_on, task, text, jnp.int32(bounds.new - 1))


def finish(task: Task, text: Decoding, bounds: Bounds, ends: np.ndarray | None = None) -> Generation:
    """What was written, without the padding that was added; `ends` [b] are the last columns of rows cut on the host."""
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
    # In the model's order: a dict comes out of jit sorted.
    captured = {name: _cut(name, text.captured[name], run) for name in task.capture}
    return Generation(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(real, jnp.int32),
        jnp.where(real[:, prompt:], text.log_probs[:, : p_n - prompt], 0.0),
        None if text.logits is None else text.logits[:, : p_n - prompt],
        ActivationCache(task.config, captured, bounds.params),
    )


def stream(task: Task, text: Decoding, bounds: Bounds) -> Iterator[Decoding]:
    """The text after each new token, until all rows have ended; with the tokens of `generate`."""
    yield text
    for _ in range(bounds.new - 1):
        if bool(text.done.all()):
            return
        text = in_memory(go_on, task, text, jnp.int32(1))
        yield text


def refuse_traced(arguments: Any) -> None:
    """Refuse values that `jit`, `vmap` or `grad` is tracing: the host reads what was written."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        raise TypeError(
            "generation compiles its own loop and reads what it writes: call it outside of jit, vmap and grad; for a "
            "gradient, or in a function that is compiled, call `forward` on the tokens that it wrote"
        )


def checked_count(max_new_tokens: Any) -> int:
    """Of any integer type, 1 at least."""
    try:
        count = 0 if isinstance(max_new_tokens, bool) else operator.index(max_new_tokens)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be a positive integer")
    return count


def _aligned(config: Gemma3Config, tokens: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The prompts [b, p], padded on the left only, and the padding [b] of each."""
    ids = np.atleast_2d(np.asarray(tokens))
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"the prompt is {ids.dtype} of shape {ids.shape}; it must be token ids [b, p], one at least")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
    if attention_mask is None:
        return ids, np.zeros(len(ids), np.int32)
    given = np.atleast_2d(np.asarray(attention_mask))
    if given.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {given.shape}; the prompt has {ids.shape}")
    check_mask(given)
    mask = given.astype(bool)
    rows = []
    for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
        at = np.flatnonzero(real)
        if not at.size:
            raise ValueError(f"row {i} of attention_mask is all padding; a prompt needs one token at least")
        if at[-1] - at[0] + 1 != at.size:
            raise ValueError(f"row {i} of attention_mask has padding between tokens; it may stand at the ends only")
        rows.append(row[real])
    p = ids.shape[1]
    start = np.asarray([p - len(row) for row in rows], np.int32)
    pad = config.pad_token_id or 0
    return np.stack([np.pad(row, (p - len(row), 0), constant_values=pad) for row in rows]), start


def _stop_tokens(config: Gemma3Config, stop_at_eos: bool, eos_token_id: Any) -> jax.Array:
    """[m] int32, filled up with -1, which is no token, so that their number compiles nothing new."""
    if not isinstance(stop_at_eos, bool | np.bool_):
        raise ValueError(f"stop_at_eos is {stop_at_eos!r}; it takes True and False")
    given = config.eos_token_id if eos_token_id is None else eos_token_id
    stop = np.atleast_1d(np.asarray([] if given is None or not stop_at_eos else given))
    if stop.size and not (
        stop.ndim == 1
        and np.issubdtype(stop.dtype, np.integer)
        and (stop >= 0).all()
        and (stop < config.vocab_size).all()
    ):
        raise ValueError(
            f"eos_token_id is {given!r}; it takes an id, or several, within the vocabulary of {config.vocab_size}"
        )
    return jnp.asarray(np.pad(stop, (0, _bucket(stop.size) - stop.size), constant_values=-1), jnp.int32)


def _bucket(length: int) -> int:
    """The length that is compiled for: the next power of two up to 64, then the next multiple of 64."""
    return 1 << max(3, (length - 1).bit_length()) if length <= 64 else -(-length // 64) * 64


def _as_pytrees(edits: Edits) -> dict[str, list[Any]]:
    """The same, with plain functions wrapped, so that they cross into `jit`."""
    return {
        name: [as_pytree(edit) for edit in (given if isinstance(given, Sequence) else [given])]
        for name, given in edits.items()
    }


def _cut(name: str, value: jax.Array, run: slice) -> jax.Array:
    """The columns that were run, of tokens and of keys."""
    letters = site(name).axes.split()
    return value[tuple(run if letter in "pk" else slice(None) for letter in letters)]
