"""The components of a model as a graph: what writes to the residual stream, and what reads from it.

Axes: b batch, p position, h query heads, g key/value heads, e head_dim, d hidden_size.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.layers import RMSNorm
from gemma3_jax.products import matmul
from gemma3_jax.stacking import layer_params

Kind = Literal["embed", "head", "mlp", "q", "k", "v", "logits"]


class Node(NamedTuple):
    """A component: a sender ("embed", "head", "mlp") or a receiver ("q", "k", "v", "mlp", "logits").

    Attributes:
        kind: which of them.
        layer: block index; None for "embed" and "logits".
        head: query head, of "k" and "v" the key/value head; None where there are no heads.

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
    """Everything that writes to the residual stream, in the model's order: the embedding, heads and MLPs."""
    nodes = [Node("embed")]
    for i in range(config.num_hidden_layers):
        nodes += [Node("head", i, j) for j in range(config.num_attention_heads)]
        nodes.append(Node("mlp", i))
    return tuple(nodes)


def receivers(config: Gemma3Config) -> tuple[Node, ...]:
    """Everything that reads from the residual stream, in the model's order: q, k and v of heads, MLPs, the logits."""
    h, g = config.num_attention_heads, config.num_key_value_heads
    nodes: list[Node] = []
    for i in range(config.num_hidden_layers):
        nodes += [Node(kind, i, j) for kind, n in (("q", h), ("k", g), ("v", g)) for j in range(n)]  # type: ignore[arg-type]
        nodes.append(Node("mlp", i))
    return (*nodes, Node("logits"))


def check(node: Node, known: tuple[Node, ...], role: str) -> Node:
    """The node, if it is one of those; a plain tuple will do.

    Raises:
        ValueError: naming the node, and what is allowed.
    """
    node = Node(*node)
    if node not in known:
        kinds = ", ".join(dict.fromkeys(repr(each.kind) for each in known))
        raise ValueError(
            f"{tuple(node)} is no {role} of this model; they are (kind, layer, head) with kinds {kinds}, from "
            f"{tuple(known[0])} to {tuple(known[-1])}"
        )
    return node


def writes_before(sender: Node, receiver: Node) -> bool:
    """Whether what the sender writes is in what the receiver reads."""
    if sender.layer is None or receiver.layer is None:
        return True
    within = sender.kind == "head" and receiver.kind == "mlp"
    return sender.layer < receiver.layer or (within and sender.layer == receiver.layer)


def sites_written(config: Gemma3Config) -> tuple[str, ...]:
    """The sites of which `written_differences` needs the activations."""
    blocks = range(config.num_hidden_layers)
    heads = [f"blocks.{i}.attn.{name}.hook_{side}" for i in blocks for name, side in (("o", "in"), ("o", "out"))]
    return ("embed.hook_out", *heads, *(f"blocks.{i}.ln2_post.hook_out" for i in blocks))


def written_differences(
    config: Gemma3Config, params: dict, clean: ActivationCache, corrupted: ActivationCache
) -> jax.Array:
    """[s, b, p, d] float32: by how much each of `senders(config)`, made clean, changes the corrupted residual stream.

    A head's output goes through the real post-norm, beside the corrupted outputs of the layer's other heads.
    Memory: 4 s b p d bytes.
    """
    parts = [_difference(clean, corrupted, "embed.hook_out")[None]]
    for i in range(config.num_hidden_layers):
        block = layer_params(config, params, i)
        parts.append(
            _heads_written(
                block["attn"]["o"]["weight"],
                block["ln1_post"]["weight"],
                _difference(clean, corrupted, f"blocks.{i}.attn.o.hook_in"),
                corrupted[f"blocks.{i}.attn.o.hook_out"],
                config.rms_norm_eps,
            )
        )
        parts.append(_difference(clean, corrupted, f"blocks.{i}.ln2_post.hook_out")[None])
    return jnp.concatenate(parts)


def _difference(clean: ActivationCache, corrupted: ActivationCache, name: str) -> jax.Array:
    return clean[name].astype(jnp.float32) - corrupted[name].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="eps")
def _heads_written(weight, gain, z_difference, attn_out, eps) -> jax.Array:
    """[h, b, p, d]: what each head's change of z [b, p, h, e] changes behind the post-norm of attn_out [b, p, d]."""
    # [b, p, h, e] x [h, e, d] -> [h, b, p, d]
    change = matmul("bphe,hed->hbpd", z_difference, weight.astype(jnp.float32))
    attn_out = attn_out.astype(jnp.float32)
    norm = RMSNorm(gain.shape[0], eps).bind({"params": {"weight": gain}})
    return norm(attn_out + change) - norm(attn_out)
