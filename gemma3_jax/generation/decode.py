"""Prefill and the decode loop, as pure functions to compile.

Rows are aligned at their ends; columns count from the left and include padding. A sampled token is written into the
next column. The model runs on it only when another token is needed, so it never runs on the last token of a text.

Axes: b batch, p columns of the prompt, n new tokens, c = p + n columns, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.generation.kv_cache import KVCache, append, empty_cache, past, positions
from gemma3_jax.generation.sampling import Sampling, draw
from gemma3_jax.meshes import constrained, replicated
from gemma3_jax.run.forward import run
from gemma3_jax.run.request import Request
from gemma3_jax.sites.names import block, layer_of
from gemma3_jax.sites.table import site, token_axis
from gemma3_jax.types import Params


@flax.struct.dataclass
class Decoding:
    """The state of generation; a pytree.

    Attributes:
        tokens: [b, c] int32, padded on both sides.
        length: [] int32, number of columns written.
        cache: keys and values of all columns except the last one written.
        done: [b] bool, True for rows that have a stop token.
        failed: [b] int32, the first new token of each row whose logits were NaN or all minus infinity; -1 if there is
            no such token.
        log_probs: [b, n] float32, log-probabilities of the new tokens at temperature 1, without filters.
        logits: [b, n, V] float32, the logits of the new tokens before any filter; or None.
        captured: captured activations by canonical name, with room for c columns.
        seen: [b, V] bool, True for tokens that the text has; or None.
    """

    tokens: jax.Array
    length: jax.Array
    cache: KVCache
    done: jax.Array
    failed: jax.Array
    log_probs: jax.Array
    logits: jax.Array | None
    captured: dict[str, jax.Array]
    seen: jax.Array | None


@flax.struct.dataclass
class Task:
    """Settings that stay constant during generation; arrays are traced.

    Attributes:
        prompt: the request of the prefill, with the sites to capture, without tokens.
        step: the request of one decode step, likewise.
        sampling: parameters of sampling.
        keys: [b] random keys.
        stop: [m] int32, tokens that end a row; -1 is padding.
        pad: token to write after the end of a row.
    """

    prompt: Request
    step: Request
    sampling: Sampling
    keys: jax.Array
    stop: jax.Array
    pad: jax.Array

    @property
    def config(self) -> Gemma3Config:
        """Shape of the model."""
        return self.prompt.config

    @property
    def capture(self) -> tuple[str, ...]:
        """Canonical names of the captured sites."""
        return self.prompt.names


def read(
    params: Params, task: Task, tokens: jax.Array, start: jax.Array, *, new: int, keep_logits: bool = False
) -> Decoding:
    """The prefill: run the prompt and write the first new token.

    Args:
        params: parameter pytree, with an entry for each block.
        task: settings of the generation.
        tokens: [b, p] int32, each row padded on the left.
        start: [b] int32, the padding of each row.
        new: largest number of new tokens, at least 1; buffers have this size.
        keep_logits: store the logits of every new token.
    """
    b, p = tokens.shape
    mask = (jnp.arange(p) >= start[:, None]).astype(jnp.int32)
    request = dataclasses.replace(task.prompt, source=tokens, attention_mask=mask)
    logits, activations, keys, values = _run(params, task, request)
    # An edit of scores or patterns may attend beyond the window, so its layer keeps all keys and values.
    whole = {layer_of(name) for name in request.edits if name.endswith(("attn.hook_attn_scores", "attn.hook_pattern"))}
    cache = append(empty_cache(task.config, start, p + new, keys, whole=whole), keys, values)
    seen = None
    if task.sampling.repetition_penalty is not None:
        seen = jnp.zeros((b, task.config.vocab_size), bool).at[jnp.arange(b)[:, None], tokens].max(mask.astype(bool))
    text = Decoding(
        tokens=jnp.pad(tokens, ((0, 0), (0, new)), constant_values=0),
        length=jnp.int32(p),
        cache=cache,
        done=jnp.zeros(b, bool),
        failed=jnp.full(b, -1, jnp.int32),
        log_probs=jnp.zeros((b, new), jnp.float32),
        logits=jnp.zeros((b, new, logits.shape[-1]), jnp.float32) if keep_logits else None,
        captured={name: _buffer(name, value, p + new) for name, value in activations.items()},
        seen=seen,
    )
    return _write(task, text, logits[:, -1], jnp.int32(0))


def go_on(params: Params, task: Task, text: Decoding, steps: jax.Array) -> Decoding:
    """The decode loop: write `steps` more tokens, or fewer if all rows end, a row fails, or the buffer is full.

    A failed row is undefined from its failed token on: see `check_logits`.
    """
    end = jnp.minimum(text.length + steps, text.tokens.shape[1])

    def goes_on(text: Decoding) -> jax.Array:
        return (text.length < end) & ~jnp.all(text.done) & ~jnp.any(_stuck(text))

    return jax.lax.while_loop(goes_on, functools.partial(_step, params, task), text)


def check_logits(text: Decoding) -> Decoding:
    """The same text, after a check that no unfinished row has failed. Waits for the device.

    Raises:
        ValueError: the logits of a row were NaN or all minus infinity; names the row and its first such token.
    """
    stuck = np.asarray(_stuck(text))
    if stuck.any():
        row = int(stuck.argmax())
        raise ValueError(
            f"the logits of row {row} are NaN, or all minus infinity, at new token {int(text.failed[row])} (both "
            "counted from 0): look for NaN or infinity in the parameters, or in the result of an edit"
        )
    return text


def _stuck(text: Decoding) -> jax.Array:
    """[b] bool: rows that have failed and have not ended."""
    return (text.failed >= 0) & ~text.done


def _step(params: Params, task: Task, text: Decoding) -> Decoding:
    """One decode step: run the model on the last token, and write the next token."""
    # [b, 1]
    last = jax.lax.dynamic_slice_in_dim(text.tokens, text.length - 1, 1, axis=1)
    request = dataclasses.replace(
        task.step, source=last, positions=positions(text.cache, 1), past=past(task.config, text.cache, 1)
    )
    logits, activations, keys, values = _run(params, task, request)
    captured = {name: _put(name, text.captured[name], value, text.cache.length) for name, value in activations.items()}
    read_so_far = text.cache.capacity - text.log_probs.shape[1]
    text = dataclasses.replace(text, cache=append(text.cache, keys, values), captured=captured)
    return _write(task, text, logits[:, 0], text.length - read_so_far)


def _run(
    params: Params, task: Task, request: Request
) -> tuple[jax.Array, dict[str, jax.Array], Sequence[jax.Array], Sequence[jax.Array]]:
    """Logits, captured activations, and the keys and values of every layer."""
    layers = range(task.config.num_hidden_layers)
    keys = [block(i, "attn.hook_rot_k") for i in layers]
    values = [block(i, "attn.v.hook_out") for i in layers]
    names = tuple(dict.fromkeys((*task.capture, *keys, *values)))
    whole = (None,) * len(names)
    logits, cache = run(params, dataclasses.replace(request, names=names, reductions=whole, reduced=whole))
    captured = {name: cache[name] for name in task.capture}
    return logits, captured, [cache[name] for name in keys], [cache[name] for name in values]


def _write(task: Task, text: Decoding, logits: jax.Array, n: jax.Array) -> Decoding:
    """Sample the n-th new token from logits [b, V], and write it into the next column."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(task.keys, n)
    token = jnp.where(text.done, task.pad, draw(logits, text.seen, keys, task.sampling))
    # [b]; the maximum is NaN if any logit is NaN
    fails = ~(jnp.max(logits, axis=-1) > -jnp.inf) & ~text.done
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    seen = None if text.seen is None else text.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return dataclasses.replace(
        text,
        # Every process reads these.
        tokens=replicated(put(text.tokens, token[:, None], text.length)),
        length=text.length + 1,
        log_probs=replicated(put(text.log_probs, jnp.where(text.done[:, None], 0.0, log_prob), n)),
        logits=None if text.logits is None else constrained(put(text.logits, logits[:, None], n), "b p V"),
        done=replicated(text.done | (jnp.any(token[:, None] == task.stop, axis=1) & ~fails)),
        failed=replicated(jnp.where(fails & (text.failed < 0), n, text.failed)),
        seen=seen,
    )


def _buffer(name: str, value: jax.Array, capacity: int) -> jax.Array:
    """An activation of the prompt, padded for later columns and their keys."""
    padding = [(0, 0)] * value.ndim
    for axis in {token_axis(name), *([value.ndim - 1] if site(name).axes.endswith("p k") else [])}:
        padding[axis] = (0, capacity - value.shape[axis])
    fill = jnp.finfo(value.dtype).min if name.endswith("hook_attn_scores") else 0
    return jnp.pad(value, padding, constant_values=fill)


def _put(name: str, buffer: jax.Array, value: jax.Array, column: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, value, column, axis=token_axis(name))
