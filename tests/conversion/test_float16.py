"""float16: a checkpoint that is stored in it is loaded in float32, a model never runs in it, and exporting in it works.

The residual stream of a real Gemma 3 passes 65,504, where float16 ends; that of the model here does, too.
"""

import logging
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from conversion import (
    CheckpointError,
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    load_params,
    save_params,
)
from gemma3_jax import Gemma3, Gemma3Config, HookedGemma3, forward, grad_at, stack_layers
from gemma3_jax.generation.loop import generate
from tests.helpers.random_models import hf_model, hf_multimodal, random_tokens

TOKENS = random_tokens((1, 9))
SINGLE = "model.safetensors"
WHY = "residual stream reaches 104,000 in the 270m, and float16 ends at 65,504"
F16, F32, BF16 = (jnp.dtype(name) for name in ("float16", "float32", "bfloat16"))


@pytest.fixture(scope="module")
def model() -> transformers.Gemma3ForCausalLM:
    """Weights that fit float16, and post-norms by which the residual stream does not."""
    model = hf_model(torch.float16)
    with torch.no_grad():
        model.model.layers[1].post_feedforward_layernorm.weight.fill_(60_000)
    return model


@pytest.fixture(scope="module")
def half(model, tmp_path_factory) -> Path:
    """The model as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("float16") / "half"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def old(half, tmp_path_factory) -> Path:
    """What `save_params` writes of parameters in float16, which was what conversion returned before."""
    directory = tmp_path_factory.mktemp("float16") / "old"
    config, params = convert_checkpoint(half)
    save_params(config, cast(params, F16), directory)
    return directory


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def dtypes(params) -> set:
    return {leaf.dtype for leaf in jax.tree.leaves(params)}


def by_kind(params) -> tuple[set, set]:
    """The dtypes of norms, and of everything else."""
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    norms = {key for key in flat if "norm" in key or "ln" in key}
    return {flat[key].dtype for key in norms}, {flat[key].dtype for key in flat.keys() - norms}


def stored_as(source: Path, target: Path, dtype_of) -> Path:
    """A copy of a checkpoint in which `dtype_of(key, array)` says the dtype of each tensor."""
    shutil.copytree(source, target)
    tensors = load_file(source / SINGLE)
    save_file({key: array.astype(dtype_of(key, array)) for key, array in tensors.items()}, target / SINGLE)
    return target


# Loading

LOADS = {
    "convert_checkpoint": lambda half, old, model, **how: convert_checkpoint(half, **how)[1],
    "convert_state_dict": lambda half, old, model, **how: convert_state_dict(
        model.state_dict(), Gemma3Config.from_hf(model.config), **how
    ),
    "a state dict of numpy": lambda half, old, model, **how: convert_state_dict(
        load_file(half / SINGLE), Gemma3Config.from_hf(model.config), **how
    ),
    "from_pretrained": lambda half, old, model, **how: HookedGemma3.from_pretrained(half, **how).params,
    "load_params": lambda half, old, model, **how: load_params(old, **how)[1],
    "from_pretrained of a store": lambda half, old, model, **how: HookedGemma3.from_pretrained(old, **how).params,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_float16_is_loaded_in_float32_and_one_line_says_so(load, half, old, model, caplog):
    """The numbers are those that are stored; the line gives the reason and the other dtype."""
    params = load(half, old, model)
    assert dtypes(params) == {F32}
    [line] = [record.getMessage() for record in caplog.records]
    assert caplog.records[0].levelno == logging.WARNING  # which a user at a prompt sees
    for part in ("is loaded in float32", WHY, 'dtype="bfloat16"'):
        assert part in line
    embedding = model.state_dict()["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(params["embed"]["weight"], embedding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_dtype_that_is_asked_for_is_what_is_loaded(load, dtype, half, old, model, caplog):
    """Nothing needs to be said then."""
    assert by_kind(load(half, old, model, dtype=dtype)) == ({F32}, {jnp.dtype(dtype)})
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float16", np.float16, jnp.float16, np.dtype("float16")], ids=repr)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_model_is_not_loaded_in_float16(load, dtype, half, old, model):
    """The refusal says why, and what to use."""
    with pytest.raises(CheckpointError, match=r"dtype is .*float16") as caught:
        load(half, old, model, dtype=dtype)
    assert WHY in str(caught.value)
    assert str(caught.value).endswith("use float32 or bfloat16")
    assert "\n" not in str(caught.value)


def test_a_float16_checkpoint_computes_what_hugging_face_computes_in_float32(model, half):
    """Where Hugging Face in float16, and bfloat16's weights rounded to float16, give NaN."""
    wide = transformers.Gemma3ForCausalLM.from_pretrained(half, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = wide(torch.tensor(TOKENS)).logits.numpy()
        assert model(torch.tensor(TOKENS)).logits.isnan().all()  # control: the stream passes 65,504
    config, params = convert_checkpoint(half)
    logits, cache = forward(config, params, TOKENS, "blocks.*.hook_resid_post")
    assert np.abs(cache["blocks.1.hook_resid_post"]).max() > 65_504
    assert np.linalg.norm(logits - theirs) / np.linalg.norm(theirs) < 5e-6


@pytest.mark.parametrize("embedding", ["float16", "bfloat16"])
def test_float16_beside_bfloat16_is_all_loaded_in_float32(embedding, model, half, tmp_path, caplog):
    """Whichever of the two the embedding has; every number is kept, the model runs in float32, and layers stack."""

    def dtype_of(key, array):
        return F16 if (embedding == "float16") == ("embed" in key or ".1." in key) else BF16

    mixed = stored_as(half, tmp_path / "mixed", dtype_of)
    config, params = convert_checkpoint(mixed)
    assert dtypes(params) == {F32}
    assert len(caplog.records) == 1
    stored = {key: torch.tensor(array.astype(np.float32)) for key, array in load_file(mixed / SINGLE).items()}
    exact = convert_state_dict(stored, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, exact))
    assert forward(config, params, TOKENS, "embed.hook_out")[1]["embed.hook_out"].dtype == F32
    stack_layers(config, params)
    assert by_kind(convert_checkpoint(mixed, dtype="bfloat16")[1]) == ({F32}, {BF16})


