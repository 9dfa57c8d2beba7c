"""Gemma 3 in JAX, open at every site: capture, edit and differentiate any activation inside `jit`."""

from pathlib import Path

from gemma3_jax import analysis, edits, pictures, reductions
from gemma3_jax.analysis import FactoredMatrix, patching
from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import ConfigError, Gemma3Config, Rope
from gemma3_jax.forward import forward, next_token_loss
from gemma3_jax.gradients import grad_at
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.hooks import Hook, HookPoint
from gemma3_jax.model import Gemma3
from gemma3_jax.sites import UnknownSite, get_act_name, site_names
from gemma3_jax.stacking import stack_layers, unstack_layers

# The trained model that comes with the package: a checkpoint directory like any other.
TINY = Path(__file__).with_name("tiny")

__all__ = [
    "TINY",
    "ActivationCache",
    "ConfigError",
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
    "forward",
    "get_act_name",
    "grad_at",
    "next_token_loss",
    "patching",
    "pictures",
    "reductions",
    "site_names",
    "stack_layers",
    "unstack_layers",
]
