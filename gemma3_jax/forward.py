"""The pure entry: params and tokens in, logits and captured activations out."""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax.attention import Past
from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.edits import check, in_layout, with_arrays
from gemma3_jax.hooks import CAPTURES, Edit, Phase, Placed, as_pytree, captured, interceptor
from gemma3_jax.model import Gemma3, one_input
from gemma3_jax.positions import Shape, at_positions, check_mask, default_positions
from gemma3_jax.reductions import Reduction, Steps, as_steps
from gemma3_jax.sites import Match, layer_of, select, site_names
from gemma3_jax.stacking import check_layout, is_stacked

ReturnType = Literal["logits", "loss", "both", None]
Capture = str | Iterable[str] | Callable[[str], bool]
# Or with what to keep of each: see `gemma3_jax.reductions`.
ReducedCapture = Capture | Mapping[str, Reduction | Sequence[Reduction] | None]
Edits = Mapping[str, Edit | Sequence[Edit]]
Hooks = Sequence[tuple[Capture, Edit]]


def forward(
    config: Gemma3Config,
    params: Mapping[str, Any],
    tokens: jax.Array | None = None,
    capture: ReducedCapture = (),
    edits: Edits | None = None,
    attention_mask: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    logits_at: Any = None,
    past: Sequence[Past] | None = None,
    phase: Phase = "prompt",
    return_type: ReturnType = "logits",
) -> tuple[Any, ActivationCache]:
    """Run the model, capture and edit activations. Pure: `jit`, `vmap` and `grad` it as you like.

    `config`, the names in `capture`, `stop_at_layer` and `return_type` are static: under `jax.jit` close over them or
    name them in `static_argnames`. Everything else may be traced. What neither the result nor a capture needs is not
    run.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it; or as `stack_layers` does, to scan over
            layers, for the same results from a smaller program.
        tokens: [b, p] integer ids below `config.vocab_size`.
        capture: sites to return: a name, several names, globs (`blocks.*.hook_out`), or a predicate on names. A
            mapping from names or globs to functions `function(value, hook) -> arrays` (several in a list run in order;
            None keeps the value) returns what they make of the value, which never leaves the compiled program itself:
            see `gemma3_jax.reductions`. Arrays in them are traced where the mapping is an argument of the jitted
            function.
        edits: for each name or glob an edit, or several to apply in order. An edit is `edit(value, hook) -> value`:
            a function, a `jax.tree_util.Partial` or a `flax.struct.dataclass` with `__call__`; its array leaves are
            traced. `hook` is a `gemma3_jax.Hook`. Captures are taken after the edits of the same site. Under a
            Hugging Face path the edit sees the value in Hugging Face's layout.
        attention_mask: [b, p], 1 at real tokens and 0 at padding on either side.
        positions: [b, p] integer positions for the rotary embedding; by default they count the real tokens.
        inputs_embeds: [b, p, d] embeddings in place of `tokens`, scaled by sqrt(d) already (as Hugging Face has it).
        start_at_layer: take `inputs_embeds` as the residual stream entering this block, and skip those before it.
            Negative counts from the end. May be traced, with one compilation for every layer; blocks' sites cannot be
            captured then.
        stop_at_layer: run only the blocks before this one and return the residual stream [b, p, d] entering it.
            Negative counts from the end.
        logits_at: positions at which to compute logits, and nowhere else, [], [n] or [b, n]: counted over each row's
            real tokens, -1 its last. The unembedding is about half of a small model's forward pass.
        past: what a KV cache holds of the text that the tokens continue; see `gemma3_jax.generation.kv_cache`.
        phase: told to the edits.
        return_type: "logits", "loss" (mean next-token cross-entropy, in nats, over real tokens), "both" or None.

    Returns:
        What `return_type` asks for: logits [b, p, V] float32 ([b, n, V] with `logits_at`), loss [] float32,
        (logits, loss), or None; and the captured values, indexed by any name of their site.

    Raises:
        UnknownSite: a name in `capture` or `edits` that no site has.
        ValueError: arguments that do not fit together; a site that this call never runs.

    >>> import jax
    >>> from gemma3_jax import Gemma3, Gemma3Config, forward
    >>> config = Gemma3Config(
    ...     vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...     num_key_value_heads=1, head_dim=4, sliding_window=4, query_pre_attn_scalar=4)
    >>> tokens = jax.numpy.arange(6)[None]
    >>> params = Gemma3(config).init(jax.random.key(0), tokens)["params"]
    >>> logits, cache = forward(config, params, tokens, capture="blocks.*.hook_resid_post")
    >>> logits.shape, list(cache)
    ((1, 6, 16), ['blocks.0.hook_out', 'blocks.1.hook_out'])
    """
    source = jnp.asarray(one_input(tokens, inputs_embeds))
    if attention_mask is not None:
        check_mask(attention_mask)
    attention_mask, positions = (None if x is None else jnp.asarray(x) for x in (attention_mask, positions))
    _check(config, source, attention_mask, positions)
    if not isinstance(start_at_layer, jax.core.Tracer | None):
        start_at_layer = operator.index(start_at_layer)
    stop_at_layer = None if stop_at_layer is None else operator.index(stop_at_layer)
    _check_extent(config, source, start_at_layer, stop_at_layer, logits_at, return_type)
    # Positions that are given may be any: what is asked for can only be looked for among them.
    extent = source.shape[:2] if positions is None else (source.shape[0], None)
    logits_at = checked_logits_at(logits_at, extent, stop_at_layer)
    kept = placed_captures(config, capture, extent, start_at_layer, stop_at_layer)
    names = tuple(kept)
    placed = placed_edits(config, edits or {}, extent, start_at_layer, stop_at_layer)
    if "embed" not in params:
        raise ValueError("params lack 'embed'; pass the pytree that `convert_checkpoint` returns, as it is")
    check_layout(config, params)
    stop = _layers_needed(config, names) if return_type is None and stop_at_layer is None else stop_at_layer
    if positions is None:
        positions = default_positions(source.shape[:2], attention_mask)

    watched, edited = frozenset(names) | frozenset(placed), frozenset(placed)
    model = Gemma3(config, watched=watched, edited=edited, scan_layers=is_stacked(params))
    # The interceptor is entered here, inside the function that gets traced: see `gemma3_jax.hooks`.
    told = {"attention_mask": attention_mask, "phase": phase} | ({} if past is None else _keys_of(past[0], source))
    unembedded = None if logits_at is None else _chosen(logits_at, positions, attention_mask)
    with nn.intercept_methods(interceptor(kept, placed, positions, unembedded, **told)):
        out, variables = model.apply(
            {"params": params},
            source,
            attention_mask=attention_mask,
            positions=positions,
            start_at_layer=start_at_layer,
            stop_at_layer=stop,
            logits_at=logits_at,
            past=past,
            mutable=[CAPTURES],
        )
    values = captured(variables)
    reduced = {name: str(steps) for name, steps in kept.items() if steps is not None}
    cache = ActivationCache(config, {name: values[name] for name in names}, reduced=reduced)
    if return_type in ("loss", "both"):
        loss = next_token_loss(out, source, attention_mask)
        return (loss if return_type == "loss" else (out, loss)), cache
    return (None if return_type is None else out), cache


