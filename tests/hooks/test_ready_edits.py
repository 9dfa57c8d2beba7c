"""The ready-made edits: what they compute at every kind of site, and where they change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import edits
from gemma3_jax.hooks.interception import apply_edits
from gemma3_jax.sites.table import site
from tests.helpers.small_model import SITES, assert_same, run, same, small
from tests.hooks.edited_rows import (
    CASES,
    KINDS,
    MASK,
    ROWS,
    along,
    call,
    hook_at,
    length,
    logits_of,
    results,
    values,
    vector,
)


@pytest.mark.parametrize("case", CASES)
def test_each_does_what_it_says(case):
    """In float32 what NumPy makes of the value in float64; and not what another edit does, or none."""
    for name in [name for each, name in results() if each == case]:
        ours, x = results()[case, name], values()[name]
        assert ours.dtype == np.float32
        others = [other for other, where in results() if where == name]
        assert [other for other in others if same(ours, CASES[other][1](x, name))] == [case], name


def test_the_sites_have_every_kind_of_axes():
    """Control: none in the table is missing above but that of ids, whichever heads and features they are."""
    kinds, known = ({site(name).axes.translate(str.maketrans("gdfV", "heee")) for name in x} for x in (KINDS, SITES))
    assert known - kinds == {"b p"}


@pytest.mark.parametrize(
    ("case", "name"), [("Add, relative", "blocks.0.attn.o.hook_in"), ("Mean", "blocks.0.attn.hook_rot_k")]
)
def test_a_placed_edit_is_captured(case, name):
    """What `results` shows is what arrives at the site."""
    _, cache = call(*small(), ROWS, name, {name: CASES[case][0](name)}, MASK, return_type=None)
    assert_same(cache[name], results()[case, name], 1e-6)


def test_a_mean_over_tokens_needs_tokens():
    """The rows of a pattern are not values of tokens."""
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_pattern has axes b h p k"):
        jax.eval_shape(lambda: logits_of(ROWS, {"blocks.0.attn.hook_pattern": edits.Mean()}))


def test_token_ids_can_be_replaced():
    """At `embed.hook_in` an edit exchanges tokens, whole ids, for the rest of the model."""
    replaced = logits_of(ROWS, {"embed.hook_in": edits.Replace(7, np.asarray([[True], [False], [False]]))})
    assert_same(replaced, logits_of(ROWS.at[0].set(7)), 1e-6)
    assert not same(replaced, logits_of(ROWS))


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 1e25])
def test_projecting_out_leaves_nothing(size):
    """No component stays, whatever the length of the direction; another direction's stays (the control)."""
    name = "blocks.1.hook_out"
    x, value = values()[name], jnp.asarray(values()[name], jnp.float32)
    out = np.asarray(edits.ProjectOut(vector(name) * np.float32(size))(value, None), np.float64)
    rounding = np.finfo(np.float32).eps * length(x)
    assert (np.abs(along(x, name)) > 1000 * rounding).mean() > 0.9
    assert (np.abs(along(out, name)) < 4 * rounding).all()
    other = vector(name, seed=5)
    assert (np.abs(out @ other) > 1000 * rounding[..., 0]).mean() > 0.9


@pytest.mark.parametrize(
    "edit",
    [
        edits.ProjectOut(jnp.zeros(48)),
        edits.Clamp(jnp.zeros(48), 1.0, 2.0),
        edits.Clamp(jnp.ones(48)),
        edits.Add(jnp.zeros(48), 5.0, relative=True),
        edits.Add(jnp.ones(48), 0.0),
        edits.Noise(jax.random.key(0), 0.0),
    ],
    ids=["ProjectOut of zeros", "Clamp of zeros", "Clamp without bounds", "Add zeros", "Add 0 times", "Noise of 0"],
)
def test_edits_that_change_nothing(edit):
    """Bit for bit."""
    name = "blocks.1.hook_out"
    value = jnp.asarray(values()[name], jnp.float32)
    np.testing.assert_array_equal(apply_edits([edit], value, hook_at(name)), value)


def test_gradients_are_finite_where_nothing_has_a_length():
    """For zero vectors, where an optimisation begins, and at zero values; a plain norm has none there (control)."""
    name, some = "blocks.1.hook_out", vector("blocks.1.hook_out")
    zeros = np.zeros_like(some)

    @jax.jit
    @jax.vmap
    @functools.partial(jax.jacrev, argnums=(0, 1))
    def gradients(v, x):
        key = jax.random.key(0)
        relative = edits.Add(v, 0.1, relative=True), edits.Noise(key, 1.0, relative=True)
        every = *relative, edits.ProjectOut(v), edits.Clamp(v, -0.1, 0.1)
        return jnp.stack([jnp.sum(jnp.sin(edit(x, hook_at(name)))) for edit in every])

    # [pair, edit, d]
    for by in gradients(np.stack([zeros, some, zeros]), np.stack([some, zeros, zeros])):
        assert np.isfinite(by).all()
    assert np.isnan(jax.grad(jnp.linalg.norm)(zeros)).all()


@pytest.mark.parametrize(
    "edit", [edits.ProjectOut(np.ones(1)), edits.Clamp(np.ones(1), 0, 1), edits.Add(np.ones(1), relative=True)]
)
def test_a_direction_of_one_feature_is_refused(edit):
    """It broadcast, but the length of what it became was not 1."""
    with pytest.raises(ValueError, match="the direction has shape"):
        logits_of(ROWS, {"blocks.1.hook_out": edit})


@pytest.mark.parametrize(("bounds", "says"), [({}, "no bounds"), ({"low": 5, "high": 1}, "low 5 above high 1")])
def test_bounds_that_do_not_bound_are_refused(bounds, says):
    """Without bounds nothing happened; with the low one above the high one, all became the high one."""
    with pytest.raises(ValueError, match=says):
        run(edits={"blocks.1.hook_out": edits.Clamp(vector("blocks.1.hook_out"), **bounds)})
