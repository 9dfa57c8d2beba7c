"""Files of activation caches: safetensors, whose metadata has the config and other settings as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gemma3_jax import atomic
from gemma3_jax.config import ConfigError, Gemma3Config
from gemma3_jax.reading import CheckpointError, map_tensor, parse_json, read_header, read_metadata
from gemma3_jax.sites.names import site_names
from gemma3_jax.types import Settings

GRAD = "_grad"  # after the name of a site: its gradient
INPUTS = ("tokens", "attention_mask")
_SETTINGS = ("config", "batched", "grads", "reduced", "some_logits")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file has.

    Attributes:
        config: shape of the model.
        values: by canonical name, in the model's order.
        grads: likewise, or None.
        inputs: the arrays of `INPUTS` that there are, or None without tokens.
        batched: as in `ActivationCache`.
        reduced: as in `ActivationCache`.
        some_logits: as in `ActivationCache`.
    """

    config: Gemma3Config
    values: dict[str, jax.Array]
    grads: dict[str, jax.Array] | None
    inputs: tuple[jax.Array, jax.Array | None] | None
    batched: bool
    reduced: dict[str, str]
    some_logits: bool


def write(file: Path, arrays: Mapping[str, np.ndarray], settings: Settings) -> None:
    """Write arrays and settings, whole or not at all."""
    # safetensors writes the buffer as it is and ignores strides.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic.new_file(file) as temporary:
        metadata = {name: json.dumps(value) for name, value in settings.items()}
        safetensors.numpy.save_file(contiguous, temporary, metadata)


def read(file: Path) -> Contents:
    """Read a file that `write` wrote, onto JAX's default device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not a regular file, or not an activation cache.
    """
    if not os.path.lexists(file):
        raise FileNotFoundError(f"there is no file {file}")
    metadata = read_metadata(file)
    if not {"config", "batched", "grads"} <= set(metadata):
        raise CheckpointError(f"{file} is not an activation cache; write one with `save`")
    settings = {name: parse_json(file, text.encode()) for name, text in metadata.items() if name in _SETTINGS}
    try:
        config = Gemma3Config.from_hf(settings["config"])
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    reduced = settings.get("reduced", {})
    stored = read_header(file)
    # In the model's order, which the file does not have.
    names = [name for name in site_names(config) if name in stored]
    gradients = [name for name in site_names(config) if name + GRAD in stored]
    unknown = sorted(set(stored) - {*names, *(name + GRAD for name in gradients), *INPUTS})
    if unknown:
        raise CheckpointError(f"{file} has {listed(unknown)}, which its model does not have")
    if not isinstance(reduced, dict) or set(reduced) - set(names):
        raise CheckpointError(f"{file} is damaged: its reductions are {reduced!r}")
    arrays = {key: jnp.array(map_tensor(key, tensor)) for key, tensor in stored.items()}
    tokens, mask = (arrays.get(name) for name in INPUTS)
    return Contents(
        config,
        {name: arrays[name] for name in names},
        {name: arrays[name + GRAD] for name in gradients} if settings["grads"] else None,
        None if tokens is None else (tokens, mask),
        bool(settings["batched"]),
        reduced,
        bool(settings.get("some_logits")),
    )


def listed(values: Iterable[str], most: int = 8) -> str:
    """Names for a message, which end after a few."""
    names = list(values)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
