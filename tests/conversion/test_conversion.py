"""Checkpoints to parameters: every name, shape, dtype and bit, from every layout that checkpoints have."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from conversion import convert_checkpoint, convert_state_dict, export_checkpoint
from gemma3_jax import Gemma3, Gemma3Config
from gemma3_jax.config import RUN_DTYPES
from gemma3_jax.conversion import transforms
from tests.conversion.key_map import KINDS, assert_identical, expected, flat, loaded, logits, rekeyed
from tests.helpers.random_models import hf_config, hf_model, hf_multimodal, random_tokens, randomize


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


@pytest.mark.parametrize("dtype", RUN_DTYPES)
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
    monkeypatch.setattr(transforms.AddOne, "convert", lambda self, tensor: tensor.astype(np.float32))
    jax.clear_caches()  # conversion compiles each step once
    try:
        assert error(convert_checkpoint(saved["tied"])[1]) > 1e-3
    finally:
        jax.clear_caches()


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
    for broken, says in (({"eos_token_id": "a"}, "eos_token_id is 'a'"), ([1], "does not contain a JSON object")):
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
