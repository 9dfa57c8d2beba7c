"""Decoding: a prompt is read, then tokens are written one by one, inside compiled functions. Pure.

Rows are aligned at their ends; columns count from the left, with padding. A token is sampled, written into the next
column, and run only when another token is wanted: the last token of a text is never run.

Axes: b batch, p columns of the prompt, n new tokens, c = p + n columns, V vocabulary.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import Edits, forward
from gemma3_jax.generation.kv_cache import KVCache, append, empty_cache, past, positions
from gemma3_jax.generation.sampling import Sampling, draw
from gemma3_jax.hooks import Phase
from gemma3_jax.sites import layer_of, site


@flax.struct.dataclass
class Decoding:
    """A text being written; a pytree.

    Attributes:
        tokens: [b, c] int32, padded on both sides.
        length: [] int32, columns written.
        cache: keys and values of the columns that were run, all but the last.
        done: [b] bool, rows that met a stop token.
        log_probs: [b, n] float32, of the new tokens under the model's own distribution (temperature 1, no filter).
        logits: [b, n, V] float32, from which the new tokens were drawn, before any filter; or None.
        captured: by canonical name the activations of the columns that were run, c long.
        seen: [b, V] bool, which tokens the text has; or None.
    """

    tokens: jax.Array
    length: jax.Array
    cache: KVCache
    done: jax.Array
    log_probs: jax.Array
    logits: jax.Array | None
    captured: dict[str, jax.Array]
    seen: jax.Array | None


@flax.struct.dataclass
class Task:
    """What holds for a whole text; arrays are traced.

    Attributes:
        params: parameter pytree.
        edits: as `forward` takes them.
        sampling: how tokens are drawn.
        keys: [b] random keys.
        stop: [m] int32, the tokens that end a row; -1 stands for none.
        pad: what is written behind the end of a row.
        config: shape of the model (static).
        capture: canonical names of the sites to keep (static).
    """

    params: Mapping[str, Any]
    edits: Edits
    sampling: Sampling
    keys: jax.Array
    stop: jax.Array
    pad: jax.Array
    config: Gemma3Config = flax.struct.field(pytree_node=False)
    capture: tuple[str, ...] = flax.struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnames=("new", "keep_logits"))
def read(task: Task, tokens: jax.Array, start: jax.Array, *, new: int, keep_logits: bool = False) -> Decoding:
    """Read a prompt and write the first token.

    Args:
        task: what to do.
        tokens: [b, p] int32, each row padded on the left.
        start: [b] int32, the padding of each row.
        new: how many tokens there may be, 1 at least; takes memory.
        keep_logits: keep the logits of every new token.
    """
    b, p = tokens.shape
    mask = (jnp.arange(p) >= start[:, None]).astype(jnp.int32)
    # Whoever looks at the unembedding, or edits it, sees it at every token, as in `forward`.
    looked_at = any(name.startswith("unembed.") for name in (*task.capture, *task.edits))
    logits, activations, keys, values = _run(
        task, tokens, logits_at=None if looked_at else -1, attention_mask=mask, phase="prompt"
    )
    # What an edit attends to behind the window must still be there.
    whole = {layer_of(name) for name in task.edits if name.endswith(("attn.hook_attn_scores", "attn.hook_pattern"))}
    cache = append(empty_cache(task.config, start, p + new, keys, whole=whole), keys, values)
    seen = None
    if task.sampling.repetition_penalty is not None:
        seen = jnp.zeros((b, task.config.vocab_size), bool).at[jnp.arange(b)[:, None], tokens].max(mask.astype(bool))
    text = Decoding(
        tokens=jnp.pad(tokens, ((0, 0), (0, new)), constant_values=0),
        length=jnp.int32(p),
        cache=cache,
        done=jnp.zeros(b, bool),
        log_probs=jnp.zeros((b, new), jnp.float32),
        logits=jnp.zeros((b, new, logits.shape[-1]), jnp.float32) if keep_logits else None,
        captured={name: _buffer(name, value, p + new) for name, value in activations.items()},
        seen=seen,
    )
    return _write(task, text, logits[:, -1], jnp.int32(0))


@functools.partial(jax.jit, donate_argnames="text")
def go_on(task: Task, text: Decoding, steps: jax.Array) -> Decoding:
    """Write `steps` more tokens, or fewer if all rows end before; `text` is used up."""
    end = text.length + steps
    return jax.lax.while_loop(
        lambda text: (text.length < end) & ~jnp.all(text.done), functools.partial(_step, task), text
    )


def _step(task: Task, text: Decoding) -> Decoding:
    """Run the last token that was written, and write the next."""
    # [b, 1]
    last = jax.lax.dynamic_slice_in_dim(text.tokens, text.length - 1, 1, axis=1)
    logits, activations, keys, values = _run(
        task,
        last,
        positions=positions(text.cache, 1),
        past=past(task.config, text.cache, 1),
        phase="generation",
    )
    captured = {name: _put(name, text.captured[name], value, text.cache.length) for name, value in activations.items()}
    read_so_far = text.cache.capacity - text.log_probs.shape[1]
    text = text.replace(cache=append(text.cache, keys, values), captured=captured)  # type: ignore[attr-defined]
    return _write(task, text, logits[:, 0], text.length - read_so_far)


def _run(
    task: Task, tokens: jax.Array, *, phase: Phase, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array], Sequence[jax.Array], Sequence[jax.Array]]:
    """Logits, the captured activations, and the keys and values of every layer."""
    layers = range(task.config.num_hidden_layers)
    keys = [f"blocks.{i}.attn.hook_rot_k" for i in layers]
    values = [f"blocks.{i}.attn.v.hook_out" for i in layers]
    names = [*keys, *values, *task.capture]
    logits, cache = forward(task.config, task.params, tokens, names, task.edits, phase=phase, **options)
    kept = {name: cache[name] for name in task.capture}
    return logits, kept, [cache[name] for name in keys], [cache[name] for name in values]


def _write(task: Task, text: Decoding, logits: jax.Array, n: jax.Array) -> Decoding:
    """Draw the n-th new token from logits [b, V], and write it into the next column."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(task.keys, n)
    token = jnp.where(text.done, task.pad, draw(logits, text.seen, keys, task.sampling))
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    seen = None if text.seen is None else text.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return text.replace(  # type: ignore[attr-defined]
        tokens=put(text.tokens, token[:, None], text.length),
        length=text.length + 1,
        log_probs=put(text.log_probs, jnp.where(text.done[:, None], 0.0, log_prob), n),
        logits=None if text.logits is None else put(text.logits, logits[:, None], n),
        done=text.done | jnp.any(token[:, None] == task.stop, axis=1),
        seen=seen,
    )


def _token_axis(name: str) -> int:
    axes = site(name).axes.split()
    return axes.index("p" if "p" in axes else "k")


def _buffer(name: str, value: jax.Array, capacity: int) -> jax.Array:
    """An activation of the prompt with room for the columns that follow, and the keys of these."""
    padding = [(0, 0)] * value.ndim
    for axis in {_token_axis(name), *([value.ndim - 1] if site(name).axes.endswith("p k") else [])}:
        padding[axis] = (0, capacity - value.shape[axis])
    fill = jnp.finfo(value.dtype).min if name.endswith("hook_attn_scores") else 0
    return jnp.pad(value, padding, constant_values=fill)


def _put(name: str, buffer: jax.Array, value: jax.Array, column: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, value, column, axis=_token_axis(name))
