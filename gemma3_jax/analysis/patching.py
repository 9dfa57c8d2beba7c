"""Activation patching: what the model would have said, had one of its activations been that of another run.

Each function takes the corrupted run's input, runs it once for each place with the clean run's activation there, and
returns the metric of every run. They have the names that TransformerLens users know; each is `activation_patching`
with a site and axes from the table below.

Source: Meng et al. 2022 (arXiv 2202.05262), causal tracing; Zhang and Nanda 2023 (arXiv 2309.16042), good practice.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import numpy as np

from gemma3_jax.analysis.sweeps import sweep
from gemma3_jax.cache import ActivationCache
from gemma3_jax.edits import FromCache, Only, only
from gemma3_jax.gradients import Metric
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.sites import axis_size, get_act_name, site
from gemma3_jax.text import Input

Axis = Literal["layer", "pos", "head", "src_pos"]

# Which letters of a site's axes an axis of the result may run over.
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
    attention_mask: Any = None,
    **options: Any,
) -> np.ndarray:
    """The metric of the corrupted run with a clean activation patched in, for every place in turn.

    Runs as one `sweep`: see there for memory, progress, and what an interruption leaves.

    Args:
        model: the model.
        corrupted: the input that is run, text, texts or ids [b, p].
        clean: the other run's `ActivationCache` with the site in every layer, or its input, which is then run. Both
            inputs must have the same shape, position by position.
        metric: `metric(logits) -> []`, see `sweep`.
        name: TransformerLens' shorthand for a site of a block: "resid_pre", "z", "q", "pattern", "mlp_out", ...
        by: axes of the result, "layer" first: "pos" (of the query), "head" (key/value heads at "k" and "v"),
            "src_pos" (the key of a pattern). Where an axis is absent, all of it is patched at once.
        attention_mask: [b, p], 1 at real tokens, of both inputs.
        **options: of `sweep`: `logits_at`, `chunk_size`, `memory_limit`, `progress`, `resume`.

    Returns:
        Float32, one axis for each of `by`: [L, p], [L, h], ...

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> answer = model.to_single_token("lo")
    >>> metric = lambda logits: logits[0, -1, answer]
    >>> grid = activation_patching(model, "ba ke ti ba ke", "ba ke lo ba ke", metric, "resid_pre", ("layer", "pos"))
    >>> grid.shape == (model.config.num_hidden_layers, 6)
    True
    """
    first = get_act_name(name, 0, config=model.config)
    glob = first.replace("blocks.0.", "blocks.*.")
    tokens, mask = model.encode(corrupted, attention_mask)
    cache = clean_cache(model, clean, glob, tokens.shape, mask)
    letters = grid_letters(first, by)
    sizes = model.config.num_hidden_layers, *(axis_size(letter, model.config, *tokens.shape) for letter in letters)
    axes = [axis.ravel() for axis in np.indices(sizes)]
    items = {_RESTRICTION[axis]: index for axis, index in zip(by, axes, strict=True)}
    resume = options.pop("resume", None)
    if resume is not None:
        options["resume"] = np.asarray(resume).reshape(-1)
    found = sweep(model, tokens, _Patch(cache, glob), items, metric, attention_mask=mask, **options)
    return found.reshape(sizes)


@flax.struct.dataclass
class _Patch:
    """The edits of one run: the clean activation, where the item says."""

    cache: ActivationCache
    glob: str = flax.struct.field(pytree_node=False)

    def __call__(self, item: dict[str, Any]) -> dict[str, Only]:
        return {self.glob: only(FromCache(self.cache), **item)}


def clean_cache(
    model: HookedGemma3, clean: ActivationCache | Input, names: Any, shape: tuple[int, ...], attention_mask: Any
) -> ActivationCache:
    """The activations of the clean run at those sites, from its cache or by running it.

    Raises:
        ValueError: the clean run does not have `shape` [b, p] tokens.
    """
    if isinstance(clean, ActivationCache):
        return clean
    tokens, mask = model.encode(clean, attention_mask)
    if tokens.shape != shape:
        raise ValueError(f"the clean input is {tokens.shape} tokens, the corrupted one {shape}; they must be alike")
    return model.run_with_cache(tokens, names, return_type=None, attention_mask=mask)[1]


def grid_letters(name: str, by: tuple[Axis, ...]) -> list[str]:
    """The axes of a site of a block that the axes of a result behind "layer" run over.

    Raises:
        ValueError: "layer" is not first, or the site has no such axis.
    """
    if by[:1] != ("layer",) or len(set(by)) != len(by):
        raise ValueError(f"by is {by}; it begins with 'layer', and names each axis once")
    found = [next((letter for letter in site(name).axes.split() if letter in _LETTERS[axis]), "") for axis in by[1:]]
    for axis, letter in zip(by[1:], found, strict=True):
        if not letter:
            raise ValueError(f"{name} has no axis {axis!r}: its axes are {site(name).axes}")
    return found


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


def _entry(key: str) -> Any:
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
    model: HookedGemma3, corrupted: Input, clean: ActivationCache | Input, metric: Metric, **options: Any
) -> np.ndarray:
    """[3, L, p]: `resid_pre`, `attn_out` and `mlp_out` by layer and position; see `activation_patching`."""
    return _stacked(("resid_pre", "attn_out", "mlp_out"), model, corrupted, clean, metric, **options)


def get_act_patch_attn_head_all_pos_every(
    model: HookedGemma3, corrupted: Input, clean: ActivationCache | Input, metric: Metric, **options: Any
) -> np.ndarray:
    """[5, L, h]: the heads' output, q, k, v and pattern, at all positions at once; see `activation_patching`.

    A key/value head serves h / g query heads: its k and v results stand at each of these.
    """
    keys = [f"attn_head_{part}_all_pos" for part in _PARTS]
    return _stacked(keys, model, corrupted, clean, metric, **options)


def get_act_patch_attn_head_by_pos_every(
    model: HookedGemma3, corrupted: Input, clean: ActivationCache | Input, metric: Metric, **options: Any
) -> np.ndarray:
    """[5, L, p, h]: the heads' output, q, k, v and pattern (by query), by position; see `activation_patching`.

    A key/value head serves h / g query heads: its k and v results stand at each of these.
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
    resume: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """The grids of several sites on one shape; after an interruption the rest is NaN, and is not begun."""
    heads = model.config.num_attention_heads
    grids: list[np.ndarray] = []
    for i, key in enumerate(keys):
        name, by = _TABLE[key]
        if grids and np.isnan(grids[-1]).any():
            grids.append(np.full_like(grids[0], np.nan) if resume is None else resume[i])
            continue
        shared = heads // model.config.num_key_value_heads if name in ("k", "v") else 1
        by_query = by == ("layer", "head", "pos")
        # [L, p, h] -> [L, p, g], [L, h, p] for the pattern
        previous = None if resume is None else resume[i][..., ::shared]
        if by_query and previous is not None:
            previous = previous.swapaxes(1, 2)
        grid = activation_patching(model, corrupted, clean, metric, name, by, resume=previous, **options)
        # [L, h, p] -> [L, p, h], [L, p, g] -> [L, p, h]
        grids.append(np.repeat(grid.swapaxes(1, 2) if by_query else grid, shared, axis=-1))
    return np.stack(grids)
