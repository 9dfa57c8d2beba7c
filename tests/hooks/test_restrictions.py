"""`edits.only`: an edit acts exactly where its restrictions say, at every kind of site, under every name."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from gemma3_jax import edits
from gemma3_jax.hooks import needs
from gemma3_jax.hooks.interception import apply_edits
from gemma3_jax.sites.names import layer_of, resolve
from gemma3_jax.sites.table import shape_of, site
from tests.helpers.small_model import COPIES, SITES, assert_same, identity, same, small
from tests.hooks.restricted_rows import MARK, MASK, ROWS, B, P, Turn, call, captured, hook_at, plain, some_value

# A site with each kind of axes, and which restrictions these take.
KINDS = {
    "embed.hook_in": ("rows", "positions"),
    "blocks.1.ln2.hook_scale": ("rows", "positions"),
    "blocks.0.mlp.out.hook_in": ("rows", "positions", "features"),
    "ln_final.hook_out": ("rows", "positions", "features"),
    "blocks.0.attn.k_norm.hook_scale": ("rows", "positions", "heads"),
    "blocks.1.attn.o.hook_in": ("rows", "positions", "heads", "features"),
    "blocks.1.attn.hook_rot_k": ("rows", "positions", "heads", "features"),
    "blocks.0.attn.hook_pattern": ("rows", "heads", "positions", "keys"),
}
OF_TOKENS = ("positions", "keys")


def test_the_sites_have_every_kind_of_axes():
    """Control: none in the table is missing above, whichever heads and features they are."""
    kinds, known = ({site(name).axes.translate(str.maketrans("gdfV", "heee")) for name in x} for x in (KINDS, SITES))
    assert kinds == known


def sizes(name: str) -> dict[str, int]:
    """How many indices each restriction has there."""
    shape = dict(zip(site(name).axes.split(), shape_of(name, small()[0], B, P), strict=True))
    axes = {"rows": "b", "positions": "p", "heads": "hg", "features": "defV", "keys": "k"}
    axes |= {"positions": "k"} if "rot_k" in name else {}
    return {each: next(shape[letter] for letter in axes[each] if letter in shape) for each in KINDS[name]}


def axis_of(name: str, restriction: str) -> int:
    """Where it lies among the axes."""
    known = {"rows": 0, "positions": 1, "heads": 2, "features": -1, "keys": 3}
    in_scores = {"heads": 1, "positions": 2}
    return (known | in_scores if "pattern" in name else known)[restriction]


def members(wanted: Any, n: int) -> np.ndarray:
    """[n] bool, by NumPy's own indexing."""
    found = np.zeros(n, bool)
    found[np.asarray(wanted)] = True
    return found


def tokens(wanted: Any, mask: np.ndarray) -> np.ndarray:
    """[b, p] bool: of each row's real tokens those that a list of its own, or of all rows, has as indices."""
    wanted = np.asarray(wanted)
    if wanted.dtype == bool:
        return wanted & (mask == 1)
    found = np.zeros(mask.shape, bool)
    for row, real in enumerate(map(np.flatnonzero, mask)):
        mine = wanted[row] if wanted.ndim == 2 else np.atleast_1d(wanted)
        found[row, [real[i] for i in mine if -len(real) <= i < len(real)]] = True
    return found


def where(name: str, restrictions: dict[str, Any], mask: np.ndarray) -> np.ndarray:
    """Where at that site the edit must act, [b, ...] bool of the site's shape."""
    shape = shape_of(name, small()[0], B, P)
    found = np.full(shape, True)
    for restriction, wanted in restrictions.items():
        if restriction == "layer":
            found &= layer_of(name) in np.atleast_1d(wanted).tolist()
            continue
        axis = axis_of(name, restriction) % len(shape)
        if restriction in OF_TOKENS:
            at, axes = tokens(wanted, mask), (0, axis)
        else:
            at, axes = members(wanted, shape[axis]), (axis,)
        found &= np.expand_dims(at, [i for i in range(len(shape)) if i not in axes])
    return found


def booleans(*shape: int) -> st.SearchStrategy:
    n = math.prod(shape)
    return st.lists(st.booleans(), min_size=n, max_size=n).map(lambda flat: np.asarray(flat).reshape(shape))


def indices(size: int, per_row: bool) -> st.SearchStrategy:
    """One index, three (which may be the same), booleans; for tokens, two indices or booleans per row."""
    one = st.integers(-size, size - 1)
    several = [st.lists(one, min_size=n, max_size=n) for n in (2, 3)]
    if per_row:
        return one | several[1] | st.lists(several[0], min_size=B, max_size=B) | booleans(B, size)
    return one | several[1] | booleans(size)


