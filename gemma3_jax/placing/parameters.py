"""The shardings of a model's parameters on a mesh.

Axes: d hidden_size, h query heads, g key/value heads, e head_dim, f intermediate_size, V vocabulary, L layers; n1, n2
outputs of the dense layers of an embedding head.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.meshes import MODEL, as_auto, spec, undivided
from gemma3_jax.model.layout import BLOCKS
from gemma3_jax.model.transformer import Gemma3
from gemma3_jax.sites.names import block_key
from gemma3_jax.sites.table import axis_size
from gemma3_jax.types import Params

_log = logging.getLogger(__name__)


def param_shardings(config: Gemma3Config, mesh: Mesh, stacked: bool = False) -> Params:
    """How each parameter is cut over a mesh: a pytree of `NamedSharding` with the structure of the parameters.

    The embedding is cut by tokens, attention by heads, the MLP by neurons; norms are replicated. So is an axis that the
    mesh does not divide, such as the key/value heads if they are fewer than the devices of "model"; a log message
    names it.

    Args:
        config: shape of the model.
        mesh: as `make_mesh` returns it. Explicit axes count as Auto ones.
        stacked: for the layout of `gemma3_jax.stack_layers`.

    Raises:
        ValueError: the mesh has neither an axis "data" nor an axis "model".

    >>> import jax
    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> from gemma3_jax.placing import make_mesh, param_shardings
    >>> config, params = convert_checkpoint(TINY)
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> shardings = param_shardings(config, mesh)
    >>> tuple(shardings["blocks_0"]["mlp"]["in"]["weight"].spec)
    (None, 'model')
    >>> params = jax.device_put(params, shardings)
    """
    check_config(config)
    mesh, axes = as_auto(mesh), param_axes(config, stacked)
    shapes = jax.tree.map(lambda letters: _shape(letters, config), axes)
    _tell_of_whole_axes(config, axes, mesh)
    return jax.tree.map(lambda letters, shape: NamedSharding(mesh, spec(letters, shape, mesh)), axes, shapes)


def place(params: Params, shardings: Params) -> Params:
    """The parameters with these shardings: a pytree of the same structure, as `param_shardings` returns it.

    With several processes, each passes the same parameters, or arrays that are placed already.
    """
    return jax.tree.map(_placed, params, shardings)


def _placed(w: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    if isinstance(w, jax.Array) and w.sharding.is_equivalent_to(sharding, w.ndim):
        return w
    local = not isinstance(w, jax.Array) or w.is_fully_addressable
    if local and not sharding.is_fully_addressable:
        # `device_put` would gather the array from all processes to compare it.
        return jax.make_array_from_callback(w.shape, sharding, lambda index: np.asarray(w[index]))
    return jax.device_put(w, sharding)


def param_axes(config: Gemma3Config, stacked: bool = False) -> Params:
    """The axis letters of each parameter, such as "h d e", in a pytree with the structure of the parameters.

    They come from the shapes that the model declares, in a model of which no two sizes are equal.

    >>> param_axes(Gemma3Config.preset("1b"))["blocks_25"]["attn"]["q"]["weight"]
    'h d e'
    """
    axes = dict(
        _axes_of_one_layer(dataclasses.replace(config, num_hidden_layers=1, layer_types=(), truncated_from=None))
    )
    block = axes.pop(block_key(0))
    if stacked:
        return {**axes, BLOCKS: jax.tree.map(lambda letters: f"L {letters}", block)}
    return {**axes, **{block_key(layer): block for layer in range(config.num_hidden_layers)}}


@functools.lru_cache
def _axes_of_one_layer(config: Gemma3Config) -> Params:
    """`param_axes` of a config with one layer."""
    head = config.embedding_head
    dense = () if head is None else tuple(range(100, 100 + len(head.dense)))
    unequal = dataclasses.replace(
        config,
        vocab_size=17,
        hidden_size=13,
        intermediate_size=11,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        embedding_head=None if head is None else dataclasses.replace(head, dense=dense),
    )
    names = [*"Vdfhge", *(f"n{j}" for j, _ in enumerate(dense, start=1))]
    letters = {axis_size(name, unequal, 1, 1): name for name in names}
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda tokens: Gemma3(unequal).init(jax.random.key(0), tokens)["params"], tokens)
    axes: Params = jax.tree.map(lambda leaf: " ".join(letters[size] for size in leaf.shape), shapes)
    return axes


def _shape(axes: str, config: Gemma3Config) -> tuple[int, ...]:
    return tuple(config.num_hidden_layers if name == "L" else axis_size(name, config, 1, 1) for name in axes.split())


def _tell_of_whole_axes(config: Gemma3Config, axes: Params, mesh: Mesh) -> None:
    """Log the axes that the mesh does not divide, and the parameters that have them, in one line."""
    found: dict[tuple[str, int], dict[str, None]] = {}
    for path, letters in jax.tree_util.tree_leaves_with_path(axes):
        name = ".".join(key.key for key in path if not key.key.startswith("blocks"))
        for whole in undivided(letters, _shape(letters, config), mesh).items():
            found.setdefault(whole, {})[name] = None
    if found:
        parts = "; ".join(f"{letter} = {size}: {', '.join(names)}" for (letter, size), names in found.items())
        devices = mesh.shape[MODEL]
        _log.warning("replicated over the %d devices of the mesh axis 'model', which do not divide %s", devices, parts)