def _keys_of(past: Past, source: jax.Array) -> dict[str, jax.Array]:
    """What a `Hook` tells of keys that stand by column: their positions and which are real, each [b, c]."""
    columns = jnp.arange(past.capacity)[None]
    real = (columns >= past.start[:, None]) & (columns < past.length + source.shape[1])
    return {"key_positions": jnp.maximum(columns - past.start[:, None], 0), "key_mask": real.astype(jnp.int32)}


def _chosen(logits_at: jax.Array, positions: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Positions and mask, each [b, n], of the rows that the unembedding has: those that `logits_at` asks for."""
    # [b, n, p]
    chosen = at_positions(logits_at, positions, mask)
    found = jnp.take_along_axis(positions, jnp.argmax(chosen, axis=-1), axis=1)
    return found, jnp.any(chosen, axis=-1).astype(jnp.int32)


def next_token_loss(logits: jax.Array, tokens: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy [] float32, in nats, of each token under the logits one position before it.

    Args:
        logits: [b, p, V].
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens; a pair counts when both its tokens are real. NaN if none is.
    """
    # [b, p - 1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
    if attention_mask is None:
        return jnp.mean(losses)
    real = attention_mask.astype(bool)
    return jnp.mean(losses, where=real[:, :-1] & real[:, 1:])


def captured_names(
    config: Gemma3Config,
    capture: Capture,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
) -> tuple[str, ...]:
    """The canonical names of the sites that `capture` means, in the model's order.

    Raises:
        UnknownSite: a name that no site has.
        ValueError: a name or glob of which no site runs between `start_at_layer` and `stop_at_layer`; a mapping that
            reduces values, where whole ones are needed.
    """
    if isinstance(capture, Mapping) and any(steps is not None for steps in capture.values()):
        raise ValueError("whole values are needed here: name the sites without functions that reduce them")
    wanted = [capture] if isinstance(capture, str) or callable(capture) else capture
    names = {match.name for each in wanted for match in _running(config, each, start_at_layer, stop_at_layer)}
    return _in_order(config, names, start_at_layer)


def _in_order(config: Gemma3Config, names: Container[str], start_at_layer: int | jax.Array | None) -> tuple[str, ...]:
    """The captured names in the model's order."""
    ordered = tuple(name for name in site_names(config) if name in names)
    inside = [name for name in ordered if layer_of(name) is not None]
    if inside and not isinstance(start_at_layer, int | None):
        raise ValueError(f"{inside[0]} cannot be captured while start_at_layer is traced: its block may not run")
    return ordered


def placed_captures(
    config: Gemma3Config,
    capture: ReducedCapture,
    shape: Shape,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
) -> dict[str, Steps | None]:
    """What to keep of each captured site, by canonical name in the model's order; None is the whole value.

    Arguments and errors as in `captured_names` and `place`.

    Raises:
        ValueError: two keys name the same site.
    """
    if not isinstance(capture, Mapping):
        return dict.fromkeys(captured_names(config, capture, start_at_layer, stop_at_layer))
    kept: dict[str, Steps | None] = {}
    for key, steps in capture.items():
        matches = _running(config, key, start_at_layer, stop_at_layer)
        twice = [match.name for match in matches if match.name in kept]
        if twice:
            raise ValueError(f"two keys of the captures name {twice[0]}; a site is kept once")
        kept |= {match.name: as_steps(steps, match, shape) for match in matches}
    return {name: kept[name] for name in _in_order(config, kept, start_at_layer)}


def place(
    config: Gemma3Config,
    wanted: Capture,
    edit: Edit,
    shape: Shape,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    new: int = 0,
) -> list[tuple[str, Edit]]:
    """The (canonical name, edit) pairs that an edit under that name, glob, list or predicate stands for.

    `shape` (b, p) is that of the input, for the check that the edit acts somewhere; p is None where positions are
    given, which may be any. `new` tokens that are written behind it will be run.
    """
    matches = _running(config, wanted, start_at_layer, stop_at_layer)
    if not callable(edit):
        where = matches[0].name if matches else wanted
        raise TypeError(f"the edit at {where} is {edit!r}; an edit is a callable, edit(value, hook) -> value")
    if isinstance(edit, Placed):
        return [(match.name, edit) for match in matches]
    if matches:
        check(edit, [match.name for match in matches], config, shape, new)
    edit = with_arrays(edit)
    return [(m.name, Placed(edit if m.layout is None else in_layout(edit, m.layout))) for m in matches]


def placed_edits(
    config: Gemma3Config,
    edits: Edits,
    shape: Shape,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    new: int = 0,
) -> dict[str, tuple[Edit, ...]]:
    """The edits by canonical name, in order; arguments as in `place`.

    Raises:
        ValueError: two keys name the same site.
    """
    placed: dict[str, tuple[Edit, ...]] = {}
    for key, given in edits.items():
        pairs: dict[str, tuple[Edit, ...]] = {}
        for edit in given if isinstance(given, Sequence) else (given,):
            for name, each in place(config, key, edit, shape, start_at_layer, stop_at_layer, new):
                pairs[name] = (*pairs.get(name, ()), each)
        twice = sorted(set(pairs) & set(placed))
        if twice:
            # A dict that passes through jit comes out sorted, so that two keys have no order of their own.
            raise ValueError(f"two keys of edits name {twice[0]}; give one key a list of edits, in the order wanted")
        placed |= pairs
    return placed


def edits_of(
    config: Gemma3Config, hooks: Hooks, shape: Shape, stop_at_layer: int | None = None, new: int = 0
) -> dict[str, list[Edit]]:
    """The edits of (name, edit) pairs by canonical name, in their order, as pytrees that can cross into `jit`."""
    edits: dict[str, list[Edit]] = {}
    for wanted, edit in hooks:
        for name, placed in place(config, wanted, as_pytree(edit), shape, stop_at_layer=stop_at_layer, new=new):
            edits.setdefault(name, []).append(placed)
    return edits


def _check(config, source, attention_mask, positions) -> None:
    is_tokens = jnp.issubdtype(source.dtype, jnp.integer)
    if is_tokens and source.ndim != 2:
        raise ValueError(f"tokens have shape {source.shape}; they must be [b, p]")
    if not is_tokens and (source.ndim != 3 or source.shape[2] != config.hidden_size):
        raise ValueError(
            f"the input is {source.dtype} of shape {source.shape}; tokens are integers [b, p], "
            f"inputs_embeds are floats [b, p, {config.hidden_size}]"
        )
    if not source.size:
        raise ValueError(f"the input has shape {source.shape}; it must have at least one token")
    for name, array in (("attention_mask", attention_mask), ("positions", positions)):
        if array is not None and array.shape != source.shape[:2]:
            raise ValueError(f"{name} has shape {array.shape}; the input has {source.shape[:2]} (batch, position)")
    if positions is not None and not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions are {positions.dtype}; they must be integers")


def _check_extent(config, source, start_at_layer, stop_at_layer, logits_at, return_type) -> None:
    is_tokens = jnp.issubdtype(source.dtype, jnp.integer)
    if return_type not in get_args(ReturnType):
        raise ValueError(f"return_type is {return_type!r}; it takes 'logits', 'loss', 'both' and None")
    if return_type in ("loss", "both") and (not is_tokens or stop_at_layer is not None or logits_at is not None):
        raise ValueError(
            f"return_type {return_type!r} needs tokens and the whole model: no stop_at_layer and no logits_at"
        )
    if return_type in ("loss", "both") and source.shape[1] < 2:
        raise ValueError(f"return_type {return_type!r} needs two tokens at least; the input has {source.shape[1]}")
    layers = config.num_hidden_layers
    for name, layer in (("start_at_layer", start_at_layer), ("stop_at_layer", stop_at_layer)):
        if isinstance(layer, int) and not -layers <= layer <= layers:
            raise ValueError(f"{name} is {layer}; the model has {layers} layers")
    if start_at_layer is not None and is_tokens:
        raise ValueError("start_at_layer needs inputs_embeds: the residual stream [b, p, d] entering that layer")


def checked_logits_at(logits_at: Any, shape: Shape, stop_at_layer: int | None) -> jax.Array | None:
    """`logits_at` as an array that fits an input of that shape; its range is checked where both are known."""
    if logits_at is None:
        return None
    b, p = shape
    known = not isinstance(logits_at, jax.core.Tracer)
    logits_at = np.asarray(logits_at) if known else logits_at
    if stop_at_layer is not None:
        raise ValueError("logits_at has no use with stop_at_layer, which computes no logits")
    if not jnp.issubdtype(logits_at.dtype, jnp.integer) or logits_at.ndim > 2 or not logits_at.size:
        raise ValueError(
            f"logits_at is {logits_at.dtype} of shape {logits_at.shape}; it takes integers [], [n] or [b, n]"
        )
    if logits_at.ndim == 2 and logits_at.shape[0] != b:
        raise ValueError(f"logits_at has {logits_at.shape[0]} rows; the input has {b}")
    if known and p is not None and (logits_at.min() < -p or logits_at.max() >= p):
        raise ValueError(f"logits_at goes from {logits_at.min()} to {logits_at.max()}; the input has {p} positions")
    return jnp.asarray(logits_at)


def _runs(config: Gemma3Config, name: str, start: int | jax.Array | None, stop: int | None) -> bool:
    """Whether a run of those layers (None: from the tokens, to the logits) comes by the site."""
    layer = layer_of(name)
    if layer is None:
        return start is None if name.startswith("embed.") else stop is None
    # A traced start may be any.
    return layer in range(config.num_hidden_layers)[start if isinstance(start, int) else None : stop]


def _running(config: Gemma3Config, wanted: Capture, start: int | jax.Array | None, stop: int | None) -> list[Match]:
    matches = [match for match in select(wanted, config) if _runs(config, match.name, start, stop)]
    if not matches and not callable(wanted):
        extent = {"start_at_layer": start, "stop_at_layer": stop}
        given = " and ".join(f"{name} is {layer}" for name, layer in extent.items() if layer is not None)
        raise ValueError(f"{wanted} never runs: {given}")
    return matches


def _layers_needed(config: Gemma3Config, names: Sequence[str]) -> int | None:
    """How many blocks produce those sites; None where one lies behind the last block."""
    if not all(_runs(config, name, None, config.num_hidden_layers) for name in names):
        return None
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)