@st.composite
def places(draw):
    """A site, restrictions that it takes, and a mask with padding on both sides of each row."""
    name = draw(st.sampled_from(sorted(KINDS)))
    drawn = {each: draw(st.none() | indices(size, each in OF_TOKENS)) for each, size in sizes(name).items()}
    if layer_of(name) is not None:
        drawn["layer"] = draw(st.sampled_from([None, None, 0, 1, [0, 2], [1, 1]]))
    restrictions = {each: wanted for each, wanted in drawn.items() if wanted is not None}
    ends = [sorted(draw(st.lists(st.integers(0, P), min_size=2, max_size=2))) for _ in range(B)]
    mask = np.asarray([[first <= i < last for i in range(P)] for first, last in ends], int)
    return name, restrictions, draw(st.sampled_from([mask, mask, np.ones_like(mask)]))


@given(places())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_an_edit_acts_where_its_restrictions_say(place):
    """For any restrictions of any site, and nowhere else: what NumPy's indexing picks of each row's real tokens."""
    name, restrictions, mask = place
    edited = apply_edits([edits.only(edits.Replace(MARK), **restrictions)], some_value(name), hook_at(name, mask))
    expected = np.where(where(name, restrictions, mask), MARK, some_value(name))
    np.testing.assert_array_equal(edited, expected.astype(np.float32))


# By hand, in the rows above: what is restricted, and the places where that is.
BY_HAND = {
    "embed.hook_out": ({"positions": 0}, [(0, 3), (1, 0), (2, 0)]),
    "blocks.0.hook_resid_mid": ({"positions": -1}, [(0, 5), (1, 5), (2, 3)]),
    "blocks.0.hook_out": ({"positions": [3, -4]}, [(1, 3), (1, 2), (2, 3), (2, 0)]),
    "blocks.1.hook_resid_mid": ({"positions": [[1], [-2], [-2]], "rows": [0, -1]}, [(0, 4), (2, 2)]),
    "blocks.1.hook_out": ({"positions": np.eye(B, P, 2, bool), "layer": [0, 1]}, [(1, 3)]),
    "ln_final.hook_out": ({"positions": MASK == 0}, []),
    "blocks.0.attn.o.hook_in": ({"positions": 1, "heads": -1, "rows": 1}, [(1, 1, 7)]),
    "blocks.1.attn.k.hook_out": ({"positions": -6, "heads": [False, True]}, [(1, 0, 1)]),
    "blocks.1.attn.hook_rot_k": ({"positions": 5, "heads": 0}, [(1, 5, 0)]),
    "blocks.0.attn.hook_pattern": (
        {"positions": -1, "keys": 0, "heads": 2},
        [(0, 2, 5, 3), (1, 2, 5, 0), (2, 2, 3, 0)],
    ),
}


def test_in_a_run_of_the_model():
    """In one run with an edit at each site, of rows padded on either side."""
    marks = dict(zip(BY_HAND, MARK * np.arange(1.0, 100.0), strict=False))  # one each: later sites add up earlier ones
    placed = {name: edits.only(edits.Replace(marks[name]), **BY_HAND[name][0]) for name in BY_HAND}
    _, cache = call(*small(), ROWS, tuple(BY_HAND), placed, MASK)
    for name, (_, places) in BY_HAND.items():
        hit = np.asarray(cache[name]) == marks[name]
        if "pattern" not in name:
            assert (hit.all(axis=-1) == hit.any(axis=-1)).all()
            hit = hit.all(axis=-1)
        assert [tuple(place) for place in np.argwhere(hit)] == sorted(places), name


@pytest.mark.parametrize(
    "edit",
    [
        lambda value, hook: -3 * value,
        Partial(lambda by, value, hook: by * np.asarray(-1.0) * value, 3.0),
        functools.partial(lambda by, value, hook: -by * value, 3.0),
        Turn(3.0),
        edits.Scale(-3.0),
    ],
    ids=["function", "Partial", "partial", "dataclass", "ready-made"],
)
def test_any_edit_can_be_restricted(edit):
    """Functions, `Partial`s, dataclasses of one's own, and what is restricted already: then all restrictions hold."""
    name = "blocks.1.attn.o.hook_in"
    expected = np.array(some_value(name))
    expected[1:, 2:4, 5] *= -3
    once = edits.only(edit, positions=[2, 3], heads=5, rows=[1, 2])
    nested = edits.only(edits.only(edits.only(edit, heads=[5, 1]), layer=1, heads=-3), positions=[2, 3])
    both = edits.only(nested, rows=[False, True, True])
    once, nested, both = (apply_edits([each], some_value(name), hook_at(name, MASK)) for each in (once, nested, both))
    assert_same(once, expected, 1e-6)
    assert_same(both, expected, 1e-6)
    assert not same(nested, expected)  # control: one restriction less is another edit


