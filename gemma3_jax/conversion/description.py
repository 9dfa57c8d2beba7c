"""What a checkpoint has, what it takes to run it, and what would go wrong: from its config and headers alone."""

import collections
import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from gemma3_jax.config import ConfigError, Gemma3Config
from gemma3_jax.conversion import files, store
from gemma3_jax.conversion.assemble import parameter_dtypes
from gemma3_jax.conversion.check import check_shapes
from gemma3_jax.conversion.gguf_header import vocabulary
from gemma3_jax.conversion.hub import NotDownloaded
from gemma3_jax.conversion.plan import find_head, plan_of
from gemma3_jax.conversion.sources import Sources, locate_sources, read_config, read_sources
from gemma3_jax.conversion.tokenizers import check_files, has_vocabulary, tokenizer_files
from gemma3_jax.messages import printable
from gemma3_jax.reading import CheckpointError

_FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint has.

    Attributes:
        config: shape of the model, with what adapters change.
        adapters: directories of the adapters that are merged.
        files: names of the files with the stored tensors.
        stored: number of stored tensors by dtype, as the files name it.
        parameters: number of parameters after loading, by dtype; empty if the checkpoint does not load, or if its
            headers do not tell: those of weights that bitsandbytes packed do not have their shapes.
        tokenizer: names of the tokenizer's files; empty if there are none with a vocabulary.
        notes: what the load logs, such as the heads that are left out; and what only the load can check.
        error: why the checkpoint does not load, or "".
    """

    config: Gemma3Config
    adapters: tuple[Path, ...]
    files: tuple[str, ...]
    stored: Mapping[str, int]
    parameters: Mapping[str, int]
    tokenizer: tuple[str, ...]
    notes: tuple[str, ...]
    error: str

    @property
    def bytes(self) -> int:
        """Memory of the parameters."""
        return sum(n * jnp.dtype(dtype).itemsize for dtype, n in self.parameters.items())

    def least_bytes(self, tokens: int) -> int:
        """A lower bound on the memory of a forward pass over one text: parameters and, in float32, logits [p, V].

        Embedding models compute no logits: for them, it has two residual streams [p, d] in their place.
        """
        config = self.config
        return self.bytes + 4 * tokens * (2 * config.hidden_size if config.embedding_head else config.vocab_size)


def describe(
    source: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Description:
    """Describe a source of `HookedGemma3.from_pretrained`; arguments as there. Weights are not read or downloaded.

    The checks are those of the load, except of the data: NaN, damage inside a tensor, a tokenizer that does not work.

    Raises:
        CheckpointError, ConfigError: there is no checkpoint, or its config is missing or cannot be read.

    >>> from gemma3_jax import TINY
    >>> tiny = describe(TINY)
    >>> tiny.parameters, tiny.bytes, tiny.error
    ({'bfloat16': 341760, 'float32': 1824}, 690816, '')
    """
    with _logged() as notes:
        sources = locate_sources(source, revision, adapter, download=False)
        config, error = read_config(sources), ""
        parameters: Mapping[str, int] = {}
        stored: list[tuple[str, str]] = []  # file and dtype of each tensor
        tokenizer: tuple[str, ...] = ()
        try:
            tokenizer = _tokenizer(sources, notes)
            stored = _stored(sources)
            config, parameters = _parameters(sources, dtype, notes)
        except NotDownloaded as reason:
            notes.append(f"what is loaded is not known before the download: {reason}")
        except (CheckpointError, ConfigError, ModuleNotFoundError) as failure:
            error = str(failure)
    return Description(
        config=config,
        adapters=sources.adapters,
        files=tuple(sorted({file for file, _ in stored})),
        stored=dict(collections.Counter(kind for _, kind in stored)),
        parameters=parameters,
        tokenizer=tokenizer,
        notes=tuple(notes),
        error=error,
    )


def _stored(sources: Sources) -> list[tuple[str, str]]:
    """The file and the dtype of every tensor of the base."""
    if store.is_converted(sources.base):
        return [(store.PARAMS, str(leaf.dtype)) for leaf in store.stored_params(sources.base).values()]
    if sources.header is not None:
        headers = sources.header.tensors
    else:
        headers = files.read_headers(sources.base) if sources.remote is None else sources.remote
    return [(tensor.file.name, tensor.dtype) for tensor in headers.values()]


def _parameters(sources: Sources, dtype: DTypeLike | None, notes: list[str]) -> tuple[Gemma3Config, dict[str, int]]:
    """The config of the loaded model, and the number of its parameters by dtype, after the checks of the load."""
    sizes: collections.Counter[str] = collections.Counter()
    if store.is_converted(sources.base):
        config, stored = files.read_config(sources.base), store.stored_params(sources.base)
        check_shapes(config, stored)
        for path, target in store.stored_dtypes(config, stored, dtype, sources.base).items():
            sizes[target.name] += math.prod(stored[path].shape)
        return config, dict(sizes)
    config, tensors = read_sources(sources, dtype)
    plan = plan_of(config, tensors)
    if config.tie_word_embeddings and find_head(tensors) is not None:
        notes.append("the checkpoint has an unembedding and its config is tied; the load checks that both are equal")
    for entry, target in parameter_dtypes(tensors, plan, dtype).items():
        sizes[target.name] += math.prod(entry.hf_shape)
    return config, dict(sizes)


def _tokenizer(sources: Sources, notes: list[str]) -> tuple[str, ...]:
    """The names of the tokenizer's files; a GGUF file is its own tokenizer if there is none beside it.

    Raises:
        CheckpointError, ModuleNotFoundError: as in `check_files`.
    """
    path = sources.tokenizer
    of_gguf = sources.header if path == sources.base else None
    directory = path if of_gguf is None else path.parent
    names = tuple(file.name for file in tokenizer_files(directory))
    if not names:
        return (path.name,) if of_gguf is not None and vocabulary(of_gguf.fields) else ()
    check_files(directory)
    if not has_vocabulary(directory):
        notes.append(f"{directory} has no vocabulary, only {', '.join(names)}: the model is loaded without a tokenizer")
        return ()
    return names


class _Messages(logging.Handler):
    """Keeps the messages that are logged."""

    def __init__(self, level: int):
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(printable(record.getMessage()))


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """The warnings that the conversion logs, in place of the log."""
    handler = _Messages(logging.WARNING)
    logger = logging.getLogger("gemma3_jax.conversion")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
