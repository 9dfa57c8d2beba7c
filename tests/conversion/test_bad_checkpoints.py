"""Broken checkpoints and wrong calls: each is one clear line that names the culprit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conversion import (
    CheckpointError,
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    load_params,
    save_params,
)
from gemma3_jax import ConfigError, Gemma3Config
from tests.conversion.checkpoint_files import EMBED, GATE, INDEX, SINGLE, Q, said

# Ways to break a checkpoint: each takes the directory.


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        held = load_file(directory / SINGLE)
        change(held)
        save_file(held, directory / SINGLE)

    return apply


def config(**fields) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return apply


def content(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / name
        file.write_bytes(data(file.read_bytes()) if callable(data) else data)

    return apply


def gone(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        held = json.loads((directory / INDEX).read_text())
        change(held["weight_map"])
        (directory / INDEX).write_text(json.dumps(held))

    return apply


def shard(directory: Path, n: int) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[n]


def missing_shard(directory: Path) -> None:
    shard(directory, 1).rename(directory / "elsewhere.safetensors")


def doubled_key(directory: Path) -> None:
    first, second = shard(directory, 0), shard(directory, 1)
    key, array = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: array}, second)


def truncated_shard(directory: Path) -> None:
    file = shard(directory, 1)
    file.write_bytes(file.read_bytes()[:-100])


LAST = "model-00007-of-00007.safetensors"
# What is broken: the layout it starts from, the way to break it, the error, what the message names.
BROKEN = {
    "missing key": ("single", tensors(lambda t: t.pop(Q)), CheckpointError, [Q]),
    "missing norm": ("single", tensors(lambda t: t.pop("model.norm.weight")), CheckpointError, ["model.norm.weight"]),
    "missing embedding": ("single", tensors(lambda t: t.pop(EMBED)), CheckpointError, ["embed_tokens.weight"]),
    "no tensor at all": ("single", tensors(dict.clear), CheckpointError, ["embed_tokens.weight"]),
    "unexpected key": (
        "single",
        tensors(lambda t: t.update({"model.layers.1.extra.weight": t[Q]})),
        CheckpointError,
        [SINGLE, "model.layers.1.extra.weight"],
    ),
    "unexpected bias": (
        "single",
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(80, np.float32)})),
        CheckpointError,
        [SINGLE, "model.layers.0.self_attn.q_proj.bias"],
    ),
    "two prefixes": (
        "single",
        tensors(lambda t: t.update({f"language_model.{EMBED}": t[EMBED]})),
        CheckpointError,
        ["language_model.model.layers.0."],
    ),
    "wrong shape": (
        "single",
        tensors(lambda t: t.update({Q: t[Q][:-1]})),
        CheckpointError,
        [SINGLE, Q, "[79, 48]", "[80, 48]"],
    ),
    "transposed": (
        "single",
        tensors(lambda t: t.update({GATE: np.ascontiguousarray(t[GATE].T)})),
        CheckpointError,
        [SINGLE, GATE, "[48, 80]", "[80, 48]"],
    ),
    "int8": ("single", tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})), CheckpointError, [SINGLE, Q, "I8"]),
    "float64": ("single", tensors(lambda t: t.update({Q: t[Q].astype(float)})), CheckpointError, [SINGLE, Q, "F64"]),
    "truncated": ("single", content(SINGLE, lambda data: data[:-100]), CheckpointError, [SINGLE]),
    "truncated header": ("single", content(SINGLE, lambda data: data[:100]), CheckpointError, [SINGLE]),
    "garbage": ("single", content(SINGLE, bytes(range(256)) * 40), CheckpointError, [SINGLE]),
    "empty file": ("single", content(SINGLE, b""), CheckpointError, [SINGLE]),
    "no safetensors": ("single", gone(SINGLE), CheckpointError, [SINGLE, INDEX]),
    "no config": ("single", gone("config.json"), CheckpointError, ["config.json"]),
    "config no JSON": ("single", content("config.json", b'{"a": 1'), CheckpointError, ["config.json"]),
    "config no text": ("single", content("config.json", b"\xff\xfe\x00"), CheckpointError, ["config.json"]),
    "config no object": ("single", content("config.json", b"[]"), ValueError, ["config.json"]),
    "rope_type": (
        "single",
        config(rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
        ConfigError,
        ["config.json", "rope_type", "yarn"],
    ),
    "activation": ("single", config(hidden_activation="silu"), ConfigError, ["config.json", "hidden_activation"]),
    "llama": ("single", config(model_type="llama"), ConfigError, ["config.json", "model_type", "llama"]),
    "more layers": (
        "single",
        config(num_hidden_layers=4, layer_types=["full_attention"] * 4),
        CheckpointError,
        ["model.layers.3."],
    ),
    "fewer layers": (
        "single",
        config(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        CheckpointError,
        [SINGLE, "model.layers.2."],
    ),
    "other heads": ("single", config(num_attention_heads=4), CheckpointError, [SINGLE, "q_proj.weight", "[40, 48]"]),
    "other groups": ("single", config(num_key_value_heads=4), CheckpointError, [SINGLE, "k_proj.weight", "[40, 48]"]),
    "other vocabulary": ("single", config(vocab_size=100), CheckpointError, [SINGLE, EMBED, "[100, 48]"]),
    "heads and groups": ("single", config(num_key_value_heads=3), ConfigError, ["num_key_value_heads 3"]),
    "untied without head": (
        "single",
        config(tie_word_embeddings=False),
        CheckpointError,
        ["lm_head.weight, which untied embeddings require; with tie_word_embeddings=True"],
    ),
    "tied with a head of its own": (
        "single",
        tensors(lambda t: t.update({"lm_head.weight": t[EMBED] + 1})),
        CheckpointError,
        ["lm_head.weight", EMBED, "tie_word_embeddings"],
    ),
    "tied with a head of another shape": (
        "single",
        tensors(lambda t: t.update({"lm_head.weight": t[EMBED][1:]})),
        CheckpointError,
        ["lm_head.weight"],
    ),
    "missing shard": ("sharded", missing_shard, CheckpointError, ["model-00002-of-00007.safetensors"]),
    "truncated shard": ("sharded", truncated_shard, CheckpointError, ["model-00002-of-00007.safetensors"]),
    "doubled key": (
        "sharded",
        doubled_key,
        CheckpointError,
        ["model-00001-of-00007.safetensors", "model-00002-of-00007.safetensors", EMBED],
    ),
    "index places a key wrongly": ("sharded", index(lambda m: m.update({EMBED: LAST})), CheckpointError, [EMBED, LAST]),
    "index names no file of ours": (
        "sharded",
        index(lambda m: m.update({"model.norm.weight": "other.safetensors"})),
        CheckpointError,
        ["other.safetensors"],
    ),
    "index no JSON": ("sharded", content(INDEX, b"{"), CheckpointError, [INDEX]),
    "index no object": ("sharded", content(INDEX, b"[]"), CheckpointError, [INDEX]),
    "index without a map": ("sharded", content(INDEX, b"{}"), CheckpointError, [INDEX, "weight_map"]),
    "index with numbers": ("sharded", index(lambda m: m.update({EMBED: 3})), CheckpointError, [INDEX]),
}


@pytest.mark.parametrize(("layout", "ruin", "error", "named"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoint(layout, ruin, error, named, good, tmp_path):
    """Each broken checkpoint is one line with the tensor and the file, before anything is returned."""
    directory = tmp_path / "broken"
    shutil.copytree(good[layout], directory)
    ruin(directory)
    with pytest.raises(error) as caught:
        convert_checkpoint(directory)
    assert isinstance(caught.value, CheckpointError | ConfigError)
    said(caught, *named)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_sound_checkpoint(layout, good):
    """Negative control: what the cases above start from converts."""
    convert_checkpoint(good[layout])


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{good}/model.safetensors", "is a file"),
        ("{good}/nowhere", "no directory"),
        ("./nowhere", "no directory"),
        ("a/b/c", "no directory"),
        ("org/unknown", "org/unknown"),
        ("not a hub id", "not a hub id"),
    ],
)
def test_source_that_is_not_there(source, named, good, monkeypatch, tmp_path):
    """A file, a missing path and a hub id that no cache holds each get their own line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    source = source.format(good=good["single"])
    with pytest.raises(CheckpointError, match=named) as caught:
        convert_checkpoint(source)
    said(caught, source)


