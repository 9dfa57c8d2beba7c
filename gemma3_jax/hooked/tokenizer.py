"""Convert text to token ids and back, with the tokenizer of a checkpoint.

Axes: b batch, p position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Literal, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.elsewhere import knows_arguments_from_elsewhere
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.inputs import Inputs, as_array, check_ids, known_ids, padding_mask, special_id, token_ids
from gemma3_jax.positions import check_mask, packed_documents
from gemma3_jax.run.request import embedding_head_of
from gemma3_jax.run.selection import LOSSES, ReturnType
from gemma3_jax.types import Integers, IntegersLike, Settings, Tokenizer

# A Hugging Face tokenizer returns a mapping.
Input = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array | Settings | Inputs


def encode(
    model: Model, input: Input, attention_mask: IntegersLike | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Any input as token ids [b, p] int32 and its mask [b, p] int32, or None if all tokens are real.

    Arguments and errors as in `inputs`; an input with positions or segment_ids is refused, which this would drop.
    """
    tokens, mask, positions, segment_ids, _ = inputs(model, input, attention_mask)
    if positions is not None or segment_ids is not None:
        raise ValueError("the input has positions or segment_ids, which encode does not return; use model.inputs")
    return jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)


def inputs(
    model: Model,
    input: Input,
    attention_mask: IntegersLike | None = None,
    positions: IntegersLike | None = None,
    segment_ids: IntegersLike | None = None,
    return_type: ReturnType = "logits",
    labels: IntegersLike | None = None,
) -> Inputs:
    """Convert any input to `Inputs`; all entry points for text and ids use this.

    Args:
        input: a text, texts (padded on the tokenizer's side), integer ids [p] or [b, p] of any array library, or a
            mapping with `input_ids`, as a Hugging Face tokenizer returns it; its `attention_mask`, `position_ids`
            and `segment_ids` are used too, and for a loss its `labels`.
        attention_mask: [b, p], 1 at real tokens and 0 at padding. By default the padding tokens at the ends of
            rows are padding; traced ids have none.
        positions: [b, p] integers.
        segment_ids: [b, p] integers.
        return_type: with "embedding", texts get the special tokens that the checkpoint's tokenizer adds, BOS and EOS
            for EmbeddingGemma, and are truncated as in `embed`. Otherwise each text has exactly one BOS.
        labels: [b, p] integers, for a loss.

    Raises:
        ValueError: the input is empty, is neither text nor ids, or has an id outside the vocabulary; a mask has
            values other than 0 and 1; or a mapping has entries that this model does not read, such as images.
    """
    tokens: Integers
    padding: np.ndarray | None
    if isinstance(input, Inputs):
        return input
    if isinstance(input, Mapping):
        input, own = _parts(input)
        attention_mask = own.get("attention_mask") if attention_mask is None else attention_mask
        positions = own.get("position_ids") if positions is None else positions
        segment_ids = own.get("segment_ids") if segment_ids is None else segment_ids
        if return_type in LOSSES:
            labels = own.get("labels") if labels is None else labels
    if is_text(input):
        if return_type == "embedding":
            rows = embedding_ids(model, [input] if isinstance(input, str) else input)
        else:
            rows = rows_of(model, input, prepend_bos=True)
        tokens, padding = padded(model, rows)
    else:
        tokens = token_ids(cast(IntegersLike, input), model.config.vocab_size)
        padding = padding_mask(model.config, tokens) if isinstance(tokens, np.ndarray) else None
    if attention_mask is not None:
        attention_mask = as_array(attention_mask)
        check_mask(attention_mask)
    elif padding is not None and not padding.all():
        attention_mask = padding
        if segment_ids is None and positions is not None:
            # With a mask, restarting positions would no longer mark where documents begin.
            segment_ids = packed_documents(None, jnp.atleast_2d(jnp.asarray(as_array(positions))))
    return Inputs(tokens, *map(_rows, (attention_mask, positions, segment_ids, labels)))


@knows_arguments_from_elsewhere
def to_tokens(
    model: Model,
    input: str | Sequence[str],
    prepend_bos: bool = True,
    padding_side: Literal["left", "right"] | None = None,
) -> jax.Array:
    """Token ids [b, p] int32 of one or several texts, padded to the same length. Each row has exactly one BOS.

    `padding_side` is by default that of the tokenizer. Gemma's tokenizer pads on the left, so the last column has
    the last token of every text. The model masks this padding by default.
    """
    return jnp.asarray(padded(model, rows_of(model, input, prepend_bos), padding_side)[0])


