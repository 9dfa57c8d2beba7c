"""The sites at which each head has its own copy of the residual stream.

Edits at `hook_attn_in` and `hook_{q,k,v}_input` act on a per-head copy of the residual stream. `Attention` normally
computes q, k and v from one shared input. If one of these sites is edited, each head's input is the shared input plus
the change that the edit makes to it after the norm. The inputs of unedited heads have the same bits as in a run without
copies. Their projections use another product, so in float32 they may differ in the last bits.

Axes: b batch, p position, d hidden_size, h query heads, g key/value heads, n either of them.
"""

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from gemma3_jax.hooks.interception import HookPoint, site_of
from gemma3_jax.model.layers import RMSNorm
from gemma3_jax.model.watched import Watched
from gemma3_jax.sites.table import HEAD_COPIES

# The changes of the inputs of q, k and v.
HeadChanges: TypeAlias = tuple[Float32[Array, "b p h d"], Float32[Array, "b p n d"], Float32[Array, "b p n d"]]


def head_changes(block: Watched, x: Float[Array, "b p d"], ln1: RMSNorm) -> HeadChanges | None:
    """The per-head difference that edits make to the normed input of q, k and v: three arrays [b, p, n, d] float32.

    None if these sites are not edited. If `hook_attn_in` is edited, each query head has its own keys and values: k and
    v then have h copies in place of g.

    Args:
        block: the current decoder layer.
        x: [b, p, d], the residual stream that enters it.
        ln1: its first norm.
    """
    sites = {name: site_of(block, name) for name in HEAD_COPIES}
    if not block.watched.intersection(sites.values()):
        return None
    h, g = block.config.num_attention_heads, block.config.num_key_value_heads
    shared = _copies(x, h)
    if sites["hook_attn_in"] in block.watched:
        shared = HookPoint(name="hook_attn_in")(shared)
    own_keys = sites["hook_attn_in"] in block.edited
    # Sites with the same copies share one array, so a compiled function returns it once.
    grouped = shared if own_keys or g == h else _copies(x, g)

    def change(name: str, copies: Float[Array, "b p n d"]) -> Float32[Array, "b p n d"]:
        # [b, p, n, d]
        if sites[name] in block.watched:
            copies = HookPoint(name=name)(copies)
        # Round both like ln1's output, so that an edited copy replaces it exactly.
        return ln1.unhooked(copies).astype(jnp.float32) - ln1.unhooked(x)[:, :, None].astype(jnp.float32)

    changes = change("hook_q_input", shared), change("hook_k_input", grouped), change("hook_v_input", grouped)
    return changes if block.edited.intersection(sites.values()) else None


def per_head(x: Float[Array, "b p d"], change: Float32[Array, "b p n d"]) -> Float[Array, "b p n d"]:
    """[b, p, n, d]: for each head, the shared input x [b, p, d] plus its change [b, p, n, d]."""
    # [b, p, 1, d] + [b, p, n, d]: a change of x affects every head, an edit of one copy affects only its head
    return (x[:, :, None].astype(jnp.float32) + change).astype(x.dtype)


def _copies(x: Float[Array, "b p d"], n: int) -> Float[Array, "b p {n} d"]:
    # [b, p, d] -> [b, p, n, d]
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], n, x.shape[2]))
