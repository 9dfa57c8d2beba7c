"""`only`: restricts an edit to layers, positions, heads, batch rows, features or keys, given as traced indices.

Axes: b batch, p position, k key position, h query heads, g key/value heads, n indices.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import call_text
from gemma3_jax.hooks.interception import Edit, Hook, Phase, as_pytree, check_callable
from gemma3_jax.inputs import as_int32
from gemma3_jax.positions import Extent, at_positions
from gemma3_jax.sites.names import layer_of
from gemma3_jax.sites.table import axis_size, site

Index = int | Sequence[int] | np.ndarray | jax.Array

# The restriction for each axis; "k" is the key axis of scores and patterns.
_RESTRICTS = {"b": "rows", "p": "positions", "k": "keys", "h": "heads", "g": "heads"}
_RESTRICTS |= dict.fromkeys("defVn", "features")
_OF_TOKENS = ("positions", "keys")


@flax.struct.dataclass(repr=False)
class Only:
    """An edit and its restrictions; made by `only`."""

    __repr__ = call_text

    edit: Edit
    layer: Index | None = None
    positions: Index | None = None
    heads: Index | None = None
    rows: Index | None = None
    features: Index | None = None
    keys: Index | None = None
    phase: Phase | None = flax.struct.field(pytree_node=False, default=None)

    def check(self, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
        """Raise ValueError if restrictions do not match the sites, or the input and `new` decode steps after it."""
        for name in _one_of_each(names):
            sizes = _sizes(name, config, extent)
            for restriction in dict.fromkeys(_RESTRICTS.values()):
                index = getattr(self, restriction)
                if index is None:
                    continue
                if restriction not in sizes:
                    raise ValueError(
                        f"{name} has no {restriction}; an edit there can be restricted by {', '.join(sizes)}"
                    )
                if restriction not in _OF_TOKENS:
                    _check_shape(restriction, as_index(restriction, index), (sizes[restriction],), name)
                elif extent.columns is not None:
                    if new:
                        _check_growing(restriction, as_index(restriction, index), name)
                    _check_shape(restriction, as_index(restriction, index), (extent.rows, extent.columns), name)
        check_values(restrictions_of(self), names, config, extent, new)

    def varies_by_position(self, axes: Sequence[str]) -> bool:
        """Whether it restricts tokens by array index (booleans) and not by position."""
        indices = (getattr(self, name) for name in _OF_TOKENS)
        return any(as_index("", index).dtype == bool for index in indices if index is not None)

    def depends_on_length(self, axes: Sequence[str]) -> bool:
        """Booleans have the shape of the input."""
        return self.varies_by_position(axes)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The edited value where all restrictions hold, and `value` elsewhere."""
        if self.phase not in (None, hook.phase):
            return value
        edited = self.edit(value, hook)
        if edited is None or jnp.shape(edited) != value.shape:
            return edited  # raises an error later, as for any edit, and must not broadcast
        acts = jnp.asarray(self.layer is None or (hook.layer is not None and jnp.any(self.layer == hook.layer)))
        for axis, letter in enumerate(axes_of(hook.name, value.ndim)):
            restriction = _restriction(letter)
            index = getattr(self, restriction) if restriction else None
            if index is not None:
                # [b, p] for tokens or [1, n] for other axes, with the other axes of the value as 1
                at = _tokens(index, hook, letter) if letter in "pk" else _members(index, value.shape[axis])
                axes = {axis: at.shape[1]} | ({0: at.shape[0]} if letter in "pk" else {})
                acts = acts & at.reshape([axes.get(i, 1) for i in range(value.ndim)])
        return jnp.where(acts, edited, value)