def test_norms_in_float16_change_no_dtype(half, tmp_path, caplog):
    """Norms are float32 however they are stored, and no part of the residual stream."""
    stored = stored_as(half, tmp_path / "norms", lambda key, array: F16 if "norm" in key else BF16)
    assert by_kind(convert_checkpoint(stored)[1]) == ({F32}, {BF16})
    assert not caplog.records


def test_a_vision_tower_in_float16_changes_no_dtype(tmp_path, caplog):
    """It is left out; the text model beside it stays in bfloat16."""
    hf_multimodal().save_pretrained(tmp_path / "wide")
    mixed = stored_as(tmp_path / "wide", tmp_path / "mixed", lambda key, _: BF16 if "language_model" in key else F16)
    assert by_kind(convert_checkpoint(mixed)[1]) == ({F32}, {BF16})
    [line] = [record.getMessage() for record in caplog.records]
    assert "vision tensors" in line


# Running

RUNS = {
    "forward": lambda config, params: forward(config, params, TOKENS),
    "forward under jit": lambda config, params: jax.jit(lambda params: forward(config, params, TOKENS)[0])(params),
    "embeddings": lambda config, params: forward(config, params, inputs_embeds=jnp.zeros((1, 2, config.hidden_size))),
    "a later layer": lambda config, params: forward(
        config, params, inputs_embeds=jnp.zeros((1, 2, config.hidden_size)), start_at_layer=1
    ),
    "a scan": lambda config, params: forward(config, stack_layers(config, params), TOKENS),
    "Linen": lambda config, params: Gemma3(config).apply({"params": params}, TOKENS),
    "HookedGemma3": lambda config, params: HookedGemma3(config, params)(TOKENS),
    "a cache": lambda config, params: HookedGemma3(config, params).run_with_cache(TOKENS, "blocks.0.hook_resid_pre"),
    "a gradient": lambda config, params: grad_at(config, params, TOKENS, "blocks.0.hook_resid_pre"),
    "generate": lambda config, params: generate(config, params, TOKENS, 2),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_parameters_in_float16_do_not_run(run, half):
    """However they came to be float16: the error says why, and what to cast them to."""
    config, params = convert_checkpoint(half, dtype="bfloat16")
    with pytest.raises(ValueError, match="the embedding is float16") as caught:
        run(config, cast(params, F16))
    assert WHY in str(caught.value)
    assert "float32 or bfloat16" in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_parameters_of_other_narrow_dtypes_do_not_run(dtype, half):
    """Quantised weights would be taken for numbers as they are; bfloat16 (control) runs."""
    config, params = convert_checkpoint(half, dtype="bfloat16")
    with pytest.raises(ValueError, match=f"the embedding is {dtype}"):
        forward(config, cast(params, dtype), TOKENS)
    forward(config, params, TOKENS)


# Exporting


@pytest.mark.parametrize("convert", [True, False], ids=["from float32", "from float16"])
def test_export_in_float16_is_exact_and_silent_where_weights_fit(convert, model, half, tmp_path, caplog):
    """Export of a float16 checkpoint: all of its tensors, bit for bit."""
    config, params = convert_checkpoint(half)
    caplog.clear()
    if convert:
        export_checkpoint(config, params, tmp_path / "out", dtype="float16")
    else:
        norms_keep = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else leaf.astype(F16), params)
        export_checkpoint(config, norms_keep, tmp_path / "out")
    assert not caplog.records
    back, stored = load_file(tmp_path / "out" / SINGLE), load_file(half / SINGLE)
    assert back.keys() == stored.keys()
    for key, array in stored.items():
        assert back[key].dtype == np.float16
        bound = 2.0**-13 if "norm" in key else 0  # below it 1 + w in float32 rounds w
        np.testing.assert_array_equal(back[key][np.abs(array) >= bound], array[np.abs(array) >= bound])
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float16


def test_export_in_float16_names_what_overflows(half, tmp_path, caplog):
    """One line with each tensor and its largest magnitude; the other tensors, and the files, are as they would be."""
    config, params = convert_checkpoint(half)
    caplog.clear()
    gate, norm = params["blocks_0"]["mlp"]["gate"], params["blocks_2"]["ln2"]
    gate["weight"] = gate["weight"].at[3, 5].set(-70_112.0)
    norm["weight"] = norm["weight"].at[2].set(1_000_001.0)
    export_checkpoint(config, params, tmp_path / "out", dtype="float16")
    [line] = [record.getMessage() for record in caplog.records]
    named = {
        "model.layers.0.mlp.gate_proj.weight": "70,112",
        "model.layers.2.pre_feedforward_layernorm.weight": "1e+06",
    }
    for key, largest in named.items():
        assert f"{key} (up to {largest} in magnitude)" in line
    back = load_file(tmp_path / "out" / SINGLE)
    assert {key for key, array in back.items() if not np.isfinite(array).all()} == set(named)
    assert back["model.layers.0.mlp.gate_proj.weight"][5, 3] == -np.inf  # [out, in] there
    with pytest.raises(CheckpointError, match=r"has NaN or infinity, first at \[5, 3\]"):
        convert_checkpoint(tmp_path / "out")
    # control: bfloat16 has room
    caplog.clear()
    export_checkpoint(config, params, tmp_path / "wide", dtype="bfloat16")
    assert not caplog.records
