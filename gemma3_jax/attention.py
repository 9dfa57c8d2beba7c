"""Attention of one layer: which keys a query sees, and what it takes from them.

Axes: b batch, p query position, k key position, h query heads, g key/value heads, r = h / g, d hidden_size,
e head_dim; s slots of a cache, c columns of the whole text.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.hooks import HookPoint, site_of
from gemma3_jax.kernels import SHORT, Mask, OneOf, attend, mix, mixed, scores
from gemma3_jax.layers import HeadsIn, HeadsOut, RMSNorm, rotate


def visible(config: Gemma3Config, layer_type: LayerType, length: int, attention_mask: jax.Array | None) -> Mask:
    """Which keys a query sees in a layer of this type, among `length` columns.

    Distances are counted in the array, as in Hugging Face, so that padding on either side leaves real tokens the
    neighbours they have alone. `attention_mask` [b, k] is 1 at real tokens. Source: `transformers` `masking_utils`.
    """
    both_ways = config.use_bidirectional_attention
    before = length - 1
    if layer_type == "sliding_attention":
        before = min(before, config.sliding_window // 2 if both_ways else config.sliding_window - 1)
    return Mask(before, before if both_ways else 0, None if attention_mask is None else attention_mask.astype(bool))


def _mix_both(pattern: jax.Array, cached: jax.Array, v: jax.Array) -> jax.Array:
    """`mix` of pattern [b, h, p, s + p] with the values of a past [b, s, g, e] and new ones [b, p, g, e]."""
    s = cached.shape[1]
    return (mixed(pattern[..., :s], cached) + mixed(pattern[..., s:], v)).astype(v.dtype)


@flax.struct.dataclass
class Past:
    """What a layer's cache has of the columns before those that are run; see `gemma3_jax.generation.kv_cache`.

    Attributes:
        keys: [b, s, g, e], after RoPE.
        values: [b, s, g, e].
        seen: [b, p, s] bool, whether a query sees what a slot holds.
        held: [s] int32, the column whose key a slot holds; negative where it holds none.
        start: [b] int32, the column of each row's first real token.
        length: [] int32, the column of the first query.
        capacity: how many columns the text may have (static).
    """

    keys: jax.Array
    values: jax.Array
    seen: jax.Array
    held: jax.Array
    start: jax.Array
    length: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)


def by_column(hook: HookPoint, x: jax.Array, past: Past | None, fill: float) -> jax.Array:
    """Scores or a pattern through their hook, which sees keys by column, [b, h, p, c]; `x` has them by slot.

    x [b, h, p, s + p] has the slots of the past and then the p new columns. Columns that no slot holds are `fill`;
    where somebody edits, every column has a slot.
    """
    if past is None:
        return hook(x)
    s, p = past.held.shape[0], x.shape[2]
    columns = jnp.arange(past.capacity)
    # [c]: the place of each column, s + p where it has none
    place = jnp.where(past.held[columns % s] == columns, columns % s, s + p)
    new = columns - past.length
    place = jnp.where((new >= 0) & (new < p), s + new, place)
    shown = hook(jnp.take(_with_fill(x, fill), place, axis=-1))
    # [s + p]: the column of each place, c where it has none
    column = jnp.concatenate([jnp.where(past.held >= 0, past.held, past.capacity), past.length + jnp.arange(p)])
    return jnp.take(_with_fill(shown, fill), column, axis=-1)


def _with_fill(x: jax.Array, fill: float) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=fill)


class Attention(nn.Module):
    """Grouped-query attention with q and k norms and rotary embedding (`Gemma3Attention`).

    `watched` and `edited` name the sites that somebody captures or edits, and edits: scores, patterns and per-head
    results are computed only for those who look.
    """

    config: Gemma3Config
    watched: frozenset[str]
    edited: frozenset[str]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        mask: Mask | OneOf,
        head_changes: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        past: Past | None = None,
    ) -> jax.Array:
        """[b, p, d] -> [b, p, d]; `head_changes` [b, p, n, d] give q, k and v an input of its own for each head."""
        c = self.config
        q_in, k_in, v_in = (x, x, x) if head_changes is None else (_per_head(x, change) for change in head_changes)
        # [b, p, d] -> [b, p, n, e]
        q = HeadsIn((c.num_attention_heads, c.hidden_size, c.head_dim), c.attention_bias, name="q")(q_in)
        k = HeadsIn((c.num_key_value_heads, c.hidden_size, c.head_dim), c.attention_bias, name="k")(k_in)
        v = HeadsIn((c.num_key_value_heads, c.hidden_size, c.head_dim), c.attention_bias, name="v")(v_in)
        q = RMSNorm(c.head_dim, c.rms_norm_eps, name="q_norm")(q)
        k = RMSNorm(c.head_dim, c.rms_norm_eps, name="k_norm")(k)

        cos, sin = HookPoint(name="hook_cos")(tables[0]), HookPoint(name="hook_sin")(tables[1])
        q = HookPoint(name="hook_rot_q")(rotate(q, cos, sin))
        k = HookPoint(name="hook_rot_k")(rotate(k, cos, sin))

        shown = self.watched.intersection(site_of(self, name) for name in ("hook_attn_scores", "hook_pattern"))
        scale = c.query_pre_attn_scalar**-0.5
        # [b, p, h, e]
        if shown or past is not None or q.shape[1] < SHORT:
            # What is short has all its scores at once in any case, so that their hooks cost nothing.
            z = self._shown(q, k, v, scale, mask, past)
        else:
            z = attend(q, k, v, scale, mask)
        name = site_of(self, "hook_result")
        hook_result = HookPoint(name="hook_result") if name in self.watched else None
        o = HeadsOut((c.num_attention_heads, c.head_dim, c.hidden_size), c.attention_bias, name="o")
        # [b, p, h, e] -> [b, p, d]
        return o(z, hook_result, name in self.edited)

    def _shown(
        self, q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: Mask | OneOf, past: Past | None
    ) -> jax.Array:
        """[b, p, h, e]: attention whose scores and pattern pass through their hooks."""
        columns = jnp.arange(q.shape[1])
        # [b, h, p, k]
        pre = scores(q, k, scale, mask.seen(columns, columns))
        if past is not None:
            # [b, h, p, s + p]
            pre = jnp.concatenate([scores(q, past.keys, scale, past.seen), pre], axis=-1)
        lowest = float(jnp.finfo(jnp.float32).min)
        pre = self._hooked("hook_attn_scores", pre, past, lowest)
        if site_of(self, "hook_attn_scores") in self.edited:
            # An edit that scales takes masked scores to minus infinity, and a row of these to NaN.
            pre = jnp.maximum(pre, lowest)
        pattern = self._hooked("hook_pattern", jax.nn.softmax(pre, axis=-1), past, 0.0)
        return mix(pattern, v) if past is None else _mix_both(pattern, past.values, v)

    def _hooked(self, name: str, x: jax.Array, past: Past | None, fill: float) -> jax.Array:
        hook = HookPoint(name=name)
        # Without a past, keys stand by column as it is, and a hook that nobody watches costs nothing.
        watched = site_of(self, name) in self.watched
        return by_column(hook, x, past, fill) if past is None or watched else x


def _per_head(x: jax.Array, change: jax.Array) -> jax.Array:
    # [b, p, 1, d] + [b, p, n, d]: what reaches x reaches every head, an edit of one head's copy that head alone
    return (x[:, :, None].astype(jnp.float32) + change).astype(x.dtype)