def test_a_restricted_edit_is_held_to_the_sites_shape():
    """What an edit returns is not broadcast to the site, as it is not without the restriction."""
    name = "blocks.1.hook_out"
    for edit, error, says in (
        (lambda value, hook: None, TypeError, r"the edit at blocks\.1\.hook_out returned None"),
        (lambda value, hook: 0.0, ValueError, r"the edit at blocks\.1\.hook_out returned shape \(\)"),
        (lambda value, hook: value[:, :1], ValueError, r"returned shape \(3, 1, 48\); the site holds \(3, 6, 48\)"),
    ):
        with pytest.raises(error, match=says):
            captured(name, edits.only(edits.only(edit, rows=0), layer=1))


def test_a_glob_that_leaves_the_blocks():
    """An edit of one layer does nothing at the sites that belong to none; nor does one of a layer that is not there."""
    names = ("embed.hook_out", "blocks.0.hook_out", "blocks.1.hook_out", "ln_final.hook_out")
    for layer, expected in ((0, [names[1]]), (1, [names[2]]), (2, []), (-1, [])):
        edit = edits.only(edits.Replace(MARK), layer=layer, features=[0, -1])
        _, cache = call(*small(), ROWS, names, {names: edit})
        assert [name for name in names if (cache[name][..., [0, -1]] == MARK).all()] == expected
        assert not any((cache[name][..., 1:-1] == MARK).any() for name in names)


def test_beside_edits_of_the_copies_for_each_head():
    """Sites that then have an axis of heads more, or more heads, are restricted as before."""
    edit = edits.only(Turn(2.0), positions=[0, 3], rows=[0, 2], features=[1, -2])
    placed = {"blocks.1.attn.q.hook_in": edit, "blocks.1.attn.v.hook_out": edit}
    copies = {f"blocks.1.{name}": Partial(identity) for name in COPIES}
    alone, beside = (call(*small(), ROWS, (), each, stop_at_layer=2)[0] for each in (placed, placed | copies))
    assert_same(beside, alone)
    assert not same(alone, plain("ln_final.hook_in"))


@pytest.mark.parametrize(
    ("path", "name", "seen"),
    [
        ("model.layers.1.self_attn.o_proj.input", "blocks.1.attn.o.hook_in", (B, P, 80)),
        ("model.layers.1.self_attn.q_norm.output", "blocks.1.attn.q_norm.hook_out", (B, 8, P, 10)),
    ],
)
def test_under_hugging_face_names(path, name, seen):
    """Restrictions speak of the table's axes under any name; what they restrict sees Hugging Face's layout."""
    layout, shapes = resolve(path, small()[0]).layout, []

    def turn(value, hook):
        shapes.append(value.shape)
        return -value

    where = {"positions": 2, "heads": [1, -1], "rows": 0, "features": [3, 4]}
    value, hook = some_value(name), hook_at(name, MASK)
    expected = np.array(value)
    expected[0, 5, [[1], [7]], [3, 4]] *= -1
    edited = apply_edits([needs.in_layout(edits.only(edits.only(turn, **where), rows=0), layout)], value, hook)
    np.testing.assert_array_equal(edited, expected)
    assert shapes == [seen]
    for whole in (edits.Mean(), edits.FromCache({name: 2 * value})):  # speak of the site themselves
        ours, theirs = (apply_edits([each], value, hook) for each in (whole, needs.in_layout(whole, layout)))
        np.testing.assert_array_equal(theirs, ours)
    scaled = needs.in_layout(edits.Add(np.arange(float(seen[-1]))), layout)
    assert apply_edits([scaled], value, hook).shape == value.shape


def test_a_hugging_face_name_in_a_run_of_the_model():
    """A restriction under a path of Hugging Face's is the same one under our name."""
    path, name = "model.layers.1.self_attn.q_proj.output", "blocks.1.attn.q.hook_out"
    edit = edits.only(edits.Scale(-2.0), heads=1, positions=2)
    expected = plain(name).copy()
    expected[:, 2, 1] *= -2
    _, cache = call(*small(), ROWS, name, {path: edit}, return_type=None)
    assert_same(cache[name], expected)
