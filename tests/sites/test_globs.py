"""Globs match what their definition says, in time that does not explode."""

import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3_jax import Gemma3Config, UnknownSite
from gemma3_jax.sites.globs import alternatives, matching
from gemma3_jax.sites.names import rows_named, select


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


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("a{b,c}d", ["abd", "acd"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("{a,b{c,d{e,f}}}g", ["ag", "bcg", "bdeg", "bdfg"]),
        ("{,a}b", ["b", "ab"]),
        ("{a}b", ["ab"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{0..1,5}.x", ["0.x", "1.x", "5.x"]),
        ("{a,a,b}", ["a", "b"]),
        ("a,b", ["a,b"]),
        ("0..3", ["0..3"]),
        ("", [""]),
    ],
)
def test_braces(glob, names):
    """Several, nested, empty, with one alternative, and ranges of numbers; outside braces, a comma is a comma."""
    assert alternatives(glob) == names


@pytest.mark.parametrize("glob", ["blocks.{5,9.hook_out", "blocks.5,9}.hook_out", "}{", "{a,{b}", "blocks.*.{"])
def test_braces_without_a_partner_are_refused(glob):
    """And the message has the glob, wherever a name is taken."""
    for take in (alternatives, lambda glob: select(glob, Gemma3Config.preset("270m")), rows_named):
        with pytest.raises(ValueError, match="without a partner"):
            take(glob)


@pytest.mark.parametrize("glob", ["{a,b}" * 40, "{0..99999}", "{9..2}", "{" * 3000 + "}" * 3000])
def test_braces_that_explode_are_refused(glob):
    """In no time, and with one clear error; a range counts upwards."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"stand for more|down to|nested"):
        alternatives(glob)
    assert time.monotonic() - start < 1


def test_braces_select_sites():
    """By any kind of name, beside stars; and an alternative without a site is an error, as its name alone is."""
    config = Gemma3Config.preset("270m")

    def chosen(glob):
        return [match.name for match in select(glob, config)]

    assert chosen("blocks.{5,9}.hook_out") == ["blocks.5.hook_out", "blocks.9.hook_out"]
    assert (
        chosen("model.layers.{9,5}.output") == chosen("blocks.{5,9}.hook_resid_post") == chosen("blocks.{5,9}.hook_out")
    )
    assert chosen("blocks.{0..17}.hook_out") == chosen("blocks.*.hook_out")
    assert chosen("blocks.1?.attn.hook_{q,k}") == chosen(["blocks.1?.attn.hook_q", "blocks.1?.attn.hook_k"])
    with pytest.raises(UnknownSite, match=r"blocks\.18\.hook_out"):
        select("blocks.{17,18}.hook_out", config)
    assert {row.name for row in rows_named("blocks.{i}.hook_{in,out}")} == {"blocks.{i}.hook_in", "blocks.{i}.hook_out"}
