"""The request for a run of the model: inputs, captures and edits, checked once when it is built.

Axes: b batch, p position, n chosen positions, d hidden_size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import EmbeddingHead, Gemma3Config, check_config
from gemma3_jax.hooks.interception import Edit, Phase
from gemma3_jax.hooks.longer import Longer
from gemma3_jax.hooks.needs import phases
from gemma3_jax.hooks.reductions import At, Steps
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.inputs import as_array, as_int32, integer, one_input, padding_mask, token_ids
from gemma3_jax.model.past import Past
from gemma3_jax.positions import BY_COLUMN, Extent, check_mask, columns_at, packed_documents
from gemma3_jax.run.loss import check_labels
from gemma3_jax.run.selection import (
    LOSSES,
    Edits,
    ReducedCapture,
    ReturnType,
    captures,
    placed_edits,
)
from gemma3_jax.types import ArrayLike, Integers, IntegersLike, Params

_log = logging.getLogger(__name__)

LARGE = 2**27  # bytes of parameters

# What a run returns: logits or a loss, both, an embedding, or None.
Output: TypeAlias = jax.Array | tuple[jax.Array, jax.Array] | None
# A reduction, as the user gave it or traced; None captures the whole value.
Reduced: TypeAlias = Steps | Traced | Longer | None


@flax.struct.dataclass
class Request:
    """A request for a run of the model; a pytree. A change of its static part recompiles.

    Attributes:
        config: shape of the model (static).
        source: [b, p] int32 ids, or [b, p, d] embeddings.
        attention_mask: [b, p] int32, or None.
        positions: [b, p] int32, or None.
        segment_ids: [b, p] int32, or None.
        labels: [b, p] int32, what a loss predicts; None for the tokens.
        first_layer: the layer that the embeddings enter, if its index is traced; or None.
        logits_at: [], [n] or [b, n] integers, or None.
        past: each layer's KV cache of the text before; or None.
        edits: by canonical name, the edits to apply, in order. An empty tuple means that the edits of the
            site act only in the other phase of a generation.
        reductions: reduction of each captured site; None captures the whole value.
        present: [1, p] bool, false in columns that only fill the input up to a common length; None if there are none.
        names: canonical names of the captured sites, in the model's order (static).
        reduced: name of the reduction of each site, or None (static).
        start_at_layer: the layer that the embeddings enter, or None (static).
        stop_at_layer: the layer before which the run ends, or None (static).
        return_type: the result of the run (static).
        phase: passed to the edits (static).
        remat: whether a backward pass computes each block again (static).
    """

    source: Integers
    attention_mask: Integers | None
    positions: Integers | None
    segment_ids: Integers | None
    labels: Integers | None
    first_layer: jax.Array | None
    logits_at: jax.Array | None
    past: Sequence[Past] | None
    edits: Mapping[str, Sequence[Edit]]
    reductions: tuple[Reduced, ...]
    present: Integers | None
    config: Gemma3Config = flax.struct.field(pytree_node=False)
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    reduced: tuple[str | None, ...] = flax.struct.field(pytree_node=False)
    start_at_layer: int | None = flax.struct.field(pytree_node=False)
    stop_at_layer: int | None = flax.struct.field(pytree_node=False)
    return_type: ReturnType = flax.struct.field(pytree_node=False)
    phase: Phase = flax.struct.field(pytree_node=False)
    remat: bool = flax.struct.field(pytree_node=False)

    @property
    def extent(self) -> Extent:
        """The shape and the known positions of its tokens."""
        b, p = self.source.shape[:2]
        return Extent(b, p, self.attention_mask, self.positions, self.segment_ids)

    @property
    def has_tokens(self) -> bool:
        """Whether the source is token ids."""
        return jnp.issubdtype(self.source.dtype, jnp.integer)

    @property
    def start(self) -> int | jax.Array | None:
        """The layer that the embeddings enter; may be traced."""
        return self.start_at_layer if self.first_layer is None else self.first_layer


def warn_of_padding(request: Request) -> None:
    """Log a warning if ids begin or end with padding and no argument says so. Traced ids are not known.

    The pure functions run padding as text then, as Hugging Face's forward pass does.
    """
    others = request.attention_mask, request.positions, request.segment_ids, request.past
    ids = request.source
    if not (isinstance(ids, np.ndarray) and request.has_tokens and all(other is None for other in others)):
        return
    rows = np.flatnonzero((padding_mask(request.config, ids) == 0).any(axis=1))
    if rows.size:
        _log.warning(
            "row %d begins or ends with the padding token %d, which runs as text; pass attention_mask, as "
            "HookedGemma3.attention_mask returns it, or ones if it is text",
            rows[0],
            request.config.padding,
        )


def _warn_of_length(config: Gemma3Config, source: Integers, mask: Integers | None) -> None:
    """Log a warning if one text is longer than the texts that the model was made for. It runs, as in Hugging Face."""
    longest = source.shape[1]
    if longest > config.max_position_embeddings and not (mask is None or isinstance(mask, jax.core.Tracer)):
        longest = int(np.asarray(mask).sum(axis=1).max())
    if longest > config.max_position_embeddings:
        _log.warning(
            "the input has %d tokens, and the model's context is %d: what it computes after that is unreliable",
            longest,
            config.max_position_embeddings,
        )


def warn_of_constants(params: Params) -> None:
    """Warn if a function that is being compiled has large parameters as constants, so that its program copies them."""
    leaves = jax.tree.leaves(params)
    # Outside of a transformation that stages operations, `zeros` is an array.
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or not isinstance(jnp.zeros(()), jax.core.Tracer):
        return
    size = sum(leaf.nbytes for leaf in leaves)
    if size >= LARGE:
        warnings.warn(
            f"the parameters, {size / 1e6:,.0f} MB, are constants of a function that is being compiled, which makes "
            "several copies; pass them as an argument: jax.jit(lambda params, tokens: forward(config, params, tokens))",
            stacklevel=3,
        )


def check_phases(request: Request) -> None:
    """Raise ValueError for an edit that is restricted to another phase than that of the run, so that it never acts."""
    for name, edits in request.edits.items():
        if any(request.phase not in phases(edit) for edit in edits):
            raise ValueError(
                f"an edit at {name} never acts: it is restricted to another phase, and this run is all {request.phase}"
            )


def new_request(
    config: Gemma3Config,
    tokens: IntegersLike | None = None,
    capture: ReducedCapture = (),
    edits: Edits | None = None,
    attention_mask: IntegersLike | None = None,
    *,
    positions: IntegersLike | None = None,
    segment_ids: IntegersLike | None = None,
    labels: IntegersLike | None = None,
    inputs_embeds: ArrayLike | None = None,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    logits_at: IntegersLike | None = None,
    past: Sequence[Past] | None = None,
    phase: Phase = "prompt",
    return_type: ReturnType = "logits",
    remat: bool = False,
    new: int = 0,
) -> Request:
    """Check the arguments of a run, as far as they are known, and return the request.

    Args:
        new: number of decode steps after the input with the same edits.

    The other arguments and errors are those of `gemma3_jax.forward`; `edits` may also be (name, edit) pairs.
    """
    check_config(config)
    if phase not in get_args(Phase):
        raise ValueError(f"phase is {phase!r}; it must be {' or '.join(map(repr, get_args(Phase)))}")
    given = one_input(tokens, inputs_embeds)
    source: Integers
    if tokens is None:
        source = jnp.asarray(given)
        _check_floats(config, source)
    elif np.ndim(tokens) != 2:
        raise ValueError(f"tokens have shape {np.shape(tokens)}; they must be [b, p]")
    else:
        source = token_ids(tokens, config.vocab_size)
    if attention_mask is not None:
        check_mask(attention_mask)
    mask = None if attention_mask is None else _on_host(attention_mask).astype(np.int32)
    positions, segment_ids, labels = (
        _integers(*pair) for pair in (("positions", positions), ("segment_ids", segment_ids), ("labels", labels))
    )
    _check_shapes(source, attention_mask=mask, positions=positions, segment_ids=segment_ids, labels=labels)
    _check_loss(config, source, labels, return_type, stop_at_layer, logits_at)
    if positions is None and segment_ids is None and past is None:
        _warn_of_length(config, source, mask)
    first_layer = start_at_layer if isinstance(start_at_layer, jax.core.Tracer) else None
    known_start = None if first_layer is not None else _layer("start_at_layer", start_at_layer)
    start_at_layer = known_start if first_layer is None else first_layer
    stop_at_layer = _layer("stop_at_layer", stop_at_layer)
    _check_extent(config, source, start_at_layer, stop_at_layer, return_type)
    if return_type == "embedding":
        _check_embedding(config, segment_ids, positions, mask, stop_at_layer, logits_at, past)
    extent = Extent(source.shape[0], source.shape[1], mask, positions, segment_ids)
    reductions = captures(config, capture, extent, start_at_layer, stop_at_layer, return_type)
    chosen = _checked_logits_at(logits_at, extent, stop_at_layer)
    _check_one_token_each(reductions, chosen, extent)
    return Request(
        source=source,
        attention_mask=mask,
        positions=positions,
        segment_ids=segment_ids,
        labels=labels,
        first_layer=first_layer,
        logits_at=chosen,
        past=past,
        edits=placed_edits(config, edits or {}, extent, start_at_layer, stop_at_layer, new, return_type),
        reductions=tuple(reductions.values()),
        present=None,
        config=config,
        names=tuple(reductions),
        reduced=tuple(None if steps is None else str(steps) for steps in reductions.values()),
        start_at_layer=known_start,
        stop_at_layer=stop_at_layer,
        return_type=return_type,
        phase=phase,
        remat=bool(remat),
    )


def _layer(name: str, layer: object) -> int | None:
    return None if layer is None else integer(name, layer)


def _integers(name: str, x: IntegersLike | None) -> Integers | None:
    if x is None:
        return None
    array = _on_host(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} are {array.dtype}; they must be integers")
    return as_int32(name, array)


def _on_host(x: ArrayLike) -> Integers:
    return x if isinstance(x, jax.core.Tracer) else np.asarray(as_array(x))


def _check_floats(config: Gemma3Config, embeds: jax.Array) -> None:
    floats = jnp.issubdtype(embeds.dtype, jnp.floating)
    if not floats or embeds.ndim != 3 or embeds.shape[2] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds are {embeds.dtype} of shape {embeds.shape}; they must be floats "
            f"[b, p, {config.hidden_size}]"
        )


def _check_shapes(source: Integers, **arrays: Integers | None) -> None:
    if not source.size:
        raise ValueError(f"the input has shape {source.shape}; it must have at least one token")
    for name, array in arrays.items():
        if array is not None and array.shape != source.shape[:2]:
            raise ValueError(f"{name} has shape {array.shape}; the input has {source.shape[:2]} (batch, position)")


def _check_extent(
    config: Gemma3Config,
    source: Integers,
    start_at_layer: int | jax.Array | None,
    stop_at_layer: int | None,
    return_type: ReturnType,
) -> None:
    is_tokens = jnp.issubdtype(source.dtype, jnp.integer)
    if return_type is not None and stop_at_layer is None:
        config.check_logits()
    layers = config.num_hidden_layers
    for name, layer in (("start_at_layer", start_at_layer), ("stop_at_layer", stop_at_layer)):
        if isinstance(layer, int) and not -layers <= layer <= layers:
            raise ValueError(f"{name} is {layer}; the model has {layers} layers")
    if isinstance(start_at_layer, int) and stop_at_layer is not None:
        first, last = (layer + layers if layer < 0 else layer for layer in (start_at_layer, stop_at_layer))
        if first > last:
            raise ValueError(
                f"start_at_layer is {start_at_layer}, after stop_at_layer {stop_at_layer}: no block would run, and the "
                "result would not be the stream that enters that layer"
            )
    if start_at_layer is not None and is_tokens:
        raise ValueError("start_at_layer needs inputs_embeds: the residual stream [b, p, d] entering that layer")


def _check_loss(
    config: Gemma3Config,
    source: Integers,
    labels: Integers | None,
    return_type: ReturnType,
    stop_at_layer: int | None,
    logits_at: IntegersLike | None,
) -> None:
    """Raise ValueError if the run cannot return its loss, or has labels without a loss or outside the vocabulary."""
    if return_type not in get_args(ReturnType):
        kinds = "'logits', 'loss', 'loss_per_row', 'both', 'embedding' or None"
        raise ValueError(f"return_type is {return_type!r}; it must be {kinds}")
    if return_type not in LOSSES:
        if labels is not None:
            raise ValueError(f"labels are for a loss, but return_type is {return_type!r}: ask for a loss")
        return
    if (source.ndim == 3 and labels is None) or stop_at_layer is not None or logits_at is not None:
        raise ValueError(
            f"return_type {return_type!r} needs tokens, or labels, and the whole model: leave stop_at_layer and "
            "logits_at out"
        )
    if source.shape[1] < 2:
        raise ValueError(f"return_type {return_type!r} needs at least two tokens; the input has {source.shape[1]}")
    if labels is not None:
        check_labels(labels, config.vocab_size)


def _check_embedding(
    config: Gemma3Config,
    segment_ids: Integers | None,
    positions: Integers | None,
    mask: Integers | None,
    stop_at_layer: int | None,
    logits_at: IntegersLike | None,
    past: Sequence[Past] | None,
) -> None:
    """Raise ValueError if the model has no embedding head, or the run does not have one whole text for each row."""
    embedding_head_of(config)
    if stop_at_layer is not None or logits_at is not None or past is not None:
        raise ValueError(
            "an embedding needs all layers at all tokens: leave stop_at_layer, logits_at and past out of the run"
        )
    if segment_ids is not None or (positions is not None and mask is None):
        raise ValueError(
            "an embedding is a mean over the tokens of its row, which must hold one text: leave segment_ids out, and "
            "give positions with an attention_mask"
        )


def embedding_head_of(config: Gemma3Config) -> EmbeddingHead:
    """The config's embedding head.

    Raises:
        ValueError: there is none.
    """
    if config.embedding_head is None:
        raise ValueError(
            "this model has no embedding head, so it has no embeddings of texts; load a checkpoint that has one, such "
            "as google/embeddinggemma-300m"
        )
    return config.embedding_head


def _check_one_token_each(kept: Mapping[str, Steps | None], logits_at: IntegersLike | None, extent: Extent) -> None:
    """Raise ValueError if several tokens of a row have a position that must have one token."""
    at = {name: step.positions for name, steps in kept.items() if steps for step in steps.steps if isinstance(step, At)}
    requested: dict[str, ArrayLike] = {f"reductions.At at {name}": wanted for name, wanted in at.items()}
    if logits_at is not None:
        requested["logits_at"] = logits_at
    if requested and extent.segment_ids is not None:
        raise ValueError(
            f"{next(iter(requested))} takes one token per position, but with segment_ids each document has one; "
            f"{BY_COLUMN}"
        )
    positions, mask = extent.positions, extent.attention_mask
    for wanted in requested.values():
        known = (wanted, positions, mask)
        if positions is not None and not any(isinstance(x, jax.core.Tracer) for x in known):
            places, real = jnp.asarray(positions), None if mask is None else jnp.asarray(mask)
            columns_at(jnp.asarray(wanted), places, real, packed_documents(None, places, real))


def _checked_logits_at(logits_at: IntegersLike | None, extent: Extent, stop_at_layer: int | None) -> jax.Array | None:
    """`logits_at` as an array, checked against the input; its range is checked if both are known."""
    if logits_at is None:
        return None
    # Given positions may have any values, so there is no range to check.
    b, p = extent.rows, None if extent.positions is not None else extent.columns
    known = not isinstance(logits_at, jax.core.Tracer)
    array = _on_host(logits_at)
    if stop_at_layer is not None:
        raise ValueError("logits_at cannot be used with stop_at_layer, which does not compute logits; leave one out")
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim > 2 or not array.size:
        raise ValueError(f"logits_at is {array.dtype} of shape {array.shape}; it must be integers [], [n] or [b, n]")
    if array.ndim == 2 and array.shape[0] != b:
        raise ValueError(f"logits_at has {array.shape[0]} rows; the input has {b}")
    if known and p is not None and (array.min() < -p or array.max() >= p):
        raise ValueError(f"logits_at goes from {array.min()} to {array.max()}; the input has {p} positions")
    return jnp.array(as_int32("logits_at", array))
