"""Dictionaries on devices: the width is cut over "model", and everything else is whole on each device.

Axes: d features of a site, f features of the dictionary, m layers that are written.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma3_jax.conversion.finite import all_finite
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.meshes import as_auto, tree_shardings
from gemma3_jax.reading import CheckpointError, release

Dictionary = SparseAutoencoder | Transcoder | CrossLayerTranscoder | Crosscoder
_AnyDictionary = TypeVar("_AnyDictionary", bound=Dictionary)


def shardings(dictionary: _AnyDictionary, mesh: Mesh) -> _AnyDictionary:
    """How each array is cut over a mesh: a `NamedSharding` for each, in a pytree like the dictionary.

    >>> import jax.numpy as jnp
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
    placed: _AnyDictionary = tree_shardings(dictionary, as_auto(mesh))
    return placed


def place(dictionary: _AnyDictionary, mesh: Mesh | None, where: Path) -> _AnyDictionary:
    """A dictionary of mapped arrays, read onto the devices of a mesh, part by part, or onto the default device.

    Without a mesh, the decoders of a layered dictionary stay in the file.

    Args:
        dictionary: with NumPy arrays.
        mesh: devices, or None.
        where: its directory, for messages.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    kept = None
    if mesh is None and isinstance(dictionary, CrossLayerTranscoder | Crosscoder):
        dictionary, kept = dataclasses.replace(dictionary, W_dec=()), dictionary.W_dec
    leaves, structure = jax.tree_util.tree_flatten_with_path(dictionary)
    targets = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(dictionary, mesh))
    placed = [_placed(path[0].name, leaf, to, where) for (path, leaf), to in zip(leaves, targets, strict=True)]
    whole = jax.tree.unflatten(structure, placed)
    return whole if kept is None else dataclasses.replace(whole, W_dec=kept)


def _placed(attribute: str, leaf: np.ndarray, target: NamedSharding | None, where: Path) -> jax.Array:
    if target is None:
        array = jax.device_put(leaf, may_alias=False)  # an alias would change, or fail, with the file
    else:
        array = jax.make_array_from_callback(leaf.shape, target, lambda index: np.ascontiguousarray(leaf[index]))
    # Otherwise the temporary copies of several arrays would be in memory together
    array.block_until_ready()
    release(leaf)
    if attribute != "activation" and not all_finite(array):  # a threshold may be infinite: that of a dead feature
        raise CheckpointError(f"{where}: {attribute} has NaN or infinity; the files are damaged")
    return array
