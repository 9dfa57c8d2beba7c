"""Sparse autoencoders, transcoders, cross-layer transcoders and crosscoders, at the sites that they were trained on."""

from gemma3_jax.features.activations import Gated, GroupMax, JumpRelu, Relu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.features.loading import load
from gemma3_jax.features.normalizations import LayerNorm, UnitNorm
from gemma3_jax.features.placement import shardings
from gemma3_jax.features.saving import save

__all__ = [
    "CrossLayerTranscoder",
    "Crosscoder",
    "Gated",
    "GroupMax",
    "JumpRelu",
    "LayerNorm",
    "Relu",
    "SparseAutoencoder",
    "TopK",
    "Transcoder",
    "UnitNorm",
    "load",
    "save",
    "shardings",
]
