"""Checkpoints from the hub's cache: at any revision, offline, and in a process without torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion import convert_checkpoint
from gemma3_jax import Gemma3Config
from tests.conversion.key_map import assert_identical, expected, flat


@pytest.fixture(scope="module")
def hub(saved, tmp_path_factory) -> Path:
    """A hub cache as huggingface_hub lays it out: `main` has the tied model, `other` the untied one."""
    root = tmp_path_factory.mktemp("hub")
    repo = root / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    for revision, kind, commit in (("main", "tied", "a" * 40), ("other", "untied", "b" * 40)):
        (repo / "refs" / revision).write_text(commit)
        shutil.copytree(saved[kind], repo / "snapshots" / commit)
    return root


@pytest.mark.parametrize(
    ("revision", "kind"), [(None, "tied"), ("main", "tied"), ("other", "untied"), ("b" * 40, "untied")]
)
def test_hub_id_from_the_offline_cache(revision, kind, hub, models, monkeypatch):
    """A hub id is read from the cache when there is no network, at the revision asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    config, params = convert_checkpoint("org/name", revision=revision)
    assert config == Gemma3Config.from_hf(models[kind].config)
    assert_identical(flat(params), expected(models[kind]))


WITHOUT_TORCH = """
import importlib.abc, sys
import jax

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("this process has no torch")

sys.meta_path.insert(0, NoTorch())
import {first}
from conversion import convert_checkpoint, export_checkpoint
from gemma3_jax import Gemma3

config, params = convert_checkpoint("org/name", revision="other")
jax.jit(Gemma3(config).apply)({{"params": params}}, jax.numpy.array([[3, 4, 5]]))
export_checkpoint(config, params, sys.argv[1], max_shard_size="50KB")
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("first", ["conversion", "gemma3_jax"])
def test_without_torch_in_a_fresh_process(first, hub, saved, tmp_path):
    """Either package imports first, and converting, running and exporting need no torch, which cannot be imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "JAX_PLATFORMS": "cpu"}
    script = WITHOUT_TORCH.format(first=first)
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    back = {k: array for file in (tmp_path / "out").glob("*.safetensors") for k, array in load_file(file).items()}
    stored = load_file(saved["untied"] / "model.safetensors")
    assert sorted(back) == sorted(stored)
    assert all(np.abs(back[key] - array).max() <= 2.0**-23 for key, array in stored.items())
