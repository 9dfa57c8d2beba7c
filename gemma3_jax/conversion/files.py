"""Files of checkpoints: directories, safetensors headers, and what an export writes beside the tensors."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gemma3_jax import atomic
from gemma3_jax.config import ConfigError, Gemma3Config
from gemma3_jax.conversion.gemma3 import is_unembedding
from gemma3_jax.processes import in_first
from gemma3_jax.reading import CheckpointError, Stored, read_header, read_json
from gemma3_jax.types import Settings

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
# What sentence_transformers adds to a folder, beside a folder for each of its modules.
MODULES = "modules.json"
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")


GGUF, GGUF_MAGIC = ".gguf", b"GGUF"

# The dtypes of parameters.
DTYPES = ("float32", "bfloat16", "float16")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its suffix or its first bytes: Ollama's files have no suffix."""
    if not path.is_file():
        return False
    if path.suffix == GGUF:
        return True
    with path.open("rb") as opened:
        return opened.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def read_config(directory: Path) -> Gemma3Config:
    """The config of the checkpoint in `directory`, with the stop tokens of its generation_config.json, if any.

    Raises:
        CheckpointError: config.json is missing or not readable.
        ConfigError: the model does not support its values.
    """
    file = directory / "config.json"
    others = sorted(directory.glob(f"*{GGUF}"))
    if others and not file.exists():
        raise CheckpointError(f"{directory} has no config.json; to read {others[0].name}, give the file: {others[0]}")
    raw = read_json(file)
    try:
        config = Gemma3Config.from_hf(raw)
        # Hugging Face's `generate` reads this file; it may be the only file with the token that ends a chat turn.
        file = directory / GENERATION
        stop = _generation(directory).get("eos_token_id")
        return config if stop is None else config.stopping_at(stop)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def read_quantization(directory: Path) -> Settings:
    """What the config.json of a checkpoint says about the quantisation of its weights; empty if it says nothing.

    Raises:
        CheckpointError: config.json is not readable.
    """
    file = directory / "config.json"
    raw = read_json(file) if os.path.lexists(file) else {}
    inner = raw.get("text_config") if isinstance(raw, Mapping) else None
    for config in (raw, inner):
        # mlx writes `quantization`, and every other library `quantization_config`.
        for name, method in (("quantization", {"quant_method": "mlx"}), ("quantization_config", {})):
            settings = config.get(name) if isinstance(config, Mapping) else None
            if isinstance(settings, Mapping):
                return {**method, **settings}
    return {}


def read_headers(directory: Path, is_wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Stored]:
    """The headers of a checkpoint's safetensors files, by key, in file order, without reading data.

    Shards that do not hold a wanted key are not opened, and need not exist.

    Raises:
        CheckpointError: there are no safetensors, a file is missing, truncated or corrupt, two files have the same key,
            or the index does not match its files.
    """
    index = directory / INDEX
    if os.path.lexists(directory / SINGLE):
        return read_header(directory / SINGLE)
    if not os.path.lexists(index):
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}; write the model with transformers' save_pretrained"
        )
    weight_map = {key: name for key, name in _weight_map(index).items() if is_wanted(key)}
    headers: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CheckpointError(f"{index} lists {name!r}, which is not the name of a file in {directory}")
        file = directory / name
        if not os.path.lexists(file):
            if all(is_unembedding(key) for key, shard in weight_map.items() if shard == name):
                continue
            raise CheckpointError(f"{file} is missing; {index.name} lists it")
        for key, stored in read_header(file).items():
            if key in headers:
                raise CheckpointError(f"two shards hold {key}: {headers[key].file.name} and {name} in {directory}")
            headers[key] = stored
    for key, name in weight_map.items():
        if key not in headers and is_unembedding(key):
            continue  # Some writers list a tied head, which they do not store.
        if key not in headers or headers[key].file.name != name:
            raise CheckpointError(f"{index} places {key} in {name}, which does not hold it")
    return headers


def has_weights(directory: Path) -> bool:
    """Whether a directory has the safetensors of a whole model."""
    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def has_all_weights(directory: Path) -> bool:
    """Whether a directory has its one file of safetensors, or all shards that its index lists."""
    return all((directory / name).exists() for name in shards(directory))


def shards(directory: Path, is_wanted: Callable[[str], bool] = lambda key: True) -> list[str]:
    """The names of the safetensors that have a wanted key: those in the index, or the one file if there is no index."""
    if not (directory / INDEX).exists():
        return [SINGLE]
    return sorted({name for key, name in _weight_map(directory / INDEX).items() if is_wanted(key)})


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each key in an index."""
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, Mapping) else None
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to file names")
    return dict(weight_map)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype, boundary: int = 64) -> np.ndarray:
    """An uninitialised array that is aligned so that JAX's CPU backend can use it without a copy."""
    size = dtype.itemsize * math.prod(shape)
    buffer = np.empty(size + boundary, np.uint8)
    start = -buffer.ctypes.data % boundary
    return buffer[start : start + size].view(dtype).reshape(shape)


def check_target(directory: str | os.PathLike[str]) -> None:
    """Raise an error if a checkpoint cannot be written to `directory`: before anything is read or computed.

    Raises:
        CheckpointError: `directory` exists and is not empty, or its parent does not exist or is not writable.
    """
    try:
        atomic.check_new_directory(directory)
    except OSError as error:
        raise CheckpointError(error) from error


@contextlib.contextmanager
def writing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """`gemma3_jax.atomic.new_directory` for checkpoints: a directory to fill, which gets the name `directory`.

    All processes of a program fill the same directory. The first makes it and renames it.

    Raises:
        CheckpointError: as in `check_target`.
        FileExistsError: another writer created `directory` during the block.
        RuntimeError: one of these, in a process that is not the first.
    """
    with contextlib.ExitStack() as stack:

        def make() -> str:
            check_target(directory)
            return str(stack.enter_context(atomic.new_directory(directory)))

        yield Path(in_first(make))
        in_first(stack.close)


def write_json(file: Path, value: Settings | Sequence[Settings]) -> None:
    """Write `value` as indented JSON."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def write_configs(directory: Path, config: Gemma3Config, source: object, **extra: object) -> None:
    """Write `config.json`, with the `extra` fields, and `generation_config.json`.

    Hugging Face's `generate` reads the second file: it has the special tokens of `config`. If `source` is the directory
    of a checkpoint, the file also has its other settings, such as `top_p`.
    """
    write_json(directory / "config.json", {**config.to_hf(), **extra})
    settings = _generation(Path(source)) if isinstance(source, str | os.PathLike) else {}
    hf = config.to_hf()
    tokens = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / GENERATION, {**settings, **tokens})


def _generation(directory: Path) -> Settings:
    """The content of a checkpoint's generation_config.json, or an empty mapping."""
    file = directory / GENERATION
    settings = read_json(file) if os.path.lexists(file) else {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{file} does not contain a JSON object")
    return settings
