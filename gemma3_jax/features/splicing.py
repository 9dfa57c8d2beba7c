"""Edits with dictionaries: reconstructions in place of values, features that are set or scaled, and steering.

Axes: d features of a site, n changed features, f features of the dictionary, l and m layers that are read and written;
`...` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gemma3_jax.features.changes import Changed, changes_of
from gemma3_jax.features.layered import Crosscoder
from gemma3_jax.features.parts import LAYERED, Feature, Part, parts_of, reader_of, restricted_to, written
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.unchecked import warn_if_unchecked
from gemma3_jax.hooks.edits import Add
from gemma3_jax.hooks.interception import Edit, Hook, Phase, Reading
from gemma3_jax.hooks.restrictions import Index
from gemma3_jax.hooks.restrictions import only as restricted
from gemma3_jax.inputs import as_array
from gemma3_jax.sites.table import site

Pair: TypeAlias = tuple[str, Edit]


class Restrictions(TypedDict, total=False):
    """The arguments of `edits.only`, without positions."""

    layer: Index
    heads: Index
    rows: Index
    features: Index
    keys: Index
    phase: Phase


def splice(
    sae: Dictionary,
    error: bool = True,
    *,
    set: Mapping[Feature, ArrayLike] | None = None,
    scale: Mapping[Feature, ArrayLike] | None = None,
    ablate: Sequence[Feature] = (),
    positions: Index | None = None,
    only: Restrictions | None = None,
) -> Pair | list[Pair]:
    """Edits that put a dictionary into the model, with some of its features changed.

    With the error term, which is the value minus its reconstruction and stays as it is, only the changed features
    change the value. Without it, the value becomes the reconstruction. A transcoder reads its input in the same run,
    after the edits there. Everything is computed in float32.

    Several dictionaries may be spliced at once: pass all the pairs. Features, values and factors are data, so that
    others do not compile anything, as long as there are as many.

    Args:
        sae: of any kind but `Crosscoder`, whose features write to layers before those that they are read from.
        error: whether to keep the error term.
        set: values [] by feature, or [p] or [b, p], such as those of another run: activation patching of features.
            In a dictionary of several layers, a feature is (layer, index), with the number of the model's layer.
        scale: factors by feature, likewise.
        ablate: features that are set to 0.
        positions: where to act, as in `edits.only`; by default at all tokens, BOS among them, which dictionaries do
            not reconstruct.
        only: other restrictions, by the name of the argument of `edits.only`: {"phase": "generation"}, {"rows": [0]}.

    Returns:
        One (site, edit) pair; or a list of pairs, of a dictionary that writes to several layers. Both can be elements
        of a list of edits.

    Raises:
        ValueError: a feature is not one of the dictionary, or is named twice; or the dictionary is a `Crosscoder`.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> d = model.config.hidden_size
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=jnp.eye(d), b_enc=jnp.zeros(d), W_dec=jnp.eye(d), b_dec=jnp.zeros(d), activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> logits = model.run_with_hooks("ba ke lo", [features.splice(sae, set={3: 0.0, 7: 12.5})])
    >>> text = model.generate("ba ke lo", 2, fwd_hooks=[features.splice(sae, ablate=[3], only={"phase": "generation"})])
    """
    if isinstance(sae, Crosscoder):
        raise ValueError(
            "the features of a crosscoder write to layers before those that they are read from, so one run cannot "
            "splice it; steer its features, or replace the sites by its outputs with edits.Replace"
        )
    warn_if_unchecked(sae)
    changed = changes_of(sae, set or {}, scale or {}, ablate)
    pairs: list[Pair] = []
    for site_out, parts in parts_of(sae).items():
        changes = tuple(changed[reader].of(part) for reader, part in parts.items() if reader in changed)
        spliced = Splice(changes, () if error else tuple(parts.values()))
        if changes or not error:
            pairs.append((site_out, _placed(spliced, spliced.reads(site_out), positions, only)))
        elif not isinstance(sae, LAYERED):
            pairs.append((site_out, _placed(spliced, (), positions, only)))
    return pairs if isinstance(sae, LAYERED) else pairs[0]


@flax.struct.dataclass
class Splice:
    """An edit that changes features, of which some are in `reconstructing` dictionaries; made by `splice`.

    Attributes:
        changes: what the changed features add.
        reconstructing: dictionaries whose outputs replace the value, as a sum; without any, the value stays.
    """

    changes: tuple[Changed, ...]
    reconstructing: tuple[Part, ...]

    def reads(self, name: str) -> tuple[str, ...]:
        """The sites that it reads, at the site `name`, beside the value there."""
        parts = (*self.reconstructing, *(change.part for change in self.changes))
        return tuple(dict.fromkeys(part.site_in for part in parts if part.site_in != name))

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The edited value, in the shape of the site."""

        def read(part: Part) -> jax.Array:
            return value if part.site_in == hook.name else (hook.read or {})[part.site_in]

        outputs = [part(read(part)).reshape(value.shape) for part in self.reconstructing]
        outputs += [change(read(change.part)).reshape(value.shape) for change in self.changes]
        return sum(outputs, jnp.zeros_like(value) if self.reconstructing else value)