def only(
    edit: Edit,
    *,
    layer: Index | None = None,
    positions: Index | None = None,
    heads: Index | None = None,
    rows: Index | None = None,
    features: Index | None = None,
    keys: Index | None = None,
    phase: Phase | None = None,
) -> Only:
    """Restrict an edit. The restrictions are traced, so one compiled function serves all their values.

    Each takes an index [], several indices [n], or a boolean for each index. Negative indices count from the end. A
    different number of indices recompiles; a boolean mask does not. The edit acts where all restrictions hold.
    Restrictions refer to the axes in the table of sites, for every name of a site.

    Args:
        edit: any edit, ready-made or your own; it may already be restricted.
        layer: blocks where it acts, integers from 0. Name the site with a glob: `"blocks.*.hook_out"`.
        positions: [], [n] or [b, n], positions of tokens as in `Hook.positions`. They count from each row's first real
            token; negative ones count back from its last token, -1. A row without a token there does not change. If
            several documents share a row, positions apply to each document. Or booleans [b, p], by array index. Padding
            is never edited. For scores and patterns, these are positions of queries.
        heads: query heads, or key/value heads at sites of keys and values. (If `hook_attn_in` is edited in the same
            run, k and v have a copy for every query head, and heads are query heads there too.)
        rows: rows of the batch.
        features: indices of the last axis.
        keys: like `positions`, for the keys of scores and patterns.
        phase: "prompt" or "generation" (static): the edit acts on the prompt, or on tokens that the model has
            generated. A run without generation is all prompt.

    Raises:
        TypeError: the edit is not callable.
        ValueError: a restriction is neither integers nor booleans, or is empty. A run raises an error if a restriction
            does not match its sites or input. A traced index that is out of range has no effect.

    >>> from gemma3_jax import TINY, HookedGemma3, edits
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> ablate = edits.only(edits.Replace(0.0), layer=1, heads=[1, 2])
    >>> logits = model.run_with_hooks("ba ke lo ba ke", [("blocks.*.attn.hook_z", ablate)])
    """
    check_callable(edit, "edit", "an edit is a callable, edit(value, hook) -> value")
    named = {"layer": layer, "positions": positions, "heads": heads, "rows": rows, "features": features, "keys": keys}
    indices = {name: as_index(name, x, name != "layer") for name, x in named.items() if x is not None}
    if phase not in (None, *get_args(Phase)):
        raise ValueError(f"phase is {phase!r}; it must be {' or '.join(map(repr, get_args(Phase)))}")
    return Only(as_pytree(edit), **indices, phase=phase)


def restrictions_of(edit: Only) -> dict[str, Index]:
    """The restrictions of one `Only`, by name."""
    indices = {name: getattr(edit, name) for name in ("layer", *dict.fromkeys(_RESTRICTS.values()))}
    return {name: index for name, index in indices.items() if index is not None}


def check_values(
    indices: Mapping[str, Index], names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0
) -> None:
    """Raise ValueError if restrictions (arrays of any shape, by name) are out of range; traced ones are not checked."""
    if "layer" in indices:
        absent = set(_known(as_index("layer", indices["layer"], booleans=False))) - {layer_of(name) for name in names}
        if absent:
            raise ValueError(f"an edit of layer {min(absent)} never acts at {_listed(names)}; layers count from 0")
    for name in _one_of_each(names):
        sizes = _sizes(name, config, extent)
        for restriction, index in indices.items():
            if restriction in sizes and restriction in _OF_TOKENS:
                _check_positions(restriction, as_index(restriction, index), extent, new, name)
            elif restriction in sizes:
                check_range(restriction, as_index(restriction, index), sizes[restriction], name)


def _one_of_each(names: Sequence[str]) -> Iterable[str]:
    """One name for each kind of site."""
    return {site(name): name for name in names}.values()


def _sizes(name: str, config: Gemma3Config, extent: Extent) -> dict[str, int]:
    """The number of indices of each restriction at a site."""
    letters = axes_of(name, len(site(name).axes.split()))
    sizes = {letter: axis_size(letter, config, extent.rows, extent.columns or 0) for letter in letters}
    named = [(_restriction(letter), size) for letter, size in sizes.items()]
    return {restriction: size for restriction, size in named if restriction is not None}


def _restriction(letter: str) -> str | None:
    """The restriction of the axis with this letter; n1 and n2 are both features."""
    return _RESTRICTS.get(letter[0])


def axes_of(name: str, ndim: int) -> list[str]:
    """One letter for each axis of a site's value; "p" is the axis of tokens, or of queries if there are also keys."""
    letters = site(name).axes.split()
    if "p" not in letters:
        letters = ["p" if letter == "k" else letter for letter in letters]
    # If the per-head copies of the residual are edited, the inputs of q, k and v also have an axis of heads.
    return letters if len(letters) == ndim else [*letters[:2], "h", *letters[2:]]


