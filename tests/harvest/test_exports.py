"""What other tools read of a store has its values: `.npy`, SAELens' data set, dictionary_learning's buffer.

Axes: n rows, c tokens of a context, d features.
"""

import json

import numpy as np
import pytest
import torch

from gemma3_jax import TINY, HookedGemma3, reductions
from gemma3_jax.harvest import ActivationStore, StoreError, exports, harvest

SITE, CONTEXT = ("resid_post", 1), 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of several units."""
    out = tmp_path_factory.mktemp("store") / "out"
    sites = {"blocks.{1,3}.hook_out": None, "blocks.2.hook_out": reductions.TopK(3), "blocks.1.attn.hook_z": None}
    harvest(HookedGemma3.from_pretrained(TINY), ["ba ke lo mu ti so re"] * 30, sites, out, rows=2, length=32)
    return ActivationStore(out)


@pytest.fixture
def saved(store, tmp_path, monkeypatch):
    """The folder for SAELens, in several files."""
    monkeypatch.setattr(exports, "_A_FILE", 5 * CONTEXT * 96 * 4)
    monkeypatch.setattr(exports, "_AT_ONCE", 2 * CONTEXT * 96 * 4)
    store[SITE].save_for_saelens(tmp_path / "cached", context=CONTEXT)
    return tmp_path / "cached"


def test_the_files_for_saelens(store, saved):
    """Arrow streams with the types of `datasets`; each token once, but for those behind the last context."""
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    state = json.loads((saved / "state.json").read_text())
    names = [entry["filename"] for entry in state["_data_files"]]
    assert names == sorted(file.name for file in saved.glob("*.arrow"))
    assert names[0] == "data-00000-of-00003.arrow"
    tables = [pyarrow.ipc.open_stream((saved / name).read_bytes()).read_all() for name in names]
    contexts = len(store) // CONTEXT
    assert sum(len(table) for table in tables) == contexts
    assert tables[0].column_names == ["blocks.1.hook_resid_post", "token_ids"]
    assert tables[0].schema.field(0).type == datasets.features.features.Array2DExtensionType((CONTEXT, 96), "float32")
    wanted = np.asarray(store[SITE].rows(0, contexts * CONTEXT), np.float32).reshape(contexts, CONTEXT, 96)
    np.testing.assert_array_equal([row for table in tables for row in table[0].to_pylist()], wanted)
    ids = [row for table in tables for row in table[1].to_pylist()]
    np.testing.assert_array_equal(np.ravel(ids), store.tokens(0, contexts * CONTEXT))


def test_datasets_reads_them(store, saved):
    """`datasets` itself reads them: SAELens loads the folder with it."""
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(saved)).with_format("numpy")
    assert loaded.features["blocks.1.hook_resid_post"].shape == (CONTEXT, 96)
    np.testing.assert_array_equal(
        loaded[3]["blocks.1.hook_resid_post"], np.asarray(store[SITE].rows(3 * CONTEXT, 4 * CONTEXT), np.float32)
    )


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_values_that_a_dtype_does_not_hold(store, tmp_path, monkeypatch, dtype):
    """They would be infinite in float16, which the residual stream of real models exceeds, and cut in integers."""
    site = store[SITE]
    assert np.isfinite(np.asarray(site, np.float32)).all()
    site.save(tmp_path / "fits.npy", "float16")
    monkeypatch.setattr(type(site), "rows", lambda site, start, stop: np.full((stop - start, 96), 70000.5, np.float32))
    with pytest.raises(StoreError, match=f"{dtype} does not hold the values of blocks.1.hook_out"):
        site.save(tmp_path / "large.npy", dtype)
    if dtype == "float16":
        pytest.importorskip("pyarrow")
        with pytest.raises(StoreError, match="float16 does not hold"):
            site.save_for_saelens(tmp_path / "large", CONTEXT, dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits.npy"]


def test_a_buffer_without_end(store):
    """Batches of one size, epoch after epoch, each in another order; several sites, centred; the config is JSON."""
    buffer, n = store.buffer(SITE, 64, seed=3), len(store)
    whole = n // 64
    epochs = [torch.cat([next(buffer) for _ in range(whole)]) for _ in range(2)]
    assert n % 64
    assert epochs[0].shape == (whole * 64, 96)
    assert epochs[0].dtype == torch.float32
    assert not torch.equal(*epochs)
    known = {tuple(row) for row in np.asarray(store[SITE], np.float32).tolist()}
    assert {tuple(row) for row in epochs[0].tolist()} <= known
    assert json.loads(json.dumps(buffer.config))["sites"] == ["blocks.1.hook_out"]
    both = next(iter(store.buffer([SITE, ("resid_post", 3)], 8, center=True)))
    assert both.shape == (8, 2, 96)
    assert len(next(store.buffer(SITE, 10**6))) == n


def test_one_array_in_a_file(store, tmp_path):
    """`.npy` of a site with heads; results with several arrays, and what SAELens cannot read, are refused."""
    z = store["z", 1]
    z.save(tmp_path / "z.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy", mmap_mode="r"), np.asarray(z, np.float32))
    with pytest.raises(StoreError, match=r"has several: blocks\.2\.hook_out/"):
        store["resid_post", 2].save(tmp_path / "top.npy")
    for site, options in [(z, {}), (store[SITE], {"context": 10**6}), (store[SITE], {"dtype": "bfloat16"})]:
        with pytest.raises(StoreError, match="SAELens reads vectors"):
            site.save_for_saelens(tmp_path / "none", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["z.npy"]
