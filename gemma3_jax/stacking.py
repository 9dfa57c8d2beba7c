"""Two layouts of the same parameters: an entry for each block, or the blocks that repeat stacked, to be scanned over.

Layer types repeat, in Gemma 3 five sliding ones and a full one. The stacked layout takes from the first block on as
many whole periods as there are: `params["periods"]["place_3"]["attn"]["q"]["weight"]` [n, h, d, e] holds blocks 3, 9,
15 and so on, one for each of n periods. What is left over keeps its entries: of 62 blocks, `blocks_60` and `blocks_61`.
A model that is run from stacked parameters is traced and compiled for one period, whatever n is.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma3_jax.config import Gemma3Config

PERIODS = "periods"


@functools.cache
def repeats(config: Gemma3Config) -> tuple[int, int]:
    """(P, n): the first n * P blocks are n periods of P blocks, each with the layer types of the first; n >= 2, or 0.

    Of all periods, the one that leaves the fewest blocks to compile, P and what is left over; of equals the shortest.

    >>> repeats(Gemma3Config.preset("27b")), repeats(Gemma3Config.preset("1b"))
    ((6, 10), (6, 4))
    """
    kinds = config.layer_types

    def count(p: int) -> int:
        alike = next((i for i in range(p, len(kinds)) if kinds[i] != kinds[i - p]), len(kinds))
        return alike // p

    # (n - 1) * P is how many blocks need no compilation of their own.
    p = max(range(1, len(kinds) + 1), key=lambda p: (count(p) - 1) * p)
    return (p, count(p)) if count(p) > 1 else (p, 0)


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether parameters are in the stacked layout."""
    return PERIODS in params


def stack_layers(config: Gemma3Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in the stacked layout, from which `forward` scans over layers; every number as it was.

    Of a model whose layer types do not repeat, and of stacked parameters, the same again. Pure; of shapes alone by
    `jax.eval_shape`.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout, as `conversion.convert_checkpoint` returns it; not changed.

    Memory: a second copy of the blocks that repeat, until you let go of `params`.

    Raises:
        ValueError: parameters that do not fit the config, or repeating blocks that differ in shape or dtype.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> stacked = stack_layers(config, params)
    >>> sorted(stacked), stacked["periods"]["place_1"]["mlp"]["in"]["weight"].shape
    (['embed', 'ln_final', 'periods'], (2, 96, 192))
    """
    check_layout(config, params)
    length, n = repeats(config)
    if is_stacked(params) or not n:
        return dict(params)
    names = [[f"blocks_{layer}" for layer in range(place, n * length, length)] for place in range(length)]
    periods = {f"place_{i}": _stack(params, alike) for i, alike in enumerate(names)}
    rest = {key: value for key, value in params.items() if key not in {name for alike in names for name in alike}}
    return {**rest, PERIODS: periods}


def unstack_layers(config: Gemma3Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with an entry for each block: the inverse of `stack_layers`, bit for bit.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout; not changed.

    Memory: a second copy of the blocks that repeat, until you let go of `params`.

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
    return {key: value for key, value in params.items() if key != PERIODS} | blocks


def layer_params(config: Gemma3Config, params: Mapping[str, Any], layer: int, *path: str) -> Any:
    """The parameters of one block, or what stands in it at `path`, from either layout; of stacked ones, slices.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> layer_params(config, stack_layers(config, params), 3, "attn", "q", "weight").shape
    (4, 96, 24)
    """
    length, n = repeats(config)
    stacked = is_stacked(params) and layer < n * length
    node = params[PERIODS][f"place_{layer % length}"] if stacked else params[f"blocks_{layer}"]
    for key in path:
        node = node[key]
    return jax.tree.map(lambda w: w[layer // length], node) if stacked else node


def check_layout(config: Gemma3Config, params: Mapping[str, Any]) -> None:
    """Refuse parameters whose blocks, in the layout that they have, are not those of the config."""
    length, n = repeats(config) if is_stacked(params) else (0, 0)
    if is_stacked(params) and not n:
        raise ValueError(f"params are stacked; the config's layer types do not repeat: {', '.join(config.layer_types)}")
    layers = range(n * length, config.num_hidden_layers)
    wanted = {f"blocks_{layer}" for layer in layers}
    found = {key for key in params if key.startswith("blocks_")}
    if wanted != found:
        wrong = sorted(wanted ^ found)[0]
        layout = f"{n} stacked periods of {length} and {len(layers)} blocks" if n else f"{len(layers)} blocks"
        does = "lack" if wrong in wanted else "have"
        raise ValueError(f"params {does} {wrong!r}; the config calls for {layout}, see `gemma3_jax.stack_layers`")
    if not is_stacked(params):
        return
    places = {f"place_{i}" for i in range(length)}
    if set(params[PERIODS]) != places:
        raise ValueError(f"params['periods'] has {len(params[PERIODS])} places; a period of this config has {length}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params[PERIODS]):
        if jnp.shape(leaf)[:1] != (n,):
            where = "/".join(key.key for key in path)
            raise ValueError(f"params['periods']: {where} has shape {jnp.shape(leaf)}; this config has {n} periods")


def _stack(params: Mapping[str, Any], names: list[str]) -> Any:
    """The blocks of those names, each leaf [n, ...]."""

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
