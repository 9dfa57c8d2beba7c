"""Quantised checkpoints, written by the libraries that quantise, against their own dequantisation."""

import json
import logging
from pathlib import Path

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import convert_checkpoint, convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3
from gemma3_jax.conversion.quantised import _unpack
from tests.conversion.quantised_files import (
    BITSANDBYTES,
    COMPRESSED,
    FP8,
    WEIGHTS,
    Q,
    assert_dequantised,
    equal,
    plain,
    with_bitsandbytes,
    with_compressed_tensors,
    with_fp8,
    written,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model whose quantised blocks of 64 numbers continue in the next row."""
    return written(tmp_path_factory.mktemp("base"), intermediate_size=96)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes(kind, base, tmp_path):
    """Files and state dicts of int8, NF4 and FP4, bit for bit."""
    model, weights = with_bitsandbytes(base, tmp_path / "x", **BITSANDBYTES[kind])
    assert len(weights) == 14
    assert_dequantised(tmp_path / "x", base, weights, "float32")
    config, params = convert_checkpoint(tmp_path / "x")
    assert equal(convert_state_dict(model.state_dict(), config), params)


def test_one_dtype_and_one_message(base, tmp_path, caplog):
    """All weights are bfloat16, norms are float32, one line says what was dequantised, and the model runs."""
    with_bitsandbytes(base, tmp_path / "x", **BITSANDBYTES["nf4, nested"])
    with caplog.at_level(logging.WARNING):
        model = HookedGemma3.from_pretrained(tmp_path / "x")
    (record,) = [record for record in caplog.records if record.name.startswith("gemma3_jax")]
    assert "dequantised 14 weights (bitsandbytes nf4)" in record.getMessage()
    leaves = flax.traverse_util.flatten_dict(model.params, sep="/")
    norms = {key for key in leaves if "ln" in key or "norm" in key}
    assert {leaf.dtype.name for key, leaf in leaves.items() if key not in norms} == {"bfloat16"}
    assert {leaves[key].dtype.name for key in norms} == {"float32"}
    assert bool(jnp.isfinite(model(np.array([[2, 5, 9]]))).all())


def test_dequantised_logits_are_those_of_bitsandbytes(tmp_path):
    """The model that transformers runs quantised: the same logits, in bfloat16 up to its rounding.

    With AVX-512, bitsandbytes can only run rows of whole blocks.
    """
    base = written(tmp_path / "base", intermediate_size=128)
    model, weights = with_bitsandbytes(base, tmp_path / "x", **BITSANDBYTES["nf4"])
    tokens = np.array([[2, 5, 9, 11]])
    config, params = convert_checkpoint(tmp_path / "x", dtype="float32")
    ours = HookedGemma3(config, params)(tokens)
    dense = transformers.Gemma3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    dense.load_state_dict({key: value.float() for key, value in plain(base, weights).items()}, strict=False)
    with torch.no_grad():
        theirs = dense(torch.tensor(tokens)).logits.numpy()
        quantised = model(torch.tensor(tokens)).logits.float().numpy()

    def distance(logits) -> float:
        return float(np.linalg.norm(np.asarray(ours) - logits) / np.linalg.norm(logits))

    assert distance(theirs) < 5e-6
    assert distance(quantised) < 0.05  # bfloat16 activations


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind, base, tmp_path):
    """Packed integers, int8 and fp8 as compressed-tensors writes them, equal to what it decompresses."""
    weights = with_compressed_tensors(base, tmp_path / "x", *COMPRESSED[kind])
    assert json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert_dequantised(tmp_path / "x", base, weights, "bfloat16")


def test_order_of_activations(base, tmp_path):
    """Older files name the group of each column: permuted columns with their groups give permuted weights."""
    with_compressed_tensors(base, tmp_path / "x", *COMPRESSED["int8, group"])
    file = tmp_path / "x" / WEIGHTS
    _, straight = convert_checkpoint(tmp_path / "x")
    tensors = safetensors.torch.load_file(file)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    packed = tensors[f"{Q}.weight_packed"].view(torch.int8)[:, order].contiguous()
    tensors[f"{Q}.weight_packed"] = packed.view(torch.int32)
    tensors[f"{Q}.weight_g_idx"] = (order // 32).to(torch.int32)
    safetensors.torch.save_file(tensors, file)
    _, permuted = convert_checkpoint(tmp_path / "x")
    q, p = (params["blocks_0"]["attn"]["q"]["weight"] for params in (straight, permuted))
    np.testing.assert_array_equal(p, q[:, order.numpy()])


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_unpacked_integers_are_those_that_were_packed(bits, rows, columns, seed):
    """Any integers in any shape, as compressed-tensors packs them."""
    low, high = -(1 << bits - 1), 1 << bits - 1
    values = np.random.default_rng(seed).integers(low, high, (rows, columns), np.int8)
    packed = pack_to_int32(torch.from_numpy(values), bits).numpy()
    np.testing.assert_array_equal(_unpack(packed, bits, columns), values)


@pytest.mark.parametrize("kind", FP8)
def test_fp8(kind, base, tmp_path):
    """Float8 with scales, in float32 bit for bit; scales of activations are left out."""
    rows, columns, name, settings = FP8[kind]
    weights = with_fp8(base, tmp_path / "x", rows, columns, name, **settings)
    assert_dequantised(tmp_path / "x", base, weights, "float32")


def test_float8_without_scales_is_its_own_value(base, tmp_path):
    """Weights that were cast to float8 and nothing else, in a file and in a state dict."""
    tensors = safetensors.torch.load_file(base / WEIGHTS)
    cast = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items() if key.endswith("_proj.weight")}
    config = Gemma3Config.from_hf(json.loads((base / "config.json").read_text()))
    expected = convert_state_dict({**tensors, **{key: value.float() for key, value in cast.items()}}, config, "float32")
    assert equal(convert_state_dict({**tensors, **cast}, config, "float32"), expected)
