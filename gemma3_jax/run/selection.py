"""The sites that a run captures and edits: names, globs and predicates, matched and checked."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from gemma3_jax.config import Gemma3Config
from gemma3_jax.hooks.interception import Edit, check_callable
from gemma3_jax.hooks.needs import check, in_layout, with_arrays, without_lists
from gemma3_jax.hooks.reductions import Reduction, Steps, as_steps
from gemma3_jax.positions import Extent
from gemma3_jax.sites.names import Match, described, layer_of, select, site_names
from gemma3_jax.sites.table import of_embedding_head

OneArray = Literal["logits", "loss", "loss_per_row"]
ReturnType = Literal[OneArray, "both", "embedding", None]
LOSSES = ("loss", "both", "loss_per_row")
Capture = str | Iterable[str] | Callable[[str], bool]
# Or a mapping to reductions: see `gemma3_jax.reductions`.
ReducedCapture = Capture | Mapping[str, Reduction | Sequence[Reduction] | None]
EditsByName = Mapping[str, Edit | Sequence[Edit]]
Pair = tuple[Capture, Edit]
Edits = EditsByName | Sequence[Pair | Sequence[Pair]] | Pair


def captures(
    config: Gemma3Config,
    capture: ReducedCapture,
    extent: Extent,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    return_type: ReturnType = "logits",
) -> dict[str, Steps | None]:
    """The reduction of each captured site, by canonical name in the model's order; None captures the whole value.

    `extent` is the extent of the input.

    Raises:
        UnknownSite: a name is not a site, or a glob or predicate does not match a site.
        ValueError: no site of a name runs between `start_at_layer` and `stop_at_layer`; two keys of a mapping name the
            same site; or the input does not have the positions of a reduction.
    """
    if not isinstance(capture, Mapping):
        names = capture if isinstance(capture, Iterable) and not isinstance(capture, str | bytes) else [capture]
        ends = start_at_layer, stop_at_layer, return_type
        kept = {match.name: None for name in names for match in _running(config, name, *ends)}
        return _in_order(config, kept, start_at_layer)
    reduced: dict[str, Steps | None] = {}
    for key, steps in capture.items():
        matches = _running(config, key, start_at_layer, stop_at_layer, return_type)
        _refuse_twice("the captures", reduced, [match.name for match in matches])
        reduced |= {match.name: as_steps(steps, match, extent) for match in matches}
    return _in_order(config, reduced, start_at_layer)


def captured_names(
    config: Gemma3Config,
    capture: Capture,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    return_type: ReturnType = "logits",
) -> tuple[str, ...]:
    """The canonical names of the sites in `capture`, in the model's order; errors as in `captures`.

    Raises:
        ValueError: `capture` has reductions, but whole values are needed.
    """
    if isinstance(capture, Mapping) and any(steps is not None for steps in capture.values()):
        raise ValueError("whole values are needed here: name the sites without reductions")
    return tuple(captures(config, capture, Extent(1, None), start_at_layer, stop_at_layer, return_type))


def placed_edits(
    config: Gemma3Config,
    edits: Edits,
    extent: Extent,
    start_at_layer: int | jax.Array | None = None,
    stop_at_layer: int | None = None,
    new: int = 0,
    return_type: ReturnType = "logits",
) -> dict[str, tuple[Edit, ...]]:
    """The edits by canonical name, in order, each checked against its sites and in their layout.

    `extent` is the extent of the input; `new` is the number of decode steps after it.

    Raises:
        UnknownSite, ValueError: as in `captures`; or an edit would never act or is out of range, or two keys of a
            mapping name the same site.
        TypeError: an edit is not callable.
    """
    placed: dict[str, tuple[Edit, ...]] = {}
    for key, several in pairs_of(edits):
        matched: dict[str, tuple[Edit, ...]] = {}
        for edit in several if isinstance(several, Sequence) and not isinstance(several, str) else (several,):
            for name, each in _placed(config, key, edit, extent, start_at_layer, stop_at_layer, new, return_type):
                matched[name] = (*matched.get(name, ()), each)
        if isinstance(edits, Mapping):  # jit sorts a mapping, so the order of its keys is lost
            _refuse_twice("edits", placed, list(matched))
        placed |= {name: (*placed.get(name, ()), *each) for name, each in matched.items()}
    return placed


def pairs_of(edits: Edits) -> list[tuple[Capture, Edit | Sequence[Edit]]]:
    """The (name, edit) pairs of a mapping, of a list of pairs and of lists of pairs, or of one pair.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(edits, Mapping):
        return list(edits.items())
    if isinstance(edits, tuple) and len(edits) == 2 and (isinstance(edits[0], str) or callable(edits[1])):
        return [edits]
    pairs: list[Any] = []
    items: Any = edits if isinstance(edits, Sequence) and not isinstance(edits, str) else [edits]
    for item in items:
        several = isinstance(item, list) and all(isinstance(pair, tuple) for pair in item)
        pairs += item if several else [item]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"edits are {{name: edit}}, a list of (name, edit) pairs, or one such pair; got {pair!r}")
    return pairs


