"""A store has what `run_with_cache` gives, for the tokens that were asked for; another run is refused.

Axes: n tokens.
"""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, reductions
from gemma3_jax.harvest import ActivationStore, StoreError, harvest, verify
from gemma3_jax.sites.table import token_axis

WORDS = ["ba", "ke", "lo", "mu", "ti", "so", "re"]
GENERATOR = np.random.default_rng(0)
# Some are longer than the window of 16, and the last is longer than a row.
TEXTS = [" ".join(GENERATOR.choice(WORDS, n)) for n in [3, 25, 1, 30, 7, 12, 2, 9, 40]]
SHAPE = {"rows": 2, "length": 32}
SITES = {
    "blocks.{1,3}.hook_resid_post": None,
    "blocks.2.attn.hook_z": None,
    "blocks.3.attn.hook_pattern": None,
    "blocks.2.hook_resid_post": [reductions.TopK(3)],
    "blocks.0.hook_resid_post": reductions.Int8(),
    "blocks.0.ln2_post.hook_out": lambda x, hook: {"half": x / 2, "sum": x.sum(-1)},
}


@pytest.fixture(scope="module")
def model():
    """The shipped model."""
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def out(model, tmp_path_factory):
    """A store of several sites and reductions; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("store") / "out"
    harvest(model, TEXTS, SITES, folder, **SHAPE)
    return folder


def copied(out, tmp_path):
    return shutil.copytree(out, tmp_path / "copy")


def test_rows_are_those_of_a_run_alone(model, out):
    """At every token of documents that share rows, also beyond the window; the control is another document's value."""
    store = ActivationStore(out)
    documents, tokens = store.documents(0, len(store)), store.tokens(0, len(store))
    names = ["blocks.1.hook_out", "blocks.3.hook_out", "blocks.2.attn.hook_z"]
    for number, text in enumerate(TEXTS[:-1]):
        [rows] = np.nonzero(documents == number)
        ids = model.to_tokens(text)
        _, cache = model.run_with_cache(ids, names)
        np.testing.assert_array_equal(tokens[rows], ids[0])
        for name in names:
            alone, stored = np.asarray(cache[name][0]), store[name].rows(rows[0], rows[-1] + 1)
            assert np.abs(stored - alone).max() < 1e-5 * np.abs(alone).max(), name
            if len(rows) > 3:
                assert np.abs(stored[1:] - alone[:-1]).max() > 1e-2 * np.abs(alone).max()
    assert (np.diff(documents) >= 0).all()


def test_rows_without_packing_are_the_same(model, out, tmp_path):
    """One document a row: the same tokens and values; and a value for each document."""
    last = {"blocks.3.hook_out": None, "blocks.1.hook_out": reductions.At(-1), "blocks.2.hook_out": reductions.Mean()}
    harvest(model, TEXTS, last, tmp_path / "rows", pack=False, **SHAPE)
    packed, alone = ActivationStore(out), ActivationStore(tmp_path / "rows")
    n = int((packed.documents(0, len(packed)) < 8).sum())  # the last one is cut in other places
    np.testing.assert_array_equal(packed.tokens(0, n), alone.tokens(0, n))
    np.testing.assert_allclose(packed["resid_post", 3].rows(0, n), alone["resid_post", 3].rows(0, n), atol=2e-3)
    ends = np.flatnonzero(np.diff(alone.positions(0, n), append=0) <= 0)
    np.testing.assert_allclose(
        alone["resid_post", 1].rows(0, len(ends))[:, 0], packed["resid_post", 1].take(ends), atol=2e-3
    )
    assert len(ends) == len(TEXTS) - 1
    assert len(alone["resid_post", 2]) == len(TEXTS) + 1  # one is cut in two
    assert alone["resid_post", 2].documents(8, 10).tolist() == [8, 8]
    with pytest.raises(StoreError, match="pack=False"):
        harvest(model, TEXTS, {"blocks.1.hook_out": reductions.Mean()}, tmp_path / "mean", **SHAPE)


