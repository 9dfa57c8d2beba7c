"""Runs blocks from stacked parameters: one block is traced and scanned over the layers.

Results match the unrolled model up to XLA's choice of fusion. A layer that must compute other values than its
neighbours, because of its captures or edits, leaves their scan.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import CollectionFilter, subtract_filters
from jaxtyping import Array, Float, Integer

from gemma3_jax.compute.attention import SHORT
from gemma3_jax.compute.masks import Mask, MaskChoice
from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.hooks.interception import CAPTURES, Repeated
from gemma3_jax.model.layout import BLOCKS, layer_params
from gemma3_jax.model.past import Past
from gemma3_jax.model.rope import Tables
from gemma3_jax.model.watched import Watched
from gemma3_jax.sites.names import block, block_key, layer_of
from gemma3_jax.sites.table import on_demand
from gemma3_jax.types import Params, PyTree

# Sites that change a block's computation when they are watched or edited; the second set only in long texts.
PER_HEAD, SCORES = on_demand("per_head"), on_demand("scores")

# Makes a block from the watched names, the edited names and its module name.
MakeBlock = Callable[..., nn.Module]
# For each layer type, the rotary tables and the mask of its blocks.
BlockInputs = tuple[Mapping[LayerType, Tables], Mapping[LayerType, Mask]]


class Body(Repeated):
    """The scan body: one traced block that stands for one or several layers."""

    config: Gemma3Config
    make_block: MakeBlock
    watched: frozenset[str]
    edited: frozenset[str]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b p d"],
        step: Integer[Array, ""] | int,
        start: int | Integer[Array, ""] | None,
        inputs: BlockInputs,
        past: Sequence[Past] | None = None,
    ) -> Float[Array, "b p d"]:
        """[b, p, d] -> [b, p, d]; `past` only if the body stands for one layer."""
        first, *others = self.layers
        watched, edited = (self._here(names) if others else names for names in (self.watched, self.edited))
        block = self.make_block(watched, edited, name="block" if others else block_key(first))
        kinds = [self.config.layer_types[layer] for layer in self.layers]
        args = (*_of_step(kinds, step, inputs), None if past is None else past[first])
        return from_layer(start, first + step, block, x, *args)

    def _here(self, names: frozenset[str]) -> frozenset[str]:
        """The names inside this body: blocks.9.hook_in -> block.hook_in."""
        inside = [name.split(".", 2) for name in names if layer_of(name) in self.layers]
        return frozenset(f"block.{rest}" for _, _, rest in inside)


def run_stacked(
    model: Watched,
    make_block: MakeBlock,
    x: Float[Array, "b p d"],
    inputs: BlockInputs,
    start: int | Integer[Array, ""] | None,
    stop: int | None,
    past: Sequence[Past] | None,
    remat: bool,
) -> Float[Array, "b p d"]:
    """Run the blocks `start` to `stop` in `model`, inside its compact call.

    Args:
        model: has `config`, `watched`, `edited` and the stacked parameters, which this function also initializes.
        make_block: makes a block.
        x: [b, p, d], the residual stream.
        inputs: for each layer type, the other arguments of its blocks.
        start: first block to run; may be traced.
        stop: block before which the run stops.
        past: KV cache of each layer. Layers are then not scanned, because each step would copy its weights.
        remat: compute each block again in a backward pass.

    Returns:
        [b, p, d], the residual stream after the last block.
    """
    config = model.config
    make_body = functools.partial(
        Body, config=config, make_block=make_block, watched=model.watched, edited=model.edited, parent=None
    )
    stacked = _parameters(model, make_body, x, inputs)
    known = start is None or isinstance(start, int)
    variables: Mapping[str, PyTree]
    assert model.scope is not None  # the model is being called
    mutable = subtract_filters(model.scope.mutable, "params")
    special = PER_HEAD if x.shape[1] < SHORT else PER_HEAD | SCORES
    layers_run = range(config.num_hidden_layers)[start if known else None : stop]
    for layers in _runs(model, layers_run, special if past is None else None):
        body, first = make_body(layers=layers), layers[0]
        args = None if known else start, inputs, past
        # In the model, variables of a block are stored under the name of its layers; a scan stacks them.
        if len(layers) > 1:
            x, variables = _scan(body, stacked, x, args, mutable, remat)
            inside, name = "block", f"{BLOCKS}_{first}_to_{layers[-1]}"
        else:
            inside = name = block_key(first)
            params = {name: layer_params(config, {BLOCKS: stacked}, first)}
            run = functools.partial(body.apply, mutable=mutable)
            x, variables = (jax.checkpoint(run) if remat else run)({"params": params}, x, 0, *args)
        for collection, values in variables.items():
            if inside in values:
                model.put_variable(collection, name, values[inside])
    return x


def from_layer(
    start: int | Integer[Array, ""] | None,
    layer: int | Integer[Array, ""],
    block: nn.Module,
    x: Float[Array, "b p d"],
    *inputs: PyTree,
) -> Float[Array, "b p d"]:
    """The block's output, or `x` if the block is before `start`."""
    if start is None or (isinstance(start, int) and start <= layer):
        return block(x, *inputs)
    if isinstance(start, int):
        return x
    return nn.cond(layer >= start, lambda block, x: block(x, *inputs), lambda block, x: x, block, x)


