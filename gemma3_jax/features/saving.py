"""Writes a dictionary in the format of another tool: all of its files, or none."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from gemma3_jax.conversion.files import check_target, write_json, writing
from gemma3_jax.conversion.safetensors_file import write_tensors
from gemma3_jax.features.formats import to_gemma_scope, to_saelens
from gemma3_jax.features.formats.outgoing import Outgoing, Tensor
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.processes import in_first
from gemma3_jax.reading import CheckpointError

_FORMATS: dict[str, Callable[[Dictionary, str | None], Outgoing]] = {
    "gemma_scope": to_gemma_scope.outgoing,
    "saelens": to_saelens.outgoing,
}


def save(
    dictionary: Dictionary,
    directory: str | os.PathLike[str],
    format: Literal["gemma_scope", "saelens"] = "gemma_scope",
    *,
    model_name: str | None = None,
) -> None:
    """Write a dictionary, whole or not at all; `load` reads it again, and so do the tools of that format.

    What a format has no setting for is folded into the weights, which changes results by rounding alone: Gemma Scope
    has no bias before the encoder. One tensor at a time is in host memory.

    Args:
        dictionary: of any kind. SAELens has no dictionaries of several layers.
        directory: a directory that does not exist yet, or is empty.
        format: "gemma_scope" (Gemma Scope 2; activations Relu and JumpRelu) or "saelens" (version 6).
        model_name: the name that the config gives to the model, such as "google/gemma-3-270m".

    Raises:
        CheckpointError: the format cannot hold the dictionary; or the directory cannot be written.
        FileExistsError: another writer created the directory in the meantime.
        RuntimeError: it failed in another process.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from gemma3_jax import features
    >>> one, zero = jnp.eye(3), jnp.zeros(3)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=zero, W_dec=one, b_dec=zero, activation=features.Relu(), site_in="blocks.0.hook_out"
    ... )
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     features.save(sae, f"{directory}/sae", format="saelens")
    ...     features.load(f"{directory}/sae").site_in
    'blocks.0.hook_out'
    """
    if format not in _FORMATS:
        raise CheckpointError(f"format is {format!r}; it must be one of {', '.join(map(repr, _FORMATS))}")
    in_first(lambda: check_target(directory))
    outgoing = _FORMATS[format](dictionary, model_name)
    with writing(directory) as target:
        for name, tensors in outgoing.tensors.items():
            shapes = {key: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
            write_tensors(target / name, shapes, functools.partial(_read, tensors))
        in_first(lambda: write_json(target / outgoing.config_name, outgoing.config))


def _read(tensors: Mapping[str, Tensor], key: str) -> Callable[[], np.ndarray]:
    array = tensors[key].read()
    return lambda: array
