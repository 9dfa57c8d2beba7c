"""Hugging Face's forward pass with inputs of its own, recorded at every site, for tests of masks and packing."""

import unittest.mock
from typing import Any

import numpy as np
import torch
import transformers

from gemma3_jax.parity import huggingface


def hf_sites(model: transformers.PreTrainedModel, tokens: np.ndarray, **inputs: Any) -> dict[str, np.ndarray]:
    """Every site and "logits" by canonical name, of `model(tokens, **inputs)` without a cache."""

    def logits_of(model, tokens, mask=None, logits_at=None):
        given = {name: torch.as_tensor(np.array(value)) for name, value in inputs.items()}
        return model(input_ids=torch.as_tensor(tokens), use_cache=False, **given).logits

    with unittest.mock.patch.object(huggingface, "logits_of", logits_of):
        sites = huggingface.activations(model, tokens)
    # Without position ids all rows share one table of angles.
    return {name: np.broadcast_to(value, (len(tokens), *value.shape[1:])) for name, value in sites.items()}
