"""A store of objects has the bytes of one in a folder; it is continued, claimed, repaired and read by ranges.

Against memory, and against a real server that speaks S3 on this machine.
"""

import os
import secrets
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.harvest import ActivationStore, StoreError, harvest, objects, verify
from gemma3_jax.harvest.files import remove_abandoned, unit_name
from gemma3_jax.harvest.places import place_of

TEXTS = ["ba ke lo mu ti so re"] * 9
SITES = {"blocks.{1,3}.hook_out": None}
SHAPE = {"rows": 1, "length": 16}


@pytest.fixture(scope="module")
def model():
    """The shipped model."""
    return HookedGemma3.from_pretrained(TINY)


@pytest.fixture(scope="module")
def local(model, tmp_path_factory):
    """A store in a folder."""
    out = tmp_path_factory.mktemp("local") / "store"
    harvest(model, TEXTS, SITES, out, **SHAPE)
    return out


@pytest.fixture(scope="module")
def server():
    """The address of a bucket of a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield "s3://bucket"
        fsspec.filesystem("s3").clear_instance_cache()
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def root(request):
    """Where there is nothing yet."""
    base = "memory:/" if request.param == "memory" else request.getfixturevalue("server")
    return f"{base}/{secrets.token_hex(4)}"


def contents(url):
    """All objects, by their names below the URL."""
    system, path = fsspec.url_to_fs(url, use_listings_cache=False)
    return {file.removeprefix(f"{path}/"): system.cat_file(file) for file in system.find(path)}


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_bytes(model, local, root):
    """By parts and by claims, begun and continued; nothing else is left there; a run with nothing to do writes none."""
    harvest(model, TEXTS, SITES, root, part="0/3", **SHAPE)
    assert len(ActivationStore(root)) < len(ActivationStore(local))  # control: there is something left to do
    harvest(model, TEXTS, SITES, root, part="claim", **SHAPE)
    found = contents(root)
    assert found == files(local)
    assert len(found) > 5
    harvest(model, TEXTS, SITES, root, **SHAPE)
    verify(root)
    with pytest.raises(StoreError, match="seed is 1, and was 0"):
        harvest(model, TEXTS, SITES, root, seed=1, **SHAPE)


def test_reading(model, local, root, monkeypatch):
    """Rows, single rows, batches by chance: those of the folder; only their bytes are read."""
    harvest(model, TEXTS, SITES, root, **SHAPE)
    here, there = ActivationStore(local), ActivationStore(root)
    assert len(here) == len(there)
    name, n = ("resid_post", 3), len(here)
    np.testing.assert_array_equal(here[name].rows(3, n - 2), there[name].rows(3, n - 2))
    rows = np.random.default_rng(0).integers(0, n, 30)
    np.testing.assert_array_equal(here[name].take(rows), there[name].take(rows))
    for one, other in zip(here.shuffled(16, seed=1), there.shuffled(16, seed=1), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one[name], other[name])
    assert repr(here) == repr(there)
    read, counts = objects.Objects.read, []

    def counted(self, *arguments):
        counts.append(len(content := read(self, *arguments)))
        return content

    monkeypatch.setattr(objects.Objects, "read", counted)
    row = there[name].rows(2, 3)
    assert counts == [row.nbytes]
    monkeypatch.setattr(objects.Objects, "gap", 0)
    counts.clear()
    np.testing.assert_array_equal(there[name].take(np.asarray([3, 0, 1, 3])), here[name].take([3, 0, 1, 3]))
    assert sorted(counts) == [row.nbytes, 2 * row.nbytes]  # rows 0 and 1 together


def test_damage(model, local, root):
    """A truncated object and a changed byte are found by `verify` and by a repair, which does them again."""
    harvest(model, TEXTS, SITES, root, **SHAPE)
    place, whole = place_of(root), files(local)
    first, second = (whole[unit_name(number)] for number in (0, 1))
    place.write(unit_name(0), [first[:-20]])
    with pytest.raises(StoreError, match=r"000000\.safetensors is damaged.*--repair"):
        verify(root)
    with pytest.raises(StoreError, match="is damaged"):
        len(ActivationStore(root))
    place.write(unit_name(1), [second[:-5] + bytes([second[-5] ^ 1]) + second[-4:]])
    harvest(model, TEXTS, SITES, root, repair=True, **SHAPE)
    assert contents(root) == whole
    place.remove(unit_name(1))
    with pytest.raises(StoreError, match="lacks 1"):
        verify(root)


def test_claims(root, monkeypatch):
    """A unit belongs to one process, until it gives it up, or is gone for long."""
    place, other = place_of(root), place_of(root)
    place.check_claims()
    mine = place.claim("claims/0")
    assert mine is not None
    assert other.claim("claims/0") is None
    assert other.claim("claims/1") is not None  # control: another one is free
    mine.release()
    assert other.claim("claims/0") is not None
    place.write(unit_name(1), [b"done by somebody"])
    remove_abandoned(place)
    assert set(contents(root)) == {"claims/0", unit_name(1)}
    monkeypatch.setattr(objects, "_EXPIRES", objects.datetime.timedelta(seconds=-1))
    assert place.claim("claims/0") is not None
    remove_abandoned(place)
    assert set(contents(root)) == {unit_name(1)}


def test_units_of_a_process_that_is_gone(model, root, caplog):
    """Others pass over them and say so; a process that has them as its part does them, and the claims go."""
    harvest(model, TEXTS, SITES, root, part="1/4", **SHAPE)
    place_of(root).claim("claims/0")
    harvest(model, TEXTS, SITES, root, part="claim", **SHAPE)
    assert "other processes are doing 1 units" in caplog.text
    assert ActivationStore(root).missing.tolist() == [0]
    harvest(model, TEXTS, SITES, root, **SHAPE)
    verify(root)
    assert not [name for name in contents(root) if name.startswith("claims")]


def test_a_store_without_conditional_puts(model, monkeypatch):
    """Claims are refused with the remedy, and nothing is left; parts work."""
    system = fsspec.filesystem("memory")
    put = type(system).pipe_file
    monkeypatch.setattr(type(system), "pipe_file", lambda self, path, value, mode="", **rest: put(self, path, value))
    with pytest.raises(StoreError, match=r"no conditional put.*part=\(number, count\)"):
        harvest(model, TEXTS, SITES, "memory://plain", part="claim", **SHAPE)
    assert not [name for name in contents("memory://plain") if "claims" in name]
    harvest(model, TEXTS, SITES, "memory://plain", **SHAPE)
    verify("memory://plain")


def test_what_is_there_already_or_cannot_be_reached(model, server):
    """Other objects are left alone; no bucket, and no such scheme, are one clear error each."""
    fsspec.filesystem("memory").pipe_file("/mine/notes.txt", b"mine")
    for use in (lambda: harvest(model, TEXTS, SITES, "memory://mine"), lambda: ActivationStore("memory://mine")):
        with pytest.raises(StoreError, match="not an activation store"):
            use()
    assert contents("memory://mine") == {"notes.txt": b"mine"}
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/out.*run again"):
        harvest(model, TEXTS, SITES, "s3://no-such-bucket/out", **SHAPE)
    with pytest.raises(StoreError, match="nowhere://"):
        ActivationStore("nowhere://bucket/out")
    with pytest.raises(StoreError, match="as a text"):
        ActivationStore(Path("s3://bucket/out"))
