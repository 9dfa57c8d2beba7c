"""Attention of one layer.

Axes: b batch, p query position, k key position, h query heads, g key/value heads, r = h / g, d hidden_size,
e head_dim; s slots of a cache, c columns of the whole text.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from gemma3_jax.compute.attention import SHORT, attend, mix, scores
from gemma3_jax.compute.masks import Mask, MaskChoice
from gemma3_jax.hooks.interception import HookPoint, site_of
from gemma3_jax.model.layers import HeadsIn, HeadsOut, RMSNorm
from gemma3_jax.model.past import Past, by_column, mix_with_past
from gemma3_jax.model.per_head_inputs import HeadChanges, per_head
from gemma3_jax.model.rope import Tables, rotate
from gemma3_jax.model.watched import Watched
from gemma3_jax.sites.table import on_demand


class Attention(Watched):
    """Grouped-query attention with q and k norms and rotary embedding (`Gemma3Attention`).

    `watched` names the sites that are captured or edited, and `edited` those that are edited.
    Per-head results are computed only if they are watched. In texts of at least `SHORT` tokens, so are scores and
    patterns.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b p d"],
        tables: Tables,
        mask: Mask | MaskChoice,
        head_changes: HeadChanges | None = None,
        past: Past | None = None,
    ) -> Float[Array, "b p d"]:
        """[b, p, d] -> [b, p, d]; `head_changes` [b, p, n, d] change the input of q, k and v for each head."""
        c = self.config
        q_in, k_in, v_in = (x, x, x) if head_changes is None else (per_head(x, change) for change in head_changes)
        # [b, p, d] -> [b, p, n, e]
        q = HeadsIn((c.num_attention_heads, c.hidden_size, c.head_dim), c.attention_bias, name="q")(q_in)
        k = HeadsIn((c.num_key_value_heads, c.hidden_size, c.head_dim), c.attention_bias, name="k")(k_in)
        v = HeadsIn((c.num_key_value_heads, c.hidden_size, c.head_dim), c.attention_bias, name="v")(v_in)
        q = RMSNorm(c.head_dim, c.rms_norm_eps, name="q_norm")(q)
        k = RMSNorm(c.head_dim, c.rms_norm_eps, name="k_norm")(k)

        cos, sin = HookPoint(name="hook_cos")(tables[0]), HookPoint(name="hook_sin")(tables[1])
        q = HookPoint(name="hook_rot_q")(rotate(q, cos, sin))
        k = HookPoint(name="hook_rot_k")(rotate(k, cos, sin))

        shown = self.watched.intersection(site_of(self, name.removeprefix("attn.")) for name in on_demand("scores"))
        scale = c.query_pre_attn_scalar**-0.5
        # [b, p, h, e]
        if shown or past is not None or q.shape[1] < SHORT:
            # Short inputs compute all scores at once anyway, so the hooks do not add cost.
            z = self._shown(q, k, v, scale, mask, past)
        else:
            z = attend(q, k, v, scale, mask)
        name = site_of(self, "hook_result")
        hook_result = HookPoint(name="hook_result") if name in self.watched else None
        o = HeadsOut((c.num_attention_heads, c.head_dim, c.hidden_size), c.attention_bias, name="o")
        # [b, p, h, e] -> [b, p, d]
        return o(z, hook_result, name in self.edited)

    def _shown(
        self,
        q: Float[Array, "b p h e"],
        k: Float[Array, "b p g e"],
        v: Float[Array, "b p g e"],
        scale: float,
        mask: Mask | MaskChoice,
        past: Past | None,
    ) -> Float[Array, "b p h e"]:
        """[b, p, h, e]: attention with scores and pattern that pass through their hooks."""
        columns = jnp.arange(q.shape[1])
        # [b, h, p, k]
        pre = scores(q, k, scale, mask.seen(columns, columns))
        if past is not None:
            # [b, h, p, s + p]
            pre = jnp.concatenate([scores(q, past.keys, scale, past.seen), pre], axis=-1)
        lowest = float(jnp.finfo(jnp.float32).min)
        pre = self._hooked("hook_attn_scores", pre, past, lowest)
        if site_of(self, "hook_attn_scores") in self.edited:
            # Scaling edits can turn masked scores into minus infinity, and a whole row of these into NaN.
            pre = jnp.maximum(pre, lowest)
        if mask.present is not None:
            # [1, 1, 1, k]: a query that attends to no key does not attend to columns that only fill the input up.
            pre = jnp.where(mask.present[:, None, None], pre, -jnp.inf)
        pattern = self._hooked("hook_pattern", jax.nn.softmax(pre, axis=-1), past, 0.0)
        return mix(pattern, v) if past is None else mix_with_past(pattern, past.values, v)

    def _hooked(
        self, name: str, x: Float32[Array, "b h p k"], past: Past | None, fill: float
    ) -> Float32[Array, "b h p k"]:
        hook = HookPoint(name=name)
        # Without a past, keys are already in order of columns, and unwatched hooks do not add cost.
        watched = site_of(self, name) in self.watched
        return by_column(hook, x, past, fill) if past is None or watched else x