def _placed(
    config: Gemma3Config,
    key: Capture,
    edit: Edit,
    extent: Extent,
    start: int | jax.Array | None,
    stop: int | None,
    new: int,
    return_type: ReturnType,
) -> list[tuple[str, Edit]]:
    """The (canonical name, edit) pairs for an edit with a name, glob, list or predicate."""
    remedy = "an edit is a callable, edit(value, hook) -> value"
    if callable(key):  # before it is called: it may be the edit of a pair in the wrong order
        check_callable(edit, f"edit at {described(key)}", remedy)
    matches = _running(config, key, start, stop, return_type)
    check_callable(edit, f"edit at {matches[0].name}", remedy)
    edit = without_lists(edit, matches[0].name)
    check(edit, [match.name for match in matches], config, extent, new)
    edit = with_arrays(edit)
    return [(match.name, edit if match.layout is None else in_layout(edit, match.layout)) for match in matches]


def _refuse_twice(what: str, kept: Container[str], names: Sequence[str]) -> None:
    twice = [name for name in names if name in kept]
    if twice:
        raise ValueError(f"two keys of {what} name {twice[0]}; give one key a list, in the order to apply")


def _in_order(
    config: Gemma3Config, kept: Mapping[str, Steps | None], start_at_layer: int | jax.Array | None
) -> dict[str, Steps | None]:
    """The captured names in the model's order."""
    ordered = {name: kept[name] for name in site_names(config) if name in kept}
    inside = [name for name in ordered if layer_of(name) is not None]
    if inside and not isinstance(start_at_layer, int | None):
        raise ValueError(f"{inside[0]} cannot be captured while start_at_layer is traced: its block may not run")
    return ordered


def _running(
    config: Gemma3Config, key: Capture, start: int | jax.Array | None, stop: int | None, return_type: ReturnType
) -> list[Match]:
    """The sites of a key that a run of these layers reaches."""
    selected = select(key, config)
    if not selected:
        raise ValueError(f"{key!r} has no names of sites")
    matches = [match for match in selected if runs(config, match.name, start, stop, return_type)]
    if not matches:
        if stop is None:
            config.check_logits()  # the sites after the last block
        extent: dict[str, object] = {"start_at_layer": start, "stop_at_layer": stop}
        extent |= {"return_type": repr(return_type)} if config.embedding_head is not None else {}
        limits = " and ".join(f"{name} is {layer}" for name, layer in extent.items() if layer is not None)
        asked = f"what the predicate {described(key)} selects" if callable(key) else key
        raise ValueError(f"{asked} never runs: {limits}")
    return matches


def runs(
    config: Gemma3Config,
    name: str,
    start: int | jax.Array | None,
    stop: int | None,
    return_type: ReturnType = "logits",
) -> bool:
    """Whether a run of these layers (None: from the tokens, to the logits or the embedding) reaches the site."""
    layer = layer_of(name)
    if layer is None and (name.startswith("unembed.") or of_embedding_head(name)):
        in_head = of_embedding_head(name)
        return stop is None and config.has_logits and in_head == (return_type == "embedding")
    if layer is None:
        return start is None if name.startswith("embed.") else stop is None and config.has_logits
    # A traced start may be any layer.
    return layer in range(config.num_hidden_layers)[start if isinstance(start, int) else None : stop]
