"""Gemma 3 as Linen modules that carry the names of TransformerLens' adapter.

Axes: b batch, p position, d hidden_size, f intermediate_size, h query heads, g key/value heads, V vocabulary.
"""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma3_jax.attention import Attention, Past, visible
from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks import HookPoint, site_of
from gemma3_jax.kernels import Mask, OneOf
from gemma3_jax.layers import Embed, Linear, RMSNorm, Unembed, rope_tables
from gemma3_jax.positions import at_positions, default_positions
from gemma3_jax.scan import from_layer, run_stacked


class GatedMLP(nn.Module):
    """`out(gelu_tanh(gate(x)) * in(x))` (`Gemma3MLP`)."""

    config: Gemma3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        # [b, p, d] -> [b, p, f]
        gate = Linear((d, f), name="gate")(x)
        up = Linear((d, f), name="in")(x)
        # [b, p, f] -> [b, p, d]
        return Linear((f, d), name="out")(jax.nn.gelu(gate, approximate=True) * up)


class Block(nn.Module):
    """One decoder layer (`Gemma3DecoderLayer`): attention and MLP, each between two norms, added to the residual."""

    config: Gemma3Config
    watched: frozenset[str]
    edited: frozenset[str]

    @nn.compact
    def __call__(
        self, x: jax.Array, tables: tuple[jax.Array, jax.Array], mask: Mask | OneOf, past: Past | None = None
    ) -> jax.Array:
        c = self.config
        ln1 = RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln1")
        attn_out = Attention(c, self.watched, self.edited, name="attn")(
            ln1(x), tables, mask, self._head_changes(x, ln1), past
        )
        x = x + RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln1_post")(attn_out)
        x = HookPoint(name="hook_resid_mid")(x)
        mlp_out = GatedMLP(c, name="mlp")(RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln2")(x))
        return x + RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln2_post")(mlp_out)

    def _head_changes(self, x: jax.Array, ln1: RMSNorm) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """By how much edits of hook_attn_in and hook_{q,k,v}_input move the normed input of every head of q, k and v.

        Each edits a copy of the residual per head. None when nobody edits them, which leaves attention its one shared
        input. When hook_attn_in is edited, each query head has keys and values of its own, so k and v take h copies
        in place of g.
        """
        hooks = {name: site_of(self, name) for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")}
        if not self.watched.intersection(hooks.values()):
            return None
        h, g = self.config.num_attention_heads, self.config.num_key_value_heads
        shared = _copies(x, h)
        if hooks["hook_attn_in"] in self.watched:
            shared = HookPoint(name="hook_attn_in")(shared)
        own_keys = hooks["hook_attn_in"] in self.edited
        # One array for sites that hold the same copies, so that they leave a compiled function once.
        grouped = shared if own_keys or g == h else _copies(x, g)

        def change(name: str, copies: jax.Array) -> jax.Array:
            # [b, p, n, d]
            if hooks[name] in self.watched:
                copies = HookPoint(name=name)(copies)
            # Each rounded as ln1's output is, so that an edited copy replaces it without a remainder.
            return ln1.unhooked(copies).astype(jnp.float32) - ln1.unhooked(x)[:, :, None].astype(jnp.float32)

        changes = change("hook_q_input", shared), change("hook_k_input", grouped), change("hook_v_input", grouped)
        return changes if self.edited.intersection(hooks.values()) else None


def _copies(x: jax.Array, n: int) -> jax.Array:
    # [b, p, d] -> [b, p, n, d]
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], n, x.shape[2]))


