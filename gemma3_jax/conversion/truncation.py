"""Only the first layers of a checkpoint."""

import dataclasses
import re

from gemma3_jax.config import ConfigError, Gemma3Config
from gemma3_jax.conversion.gemma3 import is_vision
from gemma3_jax.conversion.tensors import Tensors

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def truncate(config: Gemma3Config, first_n_layers: int) -> Gemma3Config:
    """The config of the first layers, which remembers how many the model has; unchanged for all layers.

    Raises:
        ConfigError: the model does not have this number of layers.

    >>> config = truncate(Gemma3Config.preset("12b"), 13)
    >>> config.num_hidden_layers, config.truncated_from
    (13, 48)
    """
    layers = config.num_hidden_layers
    is_integer = isinstance(first_n_layers, int) and not isinstance(first_n_layers, bool)
    if not is_integer or not 1 <= first_n_layers <= layers:
        raise ConfigError(f"first_n_layers is {first_n_layers!r}; it must be an integer from 1 to {layers}")
    if first_n_layers == layers:
        return config
    return dataclasses.replace(
        config,
        num_hidden_layers=first_n_layers,
        layer_types=config.layer_types[:first_n_layers],
        truncated_from=config.truncated_from or layers,
    )


def is_within(key: str, first_n_layers: int) -> bool:
    """Whether the text model with these layers needs the tensor of a Hugging Face key.

    >>> [is_within(f"model.layers.{i}.mlp.up_proj.weight", 13) for i in (12, 13)]
    [True, False]
    """
    layer = _LAYER.search(key)
    return not is_vision(key) and (layer is None or int(layer[1]) < first_n_layers)


def first_layers(tensors: Tensors, first_n_layers: int) -> Tensors:
    """The tensors that the first layers need, the embedding, the final norm and the unembedding among them."""
    shapes = {key: shape for key, shape in tensors.shapes.items() if is_within(key, first_n_layers)}
    return dataclasses.replace(tensors, shapes=shapes)