def test_reductions(model, out):
    """Arrays of one, of several by name, of nested results; int8 comes back as floats within half a scale."""
    store = ActivationStore(out)
    _, cache = model.run_with_cache(TEXTS[1], ["blocks.*.hook_resid_post", "blocks.0.ln2_post.hook_out"])
    [rows] = np.nonzero(store.documents(0, len(store)) == 1)
    top = store["resid_post", 2].rows(rows[0], rows[-1] + 1)
    wanted = reductions.TopK(3)(cache["resid_post", 2][0], None)
    np.testing.assert_allclose(top["values"], wanted.values, atol=1e-3)
    whole = np.asarray(cache["resid_post", 0][0])
    near = store["resid_post", 0].take(rows)
    assert np.abs(near - whole).max() < np.abs(whole).max() / 127
    mine = store["blocks.0.ln2_post.hook_out"].take(rows)
    np.testing.assert_allclose(mine["half"] * 2, cache["blocks.0.ln2_post.hook_out"][0], atol=1e-4)
    assert mine["sum"].shape == rows.shape
    assert store["blocks.3.attn.hook_pattern"].shape == (len(store), 4, 32)
    assert token_axis("blocks.3.attn.hook_pattern") == 2


def test_a_long_document_is_cut(out):
    """Its pieces fill the rows, each with BOS, and no token is lost."""
    store = ActivationStore(out)
    n = len(store)
    [rows] = np.nonzero(store.documents(0, n) == 8)
    offsets, positions = store.offsets(0, n)[rows], store.positions(0, n)[rows]
    assert [i for i in offsets if i >= 0] == list(range(41))
    begins = positions == 0
    assert begins.sum() > 1
    assert (store.tokens(0, n)[rows][begins] == 2).all()
    assert (offsets[begins][1:] == -1).all()


def test_what_is_kept(model, out, tmp_path):
    """Without BOS; tokens for which a function is true; a few of each document, the same for the same seed."""
    whole = ActivationStore(out)
    n = len(whole)
    offsets, positions, documents = (read(0, n) for read in (whole.offsets, whole.positions, whole.documents))
    chosen = {
        "drop_bos": ({"drop_bos": True}, positions > 0),
        "keep": ({"keep": lambda tokens, positions: positions % 3 == 1}, positions % 3 == 1),
    }
    for name, (options, wanted) in chosen.items():
        harvest(model, TEXTS, {"blocks.1.hook_out": None}, tmp_path / name, **options, **SHAPE)
        store = ActivationStore(tmp_path / name)
        np.testing.assert_array_equal(store.offsets(0, len(store)), offsets[wanted])
        np.testing.assert_allclose(
            np.asarray(store["resid_post", 1]), np.asarray(whole["resid_post", 1])[wanted], rtol=1e-5, atol=1e-3
        )
    found = []
    for seed, name in [(0, "a"), (0, "b"), (1, "c")]:
        harvest(model, TEXTS, {"blocks.1.hook_out": None}, tmp_path / name, sample=4, seed=seed, **SHAPE)
        store = ActivationStore(tmp_path / name)
        counts = np.bincount(store.documents(0, len(store))).tolist()
        assert counts == [min(4, n) for n in np.bincount(documents[offsets > 0])]
        found.append(store.offsets(0, len(store)).tolist())
    assert found[0] == found[1] != found[2]
    with pytest.raises(StoreError, match="one bool for each"):
        harvest(model, TEXTS, "blocks.1.hook_out", tmp_path / "d", keep=lambda tokens, positions: tokens, **SHAPE)


