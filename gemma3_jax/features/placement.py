"""Dictionaries on devices: the width is cut over "model", and everything else is whole on each device.

Axes: d features of a site, f features of the dictionary, m layers that are written.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.meshes import as_auto, spec

Dictionary = SparseAutoencoder | Transcoder | CrossLayerTranscoder | Crosscoder
_AnyDictionary = TypeVar("_AnyDictionary", bound=Dictionary)

# Axis letters of the attributes; those of layered dictionaries have them for each layer.
_AXES = {"W_enc": "d f", "b_enc": "f", "W_dec": "f d", "b_dec": "d", "skip": "d d"}
_LAYERED_DECODER = "f m d"


def shardings(dictionary: _AnyDictionary, mesh: Mesh) -> _AnyDictionary:
    """How each array is cut over a mesh: `NamedSharding`s in a pytree like the dictionary.

    >>> from gemma3_jax import features
    >>> from gemma3_jax.placing import make_mesh
    >>> one, f = jnp.eye(2), jnp.zeros(2)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=f, W_dec=one, b_dec=f, activation=features.Relu(), site_in="blocks.0.hook_out"
    ... )
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> tuple(features.shardings(sae, mesh).W_enc.spec)
    (None, 'model')
    >>> sae = jax.device_put(sae, features.shardings(sae, mesh))
    """
    mesh = as_auto(mesh)

    def sharding(path: tuple[object, ...], leaf: jax.Array | np.ndarray) -> NamedSharding:
        letters = _letters(getattr(path[0], "name", ""), leaf.ndim)
        return NamedSharding(mesh, spec(letters, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, dictionary)


def _letters(attribute: str, axes: int) -> str:
    """The axis letters of an attribute, of which an activation has arrays [f] and []."""
    letters = _AXES.get(attribute, "f" if axes else "")
    return _LAYERED_DECODER if attribute == "W_dec" and axes == 3 else letters


def place(dictionary: _AnyDictionary, mesh: Mesh | None) -> _AnyDictionary:
    """A dictionary of mapped arrays, read onto the devices of a mesh, part by part, or onto the default device.

    Without a mesh, the decoders of a layered dictionary stay in the file.
    """
    if mesh is not None:
        return jax.tree.map(_cut, dictionary, shardings(dictionary, mesh))
    if isinstance(dictionary, CrossLayerTranscoder | Crosscoder):
        others = jax.tree.map(jnp.array, dataclasses.replace(dictionary, W_dec=()))
        return dataclasses.replace(others, W_dec=dictionary.W_dec)
    return jax.tree.map(jnp.array, dictionary)


def _cut(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.ascontiguousarray(leaf[index]))
