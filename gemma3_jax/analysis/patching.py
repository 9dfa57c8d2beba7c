"""Activation patching: the model's output if one of its activations came from another run.

Each function runs the corrupted input once for each place, with the clean run's activation at that place, and returns
the metric of every run. The functions have TransformerLens' names. Each is `activation_patching` with a site and axes
from the table below.

Source: Meng et al. 2022 (arXiv 2202.05262), causal tracing; Zhang and Nanda 2023 (arXiv 2309.16042), good practice.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, Unpack, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.analysis.sweeps import SweepOptions, measured_sweep
from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.cache.components import require_whole
from gemma3_jax.grids import named_grid
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.tokenizer import Input, spelled_tokens
from gemma3_jax.hooks.edits import FromCache, Only, only
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.gradients import Metric, scalar
from gemma3_jax.run.selection import Capture, captured_names
from gemma3_jax.sites.names import get_act_name
from gemma3_jax.sites.table import axis_size, shape_of, site
from gemma3_jax.types import Integers, IntegersLike

Axis = Literal["layer", "pos", "head", "src_pos"]

# For each axis of the result, the letters of a site's axes that it may stand for.
_LETTERS = {"pos": "p", "head": "hg", "src_pos": "k"}
_RESTRICTION = {"layer": "layer", "pos": "positions", "head": "heads", "src_pos": "keys"}


def activation_patching(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    name: str,
    by: tuple[Axis, ...],
    *,
    attention_mask: IntegersLike | None = None,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """The metric of the corrupted run with a clean activation patched in, for each place.

    It is one `sweep`, which describes memory, progress, and the result after an interruption.

    Args:
        model: the model.
        corrupted: the input to run: text, texts or ids [b, p].
        clean: the other run's `ActivationCache` with the site in every layer, or its input, which is then run. Both
            inputs must have the same shape, and their positions must correspond.
        metric: `metric(logits) -> []`, see `sweep`.
        name: TransformerLens' shorthand for a site of a block: "resid_pre", "z", "q", "pattern", "mlp_out", ...
        by: axes of the result, "layer" first: "pos" (of the query), "head" (key/value heads at "k" and "v"),
            "src_pos" (the key of a pattern). An axis that is absent is patched as a whole.
        attention_mask: [b, p], 1 at real tokens, of both inputs.
        **options: options of `sweep`: `logits_at`, `chunk_size`, `memory_limit`, `progress`, `resume`.

    Returns:
        Float32, one axis for each of `by`: [L, p], [L, h], ... NaN at positions that only padding has.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> answer = model.to_single_token("lo")
    >>> metric = lambda logits: logits[0, -1, answer]
    >>> grid = activation_patching(model, "ba ke ti ba ke", "ba ke lo ba ke", metric, "resid_pre", ("layer", "pos"))
    >>> grid.shape == (model.config.num_hidden_layers, 6)
    True
    """
    return _grid(model, corrupted, clean, metric, name, by, attention_mask, **options)[0]


def _grid(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    name: str,
    by: tuple[Axis, ...],
    attention_mask: IntegersLike | None = None,
    **options: Unpack[SweepOptions],
) -> tuple[np.ndarray, bool]:
    """`activation_patching`, and whether all its runs were done."""
    first = get_act_name(name, 0, config=model.config)
    glob = first.replace("blocks.0.", "blocks.*.")
    inputs = model.inputs(corrupted, attention_mask)
    cache = clean_cache(model, clean, glob, inputs, attention_mask)
    letters = grid_letters(first, by)
    shape = inputs.tokens.shape
    sizes = model.config.num_hidden_layers, *(axis_size(letter, model.config, *shape) for letter in letters)
    axes = [axis.ravel() for axis in np.indices(sizes)]
    items = {_RESTRICTION[axis]: index for axis, index in zip(by, axes, strict=True)}
    present = _has_a_token(inputs, items)
    resume = options.get("resume")
    if resume is not None:
        if np.shape(resume) != sizes:
            raise ValueError(f"resume has shape {np.shape(resume)}; the result has {sizes}")
        options["resume"] = np.asarray(resume).reshape(-1)[present]
    items = {name: index[present] for name, index in items.items()}
    values, finished = measured_sweep(model, inputs, _Patch(cache, glob), items, metric, check=scalar, **options)
    if not isinstance(values, np.ndarray):  # traced
        return jnp.full(present.shape, jnp.nan).at[np.flatnonzero(present)].set(values).reshape(sizes), finished
    grid = np.full(present.shape, np.nan, np.float32)
    grid[present] = values
    return grid_of_inputs(grid.reshape(sizes), by, f"patching {name}", model, inputs), finished


def grid_of_inputs(
    values: np.ndarray | jax.Array,
    by: Sequence[str],
    what: str,
    model: HookedGemma3,
    inputs: Inputs,
    **labels: Sequence[str],
) -> np.ndarray:
    """The result with the names of its axes, and the tokens if each position has one."""
    plain = inputs.tokens.shape[0] == 1 and inputs.attention_mask is inputs.positions is inputs.segment_ids is None
    tokens = spelled_tokens(model, inputs.tokens[0]) if plain and model.tokenizer is not None else None
    return named_grid(values, by, what, labels, tokens, model.config)


def _has_a_token(inputs: Inputs, items: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] bool: whether a real token has the positions of each item; True if that is not known."""
    known = inputs.extent.known_positions
    present = np.ones(len(next(iter(items.values()))), bool)
    for name in ("positions", "keys"):
        if name in items and known is not None:
            present &= np.isin(items[name], list(known))
    return present


