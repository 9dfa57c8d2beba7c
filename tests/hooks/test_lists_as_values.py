"""Ready-made edits and reductions take lists of numbers as arrays; other values are errors that name the edit."""

import traceback

import jax
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, edits, reductions
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import TOKENS, assert_same, same, small

SITE = "blocks.1.hook_out"
D = SMALL["hidden_size"]
VECTOR = np.sin(np.arange(D)).astype(np.float32)
BY_POSITION = np.arange(9, dtype=np.float32)[:, None]

EDITS = {
    "Add": lambda f: edits.Add(f(VECTOR), f(BY_POSITION)),
    "Scale": lambda f: edits.Scale(f(BY_POSITION)),
    "Replace": lambda f: edits.Replace(f(VECTOR), where=f(BY_POSITION > 4)),
    "Clamp": lambda f: edits.Clamp(f(VECTOR), low=f(BY_POSITION)),
    "FromRow": lambda f: edits.only(edits.FromRow(f(np.array([1, 0]))), positions=3),
    "Noise": lambda f: edits.Noise(jax.random.key(0), f(BY_POSITION)),
    "FromCache": lambda f: edits.FromCache({SITE: f(np.broadcast_to(VECTOR, (2, 9, D)))}),
}


def model():
    return HookedGemma3(*small())


@pytest.mark.parametrize("name", EDITS)
def test_a_list_is_an_array(name):
    """Also in a prompt that runs at a longer length, where values for each position must be recognised as such."""
    listed, array = (
        model().run_with_hooks(TOKENS, (SITE, EDITS[name](kind)), stop_at_layer=2)
        for kind in (np.ndarray.tolist, np.asarray)
    )
    np.testing.assert_array_equal(listed, array)
    assert not same(array, model()(TOKENS, stop_at_layer=2), 1e-3)  # control


def test_lists_of_reductions():
    """The matrix of a projection may be a list, too."""
    matrix = np.stack([VECTOR, VECTOR[::-1]], axis=1)
    both = [{SITE: reductions.Project(x)} for x in (matrix.tolist(), matrix)]
    listed, array = (model().run_with_cache(TOKENS, each, return_type=None)[1][SITE] for each in both)
    assert_same(listed, array, 1e-6)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (edits.Replace("mean"), r"edits\.Replace at blocks\.1\.hook_out has 'mean', which is not an array of numbers"),
        (edits.only(edits.Add([[1.0], [1.0, 2.0]]), positions=0), r"edits\.Add at blocks\.1\.hook_out has \[\[1\.0\]"),
        (edits.Noise(0, 1.0), r"edits\.Noise at blocks\.1\.hook_out has key 0; it must be jax\.random\.key\(seed\)"),
        (
            edits.Mean,
            r"the edit at blocks\.1\.hook_out is the class Mean; it must be an instance of it: Mean\(\.\.\.\)",
        ),
        ("mean", r"the edit at blocks\.1\.hook_out is 'mean'; an edit is a callable"),
        (np.zeros(500), r"the edit at blocks\.1\.hook_out is array\(\[.{,60}; an edit is a callable"),
    ],
)
def test_what_is_no_edit(edit, says):
    """Each is one error that names the site and the remedy, before anything runs."""
    with pytest.raises((TypeError, ValueError), match=says):
        model().run_with_hooks(TOKENS, (SITE, edit))


def test_an_error_has_the_shape_of_the_prompt():
    """And not of the length at which it would run: an edit whose values have no place, a reduction of too many."""
    for call in (
        lambda: model().run_with_hooks(TOKENS, (SITE, edits.Add(VECTOR[:-1]))),
        lambda: model().run_with_cache(TOKENS, {SITE: reductions.TopK(D + 1)}),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        # with the errors that a traceback shows before it
        said = "".join(traceback.format_exception(caught.value)).replace(" ", "")
        assert f"2,9,{D}" in said
        assert f"2,16,{D}" not in said


def test_a_class_is_no_reduction_and_cannot_be_restricted():
    """It would make an object of the value and the hook."""
    with pytest.raises(TypeError, match=r"the reduction at blocks\.1\.hook_out is the class At"):
        model().run_with_cache(TOKENS, {SITE: [reductions.At, reductions.TopK(2)]})
    with pytest.raises(TypeError, match="the edit is the class Replace"):
        edits.only(edits.Replace, positions=0)
