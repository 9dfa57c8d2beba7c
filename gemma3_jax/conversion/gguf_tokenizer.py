"""The tokenizer of a GGUF file: beside it, or made from its vocabulary and kept in the cache directory."""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3_jax.conversion import files
from gemma3_jax.conversion.gguf_header import Header, vocabulary
from gemma3_jax.conversion.tokenizers import load_tokenizer as load_tokenizer_files
from gemma3_jax.kept import cache_directory
from gemma3_jax.messages import printable
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_SPACE = "\u2581"  # how SentencePiece spells a space
_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's `llama_token_type`
# Some files have these as ordinary tokens, which no text would give; llama.cpp makes them control tokens too.
_TURNS = ("<start_of_turn>", "<end_of_turn>")
_SAMPLE = 1000  # tokens


def load_tokenizer(header: Header) -> Tokenizer | None:
    """The Hugging Face tokenizer of a GGUF file, or None if the file has no vocabulary of SentencePiece.

    Tokenizer files in the directory of the file come first. If there are none, the tokenizer is made from the file's
    vocabulary, which takes seconds, and is kept under `cache_directory()` for all files with this vocabulary.

    Raises:
        CheckpointError: the tokenizer beside the file is that of another model.
    """
    file, fields = header.file, header.fields
    beside, tokens = load_tokenizer_files(file.parent), vocabulary(fields)
    if beside is not None:
        _check_same(file, beside, tokens)
        return beside
    if fields.get("tokenizer.ggml.model") != "llama" or not tokens:
        _log.warning("%s has no SentencePiece vocabulary: the model is loaded without a tokenizer", file)
        return None
    try:
        kept = cache_directory() / "tokenizers" / _fingerprint(fields)
    except OSError as error:
        return _made(header, f"the tokenizer of {file} is not kept: {error}")
    if not kept.is_dir():
        made = _made(header, f"making the tokenizer of {file}, to be kept in {kept}")
        if made is None:
            return None
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with files.writing(kept) as directory:
                made.save_pretrained(directory)
        except (OSError, CheckpointError) as error:  # not writable, full, or written by another process meanwhile
            _log.info("the tokenizer of %s was not kept: %s", file, error)
            return made
    return load_tokenizer_files(kept)


def _made(header: Header, message: str) -> Tokenizer | None:
    """The tokenizer of the file's vocabulary, or None, with a warning, if that is damaged; `message` is logged."""
    _log.info("%s", message)
    try:
        return tokenizer_of(header.fields)
    except Exception as error:  # a damaged vocabulary fails in many ways, in several libraries
        why = f"its vocabulary fails with {type(error).__name__}: {printable(error)}"
        _log.warning("%s: the model is loaded without a tokenizer, because %s", header.file, why)
        return None


def tokenizer_of(fields: Settings) -> Tokenizer:
    """A `GemmaTokenizer` from the metadata of a GGUF file, without torch.

    The file has the pieces of SentencePiece, but not the merges of byte-pair encoding. These are all the cuts of each
    piece into two pieces; an earlier piece has priority, and of one piece, the cut with the longer left part.
    """
    from transformers import AddedToken, GemmaTokenizer  # the import takes a second

    def get(name: str, default: object = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    # The file has runs of spaces as they are, but `GemmaTokenizer` spells each space.
    tokens = [token if token.strip(" ") else _SPACE * len(token) for token in vocabulary(fields)]
    ids_of = {token: i for i, token in enumerate(tokens)}
    merges = [  # transformers accepts pairs too
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ids_of and token[cut:] in ids_of
    ]
    ids = {"bos": get("bos_token_id"), "eos": get("eos_token_id"), "unk": get("unknown_token_id")}
    ids["pad"] = get("padding_token_id")
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    flags = {"add_bos_token": get("add_bos_token", True), "add_eos_token": get("add_eos_token", False)}
    tokenizer = GemmaTokenizer(vocab=ids_of, merges=merges, **special, **flags)
    kinds = dict(zip(vocabulary(fields), get("token_type", []), strict=False))
    kinds |= {turn: _CONTROL for turn in _TURNS if turn in kinds}
    for kind in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, its_kind in kinds.items()
            if its_kind == kind and token in ids_of
        ]
        tokenizer.add_tokens(added, special_tokens=kind == _CONTROL)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _fingerprint(fields: Settings) -> str:
    """A name for what determines the tokenizer: its metadata, and the versions that make and write it."""
    ours = sorted((key, value) for key, value in fields.items() if key.startswith("tokenizer."))
    versions = [version(name) for name in ("gemma3-jax", "transformers")]
    return hashlib.sha256(repr((ours, versions)).encode()).hexdigest()[:32]


def _check_same(file: Path, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Raise if most of the tokens that both have are spelled differently. A fine-tune may rename a few."""
    ids = range(0, len(tokens), -(-len(tokens) // _SAMPLE) or 1)
    theirs = tokenizer.convert_ids_to_tokens([i for i in ids if i < len(tokenizer)])
    same = sum(a == tokens[i].replace(" ", _SPACE) for i, a in zip(ids, theirs, strict=False))
    if 2 * same < len(ids):
        raise CheckpointError(
            f"the tokenizer beside {file} has another vocabulary than the file; move one of them to another directory"
        )
