"""The port's side of the comparison.

Axes: b batch, p position, d hidden_size.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.gemma3 import Entry
from gemma3_jax.model.layout import is_stacked, stack_layers, unstack_layers
from gemma3_jax.run.forward import forward
from gemma3_jax.sites.names import layer_of, site_names
from gemma3_jax.types import ArrayLike, Params, PyTree

Values = dict[str, jax.Array]


class Run:
    """One forward pass of the whole model, as users run it. Any block can be run again with every site captured.

    To watch scores and patterns decides how a long prompt's attention is computed: the residual stream that enters each
    block, and the logits, are those of the unwatched pass.

    Args:
        config: shape of the model.
        params: parameter pytree, in either layout.
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens.
        logits_at: [n] positions that get logits; None is all of them.

    Attributes:
        outside: every site outside the blocks, by canonical name, and "logits".
    """

    def __init__(
        self,
        config: Gemma3Config,
        params: Params,
        tokens: np.ndarray,
        attention_mask: np.ndarray | None = None,
        logits_at: np.ndarray | None = None,
    ):
        self._config, self._params, self._shape = config, params, tokens.shape
        self._mask = None if attention_mask is None else jnp.asarray(attention_mask)
        values = _whole(config, params, jnp.asarray(tokens), self._mask, logits_at)
        self._entering = [values.pop(f"blocks.{i}.hook_in") for i in range(config.num_hidden_layers)]
        self.outside: Values = values

    def block(self, i: int) -> Values:
        """Every site of block i, by canonical name."""
        config = dataclasses.replace(self._config, num_hidden_layers=1, layer_types=(self._config.layer_types[i],))
        params = {"embed": self._params["embed"], "blocks_0": unstack_layers(self._config, self._params)[f"blocks_{i}"]}
        values = _block(config, params, self._entering[i], self._mask)
        return {name.replace("blocks.0.", f"blocks.{i}.", 1): value for name, value in values.items()}


@functools.partial(jax.jit, static_argnames="config")
def _whole(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array | None,
    logits_at: jax.Array | None,
) -> Values:
    names = [name for name in site_names(config) if layer_of(name) is None]
    logits, cache = forward(
        config, params, tokens, [*names, "blocks.*.hook_in"], attention_mask=attention_mask, logits_at=logits_at
    )
    return {**cache, "logits": logits}


@functools.partial(jax.jit, static_argnames="config")
def _block(config: Gemma3Config, params: Params, x: jax.Array, attention_mask: jax.Array | None) -> Values:
    """A model of one block: compiled once for each type of layer."""
    _, cache = forward(
        config,
        params,
        capture="blocks.0.**",
        attention_mask=attention_mask,
        inputs_embeds=x,
        start_at_layer=0,
        stop_at_layer=1,
    )
    return dict(cache)


def activations(
    config: Gemma3Config, params: Params, tokens: np.ndarray, attention_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every site in float32 by canonical name, in the model's order, and "logits". All of them at once."""
    run = Run(config, params, tokens, attention_mask)
    values = dict(run.outside)
    for i in range(config.num_hidden_layers):
        values |= run.block(i)
    return {name: np.asarray(values[name], np.float32) for name in [*site_names(config), "logits"]}


def gradients(
    config: Gemma3Config,
    params: Params,
    chosen: Sequence[Entry],
    rows: np.ndarray,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss for the chosen parameters, by adapter key; of the embedding, at `rows`."""
    by_block = unstack_layers(config, params)
    leaves = [_at(by_block, entry.path) for entry in chosen]
    mask = None if attention_mask is None else jnp.asarray(attention_mask)
    found = _gradients(config, tuple(chosen), leaves, params, jnp.asarray(tokens), mask)
    gradients = {entry.ours: np.asarray(leaf) for entry, leaf in zip(chosen, found, strict=True)}
    return {name: leaf[rows] if name == "embed.weight" else leaf for name, leaf in gradients.items()}


@functools.partial(jax.jit, static_argnames=("config", "chosen"))
@functools.partial(jax.grad, argnums=2)
def _gradients(
    config: Gemma3Config,
    chosen: Sequence[Entry],
    leaves: Sequence[jax.Array],
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array | None,
) -> jax.Array:
    by_block = unstack_layers(config, params)
    for entry, leaf in zip(chosen, leaves, strict=True):
        by_block = _replaced(by_block, entry.path, leaf)
    params = stack_layers(config, by_block) if is_stacked(params) else by_block
    return forward(config, params, tokens, attention_mask=attention_mask, return_type="loss")[0]


def _at(params: Params, path: tuple[str, ...]) -> PyTree:
    return params[path[0]] if len(path) == 1 else _at(params[path[0]], path[1:])


def _replaced(params: Params, path: tuple[str, ...], leaf: ArrayLike) -> Params:
    inner = leaf if len(path) == 1 else _replaced(params[path[0]], path[1:], leaf)
    return {**params, path[0]: inner}
