"""Two layouts of the same parameters: an entry for each block, or all blocks stacked for a scan.

The stacked layout has `params["blocks"]["attn"]["q"]["weight"]` [l, h, d, e] in place of `params["blocks_0"]` to
`params["blocks_25"]`, where l is the number of layers. A model with this layout traces and compiles one block,
whatever l is. Sliding and full layers have weights of the same shapes, and differ only in rotation and mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.sites.names import block_key
from gemma3_jax.types import Params, PyTree

BLOCKS = "blocks"


def is_stacked(params: Params) -> bool:
    """Whether parameters are in the stacked layout."""
    return BLOCKS in params


def stack_layers(config: Gemma3Config, params: Params) -> Params:
    """The parameters in the stacked layout, with which `forward` scans over layers; values do not change.

    Stacked parameters are returned unchanged. Pure; for shapes only, use `jax.eval_shape`.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout, as `conversion.convert_checkpoint` returns it; not changed.

    Memory: a second copy of the blocks, until you delete `params`.

    Raises:
        TypeError: `config` is not a config, or `params` is not a mapping.
        ValueError: the parameters do not match the config, or blocks differ in shape or dtype.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> stacked = stack_layers(config, params)
    >>> sorted(stacked), stacked["blocks"]["mlp"]["in"]["weight"].shape
    (['blocks', 'embed', 'ln_final'], (4, 96, 192))
    """
    check_model(config, params)
    return stack_and_empty(config, dict(params))


def stack_and_empty(config: Gemma3Config, params: dict[str, PyTree]) -> Params:
    """As `stack_layers`, but takes the blocks out of `params`.

    Memory: a second copy of one weight of all layers, if nothing else holds the blocks.
    """
    check_layout(config, params)
    if is_stacked(params):
        return dict(params)
    names = [block_key(layer) for layer in range(config.num_hidden_layers)]
    structure = jax.tree.structure(params[names[0]])
    blocks = [jax.tree_util.tree_leaves_with_path(params.pop(name)) for name in names]
    paths = [[path for path, _ in block] for block in blocks]
    if other := [name for name, each in zip(names, paths, strict=True) if each != paths[0]]:
        raise ValueError(f"params[{other[0]!r}] has other parameters than params[{names[0]!r}]")
    weights = [[leaf for _, leaf in layers] for layers in zip(*blocks, strict=True)]  # [weights of a block][layers]
    del blocks
    weights.reverse()  # each weight leaves the list before it is stacked, and so its layers are freed before the next
    stacked = [_stack(names, path, weights.pop()) for path in paths[0]]
    return params | {BLOCKS: jax.tree.unflatten(structure, stacked)}


def unstack_layers(config: Gemma3Config, params: Params) -> Params:
    """The parameters with an entry for each block: the inverse of `stack_layers`, bit for bit.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout; not changed.

    Memory: a second copy of the blocks, until you delete `params`.

    Raises:
        ValueError: the parameters do not match the config.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> again = unstack_layers(config, stack_layers(config, params))
    >>> bool((again["blocks_3"]["mlp"]["in"]["weight"] == params["blocks_3"]["mlp"]["in"]["weight"]).all())
    True
    """
    check_model(config, params)
    if not is_stacked(params):
        return dict(params)
    check_layout(config, params)
    blocks = {block_key(i): layer_params(config, params, i) for i in range(config.num_hidden_layers)}
    return {key: value for key, value in params.items() if key != BLOCKS} | blocks


def layer_params(config: Gemma3Config, params: Params, layer: int, *path: str) -> PyTree:
    """The parameters of one block, or its entry at `path`, from either layout; slices of stacked parameters.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> layer_params(config, stack_layers(config, params), 3, "attn", "q", "weight").shape
    (4, 96, 24)
    """
    stacked = is_stacked(params)
    node = params[BLOCKS] if stacked else params[block_key(layer)]
    for key in path:
        node = node[key]
    return jax.tree.map(lambda w: w[layer], node) if stacked else node


def check_model(config: object, params: object) -> None:
    """Raise TypeError or ValueError unless these are a config and the parameters of a model, in this order."""
    check_config(config)
    remedy = "pass the pytree that `convert_checkpoint` returns, or a model's `model.params`"
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {type(params).__name__}; {remedy}")
    if "params" in params:
        raise ValueError("params has an entry 'params': these are the variables of Flax; pass variables['params']")


def check_layout(config: Gemma3Config, params: Params) -> None:
    """Raise ValueError if the blocks of the parameters are not those of the config."""
    layers = config.num_hidden_layers
    expected = set() if is_stacked(params) else {block_key(layer) for layer in range(layers)}
    present = {key for key in params if key.startswith("blocks_")}
    if expected != present:
        wrong = sorted(expected ^ present)[0]
        if is_stacked(params):
            raise ValueError(f"params have {BLOCKS!r}, which are stacked, and {wrong!r}; remove one of them")
        does = "lack" if wrong in expected else "have"
        raise ValueError(f"params {does} {wrong!r}; the config requires {layers} blocks")
    if not is_stacked(params):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[BLOCKS]):
        if jnp.shape(leaf)[:1] != (layers,):
            where = "/".join(key.key for key in path)
            raise ValueError(f"params['blocks']: {where} has shape {jnp.shape(leaf)}; this config has {layers} layers")


def _stack(names: list[str], path: tuple[DictKey, ...], layers: list[np.ndarray | jax.Array]) -> jax.Array:
    """One weight of the blocks with those names, as [l, ...]; `path` is its place in them."""
    where = "/".join(key.key for key in path)
    for name, leaf in zip(names, layers, strict=True):
        if (leaf.shape, leaf.dtype) != (layers[0].shape, layers[0].dtype):
            raise ValueError(
                f"{name}/{where} is {leaf.dtype} of shape {leaf.shape}, {names[0]}/{where} {layers[0].dtype} of "
                f"shape {layers[0].shape}; stacked blocks must have equal shapes and dtypes"
            )
    return _stacked(layers)


_stacked = jax.jit(jnp.stack)
