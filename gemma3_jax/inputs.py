"""Checks and conversion of token ids and masks from any array library; all entry points use this module.

Axes: b batch, p position.
"""

import operator
import reprlib
import sys
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.positions import Extent
from gemma3_jax.types import Integers, IntegersLike

Value = TypeVar("Value")


class Inputs(NamedTuple):
    """The inputs of a run; a pytree. Untraced arrays are on the host, since reading from a device waits for its runs.

    Attributes:
        tokens: [b, p] int32 ids.
        attention_mask: [b, p] int32, 1 at real tokens; None if all tokens are real.
        positions: [b, p] int32, or None to derive them from the mask.
        segment_ids: [b, p] int32, the document of each token; or None. Documents do not attend to each other.
        labels: [b, p] int32, what a loss predicts; None for the tokens, and for runs without a loss.
    """

    tokens: Integers
    attention_mask: Integers | None = None
    positions: Integers | None = None
    segment_ids: Integers | None = None
    labels: Integers | None = None

    @property
    def extent(self) -> Extent:
        """The shape of the tokens, and the known positions."""
        b, p = self.tokens.shape
        return Extent(b, p, self.attention_mask, self.positions, self.segment_ids)


def as_array(value: Value) -> Value | np.ndarray:
    """A torch tensor as an array, also in bfloat16; other values are returned unchanged."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu().contiguous()
    # torch's .numpy() does not support bfloat16, and JAX would truncate 64-bit integers to 32 bits.
    return np.asarray(jax.dlpack.from_dlpack(tensor)) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_int32(name: str, integers: Integers) -> Integers:
    """Integers of any type as int32.

    Raises:
        ValueError: a known value does not fit; a cast would silently wrap it.

    >>> as_int32("positions", np.array([0, 1])).dtype
    dtype('int32')
    """
    if not isinstance(integers, jax.core.Tracer) and integers.size:
        for extreme in (int(integers.min()), int(integers.max())):
            if not -(2**31) <= extreme < 2**31:
                raise ValueError(f"{name} has {extreme}, which does not fit 32 bits")
    return integers.astype(np.int32)


def integer(name: str, value: object) -> int:
    """An integer of any library as an int.

    Raises:
        TypeError: it is not an integer.

    >>> integer("layer", np.int32(3))
    3
    """
    try:
        return operator.index(value)  # type: ignore[arg-type] # which the error is for
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer") from None


def positive(name: str, value: object) -> int:
    """An integer of at least 1, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than 1.
    """
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def section(name: str, index: int | slice) -> slice:
    """The slice of an axis that an int, which keeps an axis of length 1, or a slice means.

    Raises:
        TypeError: it is neither.

    >>> section("positions", 2), section("positions", -1)
    (slice(2, 3, None), slice(-1, None, None))
    """
    if isinstance(index, slice):
        return index
    try:
        at = operator.index(index)
    except TypeError:
        raise TypeError(f"{name} is {index!r}; it must be an integer or a slice, such as slice(0, 2)") from None
    return slice(at, at + 1 or None)


def lists_as_arrays(tree: Value, what: str) -> Value:
    """A pytree with an array in place of each list of numbers, whose entries would be leaves of their own.

    Raises:
        ValueError: a leaf, or an entry of a list, is not a number; the message begins with `what`.

    >>> lists_as_arrays({"row": [1, 0]}, "the edit")
    {'row': array([1, 0])}
    """

    def as_one(leaf: object) -> object:
        if not isinstance(leaf, list | tuple | str | bytes):
            return leaf
        try:
            array = np.asarray(leaf)
        except jax.errors.TracerArrayConversionError:
            return jnp.asarray(leaf)
        except ValueError:  # a ragged list
            array = np.asarray(None)
        if array.dtype.kind in "SUO":
            raise ValueError(f"{what} has {reprlib.repr(leaf)}, which is not an array of numbers")
        return array

    changed: Value = jax.tree.map(as_one, tree, is_leaf=lambda leaf: isinstance(leaf, list | tuple))
    return changed


def known_ids(ids: IntegersLike) -> np.ndarray:
    """Ids of any array library, or in lists, on the host; not checked further.

    Raises:
        ValueError: rows of ids have different lengths.
    """
    try:
        return np.asarray(as_array(ids))
    except ValueError as error:
        raise ValueError("rows of ids have different lengths; pad them, and give their attention_mask") from error


def token_ids(ids: IntegersLike, vocab_size: int) -> Integers:
    """Ids [p] or [b, p] of any integer type as [b, p] int32, checked; on the host unless they are traced.

    Raises:
        ValueError: the ids are not integers, are empty, or have an id outside the vocabulary.

    >>> token_ids([5, 7], 10).shape
    (1, 2)
    """
    if isinstance(ids, jax.core.Tracer):
        _check_integers(ids)
        return jnp.atleast_2d(ids).astype(jnp.int32)
    array = known_ids(ids)
    if array.dtype.kind in "SUO":
        raise ValueError(
            f"the input is {reprlib.repr(ids)}; token ids must be integers [p] or [b, p], and texts a str or a list of "
            "str"
        )
    _check_integers(array)
    check_ids(array, vocab_size)
    return np.atleast_2d(array).astype(np.int32)


def _check_integers(ids: Integers) -> None:
    if ids.ndim not in (1, 2) or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"token ids are {ids.dtype} of shape {ids.shape}; they must be integers [p] or [b, p], with at least one "
            "token"
        )


def check_ids(ids: IntegersLike, vocab_size: int, what: str = "token id") -> None:
    """Check that ids are in the vocabulary; traced ids are not checked.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    known = np.asarray(ids)
    wrong = known[(known < 0) | (known >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{what} {wrong.flat[0]} is outside the vocabulary of {vocab_size}")


def special_id(config: Gemma3Config, name: str) -> int:
    """The config's id of that name, such as "pad_token_id"; 0 if the config has none.

    Raises:
        ValueError: the id is outside the vocabulary.
    """
    value = getattr(config, name)
    if value is not None and not 0 <= value < config.vocab_size:
        raise ValueError(
            f"the config's {name} {value} is outside the vocabulary of {config.vocab_size}; set another one with "
            f"dataclasses.replace(config, {name}=...)"
        )
    return value or 0


def padding_mask(config: Gemma3Config, tokens: np.ndarray) -> np.ndarray:
    """[b, p] int32, 0 at padding tokens at the ends of rows of `tokens` [b, p], and 1 elsewhere.

    If the padding token is also BOS, the last of the leading padding tokens belongs to the text. If it is also EOS, the
    first of the trailing padding tokens belongs to the text. A row of only padding tokens is a text.

    >>> import numpy as np
    >>> padding_mask(Gemma3Config.preset("1b"), np.array([[0, 0, 2, 9], [2, 9, 7, 0]])).tolist()
    [[0, 0, 1, 1], [1, 1, 1, 0]]
    """
    pad = config.padding
    stops = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    text = tokens != pad
    columns = np.arange(tokens.shape[1])
    # [b, 1]
    first = text.argmax(axis=1)[:, None] - (pad == config.bos_token_id)
    last = tokens.shape[1] - 1 - text[:, ::-1].argmax(axis=1)[:, None] + (pad in stops)
    real = (columns >= first) & (columns <= last)
    return (real | ~text.any(axis=1, keepdims=True)).astype(np.int32)


def one_input(tokens: Value | None, inputs_embeds: Value | None) -> Value | np.ndarray:
    """The argument that is not None; a torch tensor as an array.

    Raises:
        ValueError: both or neither are None.
    """
    source = tokens if inputs_embeds is None else inputs_embeds
    if source is None or (tokens is not None and inputs_embeds is not None):
        raise ValueError("give tokens or inputs_embeds: exactly one of them")
    return as_array(source)
