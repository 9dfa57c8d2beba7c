"""What edits need, and whether they can have it where they are placed.

An edit is any callable, `edit(value, hook) -> value`. A class may say what it needs by these optional members, which
are read before anything runs, as those of the ready-made edits are:

- `needs_whole_text = True`: it computes from all tokens at once, so it cannot act on new tokens, which come one by one.
- `depends_on_layout = True`: it reads the site's axes or name, so it sees the table's layout under every name.
- `varies_by_position(axes) -> bool`: whether it has values for single positions of a site with these axes (one letter
  each), which must then stay where they are.
- `depends_on_length(axes) -> bool`: whether its result at a token depends on the number of columns, so that a run may
  not add masked ones. Only ready-made edits are asked; other edits may depend on it.
- `check(names, config, extent, new)`: raises a ValueError for a value that the input, or `new` decode steps after it,
  cannot have. `names` are the canonical names of its sites, `extent` is a `gemma3_jax.positions.Extent`.

Axes: b batch, p position, n indices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

import einops
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks import restrictions
from gemma3_jax.hooks.edits import FromRow, OfValues, ReadyMade
from gemma3_jax.hooks.interception import Edit, Hook, InLayout, Phase, Reading
from gemma3_jax.hooks.restrictions import Index, Only, as_index
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.inputs import as_array, lists_as_arrays
from gemma3_jax.positions import Extent
from gemma3_jax.sites.table import HEAD_COPIES, site


def nested(edit: Edit) -> Iterator[Edit]:
    """The edit, the one that it restricts or rearranges, and so on to the innermost."""
    yield edit
    while isinstance(edit, Only | InLayout | Reading):
        edit = edit.edit
        yield edit


def phases(edit: Edit) -> set[str]:
    """The phases in which an edit acts."""
    restricted = [{each.phase} for each in nested(edit) if isinstance(each, Only) and each.phase]
    return set(get_args(Phase)).intersection(*restricted)


def check(edit: Edit, names: Sequence[str], config: Gemma3Config, extent: Extent, new: int = 0) -> None:
    """Raise ValueError for an edit that never acts or is out of range. For traced arrays, only the shape is checked.

    Args:
        edit: any edit.
        names: canonical names of the sites where it is placed.
        config: shape of the model.
        extent: extent of the input.
        new: number of decode steps after the input; an edit sees one token in each.

    Raises:
        ValueError: the message names the edit or restriction, its value and the site.
    """
    acts_in = phases(edit)
    if not acts_in:
        raise ValueError(f"an edit at {names[0]} is restricted to both phases at once, so it never acts")
    new = new if "generation" in acts_in else 0
    for each in nested(edit):
        if hasattr(each, "check"):
            each.check(names, config, extent, new)
        if new and getattr(each, "needs_whole_text", False):
            raise ValueError(
                f"{type(each).__name__} at {names[0]} needs the whole text, but new tokens come one by one; "
                'restrict it to the prompt: edits.only(edit, phase="prompt")'
            )


def check_generation(edit: Edit, name: str, shortest: int, new: int, moved: bool) -> None:
    """Raise ValueError for an edit with values for positions that move, or one for new tokens that never acts.

    Args:
        edit: an edit at the site `name`.
        name: canonical name.
        shortest: tokens of the prompt's shortest row.
        new: number of decode steps; the model does not run on the last new token.
        moved: whether the prompt's rows were moved to align their ends.

    Raises:
        ValueError: the message names the site and the remedy.
    """
    if moved and _varies_by_position(edit, site(name).axes.split()):
        raise ValueError(
            f"an edit at {name} has values for positions of the prompt, but its rows are moved to align their ends; "
            'pad them on the left, as `to_tokens(texts, padding_side="left")` does'
        )
    if phases(edit) != {"generation"}:
        return
    if not new:
        raise ValueError(
            f"an edit at {name} is restricted to new tokens, but with max_new_tokens=1 it never runs; increase it"
        )
    for each in nested(edit):
        positions = each.positions if isinstance(each, Only) else None
        if positions is not None and as_index("positions", positions).max() < shortest:
            raise ValueError(
                f"the positions of an edit at {name} are within the prompt, but it is restricted to new tokens; "
                f"positions count from the start of the text: the first new token has {shortest} or more"
            )


def indices_of(edit: Edit) -> list[dict[str, Index]]:
    """The indices of an edit by the name of their restriction; `FromRow` has "rows"."""
    only = [restrictions.restrictions_of(each) for each in nested(edit) if isinstance(each, Only)]
    return only + [{"rows": each.row} for each in nested(edit) if isinstance(each, FromRow)]


def without_lists(edit: Edit, where: str) -> Edit:
    """A ready-made edit at a site with arrays in place of lists of numbers.

    Raises:
        ValueError: it has something else than numbers.
    """
    if isinstance(edit, Only):
        return dataclasses.replace(edit, edit=without_lists(edit.edit, where))
    return lists_as_arrays(edit, f"edits.{type(edit).__name__} at {where}") if _is_ready(edit) else edit


def with_arrays(edit: Edit) -> Edit:
    """A ready-made edit with JAX arrays in place of torch tensors and numbers, whose types `jit` distinguishes."""
    if isinstance(edit, Only):
        return dataclasses.replace(edit, edit=with_arrays(edit.edit))
    if not isinstance(edit, ReadyMade):
        return edit
    edit = jax.tree.map(as_array, edit)
    if not isinstance(edit, OfValues):
        return edit
    return jax.tree.map(lambda leaf: jnp.float32(leaf) if _is_number(leaf) else leaf, edit)


def with_functions(edit: Edit, values: Sequence[jax.ShapeDtypeStruct], hook: Hook, change: Callable[..., Edit]) -> Edit:
    """The edit with `change(function, values, hook)` in place of every function in it that is not a ready-made edit.

    Args:
        edit: any edit.
        values: the shape of the site's value, or several; `change` gets them in the function's layout.
        hook: with shapes in place of arrays.
        change: returns the edit to use.
    """
    if type(edit) is Only or isinstance(edit, Reading):
        return dataclasses.replace(edit, edit=with_functions(edit.edit, values, hook, change))
    if isinstance(edit, InLayout):
        rearranged = [jax.eval_shape(lambda x: einops.rearrange(x, edit.layout), value) for value in values]
        hook = dataclasses.replace(hook, layout=edit.layout)
        return dataclasses.replace(edit, edit=with_functions(edit.edit, rearranged, hook, change))
    return edit if _is_ready(edit) else change(edit, values, hook)


def in_layout(edit: Edit, layout: str) -> Edit:
    """The edit for a site in another layout; `layout` is as in `InLayout`.

    Restrictions, and edits that depend on a site's axes or name, use the table's layout. Restricted edits and all other
    edits see the other layout.
    """
    if isinstance(edit, Only):
        return dataclasses.replace(edit, edit=in_layout(edit.edit, layout))
    return edit if getattr(edit, "depends_on_layout", False) else InLayout(edit, layout)


def some_depend_on_length(edits: Mapping[str, Sequence[Edit]]) -> bool:
    """Whether the values of some edits, by canonical name, may change with the number of masked columns: see below."""
    # With copies for each head, the inputs of q, k and v have another axis, which values may vary along.
    copies = any(name.endswith(HEAD_COPIES) for name in edits)
    inputs = any(name.endswith((".attn.q.hook_in", ".attn.k.hook_in", ".attn.v.hook_in")) for name in edits)
    return (copies and inputs) or any(depends_on_length(edit, name) for name, each in edits.items() for edit in each)


def depends_on_length(edit: Edit, name: str) -> bool:
    """Whether the values of an edit at a text's tokens may change if masked columns follow the text.

    True for edits that read other sites, and at sites with an axis of keys for ready-made edits, which may give weight
    to masked keys, or compute with all keys. Traced functions are for `gemma3_jax.hooks.longer` to decide; only
    their restrictions are asked here.

    Args:
        edit: an edit at the site `name`, whose functions are traced.
        name: canonical name.
    """
    axes = site(name).axes.split()
    function = [isinstance(each, Traced) for each in nested(edit)][-1]
    ready = all(isinstance(each, Only | InLayout | Traced) or _is_ready(each) for each in nested(edit))
    with_keys = {"p", "k"} <= set(axes) and not function
    return not ready or with_keys or _any_says("depends_on_length", edit, axes)


def _varies_by_position(edit: Edit, axes: Sequence[str]) -> bool:
    return _any_says("varies_by_position", edit, axes)


def _any_says(member: str, edit: Edit, axes: Sequence[str]) -> bool:
    """Whether the method `member(axes)` is true for the edit or one in it, each with the axes that it sees."""
    for each in nested(edit):
        if isinstance(each, InLayout):
            axes = each.axes(axes)
        elif hasattr(each, member) and getattr(each, member)(axes):
            return True
    return False


def _is_ready(edit: Edit) -> bool:
    """Whether an edit is ready-made. A subclass may read anything."""
    return isinstance(edit, ReadyMade) and type(edit).__module__ == ReadyMade.__module__


def _is_number(leaf: object) -> bool:
    return isinstance(leaf, int | float | np.integer | np.floating) and not isinstance(leaf, bool)
