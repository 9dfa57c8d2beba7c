"""`only`: an edit restricted to layers, positions, heads, batch rows, features or keys, all of them data.

Axes: b batch, p position, k key position, h query heads, g key/value heads, n wanted indices.
"""

from collections.abc import Sequence
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks import Edit, Hook, Phase, as_pytree
from gemma3_jax.positions import Shape, at_positions
from gemma3_jax.sites import axis_size, layer_of, site

Index = int | Sequence[int] | np.ndarray | jax.Array

# Which restriction speaks of an axis; "k" is the key axis of scores and patterns.
_RESTRICTS = {"b": "rows", "p": "positions", "k": "keys", "h": "heads", "g": "heads"}
_RESTRICTS |= dict.fromkeys("defV", "features")
_OF_TOKENS = ("positions", "keys")


@flax.struct.dataclass
class Only:
    """An edit and the places where it acts; made by `only`."""

    edit: Any
    layer: Any = None
    positions: Any = None
    heads: Any = None
    rows: Any = None
    features: Any = None
    keys: Any = None
    phase: Phase | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The edited value where all restrictions hold, `value` elsewhere."""
        if self.phase not in (None, hook.phase):
            return value
        edited = self.edit(value, hook)
        if edited is None or jnp.shape(edited) != value.shape:
            return edited  # to be refused, as from any edit, and not broadcast
        here = jnp.asarray(self.layer is None or (hook.layer is not None and jnp.any(self.layer == hook.layer)))
        for axis, letter in enumerate(axes_of(hook.name, value.ndim)):
            wanted = getattr(self, _RESTRICTS[letter]) if letter in _RESTRICTS else None
            if wanted is not None:
                # [b, p] tokens, or [1, n] others, at their place among the value's axes
                at = _tokens(wanted, hook, letter) if letter in "pk" else _members(wanted, value.shape[axis])
                axes = {axis: at.shape[1]} | ({0: at.shape[0]} if letter in "pk" else {})
                here = here & at.reshape([axes.get(i, 1) for i in range(value.ndim)])
        return jnp.where(here, edited, value)


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
    """Restrict an edit; the restrictions are data, so that one compiled function serves all their values.

    Each takes an index [] or several [n], negative ones counted from the end, or booleans, one for each index that
    there is. How many there are is part of the shape, and compiles anew; booleans keep one shape. All restrictions
    must hold at once. They speak of the axes that the table of sites gives, whichever of a site's names is used.

    Args:
        edit: any edit, ready-made or your own, restricted already or not.
        layer: blocks where it acts, integers from 0. Name the site by a glob: `"blocks.*.hook_out"`.
        positions: [], [n] or [b, n], positions of tokens as `Hook.positions` has them: counted over each row's real
            tokens, -1 the last. A row without such a position stays as it is. Or booleans [b, p], in the array's
            order. Padding is never touched. For scores and patterns, the positions of the query.
        heads: query heads, or key/value heads at the sites that have those. (While `hook_attn_in` is edited in the
            same run, k and v have a copy for every query head, and heads are query heads there too.)
        rows: rows of the batch.
        features: of the last axis.
        keys: like `positions`, for the keys of scores and patterns.
        phase: "prompt" or "generation" (static): while a prompt is read, or at the tokens that the model has written.
            A run that does not generate is all prompt.

    Raises:
        TypeError: the edit is no callable.
        ValueError: a restriction that is neither integers nor booleans, or is empty. What does not fit the sites or
            the input is an error where the edit is placed; a traced index that is out of range acts nowhere.

    >>> from gemma3_jax import TINY, HookedGemma3, edits
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> ablate = edits.only(edits.Replace(0.0), layer=1, heads=[1, 2])
    >>> logits = model.run_with_hooks("ba ke lo ba ke", [("blocks.*.attn.hook_z", ablate)])
    """
    if not callable(edit):
        raise TypeError(f"the edit is {edit!r}; an edit is a callable, edit(value, hook) -> value")
    given = {"layer": layer, "positions": positions, "heads": heads, "rows": rows, "features": features, "keys": keys}
    indices = {name: as_index(name, x, name != "layer") for name, x in given.items() if x is not None}
    if phase not in (None, *get_args(Phase)):
        raise ValueError(f"phase is {phase!r}; it takes {' and '.join(map(repr, get_args(Phase)))}")
    return Only(as_pytree(edit), **indices, phase=phase)


def check_only(edit: Only, names: Sequence[str], config: Gemma3Config, shape: Shape, new: int = 0) -> None:
    """Refuse restrictions that do not fit the sites `names`, or `new` tokens behind an input of `shape` (b, p)."""
    if edit.layer is not None:
        absent = set(_known(as_index("layer", edit.layer, booleans=False))) - {layer_of(name) for name in names}
        if absent:
            raise ValueError(f"an edit of layer {min(absent)} never acts at {_listed(names)}; layers count from 0")
    for name in {site(name): name for name in names}.values():
        letters = axes_of(name, len(site(name).axes.split()))
        b, p = shape[0], None if shape[1] is None else shape[1] + new
        sizes = {_RESTRICTS[c]: axis_size(c, config, b or 0, p or 0) for c in letters if c in _RESTRICTS}
        for restriction in dict.fromkeys(_RESTRICTS.values()):
            wanted = getattr(edit, restriction)
            if wanted is not None and restriction not in sizes:
                raise ValueError(f"{name} has no {restriction}; an edit there can be restricted by {', '.join(sizes)}")
            # Of tokens whose positions were given, as any, there is nothing to check.
            if wanted is not None and not (restriction in _OF_TOKENS and p is None):
                index, full = as_index(restriction, wanted), (sizes[restriction],)
                if new and restriction in _OF_TOKENS:
                    _check_growing(restriction, index, name)
                _check_shape(restriction, index, (b or 0, p or 0) if restriction in _OF_TOKENS else full, name)
                check_range(restriction, index, sizes[restriction], name)


def has_booleans(edit: Only) -> bool:
    """Whether it speaks of tokens by their place in the array, and not by their position."""
    given = (getattr(edit, name) for name in _OF_TOKENS)
    return any(as_index("", wanted).dtype == bool for wanted in given if wanted is not None)


def axes_of(name: str, ndim: int) -> list[str]:
    """One letter for each axis of a site's value; "p" is its token axis, of queries where there are two."""
    letters = site(name).axes.split()
    if "p" not in letters:
        letters = ["p" if letter == "k" else letter for letter in letters]
    # While the copies of the residual for each head are edited, so are the inputs of q, k and v.
    return letters if len(letters) == ndim else [*letters[:2], "h", *letters[2:]]


