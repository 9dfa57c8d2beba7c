"""Text to token ids and back, with the tokenizer of a checkpoint; a part of `HookedGemma3`.

Axes: b batch, p position.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.positions import check_mask

Input = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


class Text:
    """What a model does with its tokenizer."""

    config: Gemma3Config
    tokenizer: Any

    def encode(self, input: Input, attention_mask: Any = None) -> tuple[jax.Array, jax.Array | None]:
        """Any input as token ids [b, p] int32, and its mask [b, p]: the given one, or that of a padded batch of texts.

        Raises:
            ValueError: the input is empty, no text and no ids, or has an id outside the vocabulary; a mask of something
                else than 0 and 1.
        """
        tokens, mask = self._ids_of(input)
        if attention_mask is not None:
            check_mask(attention_mask)
            mask = jnp.atleast_2d(jnp.asarray(attention_mask))
        return tokens, mask

    def to_tokens(
        self, input: str | Sequence[str], prepend_bos: bool = True, padding_side: Literal["left", "right"] = "right"
    ) -> jax.Array:
        """Token ids [b, p] int32 of one text or several, padded to one length. Each row has one BOS, never two.

        Ids do not say which of them are padding: when rows differ in length, give `attention_mask(tokens)` along.
        """
        return self._tokenize(input, prepend_bos, padding_side)[0]

    def attention_mask(self, tokens: Any) -> jax.Array:
        """[b, p] int32, 0 at the padding tokens with which rows of `tokens` [b, p] begin or end, and 1 elsewhere."""
        real = np.atleast_2d(np.asarray(tokens)) != (self.config.pad_token_id or 0)
        from_left = np.logical_or.accumulate(real, axis=1)
        from_right = np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]
        return jnp.asarray(from_left & from_right, jnp.int32)

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of ids [p], or the texts of ids [b, p]; special tokens are spelled out."""
        ids = np.asarray(tokens)
        decode = self._need_tokenizer().decode
        return decode(ids.reshape(-1).tolist()) if ids.ndim < 2 else [decode(row.tolist()) for row in ids]

    def to_str_tokens(self, input: Input, prepend_bos: bool = True) -> list[str] | list[list[str]]:
        """Each token of a text (or of ids [p]) as a string; a list of lists for several texts (or ids [b, p])."""
        if isinstance(input, str):
            return self._spell(self._ids(input, prepend_bos))
        if len(input) and isinstance(input[0], str):
            return [self._spell(self._ids(str(text), prepend_bos)) for text in input]
        ids = np.asarray(input)
        return self._spell(ids) if ids.ndim == 1 else [self._spell(row) for row in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            ValueError: it is none, or more than one.
        """
        ids = self._ids(string, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, {self._spell(ids)}; a single one was asked for")
        return ids[0]

    def _ids_of(self, input: Input) -> tuple[jax.Array, jax.Array | None]:
        if is_text(input):
            return self._tokenize(input, prepend_bos=True, padding_side="right")
        if isinstance(input, jax.core.Tracer):  # its values, and so their range, are not known yet
            return jnp.atleast_2d(input), None
        try:
            ids = np.asarray(input)
        except ValueError:
            ids = np.empty(0)
        if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                "the input must be text, texts, or integer token ids [p] or [b, p] with at least one token"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return jnp.asarray(np.atleast_2d(ids), jnp.int32), None

    def _tokenize(
        self, input: str | Sequence[str], prepend_bos: bool, padding_side: str
    ) -> tuple[jax.Array, jax.Array | None]:
        tokens, mask = self._padded(input, prepend_bos, padding_side)
        return jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)

    def _padded(
        self, input: str | Sequence[str], prepend_bos: bool, padding_side: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids [b, p] int32 of texts, and their mask where they differ in length, on the host."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it takes 'left' and 'right'")
        rows = [self._ids(text, prepend_bos) for text in ([input] if isinstance(input, str) else input)]
        if not rows or not all(rows):
            raise ValueError("there is a text without tokens; give at least one, or prepend_bos")
        length = max(map(len, rows))
        pad = self.config.pad_token_id or 0

        def padded(row: list[int], fill: int) -> list[int]:
            padding = [fill] * (length - len(row))
            return padding + row if padding_side == "left" else row + padding

        tokens = np.asarray([padded(row, pad) for row in rows], np.int32)
        if all(len(row) == length for row in rows):
            return tokens, None
        return tokens, np.asarray([padded([1] * len(row), 0) for row in rows], np.int32)

    def _ids(self, text: str, prepend_bos: bool) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"among the texts is {text!r}; give texts alone, or ids alone")
        ids = list(self._need_tokenizer()(text, add_special_tokens=False)["input_ids"])
        bos = self.config.bos_token_id
        return [bos, *ids] if prepend_bos and bos is not None and ids[:1] != [bos] else ids

    def _spell(self, ids: Any) -> list[str]:
        return [self._need_tokenizer().decode([int(i)]) for i in ids]

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; pass token ids, or give it one: HookedGemma3(..., tokenizer)"
            )
        return self.tokenizer


def is_text(input: Any) -> TypeGuard[str | Sequence[str]]:
    """A text, or several."""
    return isinstance(input, str) or (isinstance(input, Sequence) and bool(input) and isinstance(input[0], str))
