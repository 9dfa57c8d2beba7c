"""The residual stream in terms of tokens: the logit lens, and direct logit attribution.

Axes: L sites (usually one per layer), b batch, p position, d hidden_size, V vocabulary, k likeliest tokens, n parts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.cache.residual import HEADS, RESIDUAL
from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description, fields_of
from gemma3_jax.hooked.buckets import longest
from gemma3_jax.hooked.cropping import shortened
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.requests import request_of
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.inputs import integer, positive, token_ids
from gemma3_jax.renamed import renamed
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.forward import forward, run
from gemma3_jax.run.pieces import in_pieces
from gemma3_jax.run.request import Request
from gemma3_jax.run.selection import Capture, captured_names
from gemma3_jax.sites.table import site
from gemma3_jax.types import IntegersLike, Params


@flax.struct.dataclass
class LogitLens(Described):
    """The most likely next tokens at every site and position, and how likely the targets are; a pytree.

    Attributes:
        names: canonical name of each of the L sites (static).
        tokens: [L, b, p, k] int32 ids, the most likely first; -1 where the logits are NaN or infinite.
        logits: [L, b, p, k] float32, after final_logit_softcapping if the model has it.
        log_probs: [L, b, p, k] float32, natural logarithms.
        target_log_probs: [L, b, p] float32, or None without targets.
        target_ranks: [L, b, p] int32, the number of tokens with a larger logit (0 is the most likely; -1 where the
            logits are NaN or infinite); or None.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    tokens: jax.Array
    logits: jax.Array
    log_probs: jax.Array
    target_log_probs: jax.Array | None = None
    target_ranks: jax.Array | None = None

    __repr__ = Described.__repr__  # dataclass would write one with every number

    def _description(self) -> Description:
        title = f"LogitLens of {len(self.names)} sites, {self.names[0]} to {self.names[-1]}; lens_table has its tokens"
        return Description(title, fields_of(self)[1:])


# The arrays of a `LogitLens`.
LensArrays: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]


@renamed(names="names_filter")
def logit_lens(
    model: HookedGemma3,
    input: Input,
    k: int = 5,
    *,
    names_filter: Capture = "blocks.*.hook_resid_post",
    targets: IntegersLike | None = None,
    chunk_size: int = 128,
    attention_mask: IntegersLike | None = None,
) -> LogitLens:
    """Read every layer's residual stream with the model's own head: final norm, unembedding, softcapping.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". The norm is computed for each value.

    Args:
        model: the model.
        input: text, texts, or token ids.
        k: the number of most likely tokens to return.
        names_filter: sites to read, as in `run_with_cache`; each must hold vectors of the residual stream, [b, p, d].
        targets: tokens whose probability and rank to return: a token id; an id for each position, [b, p], or [p] for
            one row; or a string that is one token.
        chunk_size: the number of positions, over all sites, to unembed at a time.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text. Results at padding are
            undefined.

    Memory: three copies of the values of the sites, [L, b, p, d] in the model's dtype; 8 * chunk_size * V bytes for
    the logits (V = 262144: 270 MB at the default), 12 under `grad`, which computes each chunk again; on a CPU in
    bfloat16 a transposed copy of the unembedding, two under `grad`; and the memory of the forward pass up to the last
    site. An array [L, b, p, V] never exists.

    Raises:
        ValueError: a site of another shape; `k` or `chunk_size` out of range; a target outside the vocabulary, or a
            string that is not one token.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import logit_lens
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> lens = logit_lens(model, "ba ke lo mu ba ke", k=1, targets="lo")
    >>> model.to_str_tokens(lens.tokens[:, 0, -1, 0])[-1], lens.target_ranks[:, 0, -1].tolist()[-1]
    ('lo', 0)
    """
    config = model.config
    sites = captured_names(config, names_filter)
    _check(config, sites, k, chunk_size)
    request = request_of(model, model.inputs(input, attention_mask), sites, return_type=None)
    if targets is not None:
        chosen = _token(model, targets)
        ids = token_ids(chosen if np.ndim(chosen) else jnp.atleast_1d(jnp.asarray(chosen)), config.vocab_size)
        if np.ndim(chosen) == 1 and np.size(chosen) > 1 and len(request.source) > 1:
            raise ValueError(
                f"targets have shape {np.shape(chosen)}, but the input has {len(request.source)} rows; give one id, or "
                f"an id for each row and position, {request.source.shape}"
            )
        targets = jnp.broadcast_to(ids, request.source.shape)
    wide, extra = longest(model.params, request)
    if targets is not None and extra:
        targets = np.pad(np.asarray(targets), ((0, 0), (0, extra)))
    arrays = run_compiled(_lens, model.params, wide, targets, k=k, chunk_size=chunk_size)
    return LogitLens(sites, *shortened(arrays, 2, request.source.shape[1]))


def lens_table(model: HookedGemma3, lens: LogitLens, row: int = 0) -> tuple[list[list[list[str]]], np.ndarray]:
    """The most likely tokens at each site and position of one batch row, for a picture or a table.

    Args:
        model: the model of the lens, for its tokenizer.
        lens: the result of `logit_lens`.
        row: index of the batch row.

    Returns:
        Strings [L][p][k], the most likely first, and their probabilities [L, p, k] float32. Where the logits are NaN or
        infinite, the strings are "NaN".

    Raises:
        ValueError: the lens does not have that row.
    """
    rows = lens.tokens.shape[1]
    if not -rows <= integer("row", row) < rows:
        raise ValueError(f"row is {row}; the lens has {rows} rows")
    tokens, log_probs = jax.device_get((lens.tokens[:, row], lens.log_probs[:, row]))
    spelled = [[["NaN"] * len(best) if best[0] < 0 else model.to_str_tokens(best) for best in site] for site in tokens]
    return spelled, np.exp(log_probs)  # type: ignore[return-value]


