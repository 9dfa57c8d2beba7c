"""Names in checkpoints: prefixes, buffers, other heads, tied heads, and fine-tunes and wrappers that people have."""

import json
import logging
import math
import re
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conversion import CheckpointError, convert_checkpoint, convert_state_dict, load_params, read_heads
from gemma3_jax import TINY, Gemma3Config, HookedGemma3
from gemma3_jax.conversion.plan import plan_of
from gemma3_jax.conversion.tensors import Tensors, of_state_dict

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, SCORE = "model.embed_tokens.weight", np.ones((3, 5), np.float32)
TENSORS = load_file(Path(TINY) / WEIGHTS)
CONFIG = json.loads((Path(TINY) / "config.json").read_text())


def written(directory: Path, tensors: dict, **config) -> Path:
    """A checkpoint of one file."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return directory


def equal(a: dict, b: dict) -> bool:
    """Whether two pytrees of parameters have the same leaves."""
    a, b = flax.traverse_util.flatten_dict(a), flax.traverse_util.flatten_dict(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def tiny() -> tuple[Gemma3Config, dict]:
    return convert_checkpoint(TINY)


component = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True).filter(
    lambda name: name not in ("vision_tower", "multi_modal_projector", "lm_head")
)
known = st.sampled_from(["_orig_mod", "module", "base_model", "model", "language_model", "pretrained_model"])


@given(st.lists(known | component, max_size=5), st.lists(known | component, max_size=3))
@settings(deadline=None)
def test_any_prefix(wrappers, head):
    """Whatever stands before a whole set of keys is found, and before the unembedding, which may have another one."""
    untied = Gemma3Config.from_hf({**CONFIG, "tie_word_embeddings": False})
    prefix, before = ("".join(f"{name}." for name in names) for names in (wrappers, head))
    keys = {key: prefix + key.removeprefix("model.") for key in TENSORS}
    keys["lm_head.weight"] = f"{before}lm_head.weight"
    tensors = {keys[key]: TENSORS.get(key, TENSORS[EMBED]) for key in keys}
    plan = plan_of(untied, of_state_dict(tensors))
    ours = {entry.hf if entry.hf == "lm_head.weight" else f"model.{entry.hf}": key for entry, key in plan.items()}
    assert ours == keys


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.model.", "base_model.model.model.", "model.model.language_model."]
)
def test_parameters_under_a_prefix(prefix, tiny, tmp_path):
    """Wrappers of torch.compile, DataParallel and PEFT, and of ShieldGemma 2, from a file."""
    tensors = {prefix + key.removeprefix("model."): array for key, array in TENSORS.items()}
    assert equal(convert_checkpoint(written(tmp_path / "x", tensors))[1], tiny[1])


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_inside_keys(wrapper, tiny, tmp_path):
    """A compiled, sharded or recomputed block: of every layer or of one, of its parts, and around the whole model."""
    for at in (r"(layers\.\d\.)", r"(layers\.1\.)", r"(mlp\.|norm\.|embed_tokens\.)", "(^)"):
        tensors = {re.sub(at, rf"\1{wrapper}.", key): array for key, array in TENSORS.items()}
        assert tensors.keys() != TENSORS.keys()
        assert equal(convert_state_dict(tensors, tiny[0]), tiny[1])
        assert equal(convert_checkpoint(written(tmp_path / str(len(at)), tensors))[1], tiny[1])
    with pytest.raises(CheckpointError, match=r"lacks .*; it has model\.layers\.0\.wrapped\."):  # control
        convert_state_dict({key.replace("layers.0.", "layers.0.wrapped."): a for key, a in TENSORS.items()}, tiny[0])
    with pytest.raises(CheckpointError, match=f"has {EMBED} twice"):
        convert_state_dict(TENSORS | {EMBED.replace("weight", f"{wrapper}.weight"): TENSORS[EMBED]}, tiny[0])


def test_a_key_without_the_prefix_is_missing(tiny):
    """Negative control: the prefix must stand before every key."""
    tensors = {f"module.{key}": array for key, array in TENSORS.items()}
    tensors["model.norm.weight"] = tensors.pop("module.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"lacks module\.model\.norm\.weight"):
        convert_state_dict(tensors, tiny[0])


def test_two_text_models(tiny):
    """A policy and its reference model: neither is taken silently."""
    both = {f"{name}.{key}": array for name in ("policy", "reference") for key, array in TENSORS.items()}
    with pytest.raises(CheckpointError, match=r"several text models: .*'policy\.model\.'.*'reference\.model\.'"):
        convert_state_dict(both, tiny[0])


BUFFERS = (
    "model.rotary_emb.inv_freq",
    "model.rotary_emb_local.inv_freq",
    "model.rotary_emb.full_attention_original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.embed_tokens.embed_scale",
)


def test_buffers_are_skipped(tiny, tmp_path, caplog):
    """Buffers that the config determines carry nothing, whatever their dtype. No message mentions them."""
    buffers = {key: np.ones(4, np.float64) for key in BUFFERS}
    with caplog.at_level(logging.WARNING):
        _, params = convert_checkpoint(written(tmp_path / "x", {**TENSORS, **buffers}))
    assert equal(params, tiny[1])
    assert not caplog.records
    with pytest.raises(CheckpointError, match="inv_freqs"):  # control
        convert_checkpoint(written(tmp_path / "x", {**TENSORS, "model.rotary_emb.inv_freqs": np.ones(4)}))


HEADS = {
    "score.weight": SCORE,
    "v_head.summary.weight": np.ones((1, 5), np.float16),
    "v_head.summary.bias": np.zeros(1, np.float32),
    "dense.0.linear.weight": np.ones((2, 5), np.float32),
    "dense.1.linear.weight": np.ones((2, 5), np.float32),
}


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_other_heads(prefix, tiny, tmp_path, caplog):
    """They do not stop the load: one line names them, and read_heads returns them, and nothing else, as stored."""
    wrapper = "module." if prefix.startswith("module") else ""
    text = {prefix + key.removeprefix("model."): array for key, array in TENSORS.items()}
    heads = {wrapper + key: array for key, array in HEADS.items()}
    directory = written(tmp_path / "x", {**text, **heads})
    with caplog.at_level(logging.WARNING):
        _, params = convert_checkpoint(directory)
    assert equal(params, tiny[1])
    (record,) = caplog.records
    assert "5 tensors of other heads" in record.getMessage()
    assert f"{wrapper}dense.*.linear.weight (2)" in record.getMessage()
    returned = read_heads(directory)
    assert {key: (array.dtype, array.shape) for key, array in returned.items()} == {
        key: (array.dtype, array.shape) for key, array in heads.items()
    }
    assert all(np.array_equal(returned[key], array) for key, array in heads.items())


@pytest.mark.parametrize("key", ["lm_head.bias", "model.layers.0.score.weight", "model.score.weight"])
def test_what_would_change_the_text_model_is_no_other_head(key, tiny):
    """A tensor inside the text model, or one that changes its logits, is an error, as it always was."""
    with pytest.raises(CheckpointError, match=key):
        convert_state_dict({**TENSORS, key: SCORE}, tiny[0])


def test_a_reward_model_of_transformers(tmp_path):
    """Gemma3ForSequenceClassification: its score comes back, equal to the model's own."""
    config = transformers.Gemma3TextConfig(**{**CONFIG, "num_labels": 3})
    model = transformers.Gemma3TextForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    convert_checkpoint(tmp_path)
    (score,) = read_heads(tmp_path).values()
    np.testing.assert_array_equal(score, model.score.weight.detach().float().numpy())


