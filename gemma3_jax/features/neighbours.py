"""The sites that a dictionary is confused with: those near the ones that it names.

Axes: d features of a site.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from gemma3_jax.config import Gemma3Config
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.sites.names import block, layer_of, site_names

# One site of a block for each different value [b, p, d], in the model's order: before and after each norm, and with and
# without its gain.
_KINDS = (
    "hook_in",
    "ln1.hook_normalized",
    "ln1.hook_out",
    "attn.o.hook_out",
    "ln1_post.hook_normalized",
    "ln1_post.hook_out",
    "ln2.hook_in",
    "ln2.hook_normalized",
    "ln2.hook_out",
    "mlp.out.hook_out",
    "ln2_post.hook_normalized",
    "ln2_post.hook_out",
    "hook_out",
)


class Place(NamedTuple):
    """Where a dictionary may belong.

    Attributes:
        name: of the site that differs; with "*" for the layers of a dictionary of several.
        argument: the arguments of `load` that would say so.
        read: canonical names of the sites that are read.
        written: those of the sites that are written.
    """

    name: str
    argument: str
    read: tuple[str, ...]
    written: tuple[str, ...]


def place_of(sae: Dictionary) -> Place:
    """Where the dictionary says that it belongs."""
    read, written = _tuple(sae.site_in), _tuple(sae.site_out)
    return Place(_named(read), "site_in", read, written)


def neighbours(sae: Dictionary, config: Gemma3Config) -> list[Place]:
    """The places near that of the dictionary: other sites of its blocks, and the same sites of the layers beside."""
    own = place_of(sae)
    known = set(site_names(config))
    places = [place for place in _near(own) if known.issuperset((*place.read, *place.written))]
    return list({place[2:]: place for place in places if place[2:] != own[2:]}.values())


def _near(own: Place) -> Iterator[Place]:
    same = own.read == own.written
    for kind in _KINDS:
        read, written = _moved(own.read, kind=kind), _moved(own.written, kind=kind)
        if same:
            yield Place(_named(read), "site_in", read, read)
        else:
            yield Place(_named(read), "site_in", read, own.written)
            yield Place(_named(written), "site_out", own.read, written)
    for by in (-1, 1):
        read, written = _moved(own.read, by), _moved(own.written, by)
        yield Place(_named(read, by), "site_in" if same else "site_in and site_out", read, written)


def _moved(names: tuple[str, ...], by: int = 0, kind: str | None = None) -> tuple[str, ...]:
    """The names in other layers, or of another kind of site."""
    return tuple(
        block((layer_of(name) or 0) + by, kind or name.split(".", 2)[2]) if name.startswith("blocks.") else name
        for name in names
    )


def _named(names: tuple[str, ...], by: int = 0) -> str:
    """One name for the sites."""
    if len(names) == 1:
        return names[0]
    layers = f", {by:+d}" if by else ""
    return re.sub(r"\d+", f"*{layers}", names[0], count=1)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