def attention_mask(model: Model, tokens: IntegersLike) -> jax.Array:
    """[b, p] int32, 0 at padding tokens at the ends of rows of `tokens` [b, p], and 1 elsewhere.

    `gemma3_jax.inputs.padding_mask` describes padding tokens that are also BOS or EOS.
    """
    return jnp.asarray(padding_mask(model.config, np.asarray(token_ids(tokens, model.config.vocab_size))))


def to_string(model: Model, tokens: IntegersLike) -> str | list[str]:
    """The text of ids [p], or the texts of ids [b, p], including special tokens."""
    ids = _decodable(model, tokens)
    decode = tokenizer_of(model).decode
    return decode(ids.reshape(-1).tolist()) if ids.ndim < 2 else [decode(row.tolist()) for row in ids]


def to_str_tokens(model: Model, input: Input, prepend_bos: bool = True) -> list[str] | list[list[str]]:
    """The tokens of a text, of ids [p] or of one id as strings; a list of lists for several texts or ids [b, p]."""
    if isinstance(input, str):
        return spelled_tokens(model, ids_of(model, input, prepend_bos))
    if is_text(input):
        return [spelled_tokens(model, ids_of(model, text, prepend_bos)) for text in input]
    ids = np.atleast_1d(
        _decodable(model, cast(IntegersLike, input["input_ids"] if isinstance(input, Mapping) else input))
    )
    return spelled_tokens(model, ids) if ids.ndim == 1 else [spelled_tokens(model, row) for row in ids]


