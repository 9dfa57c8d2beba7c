"""Where a model comes from: a checkpoint, or an adapter and its base."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files, gguf, gguf_tokenizer, tokenizers
from gemma3_jax.conversion.adapter_config import CONFIG as ADAPTER_CONFIG
from gemma3_jax.conversion.adapters import base_of, base_remedy, is_adapter, merge_adapter
from gemma3_jax.conversion.assemble import assemble
from gemma3_jax.conversion.dtypes import parameter_dtype
from gemma3_jax.conversion.gguf_header import Header, read_header
from gemma3_jax.conversion.hub import (
    DESCRIPTION_FILES,
    MODEL_FILES,
    locate,
    not_downloaded,
    refuse_gguf_alone,
    refuse_revision,
    remote_gguf,
    remote_headers,
)
from gemma3_jax.conversion.sentence_transformers import with_dense, with_head
from gemma3_jax.conversion.tensors import Tensors, of_directory, of_stored, without_unembedding
from gemma3_jax.conversion.tokenizers import has_tokenizer
from gemma3_jax.conversion.truncation import first_layers, is_within, truncate
from gemma3_jax.reading import CheckpointError, Stored
from gemma3_jax.types import Params, Shardings, Tokenizer


@dataclasses.dataclass(frozen=True)
class Sources:
    """A checkpoint and the adapters to merge into it.

    Attributes:
        base: directory or GGUF file of the checkpoint.
        adapters: directories of the adapters, in order.
        remote: headers of the checkpoint's tensors, by key, if the tensors are on the hub and are not downloaded.
        remote_gguf: header of the GGUF file, likewise.
    """

    base: Path
    adapters: tuple[Path, ...] = ()
    remote: Mapping[str, Stored] | None = None
    remote_gguf: Header | None = None

    @functools.cached_property
    def header(self) -> Header | None:
        """The header of a GGUF file, which takes a moment to read; None for directories."""
        if self.remote_gguf is not None:
            return self.remote_gguf
        return read_header(self.base) if files.is_gguf(self.base) else None

    @property
    def tokenizer(self) -> Path:
        """The directory whose tokenizer belongs to the model: the last that has one, or that of the base."""
        return next(filter(has_tokenizer, self.adapters[::-1]), self.base)


def locate_sources(
    source: str | os.PathLike[str],
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    first_n_layers: int | None = None,
) -> Sources:
    """The directories of a source, of the bases that adapters name, and of the adapter.

    Weights that are on the hub and not on this machine are downloaded: with `first_n_layers`, only the files that have
    something of these layers. Without `download`, only their headers are read.

    Raises:
        CheckpointError: a directory or a base is not available; the source is a model and an adapter at once, or has a
            revision and is not on the hub; or `adapter` is not an adapter.
    """
    refuse_revision(source, revision)
    name, wanted = source, MODEL_FILES if download and first_n_layers is None else DESCRIPTION_FILES
    base, header = _find_base(name, revision, wanted, download)
    adapters: list[Path] = []
    while is_adapter(base) and not files.has_weights(base):
        if base in adapters:
            raise CheckpointError(f"{base} is an adapter whose base is the adapter itself; give the base model")
        adapters.insert(0, base)
        name, revision = base_of(base)
        try:
            base, header = _find_base(name, revision, wanted, download)
        except CheckpointError as error:
            config = base / ADAPTER_CONFIG
            raise CheckpointError(f"{config} names its base model, but {error}; {base_remedy(base)}") from error
    if is_adapter(base) and adapter is None:
        raise CheckpointError(
            f"{base} has a whole model and an adapter; give adapter={str(base)!r} to merge them, or move "
            f"{ADAPTER_CONFIG} away to load the model without the adapter"
        )
    if adapter is not None:
        adapters.append(locate(adapter, files=wanted))
        if not is_adapter(adapters[-1]):
            raise CheckpointError(f"{adapters[-1]} has no {ADAPTER_CONFIG}; give the directory of a PEFT adapter")
    sources = Sources(base, tuple(adapters), remote_gguf=header)
    if header is not None or Path(name).exists() or files.is_gguf(base) or files.has_all_weights(base):
        return sources
    if not download:
        return dataclasses.replace(sources, remote=remote_headers(os.fspath(name), revision))
    if first_n_layers is not None:
        locate(name, revision, files=files.shards(base, functools.partial(is_within, first_n_layers=first_n_layers)))
    if not files.has_weights(base):
        refuse_gguf_alone(os.fspath(name), revision)
    return sources


def _find_base(
    name: str | os.PathLike[str], revision: str | None, wanted: Sequence[str], download: bool
) -> tuple[Path, Header | None]:
    """The directory or GGUF file of a source. Without `download`, a GGUF file on the hub is given with its header."""
    header = None if download else remote_gguf(name, revision)
    return (locate(name, revision, files=wanted), None) if header is None else (header.file, header)


def convert_sources(
    sources: Sources,
    dtype: DTypeLike | None = None,
    *,
    first_n_layers: int | None = None,
    tie_word_embeddings: bool | None = None,
    shardings: Shardings | None = None,
) -> tuple[Gemma3Config, Params]:
    """`convert_checkpoint` of located sources."""
    config, tensors = read_sources(
        sources, dtype, first_n_layers=first_n_layers, tie_word_embeddings=tie_word_embeddings
    )
    return config, assemble(config, tensors, dtype, shardings)


def read_sources(
    sources: Sources,
    dtype: DTypeLike | None = None,
    *,
    first_n_layers: int | None = None,
    tie_word_embeddings: bool | None = None,
) -> tuple[Gemma3Config, Tensors]:
    """The config and the tensors of located sources; only headers are read. Arguments as in `convert_checkpoint`."""
    config, tensors = _read_base(sources, dtype, first_n_layers)
    if tie_word_embeddings is not None:
        config = dataclasses.replace(config, tie_word_embeddings=tie_word_embeddings)
    if tie_word_embeddings:
        tensors = without_unembedding(tensors)
    for adapter in sources.adapters:
        config, tensors = merge_adapter(config, tensors, adapter, dtype)
    if first_n_layers is not None:
        config = truncate(config, first_n_layers)
    elif sources.header is None:
        config = with_head(sources.base, config)
        tensors = with_dense(sources.base, config, tensors)
    return config, tensors


def load_tokenizer(sources: Sources) -> Tokenizer | None:
    """The tokenizer of located sources, or None if they do not have one that works."""
    if sources.header is not None and sources.tokenizer == sources.base:
        return gguf_tokenizer.load_tokenizer(sources.header)
    return tokenizers.load_tokenizer(sources.tokenizer)


def read_config(sources: Sources) -> Gemma3Config:
    """The config of the base, without an embedding head.

    Raises:
        CheckpointError, ConfigError: as in `convert_checkpoint`.
    """
    return files.read_config(sources.base) if sources.header is None else gguf.config_of(sources.header)


def _read_base(sources: Sources, dtype: DTypeLike | None, first_n_layers: int | None) -> tuple[Gemma3Config, Tensors]:
    """The config of the whole base, and the tensors of its first layers; data is read later."""
    path, header, config = sources.base, sources.header, read_config(sources)
    wanted = None
    if first_n_layers is not None:
        truncate(config, first_n_layers)  # raises before a header is read
        wanted = functools.partial(is_within, first_n_layers=first_n_layers)
    if header is not None:
        tensors = gguf.tensors_of(header, parameter_dtype(dtype) or np.dtype(jnp.bfloat16))
    elif sources.remote is not None:
        tensors = of_stored(str(path), sources.remote, files.read_quantization(path), not_downloaded)
    else:
        tensors = of_directory(path) if wanted is None else of_directory(path, wanted)
    return config, tensors if first_n_layers is None else first_layers(tensors, first_n_layers)