class Gemma3(nn.Module):
    """Tokens to logits. `Gemma3(config).apply({"params": params}, tokens)` is all that it needs.

    Attributes:
        config: the model's shape.
        watched: canonical names of sites that an interceptor captures or edits. Five sites of a block are computed
            only when they are in it, `hook_result`, `hook_attn_in` and `hook_{q,k,v}_input`, and from 512 tokens on
            two more, `hook_attn_scores` and `hook_pattern`. `forward` fills it in; an interceptor of your own needs it
            for these, and for no other.
        edited: those of them that are edited.
        scan_layers: scan over the layers, which compiles a deep model as fast as a shallow one: the parameters are in
            the layout of `gemma3_jax.stack_layers`. An interceptor of your own then sees, for layers that share a scan,
            one module `block`, in a `Body` whose calls it should leave alone; a layer that is run alone has its own
            name. What it sows is found under the names of such layers, `blocks_0_to_25`, stacked; only `captures`, the
            collection of `forward`, cannot hold it. Blocks see no other collection that `apply` is given, and Flax's
            `capture_intermediates` does not reach into them.
    """

    config: Gemma3Config
    watched: frozenset[str] = frozenset()
    edited: frozenset[str] = frozenset()
    scan_layers: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        start_at_layer: int | jax.Array | None = None,
        stop_at_layer: int | None = None,
        logits_at: jax.Array | None = None,
        past: Sequence[Past] | None = None,
    ) -> jax.Array:
        """Run the model.

        Args:
            tokens: [b, p] integer token ids.
            attention_mask: [b, p], 1 at real tokens and 0 at padding, on either side.
            positions: [b, p] integer positions for the rotary embedding; by default `default_positions`.
            inputs_embeds: [b, p, d] floating-point embeddings in place of `tokens`, scaled already.
            start_at_layer: skip the blocks before this one: `inputs_embeds` is the residual stream entering it.
                Negative counts from the end. A traced number skips them while the model runs, with one compilation for
                every layer.
            stop_at_layer: run only the blocks before this one.
            logits_at: [], [n] or [b, n] positions at which to compute logits, and nowhere else; negative ones count
                from each row's last real token. One that a row does not have gives NaN.
            past: for each layer what the tokens see of a cache, whose text they continue; `positions` belong to it.

        Returns:
            Logits [b, p, V] float32, [b, n, V] with `logits_at`; with `stop_at_layer`, the residual stream [b, p, d]
            entering that layer.
        """
        c = self.config
        embed = Embed((c.vocab_size, c.hidden_size), name="embed")
        # [b, p] -> [b, p, d]
        x = one_input(tokens, inputs_embeds)
        x = embed(x) if start_at_layer is None else x.astype(embed.weight.dtype)
        length = x.shape[1]
        if positions is None:
            positions = default_positions(x.shape[:2], attention_mask)
        kinds = sorted(set(c.layer_types))
        tables = {kind: rope_tables(c.rope(kind), positions, c.head_dim) for kind in kinds}
        masks = {kind: visible(c, kind, length, attention_mask) for kind in kinds}
        start_at_layer = layer_from_front(start_at_layer, c.num_hidden_layers)
        block_of = functools.partial(Block, c)
        if self.scan_layers:
            x = run_stacked(self, block_of, x, (tables, masks), start_at_layer, stop_at_layer, past)
        else:
            for i, kind in enumerate(c.layer_types[:stop_at_layer]):
                beside = tables[kind], masks[kind], None if past is None else past[i]
                x = from_layer(start_at_layer, i, block_of(self.watched, self.edited, name=f"blocks_{i}"), x, *beside)
        if stop_at_layer is not None:
            return x
        x = RMSNorm(c.hidden_size, c.rms_norm_eps, name="ln_final")(x)
        if logits_at is not None:
            x = _rows_at(x, at_positions(logits_at, positions, attention_mask))
        unembed = Unembed((c.hidden_size, c.vocab_size), name="unembed")
        # [b, p, d] -> [b, p, V]
        logits = unembed(x, embed.weight) if c.tie_word_embeddings else unembed(x)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def layer_from_front(layer: int | jax.Array | None, layers: int) -> int | jax.Array | None:
    """A layer counted from the front; an `int` where it is known, whatever integer it was given as."""
    if layer is None:
        return None
    if isinstance(layer, jax.core.Tracer):
        return jnp.where(layer < 0, layer + layers, layer)
    known = operator.index(layer)
    return known + layers if known < 0 else known


def one_input(tokens: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
    """The one of the two that is given."""
    source = tokens if inputs_embeds is None else inputs_embeds
    if source is None or (tokens is not None and inputs_embeds is not None):
        raise ValueError("give tokens or inputs_embeds: exactly one of them")
    return source


def _rows_at(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """[b, n, d]: the rows of x [b, p, d] that are chosen [b, n, p], NaN where none is."""
    # [b, n, 1]
    index = jnp.argmax(chosen, axis=-1)[..., None]
    found = jnp.any(chosen, axis=-1)[..., None]
    return jnp.where(found, jnp.take_along_axis(x, index, axis=1), jnp.nan)
