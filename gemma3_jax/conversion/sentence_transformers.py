"""The folder of a `SentenceTransformer`: a text model, and the modules that make embeddings of its states.

`modules.json` lists the modules. This library reads `Transformer`, `Pooling` by the mean, any number of `Dense` layers
without bias and activation, and `Normalize`. That is EmbeddingGemma.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gemma3_jax.config import ConfigError, EmbeddingHead, Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.gemma3 import dense_entries
from gemma3_jax.conversion.tensors import Tensors, of_stored
from gemma3_jax.reading import CheckpointError, Stored, read_header, read_json
from gemma3_jax.types import Settings

_log = logging.getLogger(__name__)

_POOLING_MODES = "pooling_mode_"  # older folders have a flag for each mode
_SETTINGS, _LIMITS = files.SENTENCE_FILES[1:]


class _Unsupported(Exception):
    """A module that this library does not compute; the message names it."""


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module of the folder: its class, its own folder, and its config."""

    kind: str
    folder: Path
    config: Settings


def with_head(directory: Path, config: Gemma3Config) -> Gemma3Config:
    """The config with the embedding head of the folder, if it has one that this library computes.

    A head that it does not compute is left out, and one log message names the reason.

    Raises:
        CheckpointError: a file of the head is missing or is not readable.
        ConfigError: the head does not match the text model, or has an invalid value.
    """
    if not os.path.lexists(directory / files.MODULES):
        return config
    modules = _modules(directory)
    try:
        dense, normalize = _checked(modules)
    except _Unsupported as reason:
        _log.warning("%s: left out the embedding head, because %s; the text model is complete", directory, reason)
        return config
    settings, limits = (_mapping(directory / name) for name in (_SETTINGS, _LIMITS))
    sizes: list[Any] = [config.hidden_size, *(module.config.get("out_features") for module in dense)]
    for module, before in zip(dense, sizes, strict=False):
        if module.config.get("in_features") != before:
            read = module.config.get("in_features")
            raise ConfigError(f"{module.folder}/config.json: in_features is {read}; the module before has {before}")
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, Mapping):
        raise ConfigError(f"{directory / _SETTINGS}: prompts is {prompts!r}; it must be a mapping")
    head = EmbeddingHead(
        dense=tuple(sizes[1:]),
        normalize=normalize,
        max_length=limits.get("max_seq_length"),
        prompts=tuple((name, text) for name, text in prompts.items() if text is not None),
        default_prompt=settings.get("default_prompt_name"),
    )
    try:
        return dataclasses.replace(config, embedding_head=head)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error