def _of_step(
    kinds: Sequence[LayerType], step: Integer[Array, ""] | int, inputs: BlockInputs
) -> tuple[Tables, Mask | MaskChoice]:
    """The tables and the mask of the layer at a step; `kinds` are the layer types of all steps."""
    tables, masks = inputs
    present = sorted(set(kinds))
    if len(present) == 1:
        return tables[present[0]], masks[present[0]]
    which = jnp.asarray([present.index(kind) for kind in kinds])[step]
    cos, sin = (jax.lax.select_n(which, *alike) for alike in zip(*(tables[kind] for kind in present), strict=True))
    return (cos, sin), MaskChoice(which, tuple(masks[kind] for kind in present))


def _parameters(
    model: Watched, make_body: Callable[..., Body], x: Float[Array, "b p d"], inputs: BlockInputs
) -> Params:
    """The stacked parameters; created when the model is initialized."""
    layers = model.config.num_hidden_layers
    if model.is_initializing():
        body = make_body(layers=(0,))

        def init(key: jax.Array) -> PyTree:
            return body.init(key, x, 0, None, inputs)["params"][block_key(0)]

        return model.param(BLOCKS, lambda key: jax.vmap(init)(jax.random.split(key, layers)))
    if not model.has_variable("params", BLOCKS):
        raise ValueError("params do not have 'blocks'; with scan_layers, pass the result of `gemma3_jax.stack_layers`")
    return model.get_variable("params", BLOCKS)


def _runs(model: Watched, layers: range, special: frozenset[str] | None) -> list[tuple[int, ...]]:
    """The layers in runs; a run is scanned, or has one layer.

    Layers share a scan if the same `special` sites, which change a block's computation, are watched, and the same ones
    edited, in all of them.
    With None, layers are not scanned.
    """
    if special is None:
        return [(layer,) for layer in layers]
    watched = [name.split(".", 2)[1:] for name in model.watched if layer_of(name) is not None]
    apart = [(int(layer), site, block(layer, site) in model.edited) for layer, site in watched if site in special]

    def kind(layer: int) -> frozenset[tuple[str, bool]]:
        return frozenset((site, edited) for at, site, edited in apart if at == layer)

    return [tuple(alike) for _, alike in itertools.groupby(layers, kind)]


def _scan(
    body: Body,
    stacked: Params,
    x: Float[Array, "b p d"],
    args: tuple[PyTree, ...],
    mutable: CollectionFilter,
    remat: bool,
) -> tuple[Float[Array, "b p d"], Mapping[str, PyTree]]:
    """Run the body at each step; returns the residual stream and the variables: captures by row, the others stacked."""
    first, steps = body.layers[0], len(body.layers)
    whole = steps == body.config.num_hidden_layers

    def run(
        carry: tuple[jax.Array, PyTree], inputs: tuple[jax.Array, Params | None]
    ) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        (x, captures), (step, params) = carry, inputs
        # For some layers only, each step slices its own parameters: slicing all of them first would copy them.
        params = params if whole else jax.tree.map(lambda w: w[first + step], stacked)
        x, variables = body.apply({"params": {"block": params}, CAPTURES: captures}, x, step, *args, mutable=mutable)
        variables = dict(variables)
        return (x, variables.pop(CAPTURES, {})), variables

    over = jnp.arange(steps), stacked if whole else None
    empty: PyTree = {}
    if body.watched:
        # Trace for shapes first: the scan carries the rows of the captures.
        shapes = jax.eval_shape(lambda: run((x, {}), jax.tree.map(lambda w: w[0], over))[0][1])
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # A scan needs no barriers: its steps share no computation.
    step = jax.checkpoint(run, prevent_cse=False) if remat else run
    (x, captures), variables = jax.lax.scan(step, (x, empty), over)
    return x, {**variables, CAPTURES: captures}
