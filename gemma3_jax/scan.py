"""Running blocks from stacked parameters: one block is traced, and scanned over the layers.

What a layer computes is what it computes outside of a scan, exactly as far as XLA's fusions are: where a layer has to
compute something of its own, because of what is watched there, it is run apart from the others.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import subtract_filters

from gemma3_jax.attention import Past
from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.hooks import CAPTURES, Repeated
from gemma3_jax.kernels import SHORT, Mask, OneOf
from gemma3_jax.sites import layer_of
from gemma3_jax.stacking import BLOCKS, layer_params

# Sites that change how a block computes when somebody watches or edits them; the second set in a long text only.
PER_HEAD = frozenset({"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"})
SCORES = frozenset({"attn.hook_attn_scores", "attn.hook_pattern"})

# From the names that are watched and edited, and its own, a block.
MakeBlock = Callable[..., nn.Module]
# For each layer type the tables and the mask that its blocks take.
Context = tuple[Mapping[LayerType, tuple[jax.Array, jax.Array]], Mapping[LayerType, Mask]]


class Body(Repeated):
    """One block: that of several layers, as the body of a scan, or of one."""

    config: Gemma3Config
    make_block: MakeBlock
    watched: frozenset[str]
    edited: frozenset[str]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        step: jax.Array | int,
        start: jax.Array | None,
        context: Context,
        past: Sequence[Past] | None = None,
    ) -> jax.Array:
        """[b, p, d] -> [b, p, d]; `past` of one layer only."""
        first, *others = self.layers
        watched, edited = (self._here(names) if others else names for names in (self.watched, self.edited))
        block = self.make_block(watched, edited, name="block" if others else f"blocks_{first}")
        kinds = [self.config.layer_types[layer] for layer in self.layers]
        beside = (*_of_step(kinds, step, context), None if past is None else past[first])
        return from_layer(start, first + step, block, x, *beside)

    def _here(self, names: frozenset[str]) -> frozenset[str]:
        """The names as modules of this body know them: blocks.9.hook_in -> block.hook_in."""
        inside = [name.split(".", 2) for name in names if layer_of(name) in self.layers]
        return frozenset(f"block.{rest}" for _, _, rest in inside)


def run_stacked(
    model: Any,
    make_block: MakeBlock,
    x: jax.Array,
    context: Context,
    start: int | jax.Array | None,
    stop: int | None,
    past: Sequence[Past] | None,
) -> jax.Array:
    """Run the blocks `start` to `stop` in `model`, a compact module that is being called.

    Args:
        model: has `config`, `watched` and `edited`, and the stacked parameters, which it gets when it is initialized.
        make_block: makes a block.
        x: [b, p, d], the residual stream.
        context: for each layer type what blocks take beside x.
        start: of the blocks to run; may be traced.
        stop: of the blocks to run.
        past: for each layer what is seen of a KV cache. Then no layer is scanned, as each step would copy its weights.

    Returns:
        [b, p, d], the residual stream behind the last block that was run.
    """
    config = model.config
    make_body = functools.partial(
        Body, config=config, make_block=make_block, watched=model.watched, edited=model.edited, parent=None
    )
    stacked = _parameters(model, make_body, x, context)
    known = start is None or isinstance(start, int)
    mutable = subtract_filters(model.scope.mutable, "params")
    special = PER_HEAD if x.shape[1] < SHORT else PER_HEAD | SCORES
    layers_run = range(config.num_hidden_layers)[start if known else None : stop]
    for layers in _runs(model, layers_run, special if past is None else None):
        body, first = make_body(layers=layers), layers[0]
        beside = None if known else start, context, past
        # What its block stores has in the model the name of its layers; under a scan the values are stacked.
        if len(layers) > 1:
            x, found = _scan(body, stacked, x, beside, mutable)
            inside, name = "block", f"{BLOCKS}_{first}_to_{layers[-1]}"
        else:
            inside = name = f"blocks_{first}"
            params = {name: layer_params(config, {BLOCKS: stacked}, first)}
            x, found = body.apply({"params": params}, x, 0, *beside, mutable=mutable)
        for collection, values in found.items():
            if inside in values:
                model.put_variable(collection, name, values[inside])
    return x


def from_layer(
    start: int | jax.Array | None,
    layer: int | jax.Array,
    block: nn.Module,
    x: jax.Array,
    *context: Any,
) -> jax.Array:
    """The block's output, or `x` itself where the block lies before `start`."""
    if start is None or (isinstance(start, int) and start <= layer):
        return block(x, *context)
    if isinstance(start, int):
        return x
    return nn.cond(layer >= start, lambda block, x: block(x, *context), lambda block, x: x, block, x)


