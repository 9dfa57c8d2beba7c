"""Two layouts of the same parameters: an entry for each block, or all blocks stacked, to be scanned over.

The stacked layout has `params["blocks"]["attn"]["q"]["weight"]` [l, h, d, e] for `params["blocks_0"]` to
`params["blocks_25"]`, l being the layers. A model that is run from it is traced and compiled for one block, whatever
l is: sliding and full layers have weights of the same shapes, and differ in their rotation and mask alone.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config

BLOCKS = "blocks"


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether parameters are in the stacked layout."""
    return BLOCKS in params


def stack_layers(config: Gemma3Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the stacked layout, from which `forward` scans over layers; every number as it was.

    Of stacked parameters the same again. Pure; of shapes alone by `jax.eval_shape`.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout, as `conversion.convert_checkpoint` returns it; not changed.

    Memory: a second copy of the blocks, until you let go of `params`.

    Raises:
        ValueError: parameters that do not fit the config, or blocks that differ in shape or dtype.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> stacked = stack_layers(config, params)
    >>> sorted(stacked), stacked["blocks"]["mlp"]["in"]["weight"].shape
    (['blocks', 'embed', 'ln_final'], (4, 96, 192))
    """
    check_layout(config, params)
    if is_stacked(params):
        return dict(params)
    names = [f"blocks_{layer}" for layer in range(config.num_hidden_layers)]
    return {key: value for key, value in params.items() if key not in names} | {BLOCKS: _stack(params, names)}


def unstack_layers(config: Gemma3Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with an entry for each block: the inverse of `stack_layers`, bit for bit.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout; not changed.

    Memory: a second copy of the blocks, until you let go of `params`.

    Raises:
        ValueError: parameters that do not fit the config.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> again = unstack_layers(config, stack_layers(config, params))
    >>> bool((again["blocks_3"]["mlp"]["in"]["weight"] == params["blocks_3"]["mlp"]["in"]["weight"]).all())
    True
    """
    if not is_stacked(params):
        return dict(params)
    check_layout(config, params)
    blocks = {f"blocks_{i}": layer_params(config, params, i) for i in range(config.num_hidden_layers)}
    return {key: value for key, value in params.items() if key != BLOCKS} | blocks


def layer_params(config: Gemma3Config, params: Mapping[str, Any], layer: int, *path: str) -> Any:
    """The parameters of one block, or what stands in it at `path`, from either layout; of stacked ones, slices.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> layer_params(config, stack_layers(config, params), 3, "attn", "q", "weight").shape
    (4, 96, 24)
    """
    stacked = is_stacked(params)
    node = params[BLOCKS] if stacked else params[f"blocks_{layer}"]
    for key in path:
        node = node[key]
    return jax.tree.map(lambda w: w[layer], node) if stacked else node


def check_layout(config: Gemma3Config, params: Mapping[str, Any]) -> None:
    """Refuse parameters whose blocks, in the layout that they have, are not those of the config."""
    layers = config.num_hidden_layers
    wanted = set() if is_stacked(params) else {f"blocks_{layer}" for layer in range(layers)}
    found = {key for key in params if key.startswith("blocks_")}
    if wanted != found:
        wrong = sorted(wanted ^ found)[0]
        layout = "stacked blocks alone" if is_stacked(params) else f"{layers} blocks"
        does = "lack" if wrong in wanted else "have"
        raise ValueError(f"params {does} {wrong!r}; the config calls for {layout}, see `gemma3_jax.stack_layers`")
    if not is_stacked(params):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[BLOCKS]):
        if jnp.shape(leaf)[:1] != (layers,):
            where = "/".join(key.key for key in path)
            raise ValueError(f"params['blocks']: {where} has shape {jnp.shape(leaf)}; this config has {layers} layers")


def _stack(params: Mapping[str, Any], names: list[str]) -> Any:
    """The blocks of those names, each leaf [l, ...]."""

    def stack(path: Any, *leaves: Any) -> jax.Array:
        for name, leaf in zip(names, leaves, strict=True):
            if (leaf.shape, leaf.dtype) != (leaves[0].shape, leaves[0].dtype):
                where = "/".join(key.key for key in path)
                raise ValueError(
                    f"{name}/{where} is {leaf.dtype} of shape {leaf.shape}, {names[0]}/{where} {leaves[0].dtype} of "
                    f"shape {leaves[0].shape}; blocks that are stacked must be alike"
                )
        return _stacked(leaves)

    return jax.tree_util.tree_map_with_path(stack, *(params[name] for name in names))


_stacked = jax.jit(jnp.stack)
