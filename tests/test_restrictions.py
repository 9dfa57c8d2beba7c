"""`edits.only`: an edit acts exactly where its restrictions say, which are data, and checked."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from random_models import random_tokens
from small_model import COPIES, SITES, assert_same, identity, jitted, same, small

from gemma3_jax import Hook, HookedGemma3, edits
from gemma3_jax.hooked import _compiled
from gemma3_jax.hooks import apply_edits
from gemma3_jax.positions import default_positions
from gemma3_jax.sites import layer_of, resolve, shape_of, site

MARK = 1e6  # what no site holds
B, P = 3, 6  # unlike each other and all sizes of the model
ROWS = jnp.asarray(random_tokens((B, P), seed=1), jnp.int32)
# Padded on the left, not at all, and on the right.
MASK = np.asarray([[0, 0, 0, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0]])
call = jitted()

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
    """One index, three (which may be the same), booleans; for tokens two of each row's own, booleans of each row."""
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


def hook_at(name: str, mask: np.ndarray) -> Hook:
    """What an edit is told there; a mask of ones is none."""
    mask = None if mask.all() else jnp.asarray(mask)
    return Hook(name, layer_of(name), default_positions((B, P), mask), mask)


@functools.cache
def some_value(name: str) -> jax.Array:
    shape = shape_of(name, small()[0], B, P)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


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


@functools.cache
def plain(name: str) -> np.ndarray:
    """The unedited value of a site, in float64."""
    return np.asarray(call(*small(), ROWS, name, return_type=None)[1][name], np.float64)


def captured(name: str, edit, **options) -> np.ndarray:
    """The value of a site with an edit in place, whose arrays are traced."""
    return np.asarray(call(*small(), ROWS, name, {name: edit}, return_type=None, **options)[1][name])


@flax.struct.dataclass
class Turn:
    """An edit of one's own: turn the value round, by so much; it counts how often it is traced."""

    by: Any
    traces: list = flax.struct.field(pytree_node=False, default_factory=list)

    def __call__(self, value, hook):
        self.traces.append(hook.name)
        return -self.by * value

    def __hash__(self):
        return 0


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


GLOB = "blocks.*.attn.hook_z"


def test_a_hundred_values_compile_once():
    """Vectors, strengths, positions, heads, rows and layers, of whatever integer type, go through one program."""
    model, rng = HookedGemma3(*small(3)), np.random.default_rng(0)
    _, before = model.run_with_cache(ROWS, [GLOB], attention_mask=MASK)
    compiled, traces = _compiled._cache_size(), []

    for i in range(100):
        vector, strength, by = rng.normal(size=10).astype(np.float32), float(rng.normal()), float(rng.normal())
        integer = (int, np.int64, np.int32, jnp.asarray, np.uint8)[i % 5]
        layer, position, head, row = (int(rng.integers(n)) for n in (3, 3, 8, 3))
        where = {"positions": position - 3 * (i % 5 < 3), "heads": head - 8 * (i % 5 < 3)}
        where = {each: integer(index) for each, index in where.items()} | {"layer": integer(layer)}
        chain = [edits.Add(vector, strength), Turn(by, traces)]
        hooks = [(GLOB, edits.only(each, **where, rows=[integer(row), 0])) for each in chain]
        logits, after = model.run_with_hooks(ROWS, hooks, names_filter=[GLOB], attention_mask=MASK)
        if i % 10 < 2:
            expected = np.array(before["z", layer], np.float64)
            for b in {row, 0}:
                at = b, np.flatnonzero(MASK[b])[where["positions"]], head
                expected[at] = -by * (expected[at] + strength * vector)
            assert_same(after["z", layer], expected)
            assert not same(after["z", layer], before["z", layer])
            by_hand = {f"blocks.{layer}.attn.hook_z": edits.Replace(expected.astype(np.float32))}
            assert_same(logits, call(*small(3), ROWS, (), by_hand, MASK)[0]) if not i else None
    assert traces == [f"blocks.{i}.attn.o.hook_in" for i in range(3)]
    assert _compiled._cache_size() == compiled + 1
    # Control: another number of indices is another shape.
    model.run_with_hooks(
        ROWS, [(GLOB, edits.only(Turn(1.0, traces), layer=0))], names_filter=[GLOB], attention_mask=MASK
    )
    assert _compiled._cache_size() == compiled + 2


