"""The components of a model as a graph: senders write to the residual stream, and receivers read from it.

Axes: b batch, p position, h query heads, g key/value heads, e head_dim, d hidden_size.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.compute.matmul import matmul
from gemma3_jax.config import Gemma3Config
from gemma3_jax.model.layers import RMSNorm
from gemma3_jax.model.layout import layer_params
from gemma3_jax.sites.names import block
from gemma3_jax.types import Params

Kind = Literal["embed", "head", "mlp", "q", "k", "v", "logits"]


class Node(NamedTuple):
    """A component: a sender ("embed", "head", "mlp") or a receiver ("q", "k", "v", "mlp", "logits").

    Attributes:
        kind: the kind of component.
        layer: block index; None for "embed" and "logits".
        head: query head, or key/value head for "k" and "v"; None for kinds without heads.

    >>> str(Node("head", 3, 1)), str(Node("mlp", 2)), str(Node("k", 3, 0))
    ('L3H1', 'L2mlp', 'L3K0')
    """

    kind: Kind
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        letter = {"head": "H"}.get(self.kind, self.kind.upper())
        return f"L{self.layer}mlp" if self.kind == "mlp" else f"L{self.layer}{letter}{self.head}"


def senders(config: Gemma3Config) -> tuple[Node, ...]:
    """All components that write to the residual stream, in the model's order: the embedding, heads and MLPs."""
    nodes = [Node("embed")]
    for i in range(config.num_hidden_layers):
        nodes += [Node("head", i, j) for j in range(config.num_attention_heads)]
        nodes.append(Node("mlp", i))
    return tuple(nodes)


def receivers(config: Gemma3Config) -> tuple[Node, ...]:
    """All components that read from the residual stream, in the model's order: q, k, v of heads, MLPs, the logits."""
    h, g = config.num_attention_heads, config.num_key_value_heads
    nodes: list[Node] = []
    for i in range(config.num_hidden_layers):
        nodes += [Node("q", i, j) for j in range(h)]
        nodes += [Node("k", i, j) for j in range(g)]
        nodes += [Node("v", i, j) for j in range(g)]
        nodes.append(Node("mlp", i))
    return (*nodes, Node("logits"))


def check(node: Node, known: tuple[Node, ...], role: str) -> Node:
    """The node, which may be a plain tuple, after a check that it is one of `known`.

    Raises:
        ValueError: the node is not one of `known`.
    """
    node = Node(*node)
    if node not in known:
        kinds = ", ".join(dict.fromkeys(repr(each.kind) for each in known))
        raise ValueError(
            f"{tuple(node)} is not a {role} of this model; {role}s are (kind, layer, head) with kinds {kinds}, from "
            f"{tuple(known[0])} to {tuple(known[-1])}"
        )
    return node


def writes_before(sender: Node, receiver: Node) -> bool:
    """Whether the receiver's input contains the sender's output."""
    if sender.layer is None or receiver.layer is None:
        return True
    within = sender.kind == "head" and receiver.kind == "mlp"
    return sender.layer < receiver.layer or (within and sender.layer == receiver.layer)


def sites_written(config: Gemma3Config) -> tuple[str, ...]:
    """The sites whose activations `written_differences` needs."""
    blocks = range(config.num_hidden_layers)
    heads = [block(i, f"attn.{name}.hook_{side}") for i in blocks for name, side in (("o", "in"), ("o", "out"))]
    return ("embed.hook_out", *heads, *(block(i, "ln2_post.hook_out") for i in blocks))


def written_differences(
    config: Gemma3Config, params: Params, clean: ActivationCache, corrupted: ActivationCache
) -> jax.Array:
    """[s, b, p, d] float32: the change of the corrupted residual stream if one of `senders(config)` becomes clean.

    A head's output goes through the real post-norm, together with the corrupted outputs of the layer's other heads.
    Memory: 4 s b p d bytes.
    """
    parts = [_difference(clean, corrupted, "embed.hook_out")[None]]
    for i in range(config.num_hidden_layers):
        weights = layer_params(config, params, i)
        parts.append(
            _heads_written(
                weights["attn"]["o"]["weight"],
                weights["ln1_post"]["weight"],
                _difference(clean, corrupted, block(i, "attn.o.hook_in")),
                corrupted[block(i, "attn.o.hook_out")],
                config.rms_norm_eps,
            )
        )
        parts.append(_difference(clean, corrupted, block(i, "ln2_post.hook_out"))[None])
    return jnp.concatenate(parts)


def _difference(clean: ActivationCache, corrupted: ActivationCache, name: str) -> jax.Array:
    return clean[name].astype(jnp.float32) - corrupted[name].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="eps")
def _heads_written(
    weight: jax.Array, gain: jax.Array, z_difference: jax.Array, attn_out: jax.Array, eps: float
) -> jax.Array:
    """[h, b, p, d]: each head's effect on post-norm(attn_out [b, p, d]) when its z [b, p, h, e] changes."""
    # [b, p, h, e] x [h, e, d] -> [h, b, p, d]
    change = matmul("bphe,hed->hbpd", z_difference, weight.astype(jnp.float32))
    attn_out = attn_out.astype(jnp.float32)
    norm = RMSNorm(gain.shape[0], eps).bind({"params": {"weight": gain}})
    return norm(attn_out + change) - norm(attn_out)
