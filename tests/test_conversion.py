"""Checkpoints to parameters and back: steps, layouts, dtypes, exact export, and no torch on the way."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import hf_config, hf_model, hf_multimodal, random_tokens, randomize
from safetensors.numpy import load_file, save_file

from conversion import convert_checkpoint, convert_state_dict, export_checkpoint, steps
from gemma3_jax import Gemma3, Gemma3Config

DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}
BITS = {4: np.uint32, 2: np.uint16}


def bits(array) -> np.ndarray:
    """The bit patterns, in which -0 and 0 differ and NaNs are equal."""
    array = np.ascontiguousarray(array)
    return array.view(BITS[array.dtype.itemsize])


def assert_identical(ours: dict, theirs: dict) -> None:
    """Same keys, dtypes, shapes and bits."""
    assert sorted(ours) == sorted(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype, key
        np.testing.assert_array_equal(bits(ours[key]), bits(array), err_msg=str(key))


def flat(params: dict) -> dict[str, jax.Array]:
    """Leaves by adapter key, `blocks_3` spelled as in the tree."""
    return flax.traverse_util.flatten_dict(params, sep=".")


def expected(model, prefix: str = "model.", dtype: torch.dtype | None = None) -> dict[str, np.ndarray]:
    """The parameters of a Hugging Face model, worked out in torch from the key map, without the code under test."""
    state, config = model.state_dict(), model.config.get_text_config()
    d, e, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads

    def take(key: str) -> torch.Tensor:
        return state[prefix + key].to(dtype or state[prefix + key].dtype)

    def norm(key: str) -> torch.Tensor:
        return 1 + state[f"{prefix}{key}.weight"].float()

    out = {"embed.weight": take("embed_tokens.weight"), "ln_final.weight": norm("norm")}
    if not model.config.tie_word_embeddings and "lm_head.weight" in state:
        out["unembed.weight"] = state["lm_head.weight"].to(dtype or state["lm_head.weight"].dtype).T
    norms = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
    }
    for i in range(config.num_hidden_layers):
        hf, ours = f"layers.{i}", f"blocks_{i}"
        out |= {f"{ours}.{key}.weight": norm(f"{hf}.{name}") for key, name in norms.items()}
        for key, n in (("q", h), ("k", g), ("v", g)):
            proj = f"{hf}.self_attn.{key}_proj"
            out[f"{ours}.attn.{key}.weight"] = take(f"{proj}.weight").reshape(n, e, d).permute(0, 2, 1)
            if config.attention_bias:
                out[f"{ours}.attn.{key}.bias"] = take(f"{proj}.bias").reshape(n, e)
        out[f"{ours}.attn.o.weight"] = take(f"{hf}.self_attn.o_proj.weight").reshape(d, h, e).permute(1, 2, 0)
        if config.attention_bias:
            out[f"{ours}.attn.o.bias"] = take(f"{hf}.self_attn.o_proj.bias")
        for key, name in (("gate", "gate"), ("in", "up"), ("out", "down")):
            out[f"{ours}.mlp.{key}.weight"] = take(f"{hf}.mlp.{name}_proj.weight").T
    return {key: np.array(jax.dlpack.from_dlpack(tensor.contiguous())) for key, tensor in out.items()}


def rekeyed(source: Path, target: Path, rename) -> Path:
    """A copy of a single-file checkpoint with other keys; `rename` may return None to drop one."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    save_file({rename(key): array for key, array in tensors.items() if rename(key)}, target / "model.safetensors")
    return target


def loaded(directory: Path) -> transformers.Gemma3ForCausalLM:
    """As transformers loads it: rope frequencies stay float32, which `.to(bfloat16)` would round."""
    return transformers.Gemma3ForCausalLM.from_pretrained(directory, attn_implementation="eager")


def logits(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits


KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
    "bf16": {"dtype": torch.bfloat16, "tie_word_embeddings": False},
    "f16": {"dtype": torch.float16},
}


