"""Attention of one layer: which keys a query sees, and what it takes from them.

Axes: b batch, p query position, k key position, h query heads, g key/value heads, r = h / g, d hidden_size,
e head_dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.hooks import HookPoint, site_of
from gemma3_jax.layers import HeadsIn, HeadsOut, RMSNorm, matmul, rotate


def visible(config: Gemma3Config, layer_type: LayerType, length: int, attention_mask: jax.Array | None) -> jax.Array:
    """[1 or b, p, k] bool: whether query p sees key k in a layer of this type.

    Distances are counted in the array, as in Hugging Face, so that padding on either side leaves real tokens the
    neighbours they have alone. `attention_mask` [b, k] is 1 at real tokens. Source: `transformers` `masking_utils`.
    """
    # [p, k]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    sliding = layer_type == "sliding_attention"
    if config.use_bidirectional_attention:
        reach = config.sliding_window // 2 + 1
        seen = jnp.abs(distance) < reach if sliding else jnp.ones_like(distance, bool)
    else:
        seen = distance >= 0
        if sliding:
            seen &= distance < config.sliding_window
    if attention_mask is None:
        return seen[None]
    return seen[None] & attention_mask.astype(bool)[:, None, :]


def scores(q: jax.Array, k: jax.Array, scale: float, seen: jax.Array) -> jax.Array:
    """[b, h, p, k] float32: `q . k * scale`, and the lowest float32 where `seen` [1 or b, p, k] is false.

    q [b, p, h, e]; k [b, k, g, e], of which each serves h / g consecutive query heads.
    """
    b, p, h, e = q.shape
    # [b, p, g, r, e] x [b, k, g, e] -> [b, g, r, p, k]
    dots = matmul("bpgre,bkge->bgrpk", q.reshape(b, p, k.shape[2], -1, e), k, jnp.float32)
    # [b, h, p, k]
    return jnp.where(seen[:, None], dots.reshape(b, h, p, -1) * scale, jnp.finfo(jnp.float32).min)


def mix(pattern: jax.Array, v: jax.Array) -> jax.Array:
    """[b, p, h, e]: what each query takes from v [b, k, g, e] under pattern [b, h, p, k]."""
    b, h, p, k = pattern.shape
    # [b, g, r, p, k] x [b, k, g, e] -> [b, p, g, r, e]
    grouped = pattern.reshape(b, v.shape[2], -1, p, k).astype(v.dtype)
    return matmul("bgrpk,bkge->bpgre", grouped, v).reshape(b, p, h, -1)


class Attention(nn.Module):
    """Grouped-query attention with q and k norms and rotary embedding (`Gemma3Attention`).

    `watched` and `edited` name the sites that somebody captures or edits, and edits: per-head results are computed
    only for those who look.
    """

    config: Gemma3Config
    watched: frozenset[str]
    edited: frozenset[str]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tables: tuple[jax.Array, jax.Array],
        seen: jax.Array,
        head_changes: tuple[jax.Array, jax.Array, jax.Array] | None = None,
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

        # [b, h, p, k]
        pre = HookPoint(name="hook_attn_scores")(scores(q, k, c.query_pre_attn_scalar**-0.5, seen))
        pattern = HookPoint(name="hook_pattern")(jax.nn.softmax(pre, axis=-1))
        # [b, p, h, e] -> [b, p, d]
        z = mix(pattern, v)
        name = site_of(self, "hook_result")
        hook_result = HookPoint(name="hook_result") if name in self.watched else None
        o = HeadsOut((c.num_attention_heads, c.head_dim, c.hidden_size), c.attention_bias, name="o")
        return o(z, hook_result, name in self.edited)


def _per_head(x: jax.Array, change: jax.Array) -> jax.Array:
    # [b, p, 1, d] + [b, p, n, d]: what reaches x reaches every head, an edit of one head's copy that head alone
    return (x[:, :, None].astype(jnp.float32) + change).astype(x.dtype)
