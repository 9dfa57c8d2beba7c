"""Dictionaries in the format of Gemma Scope 2. See `gemma_scope`, which reads it.

Axes: f features of a layer, l layers, o features of the output.
"""

import jax
import numpy as np

from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.formats.gemma_scope import CONFIG, LAYER_PARAMS, PARAMS, SKIP
from gemma3_jax.features.formats.outgoing import Outgoing, Tensor, as_is, folded_bias, threshold_of
from gemma3_jax.features.hookpoints import huggingface_name
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.processes import to_host
from gemma3_jax.reading import CheckpointError
from gemma3_jax.sites.names import layer_of
from gemma3_jax.types import JsonObject

_FORMAT = "gemma_scope"


def outgoing(dictionary: Dictionary, model_name: str | None) -> Outgoing:
    """The files of a dictionary.

    Raises:
        CheckpointError: the format cannot hold it.
    """
    if isinstance(dictionary, SparseAutoencoder | Transcoder):
        kind, points = "sae", [huggingface_name(site) for site in (dictionary.site_in, dictionary.site_out)]
        tensors = {PARAMS: _tensors(dictionary)}
    else:
        kind, points = "clt", [_all(sites) for sites in (dictionary.site_in, dictionary.site_out)]
        tensors = {LAYER_PARAMS.format(layer): _of_layer(dictionary, layer) for layer in range(len(dictionary.W_enc))}
    kinds = {Transcoder: "transcoder", Crosscoder: "crosscoder"}
    config: JsonObject = {
        "architecture": "jump_relu",
        "type": kinds.get(type(dictionary), kind),
        "hf_hook_point_in": points[0],
        "hf_hook_point_out": points[1],
        "width": sum(b.shape[0] for b in jax.tree.leaves(dictionary.b_enc)),
        "affine_connection": getattr(dictionary, "skip", None) is not None,
        **({} if model_name is None else {"model_name": model_name}),
    }
    return Outgoing(tensors, CONFIG, config)


def _tensors(dictionary: SparseAutoencoder | Transcoder) -> dict[str, Tensor]:
    if dictionary.normalization is not None:
        kind = type(dictionary.normalization).__name__
        raise CheckpointError(f"{_FORMAT} has no normalization of the input ({kind}); use format='saelens'")
    tensors = {
        "w_enc": as_is(dictionary.W_enc),
        "b_enc": folded_bias(dictionary),
        "threshold": threshold_of(dictionary.activation, dictionary.width, _FORMAT),
        "w_dec": as_is(dictionary.W_dec),
        "b_dec": as_is(dictionary.b_dec),
    }
    skip = getattr(dictionary, "skip", None)
    return tensors if skip is None else {**tensors, SKIP: as_is(skip)}


def _of_layer(dictionary: CrossLayerTranscoder | Crosscoder, layer: int) -> dict[str, Tensor]:
    tensors = {
        "w_enc": as_is(dictionary.W_enc[layer]),
        "b_enc": as_is(dictionary.b_enc[layer]),
        "threshold": threshold_of(dictionary.activation[layer], dictionary.width, _FORMAT),
        "w_dec": _all_targets(dictionary.W_dec[layer], len(dictionary.W_enc)),
        "b_dec": as_is(dictionary.b_dec[layer]),
    }
    skip = getattr(dictionary, "skip", None)
    return tensors if skip is None else {**tensors, SKIP: as_is(skip[layer])}


def _all_targets(W_dec: jax.Array | np.ndarray, layers: int) -> Tensor:
    """A decoder [f, m, o] with zeros for the layers before its own: [f, l, o]."""
    f, m, o = W_dec.shape
    return Tensor((f, layers, o), W_dec.dtype, lambda: np.pad(to_host(W_dec), ((0, 0), (layers - m, 0), (0, 0))))


def _all(sites: tuple[str, ...]) -> str:
    """One name for the sites of several layers, with `{all}` or with their numbers.

    Raises:
        CheckpointError: they are not one site of different layers.
    """
    layers, names = [layer_of(site) for site in sites], [huggingface_name(site) for site in sites]
    patterns = {name.replace(f".{layer}.", ".{}.", 1) for name, layer in zip(names, layers, strict=True)}
    if len(patterns) != 1:
        raise CheckpointError(f"{_FORMAT} has one kind of site for all layers, and these are {', '.join(sites)}")
    numbers = "all" if layers == list(range(len(layers))) else ",".join(map(str, layers))
    return patterns.pop().replace("{}", f"{{{numbers}}}")
