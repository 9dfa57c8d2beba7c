"""Results of sweeps and patching: arrays wherever an array works, which say what their axes are and draw themselves."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import edits, patching, pictures
from gemma3_jax.analysis import attribution_patching, detect_heads, edge_attribution, path_patching, sweep
from gemma3_jax.grids import Grid
from tests.placing.everything import two_layers

CLEAN, CORRUPTED = "ba ke lo mu ba ke", "ba ke re mu ba ke"
HEADS = ("layer", "head")


@functools.cache
def tiny():
    return two_layers()


def logit(logits):
    return logits[0, -1, 20]


@functools.cache
def patched():
    return patching.get_act_patch_resid_pre(tiny(), CORRUPTED, CLEAN, logit, logits_at=-1, progress=False)


def test_the_result_says_where_its_extremes_are():
    """With layer, position and token, as the numbers have it; `print` shows the numbers."""
    grid = patched()
    assert grid.axes == ("layer", "pos")
    for name, at in (("highest", grid.argmax()), ("lowest", grid.argmin())):
        layer, position = np.unravel_index(at, grid.shape)
        token = tiny().to_str_tokens(CORRUPTED)[position]
        line = next(line for line in repr(grid).splitlines() if name in line)
        assert f"{grid.flat[at]:.4g}  layer {layer}, pos {position} {token!r}" in line
    assert repr(grid).startswith("patching resid_pre: layer x pos, [2, 7] float32\n")
    assert "<table" in grid._repr_html_()
    assert str(grid) == str(np.asarray(grid))


def test_it_is_an_array():
    """JAX, NumPy and pickle take it as one; it can be written to, and the numbers of its parts are plain numbers."""
    grid = patched().copy()
    plain = np.asarray(grid)
    assert isinstance(grid, np.ndarray)
    for function in (np.stack, np.concatenate, jnp.asarray, jax.jit(lambda pair: pair[0] + pair[1])):
        np.testing.assert_array_equal(function([grid, grid]), function([plain, plain]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(grid)), plain)
    assert type(grid.max()) is type(grid[0, 0]) is type(np.nanmean(grid)) is np.float32
    grid[0, 0] = 5
    assert grid.max() == 5


@pytest.mark.parametrize(
    ("name", "call", "axes", "place"),
    [
        ("attribution patching z", lambda *run: attribution_patching(*run, "z", HEADS), "layer head", "head"),
        ("edge attribution", edge_attribution, "sender receiver", "receiver"),
        ("induction_head", lambda model, x, *_: detect_heads(model, x, "induction_head"), "layer head", "head"),
    ],
)
def test_scores_of_one_run_say_it_too(name, call, axes, place):
    """Attribution and head scores have names; pictures draw them without other arguments; under jit they stay JAX's."""
    grid = call(tiny(), CORRUPTED, CLEAN, logit)
    assert grid.axes == tuple(axes.split())
    assert repr(grid).startswith(f"{name}: {' x '.join(grid.axes)}, {list(grid.shape)} float32\n")
    assert place in repr(grid).splitlines()[1]
    assert np.ptp(grid) > 0
    pictures.patching_heatmap(grid)
    with jax.checking_leaks():
        traced = jax.jit(lambda model: call(model, CORRUPTED, CLEAN, logit))(tiny())
    assert isinstance(traced, jax.Array)
    np.testing.assert_allclose(traced, grid, atol=1e-5 * np.abs(grid).max())


@pytest.mark.parametrize(
    "change", [lambda g: g[1:], lambda g: g.T, lambda g: g[::-1], lambda g: np.sort(g), lambda g: g > 0], ids=range(5)
)
def test_names_do_not_outlive_their_axes(change):
    """Arithmetic keeps the names. A part, or another order of the entries, would put them at the wrong entries."""
    grid = Grid([[1.0, -2.0], [np.nan, 4.0]], ("layer", "head"), "patching z")
    assert "lowest      -4" in repr(-grid)
    assert "not finite  1 of 4" in repr((grid - 1) / 3)
    changed = change(grid)
    assert getattr(changed, "axes", ()) == ()
    assert repr(changed).startswith("array(")


def test_other_results():
    """A sweep shows the numbers of its items, path patching its senders, and several sites have an axis."""
    items = {"by": np.float32([0.5, 0.0, 1.0]), "vector": np.zeros((3, 96), np.float32)}
    runs = sweep(tiny(), CLEAN, lambda item: {"hook_embed": edits.Scale(item["by"])}, items, logit, progress=False)
    assert f"run {runs.argmin()}: by {items['by'][runs.argmin()]:g}" in repr(runs)
    senders = [("embed",), ("head", 0, 1)]
    paths = path_patching(tiny(), CORRUPTED, CLEAN, logit, [("logits",)], senders, progress=False)
    assert {"sender embed", "sender head 0 1"} == {line.split("  ")[-1] for line in repr(paths).splitlines()[1:]}
    every = patching.get_act_patch_block_every(tiny(), CORRUPTED, CLEAN, logit, logits_at=-1, progress=False)
    titles = [panel.title for panel in pictures.patching_heatmap(every).panels]
    assert titles == ["site resid_pre", "site attn_out", "site mlp_out"]


def test_a_picture_without_arguments():
    """The same as with all of them; an argument replaces what the result says; a plain array needs its config."""
    grid, config, tokens = patched(), tiny().config, tiny().to_str_tokens(CORRUPTED)
    own, told = pictures.patching_heatmap(grid), pictures.patching_heatmap(np.asarray(grid), config, tokens)
    assert own.rows.labels == told.rows.labels
    assert own.columns.labels == told.columns.labels
    assert own.title == "patching resid_pre"
    assert pictures.patching_heatmap(grid, axes="layer query", title="mine").columns.name == "query"
    with pytest.raises(ValueError, match=r"pass model\.config"):
        pictures.patching_heatmap(np.asarray(grid))


def test_both_names_of_positions():
    """A picture of a grid takes "position" for its axis "pos", as it does for an array, and "pos" itself."""
    for name in ("pos", "position"):
        assert pictures.patching_heatmap(patched(), names={name: "corrupted token"}).columns.name == "corrupted token"
    with pytest.raises(ValueError, match="names has place, which axes"):
        pictures.patching_heatmap(patched(), names={"place": "token"})
