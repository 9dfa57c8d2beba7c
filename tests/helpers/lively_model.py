"""A small model that writes varied text, for the tests of generation: a random one repeats one token for ever."""

import functools
from typing import Any

import jax
import numpy as np
import torch
import transformers

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config
from gemma3_jax.sites.table import site
from tests.helpers.random_models import hf_model


@functools.cache
def lively(tied: bool = True, **overrides: Any) -> tuple[transformers.Gemma3ForCausalLM, Gemma3Config, Any]:
    """Model, config and params; embeddings are small beside what the layers write, so that tokens do not copy."""
    model = hf_model(tie_word_embeddings=tied, **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)
    config = Gemma3Config.from_hf(model.config)
    with jax.ensure_compile_time_eval():
        return model, config, convert_state_dict(model.state_dict(), config)


def at_real_tokens(name: str, value: Any, mask: np.ndarray) -> np.ndarray:
    """A site's value with zeros where `mask` [b, p] says that the token is padding; keys beyond p are cut."""
    axes = site(name).axes.split()
    value = np.asarray(value)[tuple(slice(mask.shape[1]) if letter in "pk" else slice(None) for letter in axes)]
    sizes = {0: mask.shape[0], axes.index("p" if "p" in axes else "k"): mask.shape[1]}
    return np.where(mask.reshape([sizes.get(i, 1) for i in range(value.ndim)]), value, 0)
