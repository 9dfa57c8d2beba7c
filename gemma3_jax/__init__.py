"""Gemma 3 in JAX, open at every site: capture, edit and differentiate any activation inside `jit`."""

from pathlib import Path

from etils import epy

# A name is imported when it is first used: conversion needs the config alone.
with epy.lazy_api_imports(globals()):
    from gemma3_jax import analysis, edits, features, harvest, pictures, reductions
    from gemma3_jax.analysis import FactoredMatrix, patching
    from gemma3_jax.cache.activations import ActivationCache
    from gemma3_jax.config import ConfigError, EmbeddingHead, Gemma3Config, Rope
    from gemma3_jax.hooked.hooked import HookedGemma3
    from gemma3_jax.hooks.interception import Hook, HookPoint
    from gemma3_jax.model.layout import stack_layers, unstack_layers
    from gemma3_jax.model.transformer import Gemma3
    from gemma3_jax.run.forward import forward, next_token_loss
    from gemma3_jax.run.gradients import grad_at
    from gemma3_jax.sites.names import UnknownSite, get_act_name, site_names
    from gemma3_jax.version import __version__ as __version__

# The trained model that comes with the package: a checkpoint directory like any other.
TINY = Path(__file__).with_name("tiny")

__all__ = [
    "TINY",
    "ActivationCache",
    "ConfigError",
    "EmbeddingHead",
    "FactoredMatrix",
    "Gemma3",
    "Gemma3Config",
    "Hook",
    "HookPoint",
    "HookedGemma3",
    "Rope",
    "UnknownSite",
    "analysis",
    "edits",
    "features",
    "forward",
    "get_act_name",
    "grad_at",
    "harvest",
    "next_token_loss",
    "patching",
    "pictures",
    "reductions",
    "site_names",
    "stack_layers",
    "unstack_layers",
]
