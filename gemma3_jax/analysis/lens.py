"""What the residual stream says in terms of tokens: the logit lens, and direct logit attribution.

Axes: L sites (usually one a layer), b batch, p position, d hidden_size, V vocabulary, k the best few of it, n parts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.decomposition import HEADS, RESIDUAL
from gemma3_jax.forward import Capture, captured_names, forward
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.sites import site
from gemma3_jax.text import Input


@flax.struct.dataclass
class LogitLens:
    """The most likely next tokens at every site and position, and how likely the targets are; a pytree.

    Attributes:
        names: canonical name of each of the L sites (static).
        tokens: [L, b, p, k] int32 ids, the most likely first.
        logits: [L, b, p, k] float32, after final_logit_softcapping where the model has it.
        log_probs: [L, b, p, k] float32, natural logarithms.
        target_log_probs: [L, b, p] float32, or None without targets.
        target_ranks: [L, b, p] int32, how many tokens have a larger logit (0 is the most likely); or None.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    tokens: jax.Array
    logits: jax.Array
    log_probs: jax.Array
    target_log_probs: jax.Array | None = None
    target_ranks: jax.Array | None = None


def logit_lens(
    model: HookedGemma3,
    input: Input,
    k: int = 5,
    *,
    names: Capture = "blocks.*.hook_resid_post",
    targets: Any = None,
    chunk_size: int = 128,
    attention_mask: Any = None,
) -> LogitLens:
    """Read every layer's residual stream with the model's own head: final norm, unembedding, softcapping.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". The norm is computed anew on each value.

    Args:
        model: the model.
        input: text, texts, or token ids.
        k: how many of the most likely tokens to return.
        names: sites to read, as in `run_with_cache`; each must hold vectors of the residual stream, [b, p, d].
        targets: whose probability and rank to return: a token id; one for each token, [b, p]; or a string that is one
            token.
        chunk_size: how many positions of all sites to unembed at a time.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text. What is returned at padding
            means nothing.

    Memory: three copies of the values that are read, [L, b, p, d] in the model's dtype; 8 * chunk_size * V bytes for
    the logits (V = 262144: 270 MB at the default), 12 under `grad`, which computes each chunk anew; on a CPU in
    bfloat16 a transposed copy of the unembedding, two under `grad`; and what the forward pass takes up to the last
    site. No [L, b, p, V] exists.

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
    tokens, mask = model.encode(input, attention_mask)
    sites = captured_names(config, names)
    _check(config, sites, k, chunk_size)
    if targets is not None:
        targets = jnp.broadcast_to(model.encode(jnp.atleast_1d(_token(model, targets)))[0], tokens.shape)
    read = _lens(config, model.params, tokens, mask, targets, sites=sites, k=k, chunk_size=chunk_size)
    return LogitLens(sites, *read)


def lens_table(model: HookedGemma3, lens: LogitLens, row: int = 0) -> tuple[list[list[list[str]]], np.ndarray]:
    """The most likely tokens at each site and position of one batch row, for a picture or a table.

    Args:
        model: the model that was read, for its tokenizer.
        lens: what `logit_lens` returned.
        row: which row of the batch.

    Returns:
        Strings [L][p][k], the most likely first, and their probabilities [L, p, k] float32.
    """
    tokens, log_probs = jax.device_get((lens.tokens[:, row], lens.log_probs[:, row]))
    return [[model.to_str_tokens(best) for best in site] for site in tokens], np.exp(log_probs)  # type: ignore[misc]


def direct_logit_attribution(
    model: HookedGemma3,
    input: Input,
    answer: Any,
    wrong: Any = None,
    *,
    by: Literal["component", "head"] = "component",
    pos_slice: int | slice | None = None,
    attention_mask: Any = None,
) -> tuple[jax.Array, list[str]]:
    """What each part of the model adds to the logit of an answer, on the direct path to the unembedding.

    The norms are frozen, each at the scale of this run, so that the parts sum to the logit, before
    final_logit_softcapping. `ActivationCache.logit_attrs` does it, and takes other decompositions.

    Args:
        model: the model.
        input: text, texts, or token ids.
        answer: a token id; one for each row, [b], or for each row and position, [b, p]; or a string that is one token.
        wrong: another, likewise: attribute the difference of the two logits.
        by: "component", the embedding and every attention and MLP output; "head" with each head by itself.
        pos_slice: positions at which to do so; an int drops the axis.
        attention_mask: [b, p], 1 at real tokens; made for you when the input is text. What is returned at padding
            means nothing.

    Returns:
        Attributions [n, b, p] float32, and the n parts' labels: "embed", "3_attn_out", "L3H1", "3_mlp_out", ...; the
        last is "remainder", what rounding adds.

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
        raise ValueError(f"by is {by!r}; it takes 'component' and 'head'")
    names = RESIDUAL if by == "component" else (*RESIDUAL, *HEADS)
    _, cache = model.run_with_cache(input, names, return_type=None, attention_mask=attention_mask)
    options: dict[str, Any] = {"pos_slice": pos_slice, "return_labels": True, "incl_remainder": True}
    if by == "component":
        stack, labels = cache.decompose_resid(**options)
    else:
        stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, **options)
    return cache.logit_attrs(stack, _token(model, answer), _token(model, wrong), pos_slice), labels


