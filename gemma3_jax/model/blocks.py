"""Runs the blocks in sequence, or with a scan.

Axes: b batch, p position, d hidden_size.
"""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from gemma3_jax.model.past import Past
from gemma3_jax.model.scan import BlockInputs, from_layer, run_stacked
from gemma3_jax.model.watched import Watched
from gemma3_jax.sites.names import block_key


def run_blocks(
    model: Watched,
    scan_layers: bool,
    remat: bool,
    block_class: type[nn.Module],
    x: Float[Array, "b p d"],
    inputs: BlockInputs,
    start: int | Integer[Array, ""] | None,
    stop: int | None,
    past: Sequence[Past] | None,
) -> Float[Array, "b p d"]:
    """[b, p, d]: the residual stream after the blocks `start` to `stop`.

    Args:
        model: the `Gemma3` that is being called.
        scan_layers: scan over the layers, whose parameters are stacked.
        remat: compute each block again in a backward pass.
        block_class: class of the blocks.
        x: [b, p, d], the residual stream that enters the first of them.
        inputs: for each layer type, the rotary tables and the mask.
        start: first block to run; negative numbers count from the end; may be traced.
        stop: block before which the run stops.
        past: KV cache of each layer.
    """
    start = _from_front(start, model.config.num_hidden_layers)
    if scan_layers:
        make_block = functools.partial(block_class, model.config)
        return run_stacked(model, make_block, x, inputs, start, stop, past, remat)
    make_block = functools.partial(nn.remat(block_class) if remat else block_class, model.config)
    tables, masks = inputs
    for i, kind in enumerate(model.config.layer_types[:stop]):
        block = make_block(model.watched, model.edited, name=block_key(i))
        x = from_layer(start, i, block, x, tables[kind], masks[kind], None if past is None else past[i])
    return x


def _from_front(layer: int | Integer[Array, ""] | None, layers: int) -> int | Integer[Array, ""] | None:
    """A layer counted from the front, as an `int` unless it is traced."""
    if layer is None:
        return None
    if isinstance(layer, jax.core.Tracer):
        return jnp.where(layer < 0, layer + layers, layer)
    known = operator.index(layer)
    return known + layers if known < 0 else known