def as_index(name: str, value: object, booleans: bool = True) -> np.ndarray | jax.Array:
    """An index as int32 or booleans, in NumPy unless it is traced, so that it can be checked inside a trace."""
    try:
        index: np.ndarray | jax.Array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        index = jnp.asarray(value)
    except ValueError:  # a ragged list
        index = np.empty(0)
    integers = jnp.issubdtype(index.dtype, jnp.integer)
    if not index.size or not (integers or (booleans and index.dtype == bool)):
        takes = "an integer, several, or booleans" if booleans else "an integer or several"
        raise ValueError(f"{name} is {value!r}; it takes {takes}")
    return as_int32(name, index) if integers else index


def check_range(name: str, index: np.ndarray | jax.Array, size: int, where: str) -> None:
    """Raise ValueError for integers outside -size ... size - 1; traced integers are not checked."""
    wrong = [i for i in _known(index) if not -size <= i < size]
    if wrong:
        raise ValueError(f"{name} has {wrong[0]}; at {where} there are {size}")


def _check_positions(name: str, index: np.ndarray | jax.Array, extent: Extent, new: int, where: str) -> None:
    """Raise ValueError for positions that no token has: an edit there would silently have no effect."""
    if extent.known_positions is None:
        return
    end = max(extent.known_positions) + 1
    wrong = set(_known(index)) - extent.known_positions - set(range(end, end + new))
    if wrong:
        position = min(wrong)
        if -end <= position < end + new:
            raise ValueError(f"{name} has {position}, but no token at {where} has that position")
        raise ValueError(f"{name} has {position}; at {where} there are {end + new}")


def _check_growing(name: str, index: np.ndarray | jax.Array, where: str) -> None:
    """Raise ValueError for indices that depend on the number of tokens, which grows during generation."""
    if index.dtype == bool or min(_known(index), default=0) < 0:
        are = "booleans" if index.dtype == bool else "counted from the end"
        raise ValueError(
            f"the {name} of an edit at {where} are {are}, but the text grows during generation; give positions "
            'from the start, or restrict the edit to the prompt: edits.only(edit, phase="prompt")'
        )


def _check_shape(name: str, index: np.ndarray | jax.Array, full: tuple[int, ...], where: str) -> None:
    """Raise ValueError for booleans without the `full` shape, [b, p] or [n], and for integers of a wrong shape."""
    if index.dtype == bool and index.shape != full:
        raise ValueError(f"{name} has shape {index.shape}; at {where} booleans have shape {full}")
    if index.dtype != bool and index.ndim > 1 and index.shape[:-1] != full[:-1]:
        takes = ["[]", "[n]", f"[{full[0]}, n]"][: 1 + len(full)]
        raise ValueError(f"{name} has shape {index.shape}; at {where} integers have shape {' or '.join(takes)}")


def _tokens(index: Index, hook: Hook, letter: str) -> jax.Array:
    """[b, p] bool: the real tokens at the positions `index`, or where a boolean `index` is true; [b, k] for keys."""
    index = jnp.asarray(index)
    positions, mask, segment_ids = hook.positions, hook.attention_mask, hook.segment_ids
    if letter == "k" and hook.key_positions is not None:
        positions, mask, segment_ids = hook.key_positions, hook.key_mask, None
    if index.dtype == bool:
        if index.shape != positions.shape:
            raise ValueError(f"booleans have shape {index.shape}; {hook.name} has {positions.shape} tokens in this run")
        return index if mask is None else index & mask.astype(bool)
    return jnp.any(at_positions(index, positions, mask, segment_ids), axis=1)


def _members(index: Index, n: int) -> jax.Array:
    """[1, n] bool: which of n indices are in `index`."""
    index = jnp.asarray(index)
    if index.dtype == bool:
        return index[None]
    return jnp.isin(jnp.arange(n), jnp.where(index < 0, index + n, index))[None]


def _known(index: np.ndarray | jax.Array) -> list[int]:
    """The integers of an index; empty if it is traced or boolean."""
    return [] if isinstance(index, jax.core.Tracer) or index.dtype == bool else index.ravel().tolist()


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