def readout(config: Gemma3Config, params: Mapping[str, Any], residual: jax.Array) -> jax.Array:
    """Logits [b, p, V] float32 that the model's head gives a residual stream [b, p, d].

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        residual: [b, p, d], any value of the residual stream.

    Memory: 4 * b * p * V bytes, at most twice with final_logit_softcapping.
    """
    logits, _ = forward(config, params, inputs_embeds=residual, start_at_layer=config.num_hidden_layers)
    return logits


def read_rows(
    config: Gemma3Config,
    params: Mapping[str, Any],
    rows: jax.Array,
    targets: jax.Array | None,
    k: int,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The arrays of `LogitLens` for rows [r, d] of the residual stream and targets [r], `chunk_size` rows at a time."""

    @jax.checkpoint  # the gradient would keep the logits of every row
    def read(chunk):
        rows, targets = chunk
        # [c, d] -> [c, V]
        logits = readout(config, params, rows[None])[0]
        best, ids = jax.lax.top_k(logits, k)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        if targets is None:
            return ids, best, best - normalizer[:, None], None, None
        target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
        rank = jnp.sum(logits > target, axis=-1, dtype=jnp.int32)
        return ids, best, best - normalizer[:, None], target[:, 0] - normalizer, rank

    return in_chunks(read, (rows, targets), chunk_size)


def in_chunks(function: Callable[[Any], Any], arrays: Any, chunk_size: int) -> Any:
    """What `function` makes of arrays [r, ...], so many rows at a time; the last chunk is filled up with zeros.

    In place of `vmap`, which would show the products of the head one row at a time.
    """
    count = jax.tree.leaves(arrays)[0].shape[0]
    c = min(chunk_size, count)

    def chunked(x: jax.Array) -> jax.Array:
        # [r, ...] -> [chunks, c, ...]
        return jnp.pad(x, [(0, -count % c)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, c, *x.shape[1:])

    # [chunks, c, ...] -> [r, ...]
    found = jax.lax.map(function, jax.tree.map(chunked, arrays))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


@functools.partial(jax.jit, static_argnames=("config", "sites", "k", "chunk_size"))
def _lens(config, params, tokens, attention_mask, targets, *, sites, k, chunk_size):
    _, cache = forward(config, params, tokens, sites, attention_mask=attention_mask, return_type=None)
    # [L, b, p, d]
    values = jnp.stack([cache[name] for name in sites])
    shape = values.shape[:3]
    if targets is not None:
        # [b, p] -> [L * b * p]
        targets = jnp.broadcast_to(targets, shape).reshape(-1)
    read = read_rows(config, params, values.reshape(-1, values.shape[-1]), targets, k, chunk_size)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), read)


def _token(model: HookedGemma3, token: Any) -> Any:
    return model.to_single_token(token) if isinstance(token, str) else token


def _check(config: Gemma3Config, sites: tuple[str, ...], k: int, chunk_size: int) -> None:
    if not sites:
        raise ValueError("names selects no site; the logit lens needs one at least")
    for name in sites:
        if site(name).axes != "b p d":
            raise ValueError(f"{name} is [{site(name).axes}]; the logit lens reads sites of shape [b p d]")
    if not 1 <= k <= config.vocab_size:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary's {config.vocab_size}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 1 at least")
