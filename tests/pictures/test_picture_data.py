"""Pictures without a browser: the numbers and labels they take, the errors, saving, and matplotlib left alone."""

import functools
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma3_jax import pictures
from gemma3_jax.pictures.labels import token_labels, visible
from tests.pictures.drawn import CONFIG, EFFECTS, HEATMAPS, PATTERNS, WORDS


def test_numbers_of_any_kind():
    """JAX arrays, bfloat16 and lists draw what float32 draws."""
    exact = np.round(np.nan_to_num(EFFECTS) * 4) / 4
    for values in (exact, exact.astype(np.float32), exact.tolist(), jnp.asarray(exact, jnp.bfloat16)):
        picture = pictures.patching_heatmap(values, CONFIG, WORDS)
        np.testing.assert_array_equal(picture.panels[0].values, exact)
        assert picture.panels[0].values.dtype == np.float32
    assert np.any(exact)


def test_what_is_not_finite_is_not_drawn():
    """One infinity leaves the scale to the other cells; where all is 0 or unfinished, there still is a scale."""
    values = np.ones((18, 6))
    values[3, 4] = np.inf
    picture = pictures.patching_heatmap(values, CONFIG, WORDS)
    assert (picture.scale.low, picture.scale.high) == (0, 1)
    assert np.isnan(picture.panels[0].values[3, 4])
    for empty in (0 * EFFECTS, np.full_like(EFFECTS, np.nan)):
        assert pictures.patching_heatmap(empty, CONFIG, WORDS).to_png()


def test_labels_of_axes():
    """Layers with their reach; heads; all tokens apart; numbers pick, strings stand for themselves."""
    picture = pictures.patching_heatmap(
        EFFECTS[:2, :2], CONFIG, WORDS, labels={"layer": [5, "final"], "position": [3, 1]}
    )
    assert picture.rows.labels == ["5 global", "final"]
    assert picture.columns.labels == ["3 ba", "1 ba"]
    assert HEATMAPS["panels"].panels[3].title == "part v"
    by_layer = pictures.patching_heatmap(np.zeros((18, 4, 6)), CONFIG, WORDS, axes=("layer", "head", "pos"))
    assert [panel.title for panel in by_layer.panels][4:6] == ["layer 4 local", "layer 5 global"]
    assert by_layer.rows.labels == ["0", "1", "2", "3"]
    key_value = pictures.patching_heatmap(np.zeros((18, 1)), CONFIG, axes="layer head")
    assert key_value.columns.labels == ["0"]
    assert pictures.patching_heatmap(np.zeros((18, 2)), CONFIG).columns.labels == ["0", "1"]


@given(st.lists(st.text(), min_size=1, max_size=8))
def test_labels_hide_nothing(tokens):
    """Whatever a tokenizer yields, its label prints, shows white space, and is unique."""
    shown = [visible(token) for token in tokens]
    assert all(text.isprintable() and not set(text) & set(" \n\t") and text for text in shown)
    assert len(set(token_labels(tokens))) == len(tokens)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.attention_patterns(PATTERNS, WORDS[1:], [(0, 0)] * 3, CONFIG), r"\(3, 6, 6\).*\(3, 5, 5\)"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(0, 0)], CONFIG), r"\(3, 6, 6\).*\(1, 6, 6\)"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(18, 0)] * 3, CONFIG), "no layer 18; they are 0 to 17"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(0, -1)] * 3, CONFIG), "no head -1; they are 0 to 3"),
        (lambda: pictures.attention_patterns(PATTERNS - 1, WORDS, [(0, 0)] * 3, CONFIG), "from -1 to .*patching_h"),
        (lambda: pictures.attention_patterns(PATTERNS, "abcdef", [(0, 0)] * 3, CONFIG), "tokens must be a list of str"),
        (lambda: pictures.attention_patterns(PATTERNS[:0], WORDS, [], CONFIG), "nothing to draw"),
        (lambda: pictures.patching_heatmap(EFFECTS[1:], CONFIG, WORDS), "17 entries along axis 'layer'.* 18 labels"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, WORDS[1:]), "6 entries along axis 'position'.* 5 labels"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer head"), "6 entries along axis 'head'"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer"), r"\(18, 6\).* names 1;"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer site"), "'site' is not one of layer, head"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, labels={"laier": [1]}), "labels has laier, which axes"),
        (lambda: pictures.patching_heatmap(EFFECTS[:2], CONFIG, labels={"layer": [4, 4]}), "labelled '4 local'"),
        (lambda: pictures.patching_heatmap(EFFECTS[:, :0], CONFIG), "the position axis is empty"),
        (lambda: pictures.logit_lens_table([["a"]], [[0.5, 0.5]], ["x"], CONFIG, layers=[0]), r"\(1, 2\).*\(1, 1\)"),
        (lambda: pictures.logit_lens_table([["a"]], [[0.5]], ["x"], CONFIG), r"\(1, 1\).*18 layers and 1 tokens"),
        (lambda: pictures.logit_lens_table([["a"]], [[-0.5]], ["x"], CONFIG, layers=[0]), "from -0.5 to -0.5"),
        (lambda: pictures.token_values(WORDS, [1.0]), r"\(1,\); 6 tokens need \(6,\)"),
        (lambda: pictures.patching_heatmap(np.zeros((5000, 2, 2)), CONFIG, axes="run pos src_pos",
                                           labels={"run": range(5000)}).to_html(), "the limit is 20,000 pixels a side"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(draw, message):
    """One sentence that names both sizes, or the thing that is not there."""
    with pytest.raises(ValueError, match=message):
        draw()


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    """An unknown suffix or directory writes nothing; a failure leaves the former file, and no other."""
    picture = pictures.token_values(WORDS, range(6))
    with pytest.raises(ValueError, match=r"a\.svg: a picture is saved as \.html or \.png"):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        picture.save(tmp_path / "nowhere" / "a.png")
    assert list(tmp_path.iterdir()) == []
    picture.save(str(tmp_path / "A.PNG"))
    before = (tmp_path / "A.PNG").read_bytes()
    assert before == picture.to_png()
    for failing in ("to_png", "_repr_html_"):
        monkeypatch.setattr(pictures.TokenFlow, failing, functools.partial(divmod, 1, 0))
        with pytest.raises(ZeroDivisionError):
            picture.save(tmp_path / "A.PNG" if failing == "to_png" else tmp_path / "a.html")
    assert [file.name for file in tmp_path.iterdir()] == ["A.PNG"]
    assert (tmp_path / "A.PNG").read_bytes() == before


def test_a_picture_leaves_matplotlib_alone():
    """Neither what a user set changes the picture, nor the picture what a user set."""
    plain = HEATMAPS["heads"].to_png()
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30, "image.origin": "lower"}):
        assert HEATMAPS["heads"].to_png() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_importing_draws_nothing():
    """The package loads matplotlib when a picture is drawn, and not before."""
    code = "import sys, gemma3_jax.pictures; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
