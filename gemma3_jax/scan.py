"""Running blocks from stacked parameters: one period is traced, and scanned over all of them.

What a layer computes is what it computes outside of a scan, exactly as far as XLA's fusions are: where a layer has to
compute something of its own, because of what is watched there, its period is run by itself.
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
from gemma3_jax.kernels import SHORT
from gemma3_jax.sites import layer_of
from gemma3_jax.stacking import PERIODS, layer_params, repeats

# Sites that change how a block computes when somebody watches or edits them; the second set in a long text only.
PER_HEAD = frozenset({"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"})
SCORES = frozenset({"attn.hook_attn_scores", "attn.hook_pattern"})

# For each block of a body, the layers that it stands for, step by step.
Places = tuple[tuple[int, ...], ...]
# From the names that are watched and edited, and its own, a block.
MakeBlock = Callable[..., nn.Module]


class Body(Repeated):
    """Consecutive blocks of one period: for several periods, the body of a scan; for one, just these blocks."""

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
        context: tuple[Mapping[LayerType, Any], ...],
        past: Sequence[Past] | None = None,
    ) -> jax.Array:
        """[b, p, d] -> [b, p, d]; `context` has for each layer type what its blocks take beside x."""
        watched, edited = self._at_places(self.watched), self._at_places(self.edited)
        for place, (first, *others) in enumerate(self.layers):
            block = self.make_block(watched, edited, name=f"place_{place}" if others else f"blocks_{first}")
            kind = self.config.layer_types[first]
            beside = (*(each[kind] for each in context), None if past is None else past[first])
            x = from_layer(start, first + step * len(self.layers), block, x, *beside)
        return x

    def _at_places(self, names: frozenset[str]) -> frozenset[str]:
        """The names as modules of this body know them: blocks.9.hook_in -> place_3.hook_in."""
        if len(self.layers[0]) == 1:
            return names
        places = {layer: place for place, layers in enumerate(self.layers) for layer in layers}
        inside = [name.split(".", 2) for name in names if layer_of(name) in places]
        return frozenset(f"place_{places[int(layer)]}.{rest}" for _, layer, rest in inside)


def run_stacked(
    model: Any,
    make_block: MakeBlock,
    x: jax.Array,
    context: tuple[Mapping[LayerType, Any], ...],
    start: int | jax.Array | None,
    stop: int | None,
    past: Sequence[Past] | None,
) -> jax.Array:
    """Run those of the blocks `start` to `stop` that are stacked, in `model`, a compact module that is being called.

    Args:
        model: has `config`, `watched` and `edited`, and the stacked parameters, which it gets when it is initialized.
        make_block: makes a block.
        x: [b, p, d], the residual stream.
        context: for each layer type what blocks take beside x.
        start: of the blocks to run; may be traced.
        stop: of the blocks to run.
        past: for each layer what is seen of a KV cache. Then no layer is scanned, as each step would copy its weights.

    Returns:
        [b, p, d], the residual stream behind the last stacked block that was run.
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
        body = make_body(layers=layers)
        beside = None if known else start, context, past
        if len(layers[0]) > 1:
            x, found = _scan(body, stacked, x, beside, mutable)
        else:
            params = {f"blocks_{layer}": layer_params(config, {PERIODS: stacked}, layer) for (layer,) in layers}
            x, found = body.apply({"params": params}, x, 0, *beside, mutable=mutable)
        for collection, values in found.items():
            for name, value in values.items():
                model.put_variable(collection, name, value)
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


def _parameters(model: Any, make_body: Callable[..., Body], x: jax.Array, context: Any) -> Any:
    """The stacked parameters, made when the model is initialized."""
    length, n = repeats(model.config)
    if not n:
        return {}
    if model.is_initializing():
        body = make_body(layers=tuple((place,) for place in range(length)))

        def init(key: jax.Array) -> dict[str, Any]:
            params = body.init(key, x, 0, None, context)["params"]
            return {f"place_{place}": params[f"blocks_{place}"] for place in range(length)}

        return model.param(PERIODS, lambda key: jax.vmap(init)(jax.random.split(key, n)))
    if not model.has_variable("params", PERIODS):
        raise ValueError("params lack 'periods': with scan_layers, pass what `gemma3_jax.stack_layers` returns")
    return model.get_variable("params", PERIODS)


def _runs(model: Any, layers: range, special: frozenset[str] | None) -> list[Places]:
    """The bodies that run those layers, as far as they are stacked: each whole periods in a scan, or one by itself.

    Periods share a scan when in all of them the same of the `special` sites are watched, which change how a block
    computes; None: nothing is scanned.
    """
    length, n = repeats(model.config)
    periods = [range(first, first + length) for first in range(0, n * length, length)]
    watched = [name.split(".", 2)[1:] for name in model.watched if layer_of(name) is not None]
    apart = {(int(layer), site) for layer, site in watched if special and site in special}

    def kind(period: range) -> Any:
        if special is None or not set(period) <= set(layers):
            return period.start
        return frozenset(
            (layer - period.start, site, f"blocks.{layer}.{site}" in model.edited)
            for layer, site in apart
            if layer in period
        )

    groups = [list(alike) for _, alike in itertools.groupby(periods, kind)]
    cut = [[[layer for layer in period if layer in layers] for period in alike] for alike in groups]
    return [tuple(zip(*alike, strict=True)) for alike in cut if alike[0]]


def _scan(body: Body, stacked: Any, x: jax.Array, beside: tuple[Any, ...], mutable: Any) -> tuple[jax.Array, Any]:
    """Run the body at each of its steps: the residual stream, and all stored; captures by row, the rest stacked."""
    length, n = repeats(body.config)
    first, steps = body.layers[0][0] // length, len(body.layers[0])
    whole = steps == n

    def run(carry: tuple[jax.Array, Any], here: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, kept), (step, params) = carry, here
        # Of some periods only, each step takes its own: to cut them out of the parameters would copy them all at once.
        params = params if whole else jax.tree.map(lambda w: w[first + step], stacked)
        x, found = body.apply({"params": params, CAPTURES: kept}, x, step, *beside, mutable=mutable)
        found = dict(found)
        return (x, found.pop(CAPTURES, {})), found

    over = jnp.arange(steps), stacked if whole else None
    empty: Any = {}
    if body.watched:
        # Traced for its shapes first: the scan carries the rows that captures are written to.
        shapes = jax.eval_shape(lambda: run((x, {}), jax.tree.map(lambda w: w[0], over))[0][1])
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (x, kept), found = jax.lax.scan(run, (x, empty), over)
    return x, {
        kind: {f"{PERIODS}_{body.layers[0][0]}": values} for kind, values in {**found, CAPTURES: kept}.items() if values
    }