def test_vmap_over_edits():
    """A batch of vectors, strengths and places in one call gives what each gives alone."""
    rng = np.random.default_rng(0)
    vectors, strengths = rng.normal(size=(4, 48)).astype(np.float32), np.asarray([0.0, 0.5, 2.0, -1.0], np.float32)
    where = {"layer": [0, 1, 1, 0], "positions": [-1, 2, 0, 3], "rows": [2, 0, 1, 1]}

    @jax.jit
    @jax.vmap
    def run(edit):
        return call(*small(), ROWS, "blocks.*.hook_out", {"blocks.*.hook_out": edit}, stop_at_layer=2)

    out, cache = run(edits.only(edits.Add(vectors, strengths), **where))
    names = list(cache)
    for i, (layer, position, row) in enumerate(zip(*where.values(), strict=True)):
        expected = plain(names[layer]).copy()
        expected[row, position] += strengths[i] * vectors[i]
        assert_same(cache[names[layer]][i], expected)
    assert_same(out[0], plain("ln_final.hook_in"))
    assert not same(out[1], plain("ln_final.hook_in"))


def test_gradients_through_a_restriction():
    """By strength and vector: those of the same step written out for its own places."""
    vector, weights = (np.random.default_rng(seed).normal(size=48).astype(np.float32) for seed in (1, 2))

    def loss(strength, vector, restricted):
        edit = edits.only(edits.Add(vector, strength), layer=0, positions=[2, 4], rows=1)
        by_hand = Partial(lambda step, value, hook: value.at[1, jnp.asarray([2, 4])].add(step), strength * vector)
        placed = {"blocks.*.hook_resid_mid": edit} if restricted else {"blocks.0.hook_resid_mid": by_hand}
        return jnp.sum(jnp.sin(call(*small(), ROWS, (), placed, stop_at_layer=1)[0] @ weights))

    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    (by_strength, by_vector), expected = gradients(0.5, vector, True), gradients(0.5, vector, False)
    assert_same(by_strength, expected[0], 1e-4)
    assert_same(by_vector, expected[1], 1e-4)
    assert abs(by_strength) > 1e-3
    assert not same(by_strength, by_vector @ vector, 1e-2)  # control: the strength is a half


BAD = [
    ("blocks.0.hook_out", {"positions": 6}, r"positions has 6; at blocks\.0\.hook_out there are 6"),
    ("blocks.*.hook_out", {"positions": [[0], [1], [-7]]}, r"positions has -7; at blocks\.1\.hook_out there are 6"),
    ("blocks.0.hook_out", {"positions": [[0], [1]]}, r"positions has shape \(2, 1\); .* or \[3, n\]"),
    ("blocks.0.hook_out", {"positions": [True] * 6}, r"positions has shape \(6,\); .* booleans have shape \(3, 6\)"),
    ("blocks.0.hook_out", {"positions": True}, r"positions has shape \(\); .* booleans have shape \(3, 6\)"),
    ("blocks.0.hook_out", {"positions": 1.0}, "positions is 1.0; it takes an integer, several, or booleans"),
    ("blocks.0.hook_out", {"positions": []}, r"positions is \[\]; it takes"),
    ("blocks.0.hook_out", {"positions": [[0, 1], [2]]}, "positions is .*; it takes"),
    ("blocks.0.hook_out", {"positions": slice(0, 2)}, r"positions is slice\(0, 2, None\); it takes"),
    ("blocks.0.hook_out", {"positions": "last"}, "positions is 'last'; it takes"),
    ("blocks.0.hook_out", {"heads": 0}, r"blocks\.0\.hook_out has no heads; .* by rows, positions, features"),
    ("blocks.0.hook_out", {"keys": 0}, r"blocks\.0\.hook_out has no keys"),
    ("blocks.0.attn.hook_pattern", {"features": 0}, r"hook_pattern has no features; .* rows, heads, positions, keys"),
    ("blocks.0.attn.hook_rot_k", {"keys": 0}, r"hook_rot_k has no keys; .* by rows, positions, heads, features"),
    ("blocks.0.ln1.hook_scale", {"features": 0}, r"blocks\.0\.ln1\.hook_scale has no features"),
    (["blocks.0.attn.hook_q", "blocks.0.hook_in"], {"heads": 0}, r"blocks\.0\.hook_in has no heads"),
    ("blocks.0.attn.hook_z", {"heads": 8}, r"heads has 8; at blocks\.0\.attn\.o\.hook_in there are 8"),
    (["blocks.0.attn.hook_q", "blocks.0.attn.hook_v"], {"heads": 2}, r"heads has 2; at .*\.v\.hook_out there are 2"),
    ("blocks.0.attn.hook_z", {"heads": [[0], [1]]}, r"heads has shape \(2, 1\); .* integers have shape \[\] or \[n\]"),
    ("blocks.0.attn.hook_z", {"heads": [True, False]}, r"heads has shape \(2,\); .* booleans have shape \(8,\)"),
    ("blocks.0.attn.hook_pattern", {"keys": [0, -9]}, "keys has -9; .* there are 6"),
    ("blocks.0.hook_out", {"rows": -4}, r"rows has -4; at blocks\.0\.hook_out there are 3"),
    ("blocks.0.mlp.hook_post", {"features": 80}, "features has 80; .* there are 80"),
    ("unembed.hook_out", {"features": 101}, "features has 101; .* there are 101"),
    ("blocks.*.hook_out", {"layer": 2}, r"layer 2 never acts at blocks\.0\.hook_out, blocks\.1\.hook_out; .* from 0"),
    ("blocks.*.hook_out", {"layer": -1}, "layer -1 never acts at .*; layers count from 0"),
    ("blocks.0.**", {"layer": [0, 1]}, "layer 1 never acts at .* and .* more"),
    ("ln_final.hook_out", {"layer": 0}, r"layer 0 never acts at ln_final\.hook_out"),
    ("blocks.*.hook_out", {"layer": [True, False]}, r"layer is \[True, False\]; it takes an integer or several"),
    ("blocks.*.hook_out", {"layer": 0.0}, "layer is 0.0; it takes an integer or several"),
]