def test_dtypes(model, tmp_path):
    """`Cast` halves the store; a bfloat16 array is written to `.npy` as float32."""
    harvest(model, TEXTS[:3], {"blocks.1.hook_out": reductions.Cast("bfloat16")}, tmp_path / "out", **SHAPE)
    store = ActivationStore(tmp_path / "out")
    assert store["resid_post", 1].rows(0, 3).dtype == jnp.bfloat16
    store["resid_post", 1].save(tmp_path / "values.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), np.asarray(store["resid_post", 1], np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": {**SITES, "blocks.1.attn.hook_z": None}}, r"blocks\.1\.attn\.o\.hook_in"),
        ({"sites": {**SITES, "blocks.2.hook_resid_post": reductions.TopK(4)}}, "shape"),
        (
            {"sites": {**SITES, "blocks.0.ln2_post.hook_out": lambda x, hook: {"half": x / 3, "sum": x.sum(-1)}}},
            "digest",
        ),
        ({"length": 64}, "length is 64, and was 32"),
        ({"rows": 3}, "rows is 3, and was 2"),
        ({"seed": 1}, "seed is 1, and was 0"),
        ({"pack": False}, "pack|pattern"),
        ({"corpus": [*TEXTS[:-1], "ba"]}, "corpus: digest"),
        ({"corpus": TEXTS[:-1]}, "corpus: documents is 8, and was 9"),
        ({"dtype": "bfloat16"}, "parameters: dtype"),
        ({"scale": 1.001}, "parameters: digest"),
        ({"drop_bos": True}, "drop_bos is true, and was false"),
    ],
)
def test_another_run_is_refused(model, out, change, message):
    """The difference is named, and the store is as it was; the same arguments are not refused."""
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    arguments = {"corpus": TEXTS, "sites": SITES, **SHAPE, **change}
    if dtype := arguments.pop("dtype", None):
        model = HookedGemma3.from_pretrained(TINY, dtype=dtype)
    if scale := arguments.pop("scale", None):
        embed = {"weight": model.params["embed"]["weight"] * scale}
        model = HookedGemma3(model.config, {**model.params, "embed": embed}, model.tokenizer)
    corpus, sites = arguments.pop("corpus"), arguments.pop("sites")
    with pytest.raises(StoreError, match=message):
        harvest(model, corpus, sites, out, **arguments)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}


def test_the_same_run_has_nothing_to_do(model, out):
    """Also in parts; and a plan that is lost is made again."""
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (out / "plan.npy").unlink()
    for part in ((1, 2), "claim", "0/1"):
        harvest(model, TEXTS, SITES, out, part=part, **SHAPE)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_damage_is_found_and_repaired(model, out, tmp_path):
    """A truncated unit is found at once, a changed byte by `verify`; a repair does these again, and no other."""
    folder = copied(out, tmp_path)
    files = sorted(folder.rglob("*.safetensors"))
    whole = [file.read_bytes() for file in files]
    files[1].write_bytes(whole[1][:-100])
    for use in (lambda: harvest(model, TEXTS, SITES, folder, **SHAPE), lambda: len(ActivationStore(folder))):
        with pytest.raises(StoreError, match=rf"{files[1].name} is damaged.*repair"):
            use()
    for place in (-5, whole[0].index(b"tokens")):  # in the content and in the header
        changed = bytearray(whole[0])
        changed[place] ^= 1
        files[0].write_bytes(bytes(changed))
        with pytest.raises(StoreError, match=rf"{files[0].name}.*checksum"):
            verify(folder)
    untouched = files[-1].stat().st_mtime_ns
    harvest(model, TEXTS, SITES, folder, repair=True, **SHAPE)
    assert [file.read_bytes() for file in files] == whole
    assert files[-1].stat().st_mtime_ns == untouched
    verify(folder)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_unit_that_is_something_else(out, tmp_path, content):
    """Any content is one clear error."""
    folder = copied(out, tmp_path)
    next(folder.rglob("*.safetensors")).write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        len(ActivationStore(folder))


