"""Globs over names of sites, matched in time that is linear in the glob and in the name.

A regular expression would not do: Python's matcher backtracks, and on a glob of a few stars it may never end.
"""

import collections
import re
from collections.abc import Iterable


def matching(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob matches as a whole.

    `*` matches any characters of one dot-separated part, `?` one of these, and `**` any characters, dots too. Several
    stars in a row are `**`.

    >>> [matching(glob, ["blocks.3.attn.hook_q"]) for glob in ("blocks.*.hook_q", "blocks.**.hook_?", "bl***.attn.*")]
    [[], ['blocks.3.attn.hook_q'], ['blocks.3.attn.hook_q']]
    """
    pieces = re.findall(r"\*+|[^*]", glob)
    shortest = sum(piece[0] != "*" for piece in pieces)
    possible = [name for name in names if len(name) >= shortest]
    if not possible:
        return []
    # The states of the automaton are positions in the glob, as bits of an integer: all are advanced together.
    where: dict[str, int] = collections.defaultdict(int)
    for i, piece in enumerate(pieces):
        where[piece[:2]] |= 1 << i
    across, one = where.pop("**", 0), where.pop("?", 0)
    stars = across | where.pop("*", 0)

    def matches(name: str) -> bool:
        states = _past_stars(1, stars)
        for char in name:
            literal = (states & where.get(char, 0)) << 1
            moved = literal | states & across if char == "." else literal | (states & one) << 1 | states & stars
            states = _past_stars(moved, stars)
            if not states:
                return False
        return bool(states >> len(pieces))

    return [name for name in possible if matches(name)]


def _past_stars(states: int, stars: int) -> int:
    """The states, and those after a star that matches no character. Two stars never follow each other."""
    return states | (states & stars) << 1
