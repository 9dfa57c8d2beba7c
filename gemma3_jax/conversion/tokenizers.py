"""Tokenizers of checkpoints: found, tried, and copied."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gemma3_jax.conversion.files import TOKENIZER_FILES
from gemma3_jax.conversion.hub import locate
from gemma3_jax.extras import needs_extra
from gemma3_jax.messages import printable
from gemma3_jax.reading import CheckpointError, check_file, read_json
from gemma3_jax.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer, or the directory or hub id of one.
TokenizerSource: TypeAlias = Tokenizer | str | os.PathLike[str]

_log = logging.getLogger(__name__)

_SENTENCEPIECE = "tokenizer.model"
_READ_BY_TRANSFORMERS = (".json", ".jinja", ".model")
_REMEDY = "download it again, or pass tokenizer="
_TRIED = 256  # tokens
# By the `tokenizer_class` of a tokenizer_config.json: what `AutoTokenizer` takes for a Gemma 3 model.
_CLASSES = {
    "GemmaTokenizer": "GemmaTokenizer",
    "GemmaTokenizerFast": "GemmaTokenizer",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has tokenizer files."""
    return bool(tokenizer_files(directory))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The Hugging Face tokenizer of a checkpoint, after a trial; None if there is none or it does not work.

    A tokenizer that does not work leaves a model that takes token ids, and one log message with the reason.

    Raises:
        CheckpointError: a tokenizer file is damaged; the message names it.
        ModuleNotFoundError: the tokenizer is a `tokenizer.model` alone, and `sentencepiece` is not installed.
    """
    if not has_tokenizer(directory):
        return None
    found = _read(directory)
    if isinstance(found, str):
        _log.warning("%s: the model is loaded without a tokenizer, because %s", directory, printable(found))
        return None
    return found


def tokenizer_from(source: TokenizerSource) -> Tokenizer:
    """The tokenizer that a user names: a tokenizer itself, or the one of a directory or of a model on the hub.

    Raises:
        CheckpointError: the directory or model is not available, or does not have a tokenizer that works.
        ModuleNotFoundError: as in `load_tokenizer`.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    directory = locate(source, files=TOKENIZER_FILES)
    if not has_tokenizer(directory):
        raise CheckpointError(_nothing_found(source))
    found = _read(directory)
    if isinstance(found, str):
        raise CheckpointError(f"{source} has no tokenizer that works: {found}")
    return found


def check_tokenizer(tokenizer: TokenizerSource | None) -> None:
    """Check the `tokenizer` argument of an export before the export begins.

    Raises:
        CheckpointError: it is a directory without tokenizer files, or one of them cannot be read.
    """
    if not isinstance(tokenizer, str | os.PathLike):
        return
    if not has_tokenizer(Path(tokenizer)):
        raise CheckpointError(_nothing_found(tokenizer))
    for file in tokenizer_files(Path(tokenizer)):
        check_file(file)


def copy_tokenizer(tokenizer: TokenizerSource | None, directory: Path) -> None:
    """Write a tokenizer, if any, to `directory`: by its `save_pretrained`, or by copying another directory's files."""
    if isinstance(tokenizer, str | os.PathLike):
        for file in tokenizer_files(Path(tokenizer)):
            shutil.copyfile(file, directory / file.name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(directory)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files of a directory."""
    return [directory / name for name in TOKENIZER_FILES if os.path.lexists(directory / name)]


def _nothing_found(source: object) -> str:
    return f"{source} has no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}, ...)"


def check_files(directory: Path) -> None:
    """Check the files of a tokenizer without reading it.

    Raises:
        CheckpointError: one of them is not a file that can be read.
        ModuleNotFoundError: as in `load_tokenizer`.
    """
    for file in directory.iterdir():
        if file.suffix in _READ_BY_TRANSFORMERS and (file.name in TOKENIZER_FILES or not file.is_dir()):
            check_file(file)
    if (directory / _SENTENCEPIECE).exists() and not (directory / "tokenizer.json").exists():
        with needs_extra("sentencepiece", f"{directory / _SENTENCEPIECE} needs"):
            # transformers imports these, and where one is missing it reports another one.
            import google.protobuf  # noqa: F401
            import sentencepiece  # noqa: F401


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has the file of a vocabulary, and not only settings of a tokenizer."""
    return any((directory / name).exists() for name in ("tokenizer.json", _SENTENCEPIECE))


def _read(directory: Path) -> Tokenizer | str:
    """The tokenizer of a directory, or the reason why it does not work."""
    check_files(directory)
    import transformers  # the import takes half a second, and only text needs it

    try:
        loader = getattr(transformers, _class_of(directory))
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        _check_contents(directory)
        return f"{type(error).__name__}: {error}"
    failure = _trial(tokenizer)
    return f"{failure} ({_sources(directory)})" if failure else tokenizer


def _class_of(directory: Path) -> str:
    """The class of `transformers` that reads a tokenizer: the one that `AutoTokenizer` would choose, if it is known.

    `AutoTokenizer` imports torch where that is installed, which takes longer than the rest of its work.
    """
    file = directory / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    name = settings.get("tokenizer_class") if isinstance(settings, dict) and "auto_map" not in settings else None
    return _CLASSES.get(str(name), "AutoTokenizer")


def _sources(directory: Path) -> str:
    present = ", ".join(file.name for file in tokenizer_files(directory))
    return f"the directory has {present}; a tokenizer is in tokenizer.json or {_SENTENCEPIECE}"


def _trial(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is wrong with a tokenizer, or "". It must give back a text that is made of words of its own vocabulary.

    A text in English would not do: small models have vocabularies of their own. `AutoTokenizer` makes a tokenizer of
    special tokens alone from a directory that has only a chat template, for example.
    """
    try:
        ids = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // _TRIED))
        special = set(tokenizer.all_special_ids)
        spelled = [tokenizer.decode([i]).strip() for i in ids if i not in special]
        text = " ".join(word for word in spelled if word.isalnum())
        if not text:
            return "its tokenizer has no words"
        read = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip()
    except Exception as error:
        return f"its tokenizer fails with {type(error).__name__}: {error}"
    return "" if read == text else f"its tokenizer reads {text[:40]!r} as {read[:40]!r}"


def _check_contents(directory: Path) -> None:
    """Raise an error that names the damaged file, if it is one that can be checked."""
    for file in sorted(directory.glob("*.json")):
        if file.name in TOKENIZER_FILES:
            try:
                read_json(file)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {_REMEDY}") from None
    for name, read in (("tokenizer.json", _read_fast), (_SENTENCEPIECE, _read_sentencepiece)):
        file = directory / name
        if not file.exists():
            continue
        try:
            read(str(file))
        except ImportError:
            continue
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: {error}; {_REMEDY}") from error


def _read_fast(file: str) -> None:
    import tokenizers

    tokenizers.Tokenizer.from_file(file)


def _read_sentencepiece(file: str) -> None:
    import sentencepiece

    sentencepiece.SentencePieceProcessor(model_file=file)
