"""Checkpoints on the Hugging Face hub: downloaded, or described by the headers of their files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gemma3_jax.conversion.files import GENERATION, GGUF, INDEX, SENTENCE_FILES, TOKENIZER_FILES, is_gguf
from gemma3_jax.conversion.gguf_header import Header, read_remote_header
from gemma3_jax.conversion.words import listed
from gemma3_jax.reading import CheckpointError, Stored, check_file

_SMALL = (INDEX, "*config.json", GENERATION, *TOKENIZER_FILES, *SENTENCE_FILES)
# What a model is loaded from, and what describes it: everything but the weights of the language model.
MODEL_FILES = ("*.safetensors", *_SMALL)
DESCRIPTION_FILES = ("adapter_model.safetensors", "*/model.safetensors", *_SMALL)


class NotDownloaded(CheckpointError):
    """Data of a model on the hub is needed, of which only the headers were read."""


def locate(source: str | os.PathLike[str], revision: str | None = None, *, files: Sequence[str] = MODEL_FILES) -> Path:
    """The directory or GGUF file of a checkpoint: `source`, or its snapshot from the hub (or from the offline cache).

    On the hub, `source` is the id of a model, of which only `files` (names or patterns) are downloaded; or the id and
    the name of a GGUF file, as in "org/model/file.gguf".

    Raises:
        CheckpointError: `source` is neither a directory, nor a GGUF file, nor the id of an available model.
    """
    path = Path(source)
    if path.is_dir() or is_gguf(path):
        return path
    name = os.fspath(source)
    if os.path.lexists(path):
        check_file(path)
        raise CheckpointError(
            f"{name} is a file; give the directory that holds config.json and the safetensors, or a GGUF file"
        )
    model, file = _model_and_file(name)

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(model, file, revision=revision))
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        why = str(error).strip().splitlines()[0]
        here = f"there is no file {name}" if file is not None else f"{name} is not a directory"
        raise CheckpointError(f"{here}, and the model{at} is not available from the hub: {why}") from error


def refuse_revision(source: str | os.PathLike[str], revision: str | None) -> None:
    """Refuse a revision of what is on this machine.

    Raises:
        CheckpointError: there is one.
    """
    if revision is not None and os.path.lexists(source):
        raise CheckpointError(
            f"revision is {revision!r}, but {os.fspath(source)} is on this machine, and only a model on the hub has "
            "revisions; leave the revision out"
        )


def _model_and_file(name: str) -> tuple[str, str | None]:
    """The id of a model on the hub, and the name of the GGUF file in "org/model/file.gguf".

    Raises:
        CheckpointError: the name is neither.
    """
    is_file = name.endswith(GGUF)
    missing = CheckpointError(f"there is no {'file' if is_file else 'directory'} {name}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 + is_file:
        raise missing
    if not is_file:
        return name, None
    model, _, file = name.rpartition("/")
    if "/" not in model:
        raise missing
    return model, file


def remote_gguf(source: str | os.PathLike[str], revision: str | None) -> Header | None:
    """The header of a GGUF file on the hub that is not on this machine, without its data; None for other sources.

    Raises:
        CheckpointError: the file is not available, or is damaged.
    """
    name = os.fspath(source)
    if not name.endswith(GGUF) or os.path.lexists(name):
        return None
    model, file = _model_and_file(name)

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(model, str(file), revision=revision), str):
            return None
        # Without fsspec's cache, the pieces that are read are the ranges that are asked for.
        with huggingface_hub.HfFileSystem().open(name, revision=revision, cache_type="none") as opened:
            return read_remote_header(Path(name), opened, opened.size)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the header of {name} cannot be read from the hub: {why}") from error


def refuse_gguf_alone(model: str, revision: str | None) -> None:
    """Raise a CheckpointError if a model on the hub has GGUF files and no safetensors; nothing if the hub is away."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = huggingface_hub.list_repo_files(model, revision=revision)
    except (HfHubHTTPError, OSError):
        return
    offered = [name for name in names if name.endswith(GGUF)]
    if offered and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{model} has GGUF files only: {listed(offered)}; give one, such as {model}/{offered[0]}")


def remote_headers(name: str, revision: str | None) -> dict[str, Stored]:
    """The headers of a model's safetensors on the hub, by key: a few kilobytes for each file.

    Raises:
        CheckpointError: the model is not available, or has no safetensors; with GGUF files, the message names them.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        if isinstance(error, NotASafetensorsRepoError):
            refuse_gguf_alone(name, revision)
        raise CheckpointError(f"the headers of {name} cannot be read: {str(error).strip().splitlines()[0]}") from error
    return {
        key: Stored(Path(file), tuple(tensor.shape), tensor.dtype, tensor.data_offsets[0])
        for file, header in metadata.files_metadata.items()
        for key, tensor in header.tensors.items()
    }


def not_downloaded(key: str) -> NoReturn:
    """In place of the data of a tensor on the hub.

    Raises:
        NotDownloaded: always.
    """
    raise NotDownloaded(f"the data of {key} is needed, and is not downloaded")
