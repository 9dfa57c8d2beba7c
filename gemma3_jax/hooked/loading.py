"""Load what `HookedGemma3.from_pretrained` needs: the tokenizer first, since weights take longer."""

from __future__ import annotations

import os
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.assemble import assemble
from gemma3_jax.conversion.sources import Sources, load_tokenizer, locate_sources, read_sources
from gemma3_jax.conversion.store import is_converted, load_params, saved_config
from gemma3_jax.conversion.tokenizers import TokenizerSource, tokenizer_from
from gemma3_jax.placing.parameters import param_shardings
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Params, Shardings, Tokenizer


def load(
    source: str | os.PathLike[str],
    dtype: DTypeLike | None,
    revision: str | None,
    *,
    mesh: Mesh | None,
    tokenizer: TokenizerSource | None,
    first_n_layers: int | None,
    adapter: str | os.PathLike[str] | None,
    tie_word_embeddings: bool | None,
) -> tuple[Gemma3Config, Params, Tokenizer | None]:
    """The config, the parameters, on the mesh if there is one, and the tokenizer. Arguments as in `from_pretrained`."""
    sources = locate_sources(source, revision, adapter, first_n_layers=first_n_layers)
    converted = is_converted(sources.base)
    if converted:
        _refuse(sources.base, adapter=sources.adapters or None, tie_word_embeddings=tie_word_embeddings)
    text_tokenizer = load_tokenizer(sources) if tokenizer is None else tokenizer_from(tokenizer)
    if converted:
        config, params = _saved(sources.base, dtype, first_n_layers, mesh)
    else:
        config, params = _converted(sources, dtype, first_n_layers, tie_word_embeddings, mesh)
    return config, params, text_tokenizer


def _saved(
    directory: Path, dtype: DTypeLike | None, first_n_layers: int | None, mesh: Mesh | None
) -> tuple[Gemma3Config, Params]:
    shardings = _shardings(saved_config(directory, first_n_layers), mesh)
    return load_params(directory, dtype, first_n_layers=first_n_layers, shardings=shardings)


def _converted(
    sources: Sources,
    dtype: DTypeLike | None,
    first_n_layers: int | None,
    tie_word_embeddings: bool | None,
    mesh: Mesh | None,
) -> tuple[Gemma3Config, Params]:
    config, tensors = read_sources(
        sources, dtype, first_n_layers=first_n_layers, tie_word_embeddings=tie_word_embeddings
    )
    return config, assemble(config, tensors, dtype, _shardings(config, mesh))


def _shardings(config: Gemma3Config, mesh: Mesh | None) -> Shardings | None:
    return None if mesh is None else param_shardings(config, mesh)


def _refuse(directory: Path, **arguments: object) -> None:
    """Raise CheckpointError for arguments that change the weights of a Hugging Face checkpoint."""
    for name, value in arguments.items():
        if value is not None:
            raise CheckpointError(f"{directory} has converted parameters; give {name} when you convert the checkpoint")