# Tied heads


def sharded(directory: Path, weight_map: dict[str, str]) -> Path:
    """The shipped model in one shard, with an index that says more."""
    written(directory, TENSORS)
    (directory / WEIGHTS).rename(directory / "one.safetensors")
    listed = {**dict.fromkeys(TENSORS, "one.safetensors"), **weight_map}
    (directory / INDEX).write_text(json.dumps({"weight_map": listed}))
    return directory


@pytest.mark.parametrize("shard", ["one.safetensors", "two.safetensors"])
def test_a_tied_head_that_only_the_index_lists(shard, tiny, tmp_path):
    """It is not an error, unless the config needs it; and any other key that no shard holds is an error."""
    directory = sharded(tmp_path / "x", {"lm_head.weight": shard})
    assert equal(convert_checkpoint(directory)[1], tiny[1])
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        convert_checkpoint(directory, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"score\.weight|two\.safetensors"):
        convert_checkpoint(sharded(tmp_path / "x", {"score.weight": shard}))


def test_a_tied_config_with_a_head_of_its_own(tiny, tmp_path, command):
    """An argument chooses, and the error names it; config.json stays as it is."""
    head = TENSORS[EMBED] * 2
    directory = written(tmp_path / "x", {**TENSORS, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match="pass tie_word_embeddings=False to use the head, or True"):
        convert_checkpoint(directory)
    config, params = convert_checkpoint(directory, tie_word_embeddings=False)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["unembed"]["weight"], head.T)
    config, params = convert_checkpoint(directory, tie_word_embeddings=True)
    assert config == tiny[0]
    assert equal(params, tiny[1])
    np.testing.assert_array_equal(HookedGemma3.from_pretrained(directory, tie_word_embeddings=False).W_U, head.T)
    assert command("convert", directory, tmp_path / "refused").returncode == 1
    assert command("convert", directory, tmp_path / "ours", "--untie-word-embeddings").returncode == 0
    np.testing.assert_array_equal(load_params(tmp_path / "ours")[1]["unembed"]["weight"], head.T)


