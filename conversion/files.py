"""Where checkpoints come from and where they go: directories, the hub, safetensors headers, all-or-nothing writing."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma3_jax.config import ConfigError, Gemma3Config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_FILES = ("*.safetensors", INDEX, "config.json", GENERATION, *TOKENIZER_FILES)


# The dtypes of parameters, and how safetensors' headers name them.
DTYPES = ("float32", "bfloat16", "float16")
_NUMPY_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16")}
STORED_DTYPES = tuple(_NUMPY_DTYPES)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the tensor."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, `start` in bytes from the file's, and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a checkpoint: `source` itself, or the hub's snapshot of it (from the offline cache if need be).

    Raises:
        CheckpointError: `source` is neither a directory nor a hub id that can be had.
    """
    path = Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.exists():
        raise CheckpointError(f"{name} is a file; give the directory that holds config.json and the safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"no directory {name}")

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} is no directory here, and the hub has no such model{at} within reach: {why}"
        ) from error


def read_config(directory: Path) -> Gemma3Config:
    """The config of the checkpoint in `directory`, with the stop tokens of its generation_config.json, if any.

    Raises:
        CheckpointError: there is no readable config.json.
        ConfigError: its values cannot be honoured.
    """
    file = directory / "config.json"
    raw = _read_json(file)
    try:
        config = Gemma3Config.from_hf(raw)
        # Hugging Face generates by this file: chat models end their turns with a token that only it may name.
        file = directory / GENERATION
        generation = _read_json(file) if file.exists() else {}
        if not isinstance(generation, Mapping):
            raise CheckpointError(f"{file} holds no JSON object")
        stop = generation.get("eos_token_id")
        return config if stop is None else config.stopping_at(stop)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by key, from the headers of its safetensors files, in the order in which
    they lie there; no data is read.

    Raises:
        CheckpointError: no safetensors, a missing, truncated or corrupt file, two files with the same key, or an index
            that does not match its files.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return _read_header(directory / SINGLE)
    if not index.exists():
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}; write the model with transformers' save_pretrained"
        )
    contents = _read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, Mapping) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to file names")
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        file = directory / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing; {index.name} lists it")
        for key, stored in _read_header(file).items():
            if key in found:
                raise CheckpointError(f"two shards hold {key}: {found[key].file.name} and {name} in {directory}")
            found[key] = stored
    for key, name in weight_map.items():
        if key not in found or found[key].file.name != name:
            raise CheckpointError(f"{index} places {key} in {name}, which does not hold it")
    return found


def map_tensor(key: str, stored: Stored) -> np.ndarray:
    """One tensor as a read-only numpy array (bfloat16 through `ml_dtypes`) that is the file itself, mapped.

    Nothing is read before it is used; pages that were count as memory until the array is released.
    """
    dtype = _NUMPY_DTYPES[stored.dtype]
    if not math.prod(stored.shape):
        return np.empty(stored.shape, dtype)  # nothing to map
    try:
        mapped = np.memmap(stored.file, np.uint8, "r", stored.start, dtype.itemsize * math.prod(stored.shape))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {key} cannot be read: {error}") from error
    return mapped.view(np.ndarray).view(dtype).reshape(stored.shape)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype, boundary: int = 64) -> np.ndarray:
    """An array for JAX to take as it is, without a copy: on a boundary that its CPU backend accepts."""
    size = dtype.itemsize * math.prod(shape)
    buffer = np.empty(size + boundary, np.uint8)
    start = -buffer.ctypes.data % boundary
    return buffer[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def writing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to fill, which takes the name `directory` when the block ends well and is removed otherwise.

    Raises:
        CheckpointError: `directory` exists and is not empty, or its parent does not exist.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already and is not empty; nothing was written")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target.absolute().parent} is no directory; nothing was written")
    temporary = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds tokenizer files."""
    return any((directory / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Any:
    """The Hugging Face tokenizer of a checkpoint, or None where it has none."""
    if not has_tokenizer(directory):
        return None
    from transformers import AutoTokenizer  # takes a second to import, and only text needs it

    return AutoTokenizer.from_pretrained(directory)


def copy_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Put a tokenizer into `directory`: the files of another directory, or an object's `save_pretrained`."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)
        return
    files = [Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).exists()]
    if not files:
        raise CheckpointError(f"{tokenizer} holds no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}, ...)")
    for file in files:
        shutil.copy(file, directory)


def write_json(file: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "numpy"):  # which checks the header against itself and against the file's size
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}") from error
    header.pop("__metadata__", None)
    data = 8 + size
    return {
        key: Stored(file, tuple(tensor["shape"]), tensor["dtype"], data + tensor["data_offsets"][0])
        for key, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