class _Place(TypedDict, total=False):
    """Where one run is patched: a value of each axis of the result."""

    layer: jax.Array
    positions: jax.Array
    heads: jax.Array
    keys: jax.Array


@flax.struct.dataclass
class _Patch:
    """The edits of one run: the clean activation at the item's place."""

    cache: ActivationCache
    glob: str = flax.struct.field(pytree_node=False)

    def __call__(self, item: _Place) -> dict[str, Only]:
        return {self.glob: only(FromCache(self.cache), **item)}


def clean_cache(
    model: HookedGemma3,
    clean: ActivationCache | Input,
    names: Capture,
    corrupted: Inputs,
    attention_mask: IntegersLike | None = None,
) -> ActivationCache:
    """The activations of the clean run at those sites, from its cache, or from a run of its input.

    Args:
        model: the model.
        clean: the clean run's cache, or its input.
        names: the sites.
        corrupted: the corrupted input.
        attention_mask: the mask that the caller gave for both inputs; None if each has its own.

    Raises:
        ValueError: the tokens of the two runs differ in shape, or have padding or documents in different places.
    """
    if isinstance(clean, ActivationCache):
        _check_sizes(clean, names, corrupted.tokens.shape)
        if clean.attention_mask is not None:
            _check_alike("padding", clean.attention_mask, _mask_of(corrupted))
        return clean
    inputs = model.inputs(clean, attention_mask)
    if inputs.tokens.shape != corrupted.tokens.shape:
        raise ValueError(
            f"the clean input has {inputs.tokens.shape} tokens, the corrupted one {corrupted.tokens.shape}; both must "
            "have the same shape"
        )
    _check_alike("padding", _mask_of(inputs), _mask_of(corrupted))
    _check_alike("positions", inputs.positions, corrupted.positions)
    _check_alike("segment_ids", inputs.segment_ids, corrupted.segment_ids)
    return model.run_with_cache(inputs, names, return_type=None)[1]


def _mask_of(inputs: Inputs) -> Integers:
    return np.ones(inputs.tokens.shape, np.int32) if inputs.attention_mask is None else inputs.attention_mask


def _check_alike(what: str, clean: Integers | None, corrupted: Integers | None) -> None:
    """Raise ValueError for known arrays that differ, or of which only one is given."""
    if isinstance(clean, jax.core.Tracer) or isinstance(corrupted, jax.core.Tracer):
        return
    neither = clean is None and corrupted is None
    if not neither and (clean is None or corrupted is None or not np.array_equal(clean, corrupted)):
        raise ValueError(
            f"the {what} of the clean run and of the corrupted one differ, so their tokens do not correspond; pad both "
            "inputs alike"
        )


