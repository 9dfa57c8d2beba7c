"""Documents as token ids.

Axes: n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.sources import Corpus, Item
from gemma3_jax.hooked.chat import render_chat
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooked.tokenizer import check_characters, tokenizer_of
from gemma3_jax.inputs import as_array, as_int32, check_ids, special_id

_AT_ONCE = 64  # documents that the tokenizer gets together: it uses every core


def bos_of(model: Model) -> int | None:
    """The id of BOS, or None if the model has none."""
    return None if model.config.bos_token_id is None else special_id(model.config, "bos_token_id")


def documents(model: Model, corpus: Corpus, first: int, end: int) -> Iterator[np.ndarray]:
    """The ids [n] int32 of each document. A text gets exactly one BOS; ids are used as they are.

    Raises:
        StoreError: an item is not a document; the message has its number.
    """
    for start in range(first, end, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, end))
        items = [_content(model, corpus[number], number) for number in numbers]
        texts = iter(_encoded(model, [item for item in items if isinstance(item, str)]))
        for number, item in zip(numbers, items, strict=True):
            ids = next(texts) if isinstance(item, str) else item
            try:
                check_ids(ids, model.config.vocab_size)
            except ValueError as error:
                raise StoreError(f"document {number}: {error}") from error
            yield ids


def _content(model: Model, item: Item, number: int) -> str | np.ndarray:
    """The text or the ids of an item."""
    if isinstance(item, Mapping):
        found: Any = next((item[name] for name in ("text", "input_ids") if item.get(name) is not None), None)
        if found is None and item.get("messages") is not None:
            return render_chat(tokenizer_of(model), list(item["messages"]), to_continue=False)
        item = found
    if isinstance(item, bytes):  # a record of ArrayRecord
        try:
            item = item.decode()
        except ValueError as error:
            raise StoreError(f"document {number} is bytes, and not UTF-8: {error}; map them to texts or ids") from error
    if isinstance(item, str):
        try:
            check_characters(item)
        except ValueError as error:
            raise StoreError(f"document {number} cannot be read: {error}") from None
        return item
    ids = np.asarray(as_array(item)) if isinstance(item, Sequence) or hasattr(item, "__array__") else None
    if ids is None or ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise StoreError(
            f"document {number} is neither a text nor a row of ids, nor has `text`, `input_ids` or `messages`; for "
            "another field, give harvest.JsonLines(file, field) or harvest.Parquet(file, field), a column of a data "
            "set (data[field]), or a list of texts"
        )
    return np.asarray(as_int32("token ids", ids))


def _encoded(model: Model, texts: list[str]) -> list[np.ndarray]:
    """The ids of texts, each with one BOS, as every entry point for text has them."""
    if not texts:
        return []
    bos = bos_of(model)
    rows = tokenizer_of(model)(texts, add_special_tokens=False)["input_ids"]
    with_bos = (row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows)
    return [np.asarray(row, np.int32) for row in with_bos]