@pytest.mark.parametrize(("name", "restriction", "says"), BAD)
def test_a_bad_restriction_is_one_clear_error(name, restriction, says):
    """It names the restriction, its value and the site, before anything is compiled; nested and inside `jit` too."""
    model, before = HookedGemma3(*small()), _compiled._cache_size()

    def edited(nested=False):
        edit = edits.only(identity, **restriction)
        return model.run_with_hooks(ROWS, [(name, edits.only(edit, rows=0) if nested else edit)])

    for run in (edited, functools.partial(edited, nested=True), functools.partial(jax.eval_shape, edited)):
        with pytest.raises(ValueError, match=says):
            run()
    assert _compiled._cache_size() == before


def test_what_is_restricted_must_be_an_edit():
    """Named at once, where it is written."""
    with pytest.raises(TypeError, match=r"the edit is 0\.0; an edit is a callable"):
        edits.only(0.0, layer=1)


def test_traced_indices():
    """Out of range they act nowhere; what does not depend on their values is an error all the same."""
    name, mark = "blocks.1.attn.o.hook_in", edits.Replace(MARK)
    out = [{"layer": 5}, {"positions": 6}, {"positions": [-7, 9]}, {"heads": [8, -9]}, {"rows": 3}, {"features": -11}]
    nowhere = [edits.only(mark, **restriction) for restriction in out]
    np.testing.assert_array_equal(captured(name, nowhere), plain(name))
    assert (captured(name, edits.only(mark, positions=[5, 9])) == MARK).any()  # control
    for restriction, says in (
        ({"keys": 0}, "no keys"),
        ({"rows": [[0]]}, "rows has"),
        ({"heads": [True]}, "heads has"),
    ):
        with pytest.raises(ValueError, match=says):
            captured(name, edits.only(mark, **restriction))

    def restricted(index):
        return edits.only(edits.Scale(1.0), positions=[index, 0], layer=index)

    assert jax.eval_shape(restricted, jnp.int32(0)).positions.shape == (2,)
    with pytest.raises(ValueError, match=r"layer is .*; it takes an integer or several"):
        jax.eval_shape(restricted, jnp.float32(0))


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
    edited = apply_edits([edits.in_layout(edits.only(edits.only(turn, **where), rows=0), layout)], value, hook)
    np.testing.assert_array_equal(edited, expected)
    assert shapes == [seen]
    for whole in (edits.Mean(), edits.FromCache({name: 2 * value})):  # speak of the site themselves
        ours, theirs = (apply_edits([each], value, hook) for each in (whole, edits.in_layout(whole, layout)))
        np.testing.assert_array_equal(theirs, ours)
    scaled = edits.in_layout(edits.Add(np.arange(float(seen[-1]))), layout)
    assert apply_edits([scaled], value, hook).shape == value.shape


def test_a_hugging_face_name_in_a_run_of_the_model():
    """A restriction under a path of Hugging Face's is the same one under our name."""
    path, name = "model.layers.1.self_attn.q_proj.output", "blocks.1.attn.q.hook_out"
    edit = edits.only(edits.Scale(-2.0), heads=1, positions=2)
    expected = plain(name).copy()
    expected[:, 2, 1] *= -2
    _, cache = call(*small(), ROWS, name, {path: edit}, return_type=None)
    assert_same(cache[name], expected)
