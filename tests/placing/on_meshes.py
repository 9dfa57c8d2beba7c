"""Small models on meshes of the eight virtual CPU devices, and the collectives of compiled programs."""

import collections
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma3_jax import Gemma3, Gemma3Config, stack_layers
from gemma3_jax.placing import make_mesh, param_shardings

LAYERS = 2  # a sliding and a full one
# Eight rows, so that every mesh divides them.
TOKENS = np.random.default_rng(0).integers(3, 512, (8, 9)).astype(np.int32)
_COLLECTIVE = re.compile(r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")


def config(g: int) -> Gemma3Config:
    """A model with eight query heads and g key/value heads; eight devices divide every other size."""
    return Gemma3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=g,
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=("sliding_attention", "full_attention"),
    )


@functools.cache
def params(g: int, stacked: bool = False, dtype: str = "float32") -> Any:
    """Random parameters on the first device."""
    if stacked:
        return stack_layers(config(g), params(g, dtype=dtype))
    shapes = jax.eval_shape(lambda: Gemma3(config(g)).init(jax.random.key(0), TOKENS)["params"])
    draw = np.random.default_rng(1)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        norm = leaf.ndim == 1
        return jnp.asarray(norm + 0.15 * draw.normal(size=leaf.shape), jnp.float32 if norm else dtype)

    return jax.tree.map(random, shapes)


def on(mesh: Mesh, g: int, stacked: bool = False, dtype: str = "float32") -> Any:
    """The same parameters on a mesh."""
    return jax.device_put(params(g, stacked, dtype), param_shardings(config(g), mesh, stacked))


def by_rows(mesh: Mesh, tokens: np.ndarray) -> jax.Array:
    """Tokens [b, p] with their rows cut over "data", where it divides them."""
    rows = "data" if len(tokens) % mesh.shape["data"] == 0 else None
    return jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(rows)))


def mesh_of(model: int) -> Mesh:
    """A mesh of all devices, `model` of which share the parameters."""
    return make_mesh(model, jax.devices()[:8])


def collectives(compiled: jax.stages.Compiled) -> collections.Counter[tuple[str, str]]:
    """How often the program has each kind of collective with each shape: ("all-reduce", "f32[2,9,32]")."""
    found = _COLLECTIVE.findall(compiled.as_text())
    return collections.Counter((kind, re.sub(r"\{[^}]*\}", "", shape)) for shape, kind in found)


def size_of(shape: str) -> int:
    """The bytes of a shape in HLO, or of several in a tuple.

    >>> size_of("(f32[2,9], bf16[3], pred[])")
    79
    """
    width = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(width[dtype] * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in arrays)
