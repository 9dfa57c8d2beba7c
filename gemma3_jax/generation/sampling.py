"""Sample the next token from its logits: greedily, or with temperature, top-k, top-p, min-p and a repetition penalty.

Source: the filters of `transformers`' `generate`, in the same order: penalty, temperature, top-k, top-p, min-p.

Axes: b batch, V vocabulary.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, Unpack

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.types import ArrayLike, IntegersLike


class Options(TypedDict, total=False):
    """The arguments of `generate` for sampling and stopping. Each of the first five is one number, or one per row.

    Attributes:
        temperature: 0, the default, takes the likeliest token.
        top_k: sample from the k likeliest tokens. This and the next two need a temperature above 0 in some row.
        top_p: sample from the likeliest tokens whose total probability reaches this value.
        min_p: sample from tokens whose probability is at least `min_p` times that of the likeliest token.
        repetition_penalty: divide positive logits of tokens in the text by this, and multiply negative ones.
        seed: a 32-bit integer, 0 by default, or one per row, which makes a row's samples independent of the other rows.
        stop_at_eos: end a row at a stop token; True by default.
        eos_token_id: the stop tokens; by default the config's.
    """

    temperature: ArrayLike
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None
    repetition_penalty: ArrayLike | None
    seed: IntegersLike
    stop_at_eos: bool
    eos_token_id: int | Sequence[int] | None


def check_names(options: Mapping[str, object], other_names: Mapping[str, str] | None = None) -> None:
    """Raise TypeError for unknown options, with a suggestion.

    Args:
        options: by name.
        other_names: what else people call an argument, and its name here.
    """
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__)
            near = [other_names[name]] if other_names and name in other_names else near
            meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(Options.__annotations__)}"
            raise TypeError(f"generation does not take the argument {name}; {meant}")


@flax.struct.dataclass
class Sampling:
    """The parameters of sampling for each row. A filter that is None is left out of the compiled program.

    Attributes:
        temperature: [b]; 0 takes the likeliest token.
        top_k: [b] int32, or None.
        top_p: [b], or None.
        min_p: [b], or None.
        repetition_penalty: [b], or None.
        greedy: whether all temperatures are 0 (static), which skips sampling entirely.
    """

    temperature: jax.Array
    top_k: jax.Array | None
    top_p: jax.Array | None
    min_p: jax.Array | None
    repetition_penalty: jax.Array | None
    greedy: bool = flax.struct.field(pytree_node=False)


def sampling(batch: int, **options: Unpack[Options]) -> Sampling:
    """Check the options of sampling, each of which is one number or one per row.

    Raises:
        ValueError: an option is out of range or has a wrong number of rows; or a filter is set while all temperatures
            are 0, which does not sample.
    """
    temperature = options.get("temperature", 0.0)
    ranges: dict[str, tuple[ArrayLike | None, str, Callable[[np.ndarray], np.ndarray]]] = {
        "temperature": (temperature, "at least 0", lambda x: x >= 0),
        "top_k": (options.get("top_k"), "at least 1", lambda x: (x >= 1) & (x == np.floor(x))),
        "top_p": (options.get("top_p"), "above 0 and at most 1", lambda x: (x > 0) & (x <= 1)),
        "min_p": (options.get("min_p"), "from 0 to 1", lambda x: (x >= 0) & (x <= 1)),
        "repetition_penalty": (options.get("repetition_penalty"), "above 0", lambda x: x > 0),
    }
    rows: dict[str, jax.Array] = {}
    for name, (value, words, good) in ranges.items():
        if value is None and name != "temperature":
            continue
        array = _numbers(value)
        if not (np.isfinite(array) & good(array)).all():
            raise ValueError(f"{name} is {value!r}; it must be {'a whole number ' if name == 'top_k' else ''}{words}")
        if array.ndim > 1 or array.size not in (1, batch):
            raise ValueError(f"{name} has shape {array.shape}; give one number, or one for each of {batch} rows")
        # No vocabulary is larger than this, and larger values may not fit in 32 bits.
        array = np.minimum(array, 2**30) if name == "top_k" else array
        rows[name] = jnp.asarray(np.broadcast_to(array, batch), jnp.int32 if name == "top_k" else jnp.float32)
    greedy = not _numbers(temperature).any()
    for name in ("top_k", "top_p", "min_p"):
        setting = options.get(name)
        if greedy and setting is not None:
            raise ValueError(
                f"{name} is {setting!r}, but the temperature is 0, which always takes the likeliest token: give a "
                f"temperature above 0, or leave {name} out"
            )
    return Sampling(
        rows["temperature"],
        rows.get("top_k"),
        rows.get("top_p"),
        rows.get("min_p"),
        rows.get("repetition_penalty"),
        greedy,
    )


def _numbers(value: object) -> np.ndarray:
    """The value in float32, or NaN, which is out of every range, if it is not numeric, such as text or booleans."""
    try:
        array = np.asarray(value)
    except ValueError:
        return np.asarray(np.nan)
    real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32) if real else np.asarray(np.nan)


def row_keys(seed: IntegersLike, batch: int) -> jax.Array:
    """[b] random keys: a different key for each row from one seed, or a key from the seed of each row."""
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    seeds, shown = (np.asarray(None), "a random key") if is_key else (np.asarray(seed), repr(seed))
    if not np.issubdtype(seeds.dtype, np.integer) or seeds.shape not in ((), (batch,)):
        raise ValueError(f"seed is {shown}; it must be an integer, or one for each of {batch} rows")
    if seeds.min() < -(2**31) or seeds.max() >= 2**32:
        raise ValueError(f"seed is {shown}; it must fit 32 bits: from {-(2**31)} to {2**32 - 1}")
    if seeds.ndim:
        return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(int(seeds)), jnp.arange(batch))


def draw(logits: jax.Array, seen: jax.Array | None, keys: jax.Array, how: Sampling) -> jax.Array:
    """[b] int32: the next token of each row.

    Args:
        logits: [b, V] float32.
        seen: [b, V] bool, the tokens of the text so far; needed for the repetition penalty.
        keys: [b] random keys for this token.
        how: the parameters.
    """
    if how.repetition_penalty is not None and seen is not None:
        penalty = how.repetition_penalty[:, None]
        penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
        # An extreme penalty overflows, and two infinite logits would differ by NaN.
        largest = jnp.finfo(jnp.float32).max
        logits = jnp.where(seen, jnp.clip(penalized, -largest, largest), logits)
    # Use one reduction. XLA may round a value differently if it computes it twice, and then no logit equals the
    # maximum.
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if how.greedy:
        return likeliest
    # Shift the maximum to 0 first, so that dividing by a tiny temperature does not make it infinite.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = below / jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, keep_likely(scaled, how))
    return jnp.where(how.temperature > 0, drawn, likeliest).astype(jnp.int32)


def keep_likely(logits: jax.Array, how: Sampling) -> jax.Array:
    """[b, V]: the logits of the tokens that top-k, top-p and min-p keep, minus infinity elsewhere.

    Tokens with the same logit are kept or left out together, and the likeliest token always stays.
    """
    if how.top_k is not None:
        k = how.top_k[:, None]
        logits = _above_cutoff(logits, lambda likelier: jnp.sum(likelier, axis=-1, keepdims=True) < k)
    if how.top_p is not None:
        p, probabilities = how.top_p[:, None], jax.nn.softmax(logits, axis=-1)

        def reached(likelier: jax.Array) -> jax.Array:
            total = jnp.sum(jnp.where(likelier, probabilities, 0), axis=-1, keepdims=True)
            # With top_p = 1 no token is left out, even if the sum rounds to 1.
            return (total < p) | (p == 1)

        logits = _above_cutoff(logits, reached)
    if how.min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        # p >= min_p * p_max, in logs
        logits = jnp.where(logits >= top + jnp.log(how.min_p[:, None]), logits, -jnp.inf)
    return logits


def _above_cutoff(logits: jax.Array, keeps: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[b, V]: the logits from a row's cutoff up, minus infinity elsewhere.

    The cutoff is the lowest value that `keeps`, which must hold from there up, is true of. A bisection over the bits of
    a float32 finds it. It reads the row 32 times, which takes a tenth of the time of sorting a row of 262,144 on a CPU,
    and on a mesh it adds single numbers over the devices where a sort would gather the rows.

    Args:
        logits: [b, V] float32.
        keeps: from the mask of the tokens that are likelier than a value, [b, V], to whether it is kept, [b, 1].
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)  # 0 and -0 are one value
    order = jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)  # ordered as the logits are
    # from below every logit to the largest: nothing is likelier than that, and it always stays
    low, high = jnp.full_like(order[:, :1], jnp.iinfo(jnp.int32).min), jnp.max(order, axis=-1, keepdims=True)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their sum may not fit in 32 bits
        kept = keeps(order > middle)
        return jnp.where(kept, low, middle), jnp.where(kept, middle, high)

    _, cutoff = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= cutoff, logits, -jnp.inf)
