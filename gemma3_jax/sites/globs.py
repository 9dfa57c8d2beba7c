"""Globs over names of sites, matched in time that is linear in the glob and in the name.

A regular expression would not do: Python's matcher backtracks, and on a glob of a few stars it may never end.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Iterator

_MOST = 10_000  # names that braces may stand for: a model has fewer layers and heads than that
_DEEPEST = 32


class GlobError(ValueError):
    """Braces that do not pair up, or that stand for too many names."""


def alternatives(glob: str) -> list[str]:
    """The globs without braces that a glob stands for, each once, in the order in which they are written.

    `{a,b}` is `a` or `b`, and `{2..5}` is each of these numbers. Braces may be nested, and a glob may have several.

    Raises:
        GlobError: a brace has no partner, or the braces stand for more than 10,000 names.

    >>> alternatives("blocks.{5,9}.hook_{in,out}")
    ['blocks.5.hook_in', 'blocks.5.hook_out', 'blocks.9.hook_in', 'blocks.9.hook_out']
    >>> alternatives("blocks.{0..2,{7,9}}.hook_out")
    ['blocks.0.hook_out', 'blocks.1.hook_out', 'blocks.2.hook_out', 'blocks.7.hook_out', 'blocks.9.hook_out']
    """
    tokens = re.split(r"([{},])", glob)
    depths = list(itertools.accumulate((token == "{") - (token == "}") for token in tokens))
    if max(depths) > _DEEPEST:
        raise GlobError(f"the braces of {glob[:60]!r} are nested more than {_DEEPEST} deep")
    if depths[-1] or min(depths) < 0:
        raise GlobError(f"{glob!r} has a brace without a partner; write alternatives as in blocks.{{5,9}}.hook_out")
    found = _expanded(glob, iter(tokens), inside=False)
    return list(dict.fromkeys(found))


def _expanded(glob: str, tokens: Iterator[str], inside: bool) -> list[str]:
    """The alternatives up to the end of the glob, or inside braces, up to the closing one."""
    done: list[str] = []
    current = [""]
    for token in tokens:
        if token == "}" or (token == "," and inside):
            done += current
            current = [""]
            if token == "}":
                break
            continue
        following = _expanded(glob, tokens, inside=True) if token == "{" else _numbers(glob, token, inside)
        if len(current) * len(following) + len(done) > _MOST:
            raise GlobError(f"the braces of {glob[:60]!r} stand for more than {_MOST:,} names; use * or **")
        current = [start + end for start, end in itertools.product(current, following)]
    return done if inside else current


def _numbers(glob: str, text: str, inside: bool) -> list[str]:
    """The numbers that `2..5` stands for inside braces; other text stands for itself."""
    found = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", text) if inside else None
    if found is None:
        return [text]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise GlobError(f"{glob!r} counts from {first} down to {last}; write {{{last}..{first}}}")
    return [str(number) for number in range(first, last + 1)]


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
