"""The loss of large batches, whose logits would not fit in memory: positions go through the head in pieces.

Axes: b batch, p position, c positions of a piece, d hidden_size, V vocabulary, r rows of any array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma3_jax.run.loss import counted_labels, cross_entropy
from gemma3_jax.run.request import Request
from gemma3_jax.run.selection import runs
from gemma3_jax.types import Params, PyTree

LOGITS = 2**29  # bytes of logits that a loss makes at once; smaller pieces take longer under `grad`

# From the parameters and a request to its result and its captures: `gemma3_jax.run.forward.run`.
Run = Callable[[Params, Request], tuple[PyTree, PyTree]]


def positions_of_piece(request: Request) -> int | None:
    """The positions of a piece of a loss; None if the logits are small, or needed whole by a capture or an edit."""
    layers, (b, p) = request.config.num_hidden_layers, request.source.shape[:2]
    seen = {*request.names, *request.edits}
    in_head = any(not runs(request.config, name, None, layers) for name in seen)
    of_position = 4 * b * request.config.vocab_size
    if request.return_type not in ("loss", "loss_per_row") or in_head or of_position * p <= LOGITS:
        return None
    return max(1, LOGITS // of_position)


def token_losses(run: Run, params: Params, request: Request, c: int) -> tuple[jax.Array, PyTree]:
    """The cross-entropies [b, p - 1] float32 of a request for a loss, at all tokens, and its captures.

    Args:
        run: runs a request without a loss.
        params: parameter pytree.
        request: without captures and edits after the last block.
        c: positions of a piece.

    Memory: 8 b c V bytes for the logits of a piece, 12 under `grad`, which computes each piece again.
    """
    # The readout of a residual stream does not depend on the layers after it.
    config, layers = request.config, request.config.num_hidden_layers
    residual, cache = run(params, dataclasses.replace(request, return_type="logits", stop_at_layer=layers))
    labels = request.source if request.labels is None else jnp.asarray(request.labels)
    _, _, targets = counted_labels(labels, config.vocab_size)
    head = dataclasses.replace(
        request,
        attention_mask=None,
        positions=None,
        segment_ids=None,
        labels=None,
        past=None,
        edits={},
        names=(),
        reductions=(),
        reduced=(),
        present=None,
        first_layer=None,
        start_at_layer=layers,
        return_type="logits",
    )

    @jax.checkpoint  # without it, the gradient would store the logits of every position
    def of_piece(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, targets = (jnp.swapaxes(each, 0, 1) for each in piece)
        # [b, c, d] -> [b, c, V] -> [c, b]
        logits, _ = run(params, dataclasses.replace(head, source=rows))
        return cross_entropy(logits, targets).T

    # [b, p - 1, d], [b, p - 1] -> [p - 1, b]
    by_position = jnp.swapaxes(residual[:, :-1], 0, 1), targets.T
    return in_pieces(of_piece, by_position, c).T, cache


def in_pieces(function: Callable[[PyTree], PyTree], arrays: PyTree, c: int) -> PyTree:
    """The results of `function` for arrays [r, ...], c rows at a time; the last piece is padded with zeros.

    `function` takes a piece [c, ...]. Under `vmap` it would take one row, and the products of the head would be slow.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    c = min(c, count)

    def cut(x: jax.Array) -> jax.Array:
        # [r, ...] -> [pieces, c, ...]
        return jnp.pad(x, [(0, -count % c)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, c, *x.shape[1:])

    # [pieces, c, ...] -> [r, ...]
    results: PyTree = jax.lax.map(function, jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], results)