def as_index(name: str, value: Any, booleans: bool = True) -> np.ndarray | jax.Array:
    """Integers (int32) or booleans: in NumPy, unless they are traced, so that they can be checked inside a trace."""
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
    return index.astype(jnp.int32) if integers else index


def check_range(name: str, index: np.ndarray | jax.Array, size: int, where: str) -> None:
    """Refuse integers outside of -size ... size - 1; what is being traced has no range to check."""
    wrong = [i for i in _known(index) if not -size <= i < size]
    if wrong:
        raise ValueError(f"{name} has {wrong[0]}; at {where} there are {size}")


def _check_growing(name: str, index: np.ndarray | jax.Array, where: str) -> None:
    """Refuse what speaks of the tokens that there are, while more are written."""
    if index.dtype == bool or min(_known(index), default=0) < 0:
        are = "booleans" if index.dtype == bool else "counted from the end"
        raise ValueError(
            f"the {name} of an edit at {where} are {are}, of a text that grows while it is written; give positions "
            'from the start, or keep the edit to the prompt: edits.only(edit, phase="prompt")'
        )


def _check_shape(name: str, index: np.ndarray | jax.Array, full: tuple[int, ...], where: str) -> None:
    """Refuse booleans that are not of the `full` shape, [b, p] or [n], and integers that do not fit beside it."""
    if index.dtype == bool and index.shape != full:
        raise ValueError(f"{name} has shape {index.shape}; at {where} booleans have shape {full}")
    if index.dtype != bool and index.ndim > 1 and index.shape[:-1] != full[:-1]:
        takes = ["[]", "[n]", f"[{full[0]}, n]"][: 1 + len(full)]
        raise ValueError(f"{name} has shape {index.shape}; at {where} integers have shape {' or '.join(takes)}")


def _tokens(wanted: Any, hook: Hook, letter: str) -> jax.Array:
    """[b, p] bool: the real tokens at the wanted positions, or where a boolean `wanted` is true; [b, k] for keys."""
    wanted = jnp.asarray(wanted)
    positions, mask = hook.positions, hook.attention_mask
    if letter == "k" and hook.key_positions is not None:
        positions, mask = hook.key_positions, hook.key_mask
    if wanted.dtype == bool:
        if wanted.shape != positions.shape:
            raise ValueError(
                f"booleans have shape {wanted.shape}; {hook.name} has {positions.shape} tokens in this run"
            )
        return wanted if mask is None else wanted & mask.astype(bool)
    return jnp.any(at_positions(wanted, positions, mask), axis=1)


def _members(wanted: Any, n: int) -> jax.Array:
    """[1, n] bool: which of n indices are wanted."""
    wanted = jnp.asarray(wanted)
    if wanted.dtype == bool:
        return wanted[None]
    return jnp.isin(jnp.arange(n), jnp.where(wanted < 0, wanted + n, wanted))[None]


def _known(index: np.ndarray | jax.Array) -> list[int]:
    """The integers in an index that is not being traced."""
    return [] if isinstance(index, jax.core.Tracer) or index.dtype == bool else index.ravel().tolist()


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
