"""Scales: their ends, their halves, their ticks, and what several pictures share."""

import numpy as np
import pytest

from gemma3_jax import pictures
from gemma3_jax.pictures.scale import Scale, fitting_scale
from tests.pictures.drawn import CONFIG, WORDS

WHITE = "#f7fbff"  # where the map from white to blue begins


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0, 2], (0, 2)),
        ([-1, 2], (-2, 2)),
        ([-3, 2], (-3, 3)),
        ([-3, -1], (-3, 0)),
        ([0, 0], (0, 1)),
        ([np.nan, 4], (0, 4)),
    ],
)
def test_no_half_for_values_that_do_not_exist(values, ends):
    """Red is there for negative values, blue for positive ones, and both for both."""
    scale = fitting_scale("", np.array(values, np.float32))
    assert (scale.low, scale.high) == ends


@pytest.mark.parametrize("ends", [(0, 1), (0, 0.0731), (-4.73, 4.73), (-3, 0), (0, 12345.6), (0, 3e-7), (7, 7.5)])
def test_ticks_are_round(ends):
    """A few numbers within the ends, at equal distances, of at most three digits."""
    ticks = Scale("", *ends).ticks()
    assert 2 <= len(ticks) <= 6
    assert ends[0] - 1e-9 <= min(ticks) < max(ticks) <= ends[1] * (1 + 1e-9) + 1e-12
    assert all(float(label) == pytest.approx(tick, abs=1e-12) for tick, label in ticks.items())
    digits = [label.split("e")[0].lstrip("-").replace(".", "").strip("0") for label in ticks.values()]
    assert max(map(len, digits)) <= 3
    steps = np.diff(list(ticks))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_vmin_and_vmax_set_the_ends():
    """The colours of two pictures agree; what is beyond has an end's colour, and the bar says so."""
    values = np.zeros((18, 6))
    values[3, 4], values[2, 2] = 5, -0.5
    picture = pictures.patching_heatmap(values, CONFIG, WORDS, vmin=-1, vmax=1)
    assert list(picture.scale.ticks().values()) == ["-1", "-0.5", "0", "0.5", "≥ 1"]
    assert picture.scale.colour(5) == picture.scale.colour(1) != picture.scale.colour(0.9)
    other = pictures.token_values(WORDS, [0.5] * 6, vmin=-1, vmax=1)
    assert other.scale.colour(0.5) == picture.scale.colour(0.5)
    assert pictures.token_values(WORDS, [0.5] * 6).scale.colour(0.5) != picture.scale.colour(0.5)
    from_five = pictures.token_values(WORDS, [5, 6, 7, 8, 9, 10], vmin=5)
    assert from_five.scale.colour(5) == WHITE


def test_faint_attention_is_made_visible():
    """With a vmax, what is beside the first token has colours; what is above has the darkest one."""
    faint = pictures.attention_patterns([[[1, 0], [0.9, 0.1]]], ["<bos>", "ba"], [(0, 0)], CONFIG, vmax=0.2)
    assert list(faint.scale.ticks().values())[-1] == "≥ 0.2"
    assert faint.scale.colour(0.9) == faint.scale.colour(0.2)
    plain = pictures.attention_patterns([[[1, 0], [0.9, 0.1]]], ["<bos>", "ba"], [(0, 0)], CONFIG)
    assert plain.scale.ink(0.1) == faint.scale.ink(0.05) == "#000000"
    assert plain.scale.colours(np.array([0.1])).sum() > faint.scale.colours(np.array([0.1])).sum()
    lens = pictures.logit_lens_table([["a"]], [[0.5]], ["x"], CONFIG, layers=[0], vmax=0.25)
    assert lens.scale.beyond == (False, True)


def test_zero_stays_white():
    """Ends at different distances from 0 do not move it: equal distances are equally dark."""
    scale = fitting_scale("", np.array([-1.0, 3.0]), vmin=-1, vmax=3)
    zero, ends = scale.colours(np.zeros(1)), Scale("", -3, 3)
    assert zero.min() > 240
    np.testing.assert_array_equal(scale.colours(np.array([-1, 3])), ends.colours(np.array([-1, 3])))


@pytest.mark.parametrize("ends", [(1, 1), (2, 1), (np.nan, 1), (0, np.inf)])
def test_ends_that_make_no_scale(ends):
    """One sentence with both ends."""
    with pytest.raises(ValueError, match=r"from vmin = .* to vmax = .*; pass finite numbers, vmin < vmax"):
        pictures.token_values(["a"], [0.5], vmin=ends[0], vmax=ends[1])


def test_names_of_axes():
    """An axis may have another name in the picture; a name for no axis is an error."""
    picture = pictures.patching_heatmap(np.zeros((18, 6)), CONFIG, WORDS, names={"position": "corrupted token"})
    assert (picture.rows.name, picture.columns.name) == ("layer", "corrupted token")
    with pytest.raises(ValueError, match="names has pos, which axes"):
        pictures.patching_heatmap(np.zeros((18, 6)), CONFIG, WORDS, names={"pos": "token"})