def _placed(edit: Edit, reads: tuple[str, ...], positions: Index | None, only: Restrictions | None) -> Edit:
    """The edit with the values that it reads, restricted."""
    edit = Reading(edit, reads) if reads else edit
    return edit if positions is None and not only else restricted(edit, positions=positions, **(only or {}))


def steer(
    sae: Dictionary,
    f: Feature,
    strength: ArrayLike,
    relative: bool = True,
    *,
    positions: Index | None = None,
    only: Restrictions | None = None,
) -> Pair | list[Pair]:
    """Edits that add a feature's decoder row to the values of the sites that it writes to.

    Args:
        sae: of any kind.
        f: a feature, as in `splice`.
        strength: with `relative`, in lengths of each value, along the decoder row: 0.1 moves a value by a tenth of its
            length. Otherwise in units of the feature: what it adds if it is larger by so much. Of a feature that writes
            to several layers, the largest row gets that strength, and the others less in proportion.
        relative: see there.
        positions: as in `splice`.
        only: as in `splice`.

    Returns:
        One (site, edit) pair, or a list of pairs, as `splice` does. The feature and the strength are data.

    Raises:
        ValueError: the feature is not one of the dictionary.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> d = model.config.hidden_size
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=jnp.eye(d), b_enc=jnp.zeros(d), W_dec=jnp.eye(d), b_dec=jnp.zeros(d), activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> text = model.generate("ba ke lo", max_new_tokens=2, fwd_hooks=[features.steer(sae, 3, 0.5)])
    """
    warn_if_unchecked(sae)
    reader, index = reader_of(sae, f)
    parts = {name: parts[reader] for name, parts in parts_of(sae).items() if reader in parts}
    rows = {name: restricted_to(part, jnp.asarray(index)[None]) for name, part in parts.items()}
    lengths = {name: jnp.linalg.norm(part.decoder.astype(jnp.float32)) for name, part in rows.items()}
    strength = jnp.asarray(as_array(strength), jnp.float32)
    pairs: list[Pair] = []
    for name, part in rows.items():
        share = lengths[name] / jnp.maximum(jnp.max(jnp.stack([*lengths.values()])), 1e-30) if relative else 1.0
        steered = Steer(part, share * strength, relative)
        # Without heads and normalization it is a ready-made edit, which is not traced at each call.
        plain = part.normalization is None and "h" not in site(name).axes.split()
        edit = Add(part.decoder[0], steered.strength, relative=relative) if plain else steered
        pairs.append((name, _placed(edit, (), positions, only)))
    return pairs if isinstance(sae, LAYERED) else pairs[0]


@flax.struct.dataclass
class Steer:
    """An edit that adds the decoder row of the only feature of `part`; made by `steer`."""

    part: Part
    strength: jax.Array
    relative: bool = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The sum, in the shape and dtype of `value`."""
        # [b, p, ...] -> [b, p, d]
        flat = value.reshape(*value.shape[:2], -1)
        if self.relative:
            moved = Add(self.part.decoder[0], self.strength, relative=True)(flat, hook)
        else:
            moved = flat + written(self.part, jnp.broadcast_to(self.strength, (*flat.shape[:2], 1)), flat)
        return moved.reshape(value.shape)
