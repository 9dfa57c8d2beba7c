"""The next token from its logits: greedy, or drawn after temperature, top-k, top-p, min-p and a repetition penalty.

Source: the filters of `transformers`' `generate`, in its order: penalty, temperature, top-k, top-p, min-p.

Axes: b batch, V vocabulary.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn, for each row. A filter that is None is left out of the compiled program.

    Attributes:
        temperature: [b]; 0 takes the likeliest token.
        top_k: [b] int32, or None.
        top_p: [b], or None.
        min_p: [b], or None.
        repetition_penalty: [b], or None.
        greedy: whether all temperatures are 0 (static), which spares the drawing.
    """

    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None
    greedy: bool = flax.struct.field(pytree_node=False)


def sampling(
    batch: int,
    temperature: Any = 0.0,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
) -> Sampling:
    """Check the parameters, each one number or one for each row.

    Raises:
        ValueError: naming the parameter that is out of range, or has another number of rows.
    """
    ranges = {
        "temperature": (temperature, "at least 0", lambda x: x >= 0),
        "top_k": (top_k, "at least 1", lambda x: (x >= 1) & (x == np.floor(x))),
        "top_p": (top_p, "above 0 and at most 1", lambda x: (x > 0) & (x <= 1)),
        "min_p": (min_p, "from 0 to 1", lambda x: (x >= 0) & (x <= 1)),
        "repetition_penalty": (repetition_penalty, "above 0", lambda x: x > 0),
    }
    rows: dict[str, Any] = {}
    for name, (value, says, good) in ranges.items():
        if value is None and name != "temperature":
            rows[name] = None
            continue
        given = _numbers(value)
        if not (np.isfinite(given) & good(given)).all():
            raise ValueError(f"{name} is {value!r}; it must be {'a whole number ' if name == 'top_k' else ''}{says}")
        if given.ndim > 1 or given.size not in (1, batch):
            raise ValueError(f"{name} has shape {given.shape}; give one number, or one for each of {batch} rows")
        # No vocabulary has so many tokens, and more would not fit 32 bits.
        given = np.minimum(given, 2**30) if name == "top_k" else given
        rows[name] = jnp.asarray(np.broadcast_to(given, batch), jnp.int32 if name == "top_k" else jnp.float32)
    return Sampling(**rows, greedy=not np.asarray(temperature).any())


def _numbers(value: Any) -> np.ndarray:
    """In float32; NaN, which is in no range, of what is no number: None, text, booleans, a ragged list."""
    try:
        given = np.asarray(value)
    except ValueError:
        return np.asarray(np.nan)
    real = jnp.issubdtype(given.dtype, jnp.integer) or jnp.issubdtype(given.dtype, jnp.floating)
    return given.astype(np.float32) if real else np.asarray(np.nan)


def row_keys(seed: Any, batch: int) -> jax.Array:
    """[b] random keys: of one seed, each row with a key of its own; or of a seed for each row."""
    seeds = np.asarray(seed)
    if not np.issubdtype(seeds.dtype, np.integer) or seeds.shape not in ((), (batch,)):
        raise ValueError(f"seed is {seed!r}; it takes an integer, or one for each of {batch} rows")
    if seeds.min() < -(2**31) or seeds.max() >= 2**32:
        raise ValueError(f"seed is {seed!r}; it must fit 32 bits: from {-(2**31)} to {2**32 - 1}")
    if seeds.ndim:
        return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(int(seeds)), jnp.arange(batch))


def draw(logits: jax.Array, seen: jax.Array | None, keys: jax.Array, how: Sampling) -> jax.Array:
    """[b] int32: the next token of each row.

    Args:
        logits: [b, V] float32.
        seen: [b, V] bool, the tokens of the text so far; needed for the repetition penalty.
        keys: [b] random keys, for this draw alone.
        how: the parameters.
    """
    if how.repetition_penalty is not None and seen is not None:
        penalty = how.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    # One reduction: XLA may round a value that it computes twice in two ways, and then nothing equals the largest.
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if how.greedy:
        return likeliest
    # The largest becomes 0 first, which a temperature next to 0 does not make infinite.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, keep_likely(scaled, how))
    return jnp.where(how.temperature > 0, drawn, likeliest).astype(jnp.int32)


def keep_likely(logits: jax.Array, how: Sampling) -> jax.Array:
    """[b, V]: the logits of the tokens that top-k, top-p and min-p keep, minus infinity elsewhere."""
    if how.top_k is not None or how.top_p is not None:
        # [b, V], the largest first
        ranked = -jnp.sort(-logits, axis=-1)
        kept = jnp.ones_like(ranked, bool)
        if how.top_k is not None:
            kept = jnp.arange(ranked.shape[-1]) < how.top_k[:, None]
        if how.top_p is not None:
            probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
            # What the likelier tokens have together; a sum that is rounded to 1 leaves no token out of all.
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            kept &= (before < how.top_p[:, None]) | (how.top_p[:, None] == 1)
        # The likeliest stays, also where top_p is so small that it is flushed to 0.
        rank = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True) - 1, 0)
        last = jnp.take_along_axis(ranked, rank, axis=-1)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    if how.min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        # p >= min_p * p_max, in logs
        logits = jnp.where(logits >= top + jnp.log(how.min_p[:, None]), logits, -jnp.inf)
    return logits