def to_single_token(model: Model, string: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        ValueError: the text is not exactly one token.
    """
    ids = ids_of(model, string, prepend_bos=False)
    if len(ids) != 1:
        raise ValueError(f"{string!r} is {len(ids)} tokens, {spelled_tokens(model, ids)}; it must be exactly one")
    return ids[0]


def to_single_str_token(model: Model, token: int) -> str:
    """The text of one token, with its leading space.

    Raises:
        ValueError: it is not one id of the vocabulary.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> model.to_single_str_token(model.to_single_token("lo"))
    'lo'
    """
    ids = np.asarray(token)
    if ids.ndim != 0:
        raise ValueError(f"the token has shape {ids.shape}; it must be one id: to_str_tokens takes several")
    return spelled_tokens(model, _decodable(model, ids[None]))[0]


def get_token_position(
    model: Model, token: int | str, input: Input, mode: Literal["first", "last"] = "first", prepend_bos: bool = True
) -> int:
    """The position of a token in one text, or in its ids: its index in `to_str_tokens`.

    Args:
        model: the model.
        token: an id, or a text that is exactly one token.
        input: a text, or ids [p] or [1, p].
        mode: the "first" or the "last" position of a token that occurs several times.
        prepend_bos: whether a text begins with BOS.

    Raises:
        ValueError: the token does not occur, or the input has several rows.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> model.get_token_position("ke", "ba ke lo ba ke"), model.get_token_position("ke", "ba ke lo ba ke", "last")
    (2, 5)
    """
    if mode not in ("first", "last"):
        raise ValueError(f"mode is {mode!r}; it must be 'first' or 'last'")
    wanted = to_single_token(model, token) if isinstance(token, str) else int(token)
    rows = rows_of(model, input, prepend_bos) if is_text(input) else inputs(model, input).tokens
    if len(rows) != 1:
        raise ValueError(f"the input has {len(rows)} rows; get_token_position takes one")
    [at] = np.nonzero(np.asarray(rows[0]) == wanted)
    if not at.size:
        text = to_single_str_token(model, wanted)
        raise ValueError(f"the token {wanted} ({text!r}) is not in {spelled_tokens(model, rows[0])}")
    return int(at[0 if mode == "first" else -1])


def rows_of(model: Model, input: str | Sequence[str], prepend_bos: bool) -> list[list[int]]:
    """The ids of each text."""
    return [ids_of(model, text, prepend_bos) for text in ([input] if isinstance(input, str) else input)]


def embedding_ids(model: Model, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
    """The ids of each text after a prompt, with the tokenizer's special tokens, truncated to the head's length."""
    head, tokenizer = embedding_head_of(model.config), tokenizer_of(model)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise ValueError(f"the list of texts has {wrong[0]!r}; give only texts" if wrong else "there are no texts")
    for text in texts:
        check_characters(text)
    length = head.max_length or min(tokenizer.model_max_length, model.config.max_position_embeddings)
    encoded = tokenizer([prompt + text for text in texts], truncation=True, max_length=length)
    return [list(row) for row in encoded["input_ids"]]


def padded(
    model: Model, rows: Sequence[Sequence[int]], side: str | None = None, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids [b, p] int32 of rows of ids and their mask, on the host; p is `length`, or that of the longest row."""
    side = getattr(model.tokenizer, "padding_side", "left") if side is None else side
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; it must be 'left' or 'right'")
    if not rows or not all(rows):
        raise ValueError("a text has no tokens; give text with at least one token, or set prepend_bos")
    for i in {i for row in rows for i in row if not 0 <= i < model.config.vocab_size}:
        spelled = tokenizer_of(model).convert_ids_to_tokens(i)
        raise ValueError(
            f"a text has {spelled!r}, token {i}, which is outside the vocabulary of {model.config.vocab_size}: this "
            "model has no embedding for it"
        )
    length = max(map(len, rows)) if length is None else length
    real = np.asarray([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
    mask = real if side == "right" else real[:, ::-1]
    tokens = np.full(mask.shape, special_id(model.config, "pad_token_id"), np.int32) if not mask.all() else mask.copy()
    tokens[mask.astype(bool)] = list(itertools.chain.from_iterable(rows))
    return tokens, mask


def ids_of(model: Model, text: str, prepend_bos: bool) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"the list of texts has {text!r}; give only texts, or only ids")
    check_characters(text)
    ids = list(tokenizer_of(model)(text, add_special_tokens=False)["input_ids"])
    if not prepend_bos or model.config.bos_token_id is None:
        return ids
    bos = special_id(model.config, "bos_token_id")
    return ids if ids[:1] == [bos] else [bos, *ids]


def check_characters(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, which is not a character, so that no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text has {text[error.start]!r} at index {error.start}, a lone surrogate, which is not a character; "
            "read the file with errors='replace'"
        ) from None


def spelled_tokens(model: Model, ids: Iterable[int]) -> list[str]:
    return [tokenizer_of(model).decode([int(i)]) for i in ids]


def _decodable(model: Model, tokens: IntegersLike) -> np.ndarray:
    """Ids on the host, after a check that they are integers that the model or its tokenizer has."""
    ids = known_ids(tokens)
    if ids.size and not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"token ids are {ids.dtype}; they must be integers")
    tokenizer = tokenizer_of(model)
    # A tokenizer may have more tokens than the embedding. It decodes those beyond its own to nothing.
    own = len(tokenizer) if isinstance(tokenizer, Sized) else 0
    check_ids(ids, max(model.config.vocab_size, own))
    return ids


def tokenizer_of(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer: its source has no tokenizer.json or tokenizer.model that works; pass token "
            "ids, or set a tokenizer: from_pretrained(..., tokenizer=) or HookedGemma3(..., tokenizer)"
        )
    return model.tokenizer


def is_text(input: object) -> TypeGuard[str | Sequence[str]]:
    """Whether the input is one or several texts."""
    return isinstance(input, str) or (isinstance(input, Sequence) and bool(input) and isinstance(input[0], str))


def _parts(input: Settings) -> tuple[Input, Settings]:
    """The ids or texts of a mapping, and the mapping, after a check that the model reads all of its entries."""
    if "input_ids" not in input:
        raise ValueError(f"the input has {', '.join(map(str, input))}; it must have input_ids")
    unread = [name for name in ("pixel_values", "inputs_embeds", "past_key_values") if input.get(name) is not None]
    kinds = input.get("token_type_ids")
    if kinds is not None and np.any(np.asarray(as_array(kinds))):
        unread.append("token_type_ids other than 0")
    if unread:
        raise ValueError(f"the input has {', '.join(unread)}, which the text model does not read")
    return input["input_ids"], input


def _rows(array: IntegersLike | None) -> Integers | None:
    """An array [p] or [b, p] as [b, p], on the host unless it is traced."""
    if array is None:
        return None
    return jnp.atleast_2d(array) if isinstance(array, jax.core.Tracer) else np.atleast_2d(np.asarray(as_array(array)))