def test_an_unfinished_store(model, out, tmp_path, caplog):
    """It has the units that are there, and says so; a later run does the others, the same bytes."""
    folder = copied(out, tmp_path)
    first = folder / "units" / "000" / "000000.safetensors"
    content = first.read_bytes()
    first.unlink()
    store = ActivationStore(folder)
    assert "1 of" in caplog.text
    assert store.missing.tolist() == [0]
    assert 0 < len(store) < len(ActivationStore(out))
    with pytest.raises(StoreError, match="lacks 1"):
        verify(folder)
    harvest(model, TEXTS, SITES, folder, part="0/2", **SHAPE)
    assert first.read_bytes() == content


def test_a_full_disk(model, tmp_path, monkeypatch):
    """One clear error; what is finished is kept, nothing else is left, and a later run does the rest."""
    from gemma3_jax import atomic
    from gemma3_jax.harvest import files

    write, sizes = files.write_unit, []

    def full(place, arrays, number):
        if number == 1:
            file = place.full(files.unit_name(1))
            with atomic.new_durable_file(file) as temporary:
                temporary.write_bytes(b"some")
                raise OSError(28, "No space left on device", file)
        sizes.append(write(place, arrays, number))
        return sizes[-1]

    monkeypatch.setattr(files, "write_unit", full)
    arguments = (model, TEXTS, "blocks.1.hook_out", tmp_path / "out")
    with pytest.raises(StoreError, match=r"No space left on device.*finished units are kept"):
        harvest(*arguments, rows=1, length=32)
    monkeypatch.undo()
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name.startswith(".")]
    assert (tmp_path / "out" / "units" / "000" / "000000.safetensors").exists()
    assert not (tmp_path / "out" / "units" / "000" / "000001.safetensors").exists()
    harvest(*arguments, rows=1, length=32)
    verify(tmp_path / "out")


def test_a_small_disk(model, tmp_path, monkeypatch, caplog):
    """Nothing is begun if all tokens do not fit; with a sample of them, which may be smaller, it is a warning."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=3000))
    with pytest.raises(StoreError, match=r"takes .* KiB, and .* has 2.9 KiB free.*sample"):
        harvest(model, TEXTS, "blocks.1.hook_out", tmp_path / "out", **SHAPE)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    harvest(model, TEXTS, "blocks.1.hook_out", tmp_path / "sampled", sample=1, **SHAPE)
    assert "has 2.9 KiB free" in caplog.text
    monkeypatch.undo()
    harvest(model, TEXTS, "blocks.1.hook_out", tmp_path / "out", **SHAPE)  # control
    verify(tmp_path / "out")


def test_too_little_memory(model, tmp_path):
    """What a device cannot hold is an error that says what to take less of; an error of another kind is not touched."""

    def huge(value, hook):
        return value + jnp.sort(value.sum() * jax.lax.broadcasted_iota(jnp.float32, (2**20, 2**20), 1))[0, 0]

    with pytest.raises(MemoryError, match=r"a unit of 2 rows of 32 tokens runs at once.*fewer rows.*placing.fits"):
        harvest(model, TEXTS, {"blocks.1.hook_out": huge}, tmp_path / "out", **SHAPE)


def test_a_lost_folder(model, tmp_path):
    """It is not made again while the harvest runs, and the error says what to do."""
    folder = tmp_path / "out"

    def keep(tokens, positions):
        shutil.rmtree(folder)
        return tokens > 0

    with pytest.raises(StoreError, match=r"run again"):
        harvest(model, TEXTS[:1], "blocks.1.hook_out", folder, keep=keep, **SHAPE)
    assert not folder.exists()


def test_folders_of_something_else(model, tmp_path):
    """They are left alone."""
    (tmp_path / "mine.txt").write_text("mine")
    for use in (lambda: harvest(model, TEXTS, "blocks.1.hook_out", tmp_path), lambda: ActivationStore(tmp_path)):
        with pytest.raises(StoreError, match="not an activation store"):
            use()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