def test_unknown_revision(good, monkeypatch, tmp_path):
    """A model that is there at another revision: the message says which one was asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    shutil.copytree(good["single"], refs.parent / "snapshots" / ("a" * 40))
    convert_checkpoint("org/name")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint("org/name", revision="v2")
    said(caught, "org/name", "v2")


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such dtype", 3, torch.bfloat16], ids=str)
def test_bad_dtype(dtype, good, model, tmp_path):
    """Every entry that takes a dtype refuses one that parameters cannot have, and lists those they can."""
    config, params = convert_checkpoint(good["single"])
    save_params(config, params, tmp_path / "saved")
    calls = {
        lambda: convert_checkpoint(good["single"], dtype=dtype): "use float32 or bfloat16",
        lambda: convert_state_dict(model.state_dict(), config, dtype=dtype): "use float32 or bfloat16",
        lambda: load_params(tmp_path / "saved", dtype=dtype): "use float32 or bfloat16",
        lambda: export_checkpoint(config, params, tmp_path / "out", dtype=dtype): "use float32, bfloat16 or float16",
    }
    for call, uses in calls.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        said(caught, dtype, uses)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


STATES = {
    "missing": (lambda s: s.pop(Q), [Q]),
    "unexpected": (lambda s: s.update({"model.layers.9.mlp.x": s[Q]}), ["model.layers.9.mlp.x"]),
    "shape": (lambda s: s.update({Q: s[Q][1:]}), [Q, "[79, 48]"]),
    "int8": (lambda s: s.update({Q: s[Q].to(torch.int8)}), [Q, "int8"]),
    "float64": (lambda s: s.update({Q: s[Q].double()}), [Q, "float64"]),
    "float64 of numpy": (lambda s: s.update({Q: s[Q].double().numpy()}), [Q, "float64"]),
    "list": (lambda s: s.update({Q: [1.0]}), [Q, "list", "torch tensors or numpy arrays"]),
    "head of its own": (lambda s: s.update({"lm_head.weight": s[EMBED] + 1}), ["lm_head.weight", EMBED]),
}


@pytest.mark.parametrize(("ruin", "named"), STATES.values(), ids=STATES)
def test_broken_state_dict(ruin, named, model):
    """A state dict is checked as a file is."""
    state = dict(model.state_dict())
    ruin(state)
    with pytest.raises(CheckpointError) as caught:
        convert_state_dict(state, Gemma3Config.from_hf(model.config))
    said(caught, *named)
