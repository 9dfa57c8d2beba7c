"""Gradients of the loss with respect to every parameter, and with respect to the residual stream of every layer."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import peers
from benchmarks.rows import Row, Settings, ratio
from benchmarks.timing import interleaved
from gemma3_jax import Gemma3Config, forward, grad_at

RESIDUALS = "blocks.*.hook_resid_post"


@functools.partial(jax.jit, static_argnames="config")
def of_params(config: Gemma3Config, params: Any, tokens: jax.Array) -> Any:
    """Gradients with respect to every parameter."""
    return jax.grad(lambda params: forward(config, params, tokens, return_type="loss")[0])(params)


@functools.partial(jax.jit, static_argnames="config")
def of_residuals(config: Gemma3Config, params: Any, tokens: jax.Array) -> Any:
    """Gradients with respect to the residual stream of every layer."""
    return grad_at(config, params, tokens, RESIDUALS)[1].grads


def torch_gradients(model: Any, tokens: torch.Tensor, residuals: bool) -> Any:
    """The same gradients in Hugging Face: of every parameter, or of the layers' outputs, which hooks store."""
    model.requires_grad_(not residuals)
    if residuals:
        inputs = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        with peers.kept_outputs(model, layers_only=True) as kept:
            # Hugging Face shifts the labels itself.
            loss = model(inputs_embeds=inputs, labels=tokens, use_cache=False).loss
        return np.float32(torch.autograd.grad(loss, list(kept.values()))[0].ravel()[0].item())
    model.zero_grad(set_to_none=True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return np.float32(model.model.norm.weight.grad[0].item())


def rows(settings: Settings) -> Iterator[Row]:
    """Two rows, in float32."""
    config = settings.config
    shape = (1, 16) if settings.quick else (1, 128)
    model, params, torch_ids, ids = peers.pair(config, "float32", shape)
    tokens = jnp.asarray(ids)
    for name, ours, residuals in (("every parameter", of_params, False), ("all residuals", of_residuals, True)):
        seconds = interleaved(
            {
                "port": functools.partial(ours, config, params, tokens),
                "HF": functools.partial(torch_gradients, model, torch_ids, residuals),
            },
            settings.rounds,
        )
        yield Row(f"of {name}, {shape[0]} x {shape[1]}", "float32", seconds, (ratio(seconds),))