def with_dense(directory: Path, config: Gemma3Config, tensors: Tensors) -> Tensors:
    """The tensors of the text model, and those of the config's dense layers from their folders; only headers are read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    names = [entry.hf for entry in dense_entries(config)]
    if not names:
        return tensors
    stored: dict[str, Stored] = {}
    for key, module in zip(names, _modules(directory)[2:], strict=False):
        file = module.folder / files.SINGLE
        if not os.path.lexists(file):
            raise CheckpointError(f"{file} is missing; {files.MODULES} lists its folder")
        stored |= {f"{key.split('.')[0]}.{name}": tensor for name, tensor in read_header(file).items()}
    dense = of_stored(str(directory), stored)
    return dataclasses.replace(
        tensors,
        shapes={**tensors.shapes, **dense.shapes},
        dtypes={**tensors.dtypes, **dense.dtypes},
        open=lambda key: (dense if key in stored else tensors).open(key),
        file_of=lambda key: (dense if key in stored else tensors).file_of(key),
    )


def write_head(config: Gemma3Config, dense: Mapping[str, np.ndarray], directory: Path) -> None:
    """Write the config's embedding head beside a text model, as `sentence_transformers` reads it.

    Args:
        config: shape of the model.
        dense: tensors of the dense layers, by the keys of `dense_entries`.
        directory: the folder of the text model.
    """
    head = config.embedding_head
    if head is None:
        return
    entries = dense_entries(config)
    kinds = ["Transformer", "Pooling", *("Dense" for _ in entries), *(["Normalize"] if head.normalize else [])]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    for path in paths[1:]:
        (directory / path).mkdir()
    files.write_json(directory / files.MODULES, modules)
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True, "include_prompt": True}
    files.write_json(directory / paths[1] / "config.json", pooling)
    for path, entry in zip(paths[2:], entries, strict=False):
        after, before = entry.hf_shape
        layer = {"in_features": before, "out_features": after, "bias": False}
        activation = {"activation_function": "torch.nn.modules.linear.Identity"}
        files.write_json(directory / path / "config.json", layer | activation)
        tensors = {"linear.weight": dense[entry.hf]}
        safetensors.numpy.save_file(tensors, directory / path / files.SINGLE, metadata={"format": "pt"})
    prompts = {"prompts": dict(head.prompts), "default_prompt_name": head.default_prompt}
    files.write_json(directory / _SETTINGS, prompts | {"similarity_fn_name": "cosine"})
    limit = {} if head.max_length is None else {"max_seq_length": head.max_length}
    files.write_json(directory / _LIMITS, limit)


def _modules(directory: Path) -> list[_Module]:
    listed = read_json(directory / files.MODULES)
    good = isinstance(listed, list) and all(isinstance(entry, Mapping) for entry in listed)
    if not good or not all(isinstance(entry.get(name), str) for entry in listed for name in ("path", "type")):
        raise CheckpointError(f"{directory / files.MODULES} does not list modules with their path and type")
    modules = []
    for entry in listed:
        folder = directory / entry["path"]
        if not folder.resolve().is_relative_to(directory.resolve()):
            raise CheckpointError(f"{directory / files.MODULES} names {entry['path']}, which is outside its folder")
        modules.append(_Module(entry["type"].split(".")[-1], folder, _mapping(folder / "config.json")))
    return modules


def _mapping(file: Path) -> Settings:
    """The JSON object in a file; empty if there is no file, as for modules without settings."""
    if not os.path.lexists(file):
        return {}
    value = read_json(file)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file} does not contain a JSON object")
    return value


def _checked(modules: Sequence[_Module]) -> tuple[list[_Module], bool]:
    """The dense layers, and whether the embedding is normalized."""
    kinds = [module.kind for module in modules]
    normalize = kinds[-1:] == ["Normalize"]
    dense = list(modules[2 : len(modules) - normalize])
    if kinds[:2] != ["Transformer", "Pooling"] or {module.kind for module in dense} - {"Dense"}:
        raise _Unsupported(
            f"its modules are {', '.join(kinds)}, and this library computes Transformer, Pooling, any number of Dense, "
            "and Normalize"
        )
    if modules[0].folder.resolve() != modules[1].folder.resolve().parent:
        raise _Unsupported("its text model is not in the folder itself")
    _check_pooling(modules[1].config)
    for module in dense:
        _check_dense(module)
    for module in (*dense, *(modules[-1:] if normalize else ())):
        _check_names(module)
    return dense, normalize


def _check_pooling(config: Settings) -> None:
    old = [name.removeprefix(_POOLING_MODES) for name, on in config.items() if name.startswith(_POOLING_MODES) and on]
    new = config.get("pooling_mode")
    modes = old if new is None else [new] if isinstance(new, str) else list(new)
    if modes not in (["mean"], ["mean_tokens"]):
        raise _Unsupported(f"its pooling mode is {', '.join(map(str, modes)) or 'missing'}, and this library has mean")
    if not config.get("include_prompt", True):
        raise _Unsupported("its pooling has include_prompt false, and this library includes the prompt")


def _check_dense(module: _Module) -> None:
    # The defaults are those of `sentence_transformers`.
    bias, residual = module.config.get("bias", True), module.config.get("use_residual", False)
    activation = str(module.config.get("activation_function", "torch.nn.modules.activation.Tanh")).split(".")[-1]
    if bias or residual or activation != "Identity":
        raise _Unsupported(
            f"{module.folder.name} has bias {bool(bias)}, activation {activation} and use_residual {bool(residual)}, "
            "and this library has dense layers without them"
        )


def _check_names(module: _Module) -> None:
    for name in ("module_input_name", "module_output_name"):
        value = module.config.get(name, "sentence_embedding")
        if value not in ("sentence_embedding", None):
            raise _Unsupported(f"{module.folder.name} has {name} {value!r}, and this library has sentence_embedding")
