"""Globs match what their definition says, in time that does not explode."""

import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3_jax import Gemma3Config, UnknownSite
from gemma3_jax.sites.globs import matching
from gemma3_jax.sites.names import select


@functools.cache
def matches(glob: str, name: str) -> bool:
    """The definition, by trying everything."""
    if not glob:
        return not name
    if glob.startswith("**"):
        return any(matches(glob.lstrip("*"), name[i:]) for i in range(len(name) + 1))
    if glob[0] == "*":
        part = len(name.split(".")[0])
        return any(matches(glob[1:], name[i:]) for i in range(part + 1))
    return bool(name) and (glob[0] == name[0] or (glob[0] == "?" and name[0] != ".")) and matches(glob[1:], name[1:])


@given(st.text("ab.?*", max_size=10), st.lists(st.text("ab.", max_size=10)))
def test_globs_match_what_the_definition_says(glob, names):
    """Any glob, on any names."""
    assert matching(glob, names) == [name for name in names if matches(glob, name)]


@given(st.data())
def test_globs_made_from_a_name_match_it(data):
    """So that most examples are not refusals: each character of a name is replaced by something that covers it."""
    name = data.draw(st.text("ab.", max_size=12))
    cover = {"a": ["a", "?", "*", "**", "*a", "a*"], "b": ["b", "?", "*", "b**"], ".": [".", "**", "*.", ".*", "***"]}
    glob = "".join(data.draw(st.sampled_from(cover[char])) for char in name)
    assert matching(glob, [name]) == [name]
    assert matches(glob, name)


HANG = [
    "*" * 31 + "x",
    "*o" * 15 + "x",
    "**o" * 15 + "x",
    "*" * 10**6 + "x",
    "?*" * 10**5,
    "x" * 10**5 + "*",
    "*.?**" * 9 + "x",
]


@pytest.mark.parametrize("glob", HANG, ids=lambda glob: f"{glob[:6]}-{len(glob)}")
def test_no_glob_hangs(glob):
    """On the model with the most sites, whether there is a match or not; a regular expression would never end."""
    start = time.monotonic()
    with pytest.raises(UnknownSite):
        select(glob, Gemma3Config.preset("27b"))
    assert time.monotonic() - start < 5
