"""`edits.only`: restrictions are data, which jit, vmap and grad take, and checked where their values are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import HookedGemma3, edits
from tests.helpers.programs import programs
from tests.helpers.small_model import assert_same, identity, same, small
from tests.hooks.restricted_rows import MARK, MASK, ROWS, Turn, call, captured, plain

GLOB = "blocks.*.attn.hook_z"


def test_a_hundred_values_compile_once():
    """Vectors, strengths, positions, heads, rows and layers, of whatever integer type, go through one program."""
    model, rng = HookedGemma3(*small(3)), np.random.default_rng(0)
    _, before = model.run_with_cache(ROWS, [GLOB], attention_mask=MASK)
    compiled, traces = programs(), []

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
    assert traces == [f"blocks.{i}.attn.o.hook_in" for i in range(3)] * 100
    assert programs() == compiled + 1
    # Control: another number of indices is another shape.
    model.run_with_hooks(
        ROWS, [(GLOB, edits.only(Turn(1.0, traces), layer=0))], names_filter=[GLOB], attention_mask=MASK
    )
    assert programs() == compiled + 2


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
    model, before = HookedGemma3(*small()), programs()

    def edited(nested=False):
        edit = edits.only(identity, **restriction)
        return model.run_with_hooks(ROWS, [(name, edits.only(edit, rows=0) if nested else edit)])

    for run in (edited, functools.partial(edited, nested=True), functools.partial(jax.eval_shape, edited)):
        with pytest.raises(ValueError, match=says):
            run()
    assert programs() == before


def test_what_is_restricted_must_be_an_edit():
    """Named at once, where it is written."""
    with pytest.raises(TypeError, match=r"the edit is 0\.0; an edit is a callable"):
        edits.only(0.0, layer=1)


def test_traced_indices():
    """Out of range, they have no effect; errors that do not depend on their values are still raised."""
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
