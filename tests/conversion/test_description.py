"""What `gemma3-jax info` says of a checkpoint is what the load does, and no weights are read for it."""

import copy
import json
import logging
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import CheckpointError, convert_checkpoint, load_params, save_params
from gemma3_jax import TINY, reading
from gemma3_jax.conversion import description
from gemma3_jax.conversion.description import Description
from tests.helpers.random_models import hf_model

Q = "model.layers.0.self_attn.q_proj"


def describe(*arguments, **options) -> Description:
    """The description, which fails if it reads a tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "map_tensor", lambda key, stored: pytest.fail(f"{key} is read"))
        return description.describe(*arguments, **options)


def sizes(params) -> dict[str, int]:
    """The number of parameters by dtype."""
    leaves = jax.tree.leaves(params)
    return {kind: sum(leaf.size for leaf in leaves if leaf.dtype == kind) for kind in {str(x.dtype) for x in leaves}}


def assert_describes(source, load, *arguments, **options):
    """The description has the parameters, bytes and config of the load."""
    described = describe(source, *arguments, **options)
    assert described.error == ""
    config, params = load(source, *arguments, **options)
    assert described.config == config
    assert described.parameters == sizes(params)
    assert described.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert described.least_bytes(7) == described.bytes + 7 * 4 * config.vocab_size
    return described


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_parameters_and_bytes_are_those_of_the_load(stored, dtype, tmp_path):
    """For every stored dtype and every dtype asked for; float16 is loaded in float32."""
    import torch

    hf_model(getattr(torch, stored)).save_pretrained(tmp_path)
    described = assert_describes(tmp_path, convert_checkpoint, dtype)
    assert described.files == ("model.safetensors",)
    assert len(described.stored) == 1
    assert sum("float16" in note for note in described.notes) == (stored == "float16" and dtype is None)


def test_shards_gguf_and_converted_parameters(good, gguf_file, tmp_path):
    """Every kind of source."""
    assert len(assert_describes(good["sharded"], convert_checkpoint).files) > 1
    described = assert_describes(gguf_file, convert_checkpoint)
    assert len(described.stored) > 1
    assert described.tokenizer == (gguf_file.name,)
    save_params(*convert_checkpoint(good["single"]), tmp_path / "ours", tokenizer=TINY)
    described = assert_describes(tmp_path / "ours", load_params)
    assert described.files == ("params",)
    assert described.tokenizer == ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_adapters(good, model, tmp_path):
    """Merged, with what they change of the config."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(copy.deepcopy(model), settings).save_pretrained(tmp_path)
    described = assert_describes(good["single"], convert_checkpoint, adapter=tmp_path)
    assert described.adapters == (tmp_path,)


def test_heads_and_other_leftovers_are_notes(good, tmp_path, caplog):
    """What the load logs is in the description, and not in the log."""
    directory = shutil.copytree(good["single"], tmp_path / "reward")
    tensors = load_file(directory / "model.safetensors")
    tensors["score.weight"] = np.zeros((3, 4), np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        described = describe(directory)
    assert described.error == ""
    assert any("score.weight" in note for note in described.notes)
    assert any("tied" in note for note in described.notes)
    assert not caplog.records


def test_what_would_go_wrong(good, tmp_path):
    """The error of the load, beside everything that can still be told."""
    directory = shutil.copytree(good["single"], tmp_path / "broken")
    tensors = load_file(directory / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    described = describe(directory)
    assert "model.layers.1.mlp.up_proj.weight" in described.error
    assert described.config.hidden_size == lost.shape[1]
    assert sum(described.stored.values()) == len(tensors)
    assert described.parameters == {}
    (directory / "model.safetensors").write_bytes(b"\0" * 20)
    assert "truncated or corrupt" in describe(directory).error
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        describe(directory)


def test_tokenizers_that_will_not_load(good, tmp_path):
    """Settings without a vocabulary are a note, as at the load; a Git LFS pointer is its error."""
    directory = shutil.copytree(good["single"], tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    described = describe(directory)
    assert (described.tokenizer, described.error) == ((), "")
    assert any("without a tokenizer" in note and "chat_template.jinja" in note for note in described.notes)
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in describe(directory).error
    assert describe(TINY).tokenizer  # control


@pytest.fixture
def hub(good, monkeypatch, tmp_path):
    """A hub that gives small files and headers, and no weights."""
    snapshot = tmp_path / "snapshot"
    shutil.copytree(good["single"], snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def download(name, revision=None, allow_patterns=()):
        asked.append(allow_patterns)
        return str(snapshot)

    def headers(name, revision=None):
        tensors = {
            key: SimpleNamespace(shape=list(tensor.shape), dtype=tensor.dtype, data_offsets=(tensor.start, 0))
            for key, tensor in reading.read_header(good["single"] / "model.safetensors").items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    return asked


def test_a_model_on_the_hub_is_not_downloaded(hub, good):
    """Its headers are read from the hub; the description is that of the directory."""
    described, local = describe("org/model"), describe(good["single"])
    assert described == local
    assert not any(pattern in ("*.safetensors", "model*.safetensors") for pattern in hub[0])


def test_packed_weights_on_the_hub(hub, monkeypatch):
    """Their shapes are in their data, which is not downloaded: a note says so, and no error."""
    header = SimpleNamespace(shape=[64], dtype="U8", data_offsets=(0, 64))
    tensors = {f"{Q}.weight{part}": header for part in ("", ".quant_state.bitsandbytes__nf4")}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name, revision=None: metadata)
    described = describe("org/model")
    assert (described.error, described.parameters, described.stored) == ("", {}, {"U8": 2})
    assert any(f"{Q}.weight.quant_state.bitsandbytes__nf4 is needed" in note for note in described.notes)


def test_errors_of_the_hub_are_one_line(hub, monkeypatch):
    """A model without safetensors."""

    def refuse(name, revision=None):
        raise huggingface_hub.errors.NotASafetensorsRepoError(f"'{name}' is not a safetensors repo.\nmore")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None: ["model.bin"])
    with pytest.raises(CheckpointError, match=r"the headers of org/model cannot be read: .* not a safetensors repo"):
        describe("org/model")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision=None: ["config.json", "a.gguf"])
    with pytest.raises(CheckpointError, match=r"give one, such as org/model/a\.gguf"):
        describe("org/model")


def test_the_command_prints_all_of_it(good, tmp_path, command):
    """Parameters, memory, notes; exit code 1 and one line for a checkpoint that does not load."""
    printed = command("info", good["single"])
    assert printed.returncode == 0
    for words in ("parameters", "float32", "memory", "to run 1,024 tokens", "none: the model takes token ids"):
        assert words in printed.stdout
    directory = shutil.copytree(good["single"], tmp_path / "broken")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    printed = command("info", directory)
    assert printed.returncode == 1
    assert "does not load" in printed.stderr
    assert "vocab_size" in printed.stdout


def test_control_a_load_reads_data(good, monkeypatch):
    """A description that reads tensors would be noticed."""
    monkeypatch.setattr(description, "describe", convert_checkpoint)
    with pytest.raises(pytest.fail.Exception, match="is read"):
        describe(good["single"])