def _of_step(
    kinds: Sequence[LayerType], step: jax.Array | int, context: Context
) -> tuple[tuple[jax.Array, jax.Array], Mask | OneOf]:
    """The tables and the mask of the layer that the step runs, `kinds` being the layer types step by step."""
    tables, masks = context
    there = sorted(set(kinds))
    if len(there) == 1:
        return tables[there[0]], masks[there[0]]
    which = jnp.asarray([there.index(kind) for kind in kinds])[step]
    cos, sin = (jax.lax.select_n(which, *alike) for alike in zip(*(tables[kind] for kind in there), strict=True))
    return (cos, sin), OneOf(which, tuple(masks[kind] for kind in there))


def _parameters(model: Any, make_body: Callable[..., Body], x: jax.Array, context: Context) -> Any:
    """The stacked parameters, made when the model is initialized."""
    layers = model.config.num_hidden_layers
    if model.is_initializing():
        body = make_body(layers=(0,))

        def init(key: jax.Array) -> Any:
            return body.init(key, x, 0, None, context)["params"]["blocks_0"]

        return model.param(BLOCKS, lambda key: jax.vmap(init)(jax.random.split(key, layers)))
    if not model.has_variable("params", BLOCKS):
        raise ValueError("params lack 'blocks'; with scan_layers, pass what `gemma3_jax.stack_layers` returns")
    return model.get_variable("params", BLOCKS)


def _runs(model: Any, layers: range, special: frozenset[str] | None) -> list[tuple[int, ...]]:
    """Those layers in runs, each for a scan, or of one layer.

    Layers share a scan when in all of them the same of the `special` sites are watched, which change how a block
    computes; None: nothing is scanned.
    """
    if special is None:
        return [(layer,) for layer in layers]
    watched = [name.split(".", 2)[1:] for name in model.watched if layer_of(name) is not None]
    apart = [(int(layer), site, f"blocks.{layer}.{site}" in model.edited) for layer, site in watched if site in special]

    def kind(layer: int) -> frozenset[tuple[str, bool]]:
        return frozenset((site, edited) for at, site, edited in apart if at == layer)

    return [tuple(alike) for _, alike in itertools.groupby(layers, kind)]


def _scan(body: Body, stacked: Any, x: jax.Array, beside: tuple[Any, ...], mutable: Any) -> tuple[jax.Array, Any]:
    """Run the body at each of its steps: the residual stream, and all stored; captures by row, the rest stacked."""
    first, steps = body.layers[0], len(body.layers)
    whole = steps == body.config.num_hidden_layers

    def run(carry: tuple[jax.Array, Any], here: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, kept), (step, params) = carry, here
        # Of some layers only, each step takes its own: to cut them out of the parameters would copy them all at once.
        params = params if whole else jax.tree.map(lambda w: w[first + step], stacked)
        x, found = body.apply({"params": {"block": params}, CAPTURES: kept}, x, step, *beside, mutable=mutable)
        found = dict(found)
        return (x, found.pop(CAPTURES, {})), found

    over = jnp.arange(steps), stacked if whole else None
    empty: Any = {}
    if body.watched:
        # Traced for its shapes first: the scan carries the rows that captures are written to.
        shapes = jax.eval_shape(lambda: run((x, {}), jax.tree.map(lambda w: w[0], over))[0][1])
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (x, kept), found = jax.lax.scan(run, (x, empty), over)
    return x, {**found, CAPTURES: kept}