@pytest.fixture(scope="module")
def models() -> dict[str, transformers.Gemma3ForCausalLM]:
    return {kind: hf_model(**overrides) for kind, overrides in KINDS.items()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> dict[str, Path]:
    """Each model as save_pretrained writes it, in one file."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in models}


# Steps


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    step_and_shape=st.sampled_from(
        [
            (steps.Keep(), lambda n, h, m: (n, m)),
            (steps.Transpose(), lambda n, h, m: (n, m)),
            (lambda n: steps.Rearrange("(n h) m -> n m h", n), lambda n, h, m: (n * h, m)),
            (lambda n: steps.Rearrange("m (n h) -> n h m", n), lambda n, h, m: (m, n * h)),
            (lambda n: steps.Rearrange("(n h) -> n h", n), lambda n, h, m: (n * h,)),
        ]
    ),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_moving_steps_are_exact(dtype, step_and_shape, sizes, seed):
    """Any bits at all, NaN payloads and -0 included, come back from every step that only moves values."""
    step, shape = step_and_shape
    step, shape = step if isinstance(step, steps.Keep | steps.Transpose) else step(sizes[0]), shape(*sizes)
    tensor = np.random.default_rng(seed).integers(0, 2 ** (8 * dtype.itemsize), shape).astype(BITS[dtype.itemsize])
    tensor = tensor.view(dtype)
    back = step.revert(step.convert(tensor))
    assert back.dtype == step.convert(tensor).dtype == dtype
    np.testing.assert_array_equal(bits(back), bits(tensor))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2.0**-16), ("float16", 2.0**-13)])
def test_add_one_on_every_16_bit_weight(dtype, bound):
    """Over all finite values: exact from the stated bound on, the same 1 + w below it, and the bound is no looser."""
    weights = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    weights = weights[np.isfinite(weights.astype(np.float32))]
    step = steps.AddOne()
    back = step.revert(step.convert(weights)).astype(weights.dtype)
    exact = bits(back) == bits(weights)
    large = np.abs(weights.astype(np.float64)) >= bound
    assert step.convert(weights).dtype == np.float32
    assert exact[large].all()
    assert not exact[~large].all()
    np.testing.assert_array_equal(step.convert(back), step.convert(weights))


@given(st.lists(st.floats(-(2.0**20), 2.0**20, width=32) | st.floats(-2.0, 2.0, width=32), min_size=1))
@settings(deadline=None)
def test_add_one_on_float32_weights(values):
    """What comes back is within half a unit in the last place of 1 + w, and converts to the same 1 + w."""
    weights, step = np.array(values, np.float32), steps.AddOne()
    converted = step.convert(weights)
    back = step.revert(converted)
    change = np.abs(back.astype(np.float64) - weights)
    assert (change <= np.spacing(np.abs(converted)).astype(np.float64) / 2).all()
    assert (change[np.abs(weights) < 1] <= 2.0**-24).all()
    np.testing.assert_array_equal(step.convert(back), converted)


# What a checkpoint becomes


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_key_map(kind, models, saved):
    """Every name, shape, dtype and bit of the pytree, against the key map worked out in torch."""
    config, params = convert_checkpoint(saved[kind])
    assert config == Gemma3Config.from_hf(models[kind].config)
    assert_identical(flat(params), expected(models[kind]))
    assert ("unembed" in params) == ("tie_word_embeddings" in KINDS[kind])


def test_shapes_are_those_of_the_key_map(models):
    """The shapes of the reference, in which no two sizes are equal."""
    d, e, h, g, f, v = 48, 10, 8, 2, 80, 101
    params = convert_state_dict(models["untied"].state_dict(), Gemma3Config.from_hf(models["untied"].config))
    block = {key: leaf.shape for key, leaf in flat(params["blocks_2"]).items()}
    assert block == {
        **dict.fromkeys(("ln1.weight", "ln1_post.weight", "ln2.weight", "ln2_post.weight"), (d,)),
        **dict.fromkeys(("attn.q_norm.weight", "attn.k_norm.weight"), (e,)),
        **dict.fromkeys(("attn.k.weight", "attn.v.weight"), (g, d, e)),
        "attn.q.weight": (h, d, e),
        "attn.o.weight": (h, e, d),
        **dict.fromkeys(("mlp.gate.weight", "mlp.in.weight"), (d, f)),
        "mlp.out.weight": (f, d),
    }
    assert sorted(params) == ["blocks_0", "blocks_1", "blocks_2", "embed", "ln_final", "unembed"]
    assert params["embed"]["weight"].shape == (v, d)
    assert params["unembed"]["weight"].shape == (d, v)
    assert params["ln_final"]["weight"].shape == (d,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["untied", "bf16", "f16"])
def test_dtype(kind, dtype, models, saved):
    """Parameters take the dtype asked for, rounded as torch rounds; norms stay float32 with the stored precision."""
    _, params = convert_checkpoint(saved[kind], dtype=dtype)
    assert_identical(flat(params), expected(models[kind], dtype=getattr(torch, dtype)))
    norms = {leaf.dtype for key, leaf in flat(params).items() if "norm" in key or "ln" in key}
    assert norms == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_gives_what_the_checkpoint_gives(kind, models, saved):
    """convert_state_dict, of torch tensors and of numpy arrays, equals convert_checkpoint."""
    config, params = convert_checkpoint(saved[kind])
    assert_identical(flat(convert_state_dict(models[kind].state_dict(), config)), flat(params))
    assert_identical(flat(convert_state_dict(load_file(saved[kind] / "model.safetensors"), config)), flat(params))


@pytest.mark.parametrize("as_numpy", [False, True])
def test_state_dict_is_copied(as_numpy):
    """Training on in torch after the conversion does not change the parameters."""
    model = hf_model()
    state = {key: tensor.numpy() if as_numpy else tensor for key, tensor in model.state_dict().items()}
    before = expected(model)
    params = convert_state_dict(state, Gemma3Config.from_hf(model.config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert_identical(flat(params), before)


def test_converted_logits_equal_torch_and_a_dropped_step_is_seen(models, saved, monkeypatch):
    """The converted model computes what Hugging Face computes; without the + 1, or with two heads swapped, not."""
    tokens = random_tokens((2, 17))
    theirs = logits(models["tied"], tokens).numpy()
    config, params = convert_checkpoint(saved["tied"])
    apply = jax.jit(Gemma3(config).apply)

    def error(params) -> float:
        ours = apply({"params": params}, jnp.asarray(tokens))
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    assert error(params) < 5e-6
    swapped = jax.tree.map(lambda leaf: leaf, params)
    swapped["blocks_1"]["attn"]["q"]["weight"] = params["blocks_1"]["attn"]["q"]["weight"][::-1]
    assert error(swapped) > 1e-3
    monkeypatch.setattr(steps.AddOne, "convert", lambda self, tensor: tensor.astype(np.float32))
    jax.clear_caches()  # conversion compiles each step once
    try:
        assert error(convert_checkpoint(saved["tied"])[1]) > 1e-3
    finally:
        jax.clear_caches()


# Layouts


def test_shards(models, saved, tmp_path):
    """Many small shards with their index give what one file gives."""
    models["bf16"].save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, params = convert_checkpoint(tmp_path)
    assert config == convert_checkpoint(saved["bf16"])[0]
    assert_identical(flat(params), expected(models["bf16"]))


def test_stop_tokens_are_those_that_hugging_face_generates_by(saved, tmp_path):
    """generation_config.json names them before config.json does; without one, or a name in it, config.json's hold."""
    shutil.copytree(saved["tied"], tmp_path / "x")
    file = tmp_path / "x" / "generation_config.json"
    for found, wanted in (({"eos_token_id": [1, 5]}, (1, 5)), ({"eos_token_id": 7}, 7), ({"top_k": 64}, 1)):
        file.write_text(json.dumps(found))
        assert convert_checkpoint(tmp_path / "x")[0].eos_token_id == wanted
    for broken, says in (({"eos_token_id": "a"}, "eos_token_id is 'a'"), ([1], "holds no JSON object")):
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"generation_config\.json.*{says}"):
            convert_checkpoint(tmp_path / "x")
    file.unlink()
    assert convert_checkpoint(tmp_path / "x")[0].eos_token_id == 1


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_prefixes(prefix, head, models, saved, tmp_path):
    """The text model is found under every prefix that real checkpoints have, with its head under either name."""

    def rename(key: str) -> str:
        return head if key == "lm_head.weight" else prefix + key.removeprefix("model.")

    _, params = convert_checkpoint(rekeyed(saved["untied"], tmp_path / "x", rename))
    assert_identical(flat(params), expected(models["untied"]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("original", [True, False], ids=["language_model.model.", "model.language_model."])
def test_multimodal(original, tied, tmp_path, caplog):
    """The text model comes out of an image model; the vision tensors are left out and listed in one message."""
    model = hf_multimodal(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, save_original_format=original)
    keys = list(load_file(tmp_path / "model.safetensors"))
    assert any(key.startswith("language_model.model." if original else "model.language_model.") for key in keys)
    vision = [key for key in keys if "vision_tower" in key or "multi_modal_projector" in key]
    with caplog.at_level(logging.DEBUG, logger="conversion"):
        config, params = convert_checkpoint(tmp_path)
    [message] = [record.getMessage() for record in caplog.records]
    assert f"{len(vision)} vision tensors" in message
    for key in vision:
        assert re.sub(r"\.\d+\.", ".*.", key) in message
    assert config == Gemma3Config.from_hf({**model.config.text_config.to_dict(), "tie_word_embeddings": tied})
    assert_identical(flat(params), expected(model, "model.language_model."))
    assert_identical(flat(convert_state_dict(model.state_dict(), config)), flat(params))
    export_checkpoint(config, params, tmp_path / "text")
    tokens = random_tokens((1, 12))
    assert torch.equal(logits(loaded(tmp_path / "text"), tokens), logits(model, tokens))


def test_embedding_model_without_prefix(tmp_path):
    """EmbeddingGemma's layout: a bare, bidirectional Gemma3TextModel, no prefix and no head."""
    model = randomize(transformers.Gemma3TextModel(hf_config(use_bidirectional_attention=True, sliding_window=8)))
    model.save_pretrained(tmp_path)
    config, params = convert_checkpoint(tmp_path)
    assert (config.use_bidirectional_attention, config.sliding_window) == (True, 8)
    assert_identical(flat(params), expected(model, ""))


def test_tied_checkpoint_that_repeats_its_head(models, saved, tmp_path):
    """A head equal to the embedding is accepted and kept once."""
    shutil.copytree(saved["tied"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    assert_identical(flat(convert_checkpoint(tmp_path)[1]), expected(models["tied"]))


# Export


@pytest.mark.parametrize(
    ("kind", "shard"), [*((kind, None) for kind in KINDS), ("tied", "40KB"), ("untied", 60_000), ("bf16", "40KB")]
)
def test_export_is_the_inverse(kind, shard, models, saved, tmp_path):
    """Every tensor comes back bit for bit (float32 norms within 2**-24), the config equal, the logits identical."""
    config, params = convert_checkpoint(saved[kind])
    export_checkpoint(config, params, tmp_path / "out", **({} if shard is None else {"max_shard_size": shard}))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 2) == (shard is not None)
    back = {key: array for file in files for key, array in load_file(file).items()}
    stored = load_file(saved[kind] / "model.safetensors")
    for key in [key for key in stored if "norm" in key and stored[key].dtype == np.float32]:
        np.testing.assert_allclose(back[key], stored[key], rtol=0, atol=2.0**-23)
        np.testing.assert_array_equal(1 + back[key], 1 + stored[key])
        assert back.pop(key).dtype == stored.pop(key).dtype
    assert_identical(back, stored)

    read, again = convert_checkpoint(tmp_path / "out")
    assert read == config
    assert_identical(flat(again), flat(params))
    theirs, original = loaded(tmp_path / "out"), loaded(saved[kind])
    assert theirs.dtype == original.dtype == models[kind].dtype
    tokens = random_tokens((2, 17))
    assert torch.equal(logits(theirs, tokens), logits(original, tokens))


def test_export_that_drops_a_step_is_seen(models, saved, tmp_path, monkeypatch):
    """Negative control: with norms exported as 1 + w, the identical-logits check above fails."""
    config, params = convert_checkpoint(saved["tied"])
    monkeypatch.setattr(steps.AddOne, "revert", lambda self, tensor: tensor)
    export_checkpoint(config, params, tmp_path / "out")
    tokens = random_tokens((2, 17))
    assert not torch.allclose(logits(loaded(tmp_path / "out"), tokens), logits(models["tied"], tokens), atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_dtype(dtype, models, saved, tmp_path):
    """A dtype casts every tensor as torch does, and config.json says so; an existing empty directory is filled."""
    config, params = convert_checkpoint(saved["untied"])
    export_checkpoint(config, params, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    back = load_file(tmp_path / "model.safetensors")
    wanted = {k: v.to(getattr(torch, dtype)) for k, v in models["untied"].state_dict().items() if "norm" not in k}
    wanted = {key: np.array(jax.dlpack.from_dlpack(tensor)) for key, tensor in wanted.items()}
    assert {array.dtype for array in back.values()} == {DTYPES[dtype]}
    assert_identical({key: array for key, array in back.items() if "norm" not in key}, wanted)


@pytest.mark.parametrize("as_object", [False, True])
def test_export_takes_a_tokenizer(as_object, saved, tmp_path):
    """Tokenizer files of a directory are copied as they are, other files are not; a tokenizer object saves itself."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>")
    source = tmp_path / "tokenizer"
    tokenizer.save_pretrained(source)
    (source / "notes.txt").write_text("stays behind")
    config, params = convert_checkpoint(saved["tied"])
    export_checkpoint(config, params, tmp_path / "out", tokenizer=tokenizer if as_object else source)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a b b")["input_ids"] == tokenizer("a b b")["input_ids"] == [3, 4, 4]
    assert not (tmp_path / "out" / "notes.txt").exists()
    if not as_object:
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert convert_checkpoint(tmp_path / "out")[0] == config


# The hub's cache, and life without torch


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
