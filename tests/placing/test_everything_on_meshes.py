"""A `HookedGemma3` on a mesh, of one process or several, does what it does on one device."""

import jax
import numpy as np
import pytest

from gemma3_jax import ActivationCache
from gemma3_jax.hooked import runs
from gemma3_jax.placing import make_mesh
from tests.helpers.processes import run_in_processes
from tests.placing.everything import TEXTS, everything, two_layers
from tests.placing.on_processes import SITES

BOUND = 1e-5


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, np.ndarray]:
    return everything(two_layers())


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    run_in_processes("tests.placing.on_processes", 2, directory, devices=4)
    return directory


def far_apart(ours, theirs):
    """The names of results that differ, and by how much of their largest value; NaN stands for padding."""
    assert ours.keys() == theirs.keys()
    found = {}
    for name, value in theirs.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(value, np.float64)
        assert a.shape == b.shape, name
        assert (np.isnan(a) == np.isnan(b)).all(), name
        error = np.abs(np.nan_to_num(a - b)).max(initial=0) / max(np.abs(np.nan_to_num(b)).max(initial=0), 1e-30)
        found |= {name: error} if error > BOUND else {}
    return found


@pytest.mark.parametrize(("model", "scan_layers"), [(4, True), (1, False)])
def test_a_mesh_changes_nothing(on_one_device, model, scan_layers):
    """Runs, edits, gradients, generation, sweeps, lenses and attributions, for rows that "data" does not divide."""
    mesh = make_mesh(model, jax.devices()[:8])
    assert not far_apart(everything(two_layers(mesh=mesh, scan_layers=scan_layers)), on_one_device)


def test_several_processes_change_nothing(on_one_device, of_two_processes):
    """They share one mesh of rows and heads, and each sees the same results."""
    with np.load(of_two_processes / "results.npz") as results:
        assert not far_apart(dict(results), {name: on_one_device[name] for name in results})


def test_each_process_gets_its_rows(of_two_processes):
    """With their tokens; together they are the file that all wrote, and a batch leaves out the rows that fill it up."""

    def load(name):
        return ActivationCache.load(of_two_processes / f"{name}.safetensors")

    whole, parts = load("whole"), [load(f"part {process}") for process in (0, 1)]
    assert [part.tokens.shape[0] for part in parts] == [4, 4]
    batches = [load(f"part of a batch {process}") for process in (0, 1)]
    assert [batch.tokens.shape[0] for batch in batches] == [4, 3]
    for name in SITES:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
        several = np.concatenate([batch[name] for batch in batches])
        for process in (0, 1):
            np.testing.assert_array_equal(load(f"whole of a batch {process}")[name], several)
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)


def test_captures_stay_on_their_devices():
    """Rows over "data", heads and neurons over "model"; the residual stream, which no layer cuts, over d."""
    model = two_layers(mesh=make_mesh(2, jax.devices()[:8]))
    names = ["blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern", "blocks.0.mlp.hook_post"]
    logits, cache = model.run_with_cache(TEXTS + TEXTS[:1], names)
    assert tuple(logits.sharding.spec) == ("data", None, "model")
    assert [tuple(cache[name].sharding.spec) for name in names] == [
        ("data", None, "model"),
        ("data", "model"),
        ("data", None, "model"),
    ]


def test_rows_are_computed_once(monkeypatch):
    """Seven rows on eight devices run as eight, each on one of them; a function that sees rows sees seven."""
    model = two_layers(mesh=make_mesh(1, jax.devices()[:8]))
    rows, run = [], runs._run

    def counted(model, request, cut):
        rows.append(len(request.source))
        return run(model, request, cut)

    monkeypatch.setattr(runs, "_run", counted)
    seven = np.full((7, 5), 9)
    logits, cache = model.run_with_cache(seven, "blocks.0.hook_resid_post")
    assert (logits.shape[0], cache["resid_post", 0].shape[0], cache.tokens.shape[0]) == (7, 7, 7)
    model.run_with_hooks(seven, [("blocks.0.hook_resid_post", lambda value, hook: value + np.ones((7, 1, 1)))])
    model(seven[:1])
    assert rows == [8, 7, 1]
