"""Gemma 3 in JAX, open at every site: capture, edit and differentiate any activation inside `jit`."""

from pathlib import Path

from gemma3_jax import edits
from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import ConfigError, Gemma3Config, Rope
from gemma3_jax.forward import forward, next_token_loss
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.hooks import Hook, HookPoint
from gemma3_jax.model import Gemma3
from gemma3_jax.sites import UnknownSite, site_names

# The trained model that comes with the package: a checkpoint directory like any other.
TINY = Path(__file__).with_name("tiny")

__all__ = [
    "TINY",
    "ActivationCache",
    "ConfigError",
    "Gemma3",
    "Gemma3Config",
    "Hook",
    "HookPoint",
    "HookedGemma3",
    "Rope",
    "UnknownSite",
    "edits",
    "forward",
    "next_token_loss",
    "site_names",
]
