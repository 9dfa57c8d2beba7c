"""Gemma 3 as Linen modules with the names of TransformerLens' adapter.

Axes: b batch, p position, d hidden_size, f intermediate_size, h query heads, g key/value heads, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Integer, Shaped

from gemma3_jax.compute.masks import Mask, MaskChoice
from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.hooks.interception import HookPoint
from gemma3_jax.inputs import one_input
from gemma3_jax.model.attention import Attention
from gemma3_jax.model.blocks import run_blocks
from gemma3_jax.model.embedding import embedding_of
from gemma3_jax.model.layers import Embed, Linear, RMSNorm, Unembed
from gemma3_jax.model.masks import mask_of
from gemma3_jax.model.past import Past, positions_after
from gemma3_jax.model.per_head_inputs import head_changes
from gemma3_jax.model.rope import Tables, rope_tables
from gemma3_jax.model.watched import Watched
from gemma3_jax.positions import default_positions, packed_documents, rows_at
from gemma3_jax.types import Integers


class GatedMLP(nn.Module):
    """`out(gelu_tanh(gate(x)) * in(x))` (`Gemma3MLP`)."""

    config: Gemma3Config

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        d, f = self.config.hidden_size, self.config.intermediate_size
        # [b, p, d] -> [b, p, f]
        gate = Linear((d, f), name="gate")(x)
        up = Linear((d, f), name="in")(x)
        # [b, p, f] -> [b, p, d]
        return Linear((f, d), name="out")(jax.nn.gelu(gate, approximate=True) * up)


class Block(Watched):
    """One decoder layer (`Gemma3DecoderLayer`): attention and MLP, each between two norms, added to the residual."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p d"], tables: Tables, mask: Mask | MaskChoice, past: Past | None = None
    ) -> Float[Array, "b p d"]:
        c = self.config
        ln1 = RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln1")
        attn_out = Attention(c, self.watched, self.edited, name="attn")(
            ln1(x), tables, mask, head_changes(self, x, ln1), past
        )
        x = x + RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln1_post")(attn_out)
        x = HookPoint(name="hook_resid_mid")(x)
        mlp_out = GatedMLP(c, name="mlp")(RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln2")(x))
        return x + RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln2_post")(mlp_out)


class Gemma3(Watched):
    """The model, from tokens to logits: `Gemma3(config).apply({"params": params}, tokens)`.

    Attributes:
        config: the model's shape.
        watched: canonical names of sites that an interceptor captures or edits. `forward` sets it. Your own interceptor
            needs it only for sites that are computed on demand:

            - `hook_result`, `hook_attn_in` and `hook_{q,k,v}_input`: computed only if watched,
            - `hook_attn_scores` and `hook_pattern`: from 512 tokens on, or with `past`, seen by an interceptor only if
              watched.
        edited: the names in `watched` that are edited.
        scan_layers: scan over the layers, so that compile time does not grow with depth. The parameters must have the
            layout of `gemma3_jax.stack_layers`. For layers that share a scan, your own interceptor sees one module
            `block` in a `Body`, whose calls it must pass through. A layer that runs alone has its own name. Values that
            the interceptor sows are stacked under the names of the layers, `blocks_0_to_25`; only the collection
            `captures`, which `forward` uses, cannot be sown. Blocks do not see other collections passed to `apply`,
            and Flax's `capture_intermediates` does not reach into them.
        remat: a backward pass keeps only the residual stream that enters each block, and computes the rest again.
    """

    watched: frozenset[str] = frozenset()
    edited: frozenset[str] = frozenset()
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Integer[Integers, "b p"] | Float[Array, "b p d"] | None = None,
        *,
        attention_mask: Shaped[Array, "b p"] | None = None,
        positions: Integer[Array, "b p"] | None = None,
        segment_ids: Integer[Array, "b p"] | None = None,
        inputs_embeds: Float[Array, "b p d"] | None = None,
        start_at_layer: int | Integer[Array, ""] | None = None,
        stop_at_layer: int | None = None,
        logits_at: Integer[Array, "*n"] | None = None,
        past: Sequence[Past] | None = None,
        to_embedding: bool = False,
        present: Bool[Array, "1 p"] | None = None,
    ) -> Float32[Array, "b _ V"] | Float[Array, "b p d"] | Float32[Array, "b _"]:
        """Run the model.

        Args:
            tokens: [b, p] integer token ids.
            attention_mask: [b, p], 1 at real tokens and 0 at padding.
            positions: [b, p] integer positions for the rotary embedding; by default `default_positions`. Without a
                mask, segment ids or a past, a document begins where they do not increase by 1.
            segment_ids: [b, p] integers: each run of equal ids in a row is a separate document.
            inputs_embeds: [b, p, d] floating-point embeddings in place of `tokens`, already scaled.
            start_at_layer: skip the blocks before this one: `inputs_embeds` is the residual stream entering it.
                Negative counts from the end. A traced number skips them at run time, with one compilation for all
                layers.
            stop_at_layer: run only the blocks before this one. Negative counts from the end.
            logits_at: [], [n] or [b, n], the only positions with logits; negative ones count from each row's last real
                token. A position that a row does not have, or has several times, gives NaN.
            past: KV cache of each layer, whose text the tokens continue; the default positions are those after it.
            to_embedding: return the embedding of each row, from the config's `embedding_head`, in place of logits.
            present: [1, p], false in masked columns at the end that only fill the input up to a common length. The
                values of all other columns, padding too, are then the same as without those columns.

        Returns:
            Logits [b, p, V] float32, [b, n, V] with `logits_at`; with `stop_at_layer`, the residual stream [b, p, d]
            entering that layer; with `to_embedding`, the embedding [b, n] float32.

        Raises:
            TypeError: `config` is not a `Gemma3Config`.
            ValueError: both or neither of `tokens` and `inputs_embeds` are given; a parameter does not have the shape
                that the config requires; `segment_ids` come with `past`; or the model has only its first layers, and
                logits are asked for.
        """
        c = self.config
        check_config(c)
        embed = Embed((c.vocab_size, c.hidden_size), name="embed")
        source = cast(jax.Array, one_input(tokens, inputs_embeds))
        # [b, p] or [b, p, d] -> [b, p, d]
        x = embed(source) if start_at_layer is None else jnp.asarray(source, embed.weight.dtype)
        length = x.shape[1]
        segment_ids = packed_documents(segment_ids, positions, attention_mask, past)
        if positions is None and past is not None:
            positions = positions_after(past[0].length, past[0].start, length)
        elif positions is None:
            positions = default_positions(x.shape[:2], attention_mask, segment_ids)
        kinds = sorted(set(c.layer_types))
        tables = {kind: rope_tables(c.rope(kind), positions, c.head_dim) for kind in kinds}
        masks = {kind: mask_of(c, kind, length, attention_mask, segment_ids, present) for kind in kinds}
        blocks = functools.partial(run_blocks, self, self.scan_layers, self.remat, Block)
        x = blocks(x, (tables, masks), start_at_layer, stop_at_layer, past)
        if stop_at_layer is not None:
            return x
        c.check_logits()
        x = RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln_final")(x)
        if c.embedding_head is not None and (to_embedding or self.is_initializing()):
            embedding = embedding_of(c.embedding_head, x, attention_mask)
            if to_embedding:
                return embedding
        if logits_at is not None:
            x = rows_at(x, logits_at, positions, attention_mask, segment_ids)
        unembed = Unembed((c.hidden_size, c.vocab_size), name="unembed")
        # [b, p, d] -> [b, p, V]
        logits = unembed(x, embed.weight) if c.tie_word_embeddings else unembed(x)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