def _check_sizes(clean: ActivationCache, names: Capture, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a captured site does not have the shape of a run of tokens of this shape."""
    sites = [name for name in captured_names(clean.config, names) if name in clean]
    require_whole(clean, sites)
    for name in sites:
        expected = shape_of(name, clean.config, *shape)
        if clean[name].shape != expected:
            raise ValueError(
                f"the clean cache has shape {clean[name].shape} at {name}; the corrupted run has {expected}. Both runs "
                "must have the same shape, with a batch axis and all positions"
            )


def grid_letters(name: str, by: tuple[Axis, ...]) -> list[str]:
    """The letters of a block site's axes for the axes of the result after "layer".

    Raises:
        ValueError: "layer" is not first, or the site has no such axis.
    """
    axes = get_args(Axis)
    if tuple(by[:1]) != axes[:1] or len(set(by)) != len(by) or not set(by) <= set(axes):
        raise ValueError(f"by is {by!r}; it must begin with 'layer' and name each axis once, of {axes}")
    letters = [next((letter for letter in site(name).axes.split() if letter in _LETTERS[axis]), "") for axis in by[1:]]
    for axis, letter in zip(by[1:], letters, strict=True):
        if not letter:
            raise ValueError(f"{name} has no axis {axis!r}: its axes are {site(name).axes}")
    return letters


_TABLE: dict[str, tuple[str, tuple[Axis, ...]]] = {
    "resid_pre": ("resid_pre", ("layer", "pos")),
    "resid_mid": ("resid_mid", ("layer", "pos")),
    "resid_post": ("resid_post", ("layer", "pos")),
    "attn_out": ("attn_out", ("layer", "pos")),
    "mlp_out": ("mlp_out", ("layer", "pos")),
    "attn_head_out_by_pos": ("z", ("layer", "pos", "head")),
    "attn_head_q_by_pos": ("q", ("layer", "pos", "head")),
    "attn_head_k_by_pos": ("k", ("layer", "pos", "head")),
    "attn_head_v_by_pos": ("v", ("layer", "pos", "head")),
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "pos")),
    "attn_head_pattern_dest_src_pos": ("pattern", ("layer", "head", "pos", "src_pos")),
    "attn_head_out_all_pos": ("z", ("layer", "head")),
    "attn_head_q_all_pos": ("q", ("layer", "head")),
    "attn_head_k_all_pos": ("k", ("layer", "head")),
    "attn_head_v_all_pos": ("v", ("layer", "head")),
    "attn_head_pattern_all_pos": ("pattern", ("layer", "head")),
}


def _entry(key: str) -> functools.partial[np.ndarray]:
    name, by = _TABLE[key]
    function = functools.partial(activation_patching, name=name, by=by)
    function.__doc__ = f"`activation_patching` of {name!r} by {', '.join(by)}."
    return function


get_act_patch_resid_pre = _entry("resid_pre")
get_act_patch_resid_mid = _entry("resid_mid")
get_act_patch_resid_post = _entry("resid_post")
get_act_patch_attn_out = _entry("attn_out")
get_act_patch_mlp_out = _entry("mlp_out")
get_act_patch_attn_head_out_by_pos = _entry("attn_head_out_by_pos")
get_act_patch_attn_head_q_by_pos = _entry("attn_head_q_by_pos")
get_act_patch_attn_head_k_by_pos = _entry("attn_head_k_by_pos")
get_act_patch_attn_head_v_by_pos = _entry("attn_head_v_by_pos")
get_act_patch_attn_head_pattern_by_pos = _entry("attn_head_pattern_by_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _entry("attn_head_pattern_dest_src_pos")
get_act_patch_attn_head_out_all_pos = _entry("attn_head_out_all_pos")
get_act_patch_attn_head_q_all_pos = _entry("attn_head_q_all_pos")
get_act_patch_attn_head_k_all_pos = _entry("attn_head_k_all_pos")
get_act_patch_attn_head_v_all_pos = _entry("attn_head_v_all_pos")
get_act_patch_attn_head_pattern_all_pos = _entry("attn_head_pattern_all_pos")


def get_act_patch_block_every(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """[3, L, p]: `resid_pre`, `attn_out` and `mlp_out` by layer and position; see `activation_patching`."""
    return _stacked(("resid_pre", "attn_out", "mlp_out"), model, corrupted, clean, metric, **options)


def get_act_patch_attn_head_all_pos_every(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """[5, L, h]: the heads' output, q, k, v and pattern, at all positions at once; see `activation_patching`.

    A key/value head serves h / g query heads: its k and v results are repeated for each of them.
    """
    keys = [f"attn_head_{part}_all_pos" for part in _PARTS]
    return _stacked(keys, model, corrupted, clean, metric, **options)


def get_act_patch_attn_head_by_pos_every(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """[5, L, p, h]: the heads' output, q, k, v and pattern (by query), by position; see `activation_patching`.

    A key/value head serves h / g query heads: its k and v results are repeated for each of them.
    """
    keys = [f"attn_head_{part}_by_pos" for part in _PARTS]
    return _stacked(keys, model, corrupted, clean, metric, **options)


_PARTS = ("out", "q", "k", "v", "pattern")


def _stacked(
    keys: Sequence[str],
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """The grids of several sites in one shape. After an interruption, the remaining grids stay NaN."""
    resume = options.get("resume")
    heads = model.config.num_attention_heads
    grids: list[np.ndarray] = []
    for i, key in enumerate(keys):
        name, by = _TABLE[key]
        shared = heads // model.config.num_key_value_heads if name in ("k", "v") else 1
        by_query = by == ("layer", "head", "pos")
        # [L, p, h] -> [L, p, g], [L, h, p] for the pattern
        previous = None if resume is None else resume[i][..., ::shared]
        if by_query and previous is not None:
            previous = previous.swapaxes(1, 2)
        options["resume"] = previous
        try:
            grid, finished = _grid(model, corrupted, clean, metric, name, by, **options)
        except KeyboardInterrupt:  # before any run of this grid was done
            if not grids:
                raise
            warnings.warn(
                f"interrupted: the grids from {name} on are NaN; pass the result as `resume` to continue", stacklevel=4
            )
            break
        # [L, h, p] -> [L, p, h], [L, p, g] -> [L, p, h]
        grids.append(grid.swapaxes(1, 2) if by_query else grid.repeat(shared, axis=-1))
        if not finished:
            break
    rest = [np.full_like(grids[0], np.nan) if resume is None else resume[i] for i in range(len(grids), len(keys))]
    names, axes = [_TABLE[key][0] for key in keys], ("site", *_TABLE[keys[0]][1])
    values = (jnp if isinstance(grids[0], jax.Array) else np).stack(grids + rest)  # JAX's if traced
    what = f"patching {', '.join(names)}"
    return grid_of_inputs(values, axes, what, model, model.inputs(corrupted), site=names)
