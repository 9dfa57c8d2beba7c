"""The pure entry point: from parameters and tokens to logits and captured activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks.interception import CAPTURES, Phase, Tokens, captured, interceptor
from gemma3_jax.meshes import by_rows, check_auto, constrained, cut_residual
from gemma3_jax.model.layout import check_layout, check_model, is_stacked
from gemma3_jax.model.past import Past, positions_after
from gemma3_jax.model.transformer import Gemma3
from gemma3_jax.positions import columns_at, default_positions, packed_documents
from gemma3_jax.run.loss import mean_loss, next_token_loss
from gemma3_jax.run.pieces import positions_of_piece, token_losses
from gemma3_jax.run.request import Output, Request, check_phases, new_request, warn_of_constants, warn_of_padding
from gemma3_jax.run.selection import LOSSES, Edits, OneArray, ReducedCapture, ReturnType, runs
from gemma3_jax.sites.names import layer_of
from gemma3_jax.types import IntegersLike, Params, PyTree

__all__ = ["forward", "next_token_loss", "run"]


class Options(TypedDict, total=False):
    """The other options of `forward`; see there."""

    positions: jax.Array | None
    segment_ids: jax.Array | None
    labels: jax.Array | None
    inputs_embeds: jax.Array | None
    start_at_layer: int | jax.Array | None
    stop_at_layer: int | None
    logits_at: IntegersLike | None
    past: Sequence[Past] | None
    phase: Phase
    remat: bool


@overload
def forward(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array | None = ...,
    capture: ReducedCapture = ...,
    edits: Edits | None = ...,
    attention_mask: jax.Array | None = ...,
    *,
    return_type: OneArray = ...,
    **options: Unpack[Options],
) -> tuple[jax.Array, ActivationCache]: ...
@overload
def forward(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array | None = ...,
    capture: ReducedCapture = ...,
    edits: Edits | None = ...,
    attention_mask: jax.Array | None = ...,
    *,
    return_type: Literal["both"],
    **options: Unpack[Options],
) -> tuple[tuple[jax.Array, jax.Array], ActivationCache]: ...
@overload
def forward(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array | None = ...,
    capture: ReducedCapture = ...,
    edits: Edits | None = ...,
    attention_mask: jax.Array | None = ...,
    *,
    return_type: None,
    **options: Unpack[Options],
) -> tuple[None, ActivationCache]: ...
@overload
def forward(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array | None = ...,
    capture: ReducedCapture = ...,
    edits: Edits | None = ...,
    attention_mask: jax.Array | None = ...,
    *,
    return_type: ReturnType,
    **options: Unpack[Options],
) -> tuple[Output, ActivationCache]: ...
def forward(
    config: Gemma3Config,
    params: Params,
    tokens: jax.Array | None = None,
    capture: ReducedCapture = (),
    edits: Edits | None = None,
    attention_mask: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    labels: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    logits_at: IntegersLike | None = None,
    past: Sequence[Past] | None = None,
    phase: Phase = "prompt",
    return_type: ReturnType = "logits",
    remat: bool = False,
) -> tuple[Output, ActivationCache]:
    """Run the model, and capture and edit activations. Pure: use it in `jit`, `vmap` and `grad`.

    `config`, the names in `capture`, `stop_at_layer` and `return_type` are static: under `jax.jit` close over them or
    name them in `static_argnames`. Everything else may be traced. Blocks that neither the result nor a capture needs do
    not run.

    Several documents may share a row: number them in `segment_ids`. Documents then do not attend to each other in any
    layer, the positions of each start from 0, and every value equals that of a run of the document alone. Restarting
    positions have the same meaning, as in Hugging Face's forward pass with `use_cache=False`.

    By default, a token's position is its column, counted from its row's first real token. This is the convention of
    Hugging Face's forward pass, which numbers the columns: padding between real tokens counts. (Hugging Face counts
    padding in front as well, which only shifts a row; rotary embeddings are relative.) Hugging Face's `generate` has
    another convention and counts the real tokens. For that convention, pass `positions` with the mask.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; or as `stack_layers` returns it, to
            scan over layers, with the same results from a smaller program.
        tokens: [b, p] integer ids below `config.vocab_size`.
        capture: sites to return: a name, several names, globs (`blocks.*.hook_out`), or a predicate on names. A
            mapping from names or globs to functions `function(value, hook) -> arrays` (several in a list run in order;
            None keeps the value) returns the results of the functions; the value itself does not leave the compiled
            program: see `gemma3_jax.reductions`. Their arrays are traced if the mapping is an argument of the jitted
            function.
        edits: for each name or glob, an edit, or several edits to apply in order; or (name, edit) pairs, or one pair.
            An edit is `edit(value, hook) -> value`: a function, a `jax.tree_util.Partial` or a `flax.struct.dataclass`
            with `__call__`. `hook` is a `gemma3_jax.Hook`. Captures are taken after the edits of the same site. Under a
            Hugging Face path the edit sees the value in Hugging Face's layout. Your own functions are plain JAX here,
            where an index out of range reads the nearest entry or drops the update; `HookedGemma3` raises an error.
        attention_mask: [b, p], 1 at real tokens and 0 at padding, to which no token attends. None runs padding as text,
            as in Hugging Face, and a log message names the row.
        positions: [b, p] integer positions for the rotary embedding, by default as above. Without `attention_mask`,
            `segment_ids` and `past`, a new document begins where a position is not the previous position plus 1, as in
            `transformers.masking_utils.find_packed_sequence_indices`. For positions of one text that do not increase
            by 1, such as stretched ones, also pass an `attention_mask` of ones.
        segment_ids: [b, p] integers: each run of equal ids in a row is a separate document. Not with `past`.
        labels: [b, p] the tokens that a loss predicts, by default `tokens`; the loss of a label -100 does not count.
        inputs_embeds: [b, p, d] embeddings in place of `tokens`, already scaled by sqrt(d), as in Hugging Face.
        start_at_layer: use `inputs_embeds` as the residual stream entering this block, and skip the blocks before it.
            Negative counts from the end. It may be traced, with one compilation for all layers; sites of blocks cannot
            be captured then.
        stop_at_layer: run only the blocks before this one and return the residual stream [b, p, d] entering it.
            Negative counts from the end.
        logits_at: compute logits only at these positions, [], [n] or [b, n]. They count from each row's first real
            token, and -1 is its last. The unembedding is about half of a small model's forward pass. Not with
            `segment_ids`. A position that several tokens of a row have is an error, or gives NaN if it is traced.
        past: the KV cache of the text that the tokens continue; see `gemma3_jax.generation.kv_cache`. The default
            positions are then those after that text.
        phase: passed to the edits.
        return_type: "logits", "loss" (mean next-token cross-entropy, in nats, over pairs of real tokens of the same
            document), "loss_per_row" (the mean of each row; NaN where no pair counts), "both" (logits and "loss"),
            None, or "embedding": the output of the config's `embedding_head`, in a run that has the sites of this head
            and not those of the unembedding. Its mean is over the tokens that `attention_mask` marks. The tokens must
            be those of `HookedGemma3.embed`, with BOS and EOS.
            A "loss" or "loss_per_row" whose logits would take more than 512 MiB makes them in pieces, unless a capture
            or an edit needs them.
        remat: for gradients of long or large batches. The backward pass keeps only the residual stream that enters each
            block, and runs each block again. The result is the same. XLA:CPU undoes this unless layers are scanned.

    Returns:
        The result of `return_type`: logits [b, p, V] float32 ([b, n, V] with `logits_at`), loss [] or
        [b] float32, (logits, loss), embedding [b, n] float32, or None; and the captured values, indexed by any name of
        their site.

    Raises:
        UnknownSite: a name in `capture` or `edits` is not a site.
        ValueError: arguments do not match, this call never runs a site, or a mesh has Explicit axes.
        TypeError: an edit or a reduction is not callable.

    >>> import jax
    >>> from gemma3_jax import Gemma3, Gemma3Config, forward
    >>> config = Gemma3Config(
    ...     vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=1, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)
    >>> tokens = jax.numpy.arange(6)[None]
    >>> params = Gemma3(config).init(jax.random.key(0), tokens)["params"]
    >>> logits, cache = forward(config, params, tokens, capture="blocks.*.hook_resid_post")
    >>> logits.shape, list(cache)
    ((1, 6, 16), ['blocks.0.hook_out', 'blocks.1.hook_out'])
    """
    request = new_request(
        config,
        tokens,
        capture,
        edits,
        attention_mask,
        positions=positions,
        segment_ids=segment_ids,
        labels=labels,
        inputs_embeds=inputs_embeds,
        start_at_layer=start_at_layer,
        stop_at_layer=stop_at_layer,
        logits_at=logits_at,
        past=past,
        phase=phase,
        return_type=return_type,
        remat=remat,
    )
    check_phases(request)
    warn_of_padding(request)
    warn_of_constants(params)
    return run(params, request)


def run(params: Params, request: Request) -> tuple[PyTree, ActivationCache]:
    """Run a request and return the results of `forward`. Pure."""
    piece = positions_of_piece(request)
    return _run(params, request) if piece is None else _loss_in_pieces(params, request, piece)


def _loss_in_pieces(params: Params, request: Request, piece: int) -> tuple[jax.Array, ActivationCache]:
    losses, cache = token_losses(_run, params, request, piece)
    mask, _, documents = _tokens_of(request)
    labels = jnp.asarray(request.source if request.labels is None else request.labels)
    per_row = request.return_type == "loss_per_row"
    return mean_loss(losses, labels, request.config.vocab_size, mask, documents, per_row=per_row), cache


def _tokens_of(request: Request) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """The attention mask, the positions and the documents of a request, each [b, p] or None."""
    mask, positions, segment_ids = (
        None if x is None else constrained(jnp.asarray(x), "b p")
        for x in (request.attention_mask, request.positions, request.segment_ids)
    )
    return mask, positions, packed_documents(segment_ids, positions, mask, request.past)


def _run(params: Params, request: Request) -> tuple[PyTree, ActivationCache]:
    """The same, with all logits of a loss in memory."""
    config, source = request.config, constrained(jnp.asarray(request.source), "b p" if request.has_tokens else "b p d")
    mask, positions, documents = _tokens_of(request)
    check_model(config, params)
    if "embed" not in params:
        raise ValueError("params do not have 'embed'; pass the whole pytree that `convert_checkpoint` returns")
    check_layout(config, params)
    check_auto((params, source))
    stop = request.stop_at_layer
    if request.return_type is None and stop is None:
        stop = _layers_needed(config, request.names)
    if positions is None and request.past is not None:
        before = request.past[0]
        positions = positions_after(before.length, before.start, source.shape[1])
    known = default_positions(source.shape[:2], mask, documents) if positions is None else positions

    captures = dict(zip(request.names, request.reductions, strict=True))
    edited = frozenset(request.edits)
    model = Gemma3(config, edited | frozenset(captures), edited, is_stacked(params), request.remat)
    # The interceptor is entered here, inside the traced function: see `gemma3_jax.hooks.interception`.
    fields = {"attention_mask": mask, "segment_ids": documents, "phase": request.phase}
    fields |= {} if request.past is None else _keys_of(request.past[0], source)
    unembedded = None if request.logits_at is None else _chosen(request.logits_at, known, mask, documents)
    with nn.intercept_methods(interceptor(captures, request.edits, known, unembedded, **fields)):
        out, variables = model.apply(
            {"params": params},
            source,
            attention_mask=mask,
            positions=positions,
            segment_ids=documents,
            start_at_layer=request.start,
            stop_at_layer=stop,
            logits_at=request.logits_at,
            past=request.past,
            to_embedding=request.return_type == "embedding",
            present=None if request.present is None else jnp.asarray(request.present),
            mutable=[CAPTURES],
        )
    axes = "b p V" if stop is None else "b p d"
    axes = "b n" if request.return_type == "embedding" else axes
    out = cut_residual(constrained(out, axes), axes)
    values = captured(variables)
    reduced = {name: words for name, words in zip(request.names, request.reduced, strict=True) if words is not None}
    by_name = {
        name: jax.tree.map(lambda x: by_rows(x, source.shape[0]), values[name]) if name in reduced else values[name]
        for name in request.names
    }
    cache = ActivationCache(config, by_name, reduced=reduced, some_logits=request.logits_at is not None)
    cache = cache.with_inputs(source, mask) if request.has_tokens else cache
    if request.return_type in LOSSES:
        labels = source if request.labels is None else jnp.asarray(request.labels)
        loss = next_token_loss(out, labels, mask, documents, per_row=request.return_type == "loss_per_row")
        return ((out, loss) if request.return_type == "both" else loss), cache
    return (None if request.return_type is None else out), cache


def _keys_of(past: Past, source: jax.Array) -> dict[str, jax.Array]:
    """The fields of a `Hook` for keys by column: their positions, and which keys are real, each [b, c]."""
    columns = jnp.arange(past.capacity)[None]
    real = (columns >= past.start[:, None]) & (columns < past.length + source.shape[1])
    return {"key_positions": jnp.maximum(columns - past.start[:, None], 0), "key_mask": real.astype(jnp.int32)}


def _chosen(logits_at: jax.Array, positions: jax.Array, mask: jax.Array | None, documents: jax.Array | None) -> Tokens:
    """The fields of a `Hook` for the tokens of `logits_at` at the unembedding, each [b, n]."""
    columns, known = columns_at(logits_at, positions, mask, documents)
    fields: Tokens = {
        "positions": jnp.take_along_axis(positions, columns, axis=1),
        "attention_mask": known.astype(jnp.int32),
        "segment_ids": None,
    }
    if documents is None:
        return fields
    document = jnp.take_along_axis(documents, columns, axis=1)
    # [b, n, n]: renumbered by the first of the n tokens in each document
    return {**fields, "segment_ids": jnp.argmax(document[:, :, None] == document[:, None, :], axis=-1)}


def _layers_needed(config: Gemma3Config, names: Sequence[str]) -> int | None:
    """The number of blocks that these sites need; None if a site is after the last block."""
    if not all(runs(config, name, None, config.num_hidden_layers) for name in names):
        return None
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)
