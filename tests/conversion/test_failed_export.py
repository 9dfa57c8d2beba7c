"""Export is all or nothing: an export that does not fit is named, and no file is left."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import (
    CheckpointError,
    convert_checkpoint,
    export_checkpoint,
)
from gemma3_jax.conversion import export, files
from tests.conversion.checkpoint_files import said

LEAF = ("blocks_1", "attn", "q", "weight")
PARAMS = {
    "missing leaf": (lambda q: q.pop("weight"), ["blocks_1/attn/q/weight"]),
    "extra leaf": (lambda q: q.update(bias=q["weight"]), ["blocks_1/attn/q/bias"]),
    "wrong shape": (lambda q: q.update(weight=q["weight"][1:]), ["blocks_1/attn/q/weight", "[7, 48, 10]"]),
    "integers": (lambda q: q.update(weight=q["weight"].astype(jnp.int8)), ["blocks_1/attn/q/weight", "int8"]),
    "no array": (lambda q: q.update(weight=None), ["blocks_1/attn/q/weight"]),
}


@pytest.mark.parametrize(("ruin", "named"), PARAMS.values(), ids=PARAMS)
def test_export_of_wrong_parameters(ruin, named, good, tmp_path):
    """Parameters that do not fit the config are named, and not a file is written."""
    config, params = convert_checkpoint(good["single"])
    ruin(params["blocks_1"]["attn"]["q"])
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(config, params, tmp_path / "out")
    said(caught, *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "named"),
    [("full", "not empty"), ("file", "exists"), ("no/parent", "not a directory"), ("file/x", "file")],
)
def test_export_to_a_place_that_will_not_do(target, named, good, tmp_path):
    """A directory with something in it, a file, a missing parent: refused, and what was there stays as it was."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    config, params = convert_checkpoint(good["single"])
    with pytest.raises(CheckpointError, match=named) as caught:
        export_checkpoint(config, params, tmp_path / target)
    said(caught, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("bad", [{"tokenizer": "nowhere"}, {"max_shard_size": "50XB"}], ids=str)
def test_export_with_a_wrong_argument(bad, good, tmp_path):
    """A tokenizer that is not there and a size that is none are one line each, and nothing is left behind."""
    config, params = convert_checkpoint(good["single"])
    with pytest.raises(ValueError, match=r"nowhere|50XB") as caught:
        export_checkpoint(config, params, tmp_path / "out", **bad)
    said(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -5, 1.5, float("nan"), True, None])
def test_export_in_shards_of_no_size(size, good, tmp_path):
    """Each tensor was written to a file of its own, whatever was meant."""
    config, params = convert_checkpoint(good["single"])
    with pytest.raises(CheckpointError, match=f"max_shard_size is {size}") as caught:
        export_checkpoint(config, params, tmp_path / "out", max_shard_size=size)
    said(caught, "5GB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["second shard", "index", "config"])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_export_leaves_nothing(where, error, exists, good, tmp_path, monkeypatch):
    """Whatever stops an export, at whichever file: no temporary directory stays, and the target is as it was."""
    config, params = convert_checkpoint(good["single"])
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    save, write = export.write_tensors, files.write_json

    def stop(real):
        def run(*args, **kwargs):
            path = str(args[0])
            if {"second shard": "-00002-", "index": "index.json", "config": "config.json"}[where] in path:
                Path(path).write_text("half")
                raise error
            real(*args, **kwargs)

        return run

    monkeypatch.setattr(export, "write_tensors", stop(save))
    monkeypatch.setattr(files, "write_json", stop(write))
    with pytest.raises(type(error)):
        export_checkpoint(config, params, target, max_shard_size="50KB")
    assert list(tmp_path.rglob("*")) == ([target] if exists else [])

    monkeypatch.undo()
    export_checkpoint(config, params, target, max_shard_size="50KB")
    assert jax.tree.all(jax.tree.map(np.array_equal, convert_checkpoint(target)[1], params))