# Models that are Gemma 3 under another name


def published(size: str, **fields) -> dict:
    """A config.json with the sizes of a preset."""
    return {**Gemma3Config.preset(size).to_hf(), **fields}


# MedGemma 27b-text and FunctionGemma are text models; MedGemma 4b and ShieldGemma 2 have the image model's shape.
MODELS = {
    "medgemma-27b-text": (transformers.Gemma3ForCausalLM, published("27b", vocab_size=262_144), ""),
    "functiongemma-270m": (transformers.Gemma3ForCausalLM, published("270m"), ""),
    "medgemma-4b": (transformers.Gemma3ForConditionalGeneration, published("4b"), ""),
    "shieldgemma-2-4b": (transformers.ShieldGemma2ForImageClassification, published("4b"), ""),
    "shieldgemma-2-4b, as published": (transformers.Gemma3ForConditionalGeneration, published("4b"), "model."),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_by_config_and_keys(name, caplog):
    """The config that transformers writes, and the keys and shapes of its model, fit this library's table."""
    kind, text, before = MODELS[name]
    config = kind.config_class()
    if kind is transformers.Gemma3ForCausalLM:
        config = kind.config_class(**text)
    else:
        config = kind.config_class(text_config={**text, "model_type": "gemma3_text"}, vision_config={})
    with torch.device("meta"):
        shapes = {before + key: tuple(tensor.shape) for key, tensor in kind(config).state_dict().items()}
    ours = Gemma3Config.from_hf(json.loads(config.to_json_string(use_diff=False)))
    size = {"medgemma-27b-text": "27b", "functiongemma-270m": "270m"}.get(name, "4b")
    preset = Gemma3Config.preset(size)
    assert (ours.layer_types, ours.rope_full) == (preset.layer_types, preset.rope_full)
    # A tied head is the embedding itself.
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith("lm_head.weight")}
    tensors = Tensors(
        name,
        shapes,
        dict.fromkeys(shapes, "bfloat16"),
        open=lambda key: lambda rows: np.empty(0),
        file_of=lambda key: name,
    )
    plan = plan_of(ours, tensors)
    counted = jax.tree.reduce(lambda total, entry: total + math.prod(entry.hf_shape), list(plan), 0)
    assert counted == sum(math.prod(shapes[key]) for key in plan.values())
    assert len(plan) == 2 + 13 * ours.num_hidden_layers
