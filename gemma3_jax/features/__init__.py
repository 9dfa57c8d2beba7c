"""Sparse autoencoders, transcoders, cross-layer transcoders and crosscoders, at the sites that they were trained on."""

from pathlib import Path

from gemma3_jax.features.activations import Gated, GroupMax, JumpRelu, Relu, TopK
from gemma3_jax.features.attribution import feature_attribution
from gemma3_jax.features.checking import check
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.encoding import Encode
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.features.loading import load
from gemma3_jax.features.normalizations import LayerNorm, UnitNorm
from gemma3_jax.features.pages.dashboards import dashboard
from gemma3_jax.features.pages.prompt_views import prompt_view
from gemma3_jax.features.placement import shardings
from gemma3_jax.features.saving import save
from gemma3_jax.features.searches.search import search
from gemma3_jax.features.splicing import splice, steer
from gemma3_jax.features.training.loop import train

# Those of the shipped model, for all its layers: a directory in the layout of Gemma Scope 2, as a hub id for `load`.
TINY = Path(__file__).with_name("tiny")

# A method of every kind, in a file that needs those of the kinds.
for _kind in (SparseAutoencoder, Transcoder, CrossLayerTranscoder, Crosscoder):
    _kind.check = check

__all__ = [
    "TINY",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Encode",
    "Gated",
    "GroupMax",
    "JumpRelu",
    "LayerNorm",
    "Relu",
    "SparseAutoencoder",
    "TopK",
    "Transcoder",
    "UnitNorm",
    "dashboard",
    "feature_attribution",
    "load",
    "prompt_view",
    "save",
    "search",
    "shardings",
    "splice",
    "steer",
    "train",
]