def direct_logit_attribution(
    model: HookedGemma3,
    input: Input,
    answer: IntegersLike,
    wrong: IntegersLike | None = None,
    *,
    by: Literal["component", "head"] = "component",
    pos_slice: int | slice | None = None,
    attention_mask: IntegersLike | None = None,
) -> tuple[jax.Array, list[str]]:
    """The contribution of each part of the model to the logit of an answer, on the direct path to the unembedding.

    The norms are frozen, each at the scale of this run, so the parts sum to the logit before final_logit_softcapping.
    For other decompositions, use `ActivationCache.logit_attrs`.

    Args:
        model: the model.
        input: text, texts, or token ids.
        answer: a token id; one for each row, [b], or for each row and position, [b, p]; or a string that is one token.
        wrong: another token, in the same forms: attribute the difference of the two logits.
        by: "component" has the embedding and every attention and MLP output as parts; "head" splits the attention
            outputs into heads.
        pos_slice: positions to attribute at; an int drops the axis.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text. Results at padding are
            undefined.

    Returns:
        Attributions [n, b, p] float32, and the n parts' labels: "embed", "3_attn_out", "L3H1", "3_mlp_out", ...; the
        last is "remainder", the rounding error.

    Memory: the captured values, 5 L b p d in the model's dtype, and twice the parts, 8 n b p d bytes for the positions
    of `pos_slice`; n is 2 L + 2 or (h + 1) L + 2.

    Raises:
        ValueError: an unknown `by`; a string that is not one token.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import direct_logit_attribution
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> parts, labels = direct_logit_attribution(model, "ba ke lo mu ba ke", "lo", "mu", pos_slice=-1)
    >>> parts.shape, labels[:3]
    ((10, 1), ['embed', '0_attn_out', '0_mlp_out'])
    """
    if by not in ("component", "head"):
        raise ValueError(f"by is {by!r}; it must be 'component' or 'head'")
    names = RESIDUAL if by == "component" else (*RESIDUAL, *HEADS)
    _, cache = model.run_with_cache(input, names, return_type=None, attention_mask=attention_mask)
    if by == "component":
        decompose = cache.decompose_resid
    else:
        decompose = functools.partial(cache.get_full_resid_decomposition, expand_neurons=False)
    stack, labels = decompose(pos_slice=pos_slice, return_labels=True, incl_remainder=True)
    return cache.logit_attrs(
        stack, _token(model, answer), None if wrong is None else _token(model, wrong), pos_slice
    ), labels


def readout(config: Gemma3Config, params: Params, residual: jax.Array) -> jax.Array:
    """The logits [b, p, V] float32 of a residual stream [b, p, d], by the model's final norm and unembedding.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        residual: [b, p, d], any value of the residual stream.

    Memory: 4 * b * p * V bytes; up to twice that with final_logit_softcapping.
    """
    # The readout of a residual stream does not depend on the layers after it.
    config = dataclasses.replace(config, allow_truncated_logits=True)
    logits, _ = forward(config, params, inputs_embeds=residual, start_at_layer=config.num_hidden_layers)
    return logits


def read_rows(
    config: Gemma3Config,
    params: Params,
    rows: jax.Array,
    targets: jax.Array | None,
    k: int,
    chunk_size: int,
) -> LensArrays:
    """The arrays of `LogitLens` for rows [r, d] of the residual stream and targets [r], `chunk_size` rows at a time."""

    @jax.checkpoint  # without it, the gradient would store the logits of every row
    def read(chunk: tuple[jax.Array, jax.Array | None]) -> LensArrays:
        rows, targets = chunk
        # [c, d] -> [c, V]
        logits = readout(config, params, rows[None])[0]
        best, ids = jax.lax.top_k(logits, k)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        known = jnp.isfinite(normalizer)  # else every order of the logits is arbitrary
        ids = jnp.where(known[:, None], ids, -1)
        if targets is None:
            return ids, best, best - normalizer[:, None], None, None
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        rank = jnp.where(known, jnp.sum(logits > target, axis=-1, dtype=jnp.int32), -1)
        return ids, best, best - normalizer[:, None], target[:, 0] - normalizer, rank

    arrays: LensArrays = in_pieces(read, (rows, targets), chunk_size)
    return arrays


def _lens(params: Params, request: Request, targets: jax.Array | None, *, k: int, chunk_size: int) -> LensArrays:
    _, cache = run(params, request)
    # [L, b, p, d]
    values = jnp.stack([cache[name] for name in request.names])
    shape = values.shape[:3]
    if targets is not None:
        # [b, p] -> [L * b * p]
        targets = jnp.broadcast_to(targets, shape).reshape(-1)
    read = read_rows(request.config, params, values.reshape(-1, values.shape[-1]), targets, k, chunk_size)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), read)


def _token(model: HookedGemma3, token: IntegersLike) -> IntegersLike:
    return model.to_single_token(token) if isinstance(token, str) else token


def check_k(config: Gemma3Config, k: int) -> None:
    """Raise an error if the vocabulary does not have k tokens."""
    if not 1 <= integer("k", k) <= config.vocab_size:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary's {config.vocab_size}")


def _check(config: Gemma3Config, sites: tuple[str, ...], k: int, chunk_size: int) -> None:
    if not sites:
        raise ValueError("names_filter does not match a site; the logit lens needs at least one")
    for name in sites:
        if site(name).axes != "b p d":
            raise ValueError(f"{name} is [{site(name).axes}]; the logit lens reads sites of shape [b p d]")
    check_k(config, k)
    positive("chunk_size", chunk_size)
