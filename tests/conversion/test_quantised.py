"""Quantised checkpoints, written by the libraries that quantise, against their own dequantisation."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import compressed_tensors.quantization as ct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from conversion import CheckpointError, convert_checkpoint, convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3
from gemma3_jax.conversion.quantised import _unpack

WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
Expected = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model whose quantised blocks of 64 numbers continue in the next row."""
    return written(tmp_path_factory.mktemp("base"), intermediate_size=96)


def written(directory: Path, intermediate_size: int) -> Path:
    """A small model in bfloat16, with every parameter random."""
    config = transformers.Gemma3TextConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=8,
    )
    model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory)
    return directory


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules whose weights are quantised, by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def plain(base: Path, weights: Expected) -> Expected:
    """The tensors of the base with these weights in place of its own."""
    return {**safetensors.torch.load_file(base / WEIGHTS), **weights}


def equal(ours: dict, theirs: dict) -> bool:
    """Whether two pytrees of parameters have the same dtypes and bits."""
    ours, theirs = flax.traverse_util.flatten_dict(ours), flax.traverse_util.flatten_dict(theirs)
    assert ours.keys() == theirs.keys()
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in ((ours[key], theirs[key]) for key in ours))


def assert_dequantised(directory: Path, base: Path, weights: Expected, stored: str) -> None:
    """By default in bfloat16, and in float32, the parameters are those that the library itself dequantises.

    `stored` is the dtype in which the library dequantises. This library does it in float32, and so equals it after
    rounding to `stored`.
    """
    config, params = convert_checkpoint(directory)
    assert equal(params, convert_state_dict(plain(base, weights), config, "bfloat16"))
    ours = convert_checkpoint(directory, "float32")[1]
    theirs = convert_state_dict(plain(base, weights), config, "float32")
    assert equal(*(jax.tree.map(lambda leaf: leaf.astype(stored), params) for params in (ours, theirs)))


# bitsandbytes

BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


def with_bitsandbytes(base: Path, target: Path, **fields) -> tuple[torch.nn.Module, Expected]:
    """A checkpoint that bitsandbytes quantised, its model, and the weights as bitsandbytes dequantises them."""
    settings = transformers.BitsAndBytesConfig(**fields)
    model = transformers.Gemma3ForCausalLM.from_pretrained(base, quantization_config=settings, device_map="cpu")
    model.save_pretrained(target)
    weights = {}
    for name, module in linears(model).items():
        weight = module.weight
        if fields.get("load_in_8bit"):
            dense = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            dense = in_one_row(weight.data, weight.quant_state)
        weights[f"{name}.weight"] = dense
    return model, weights


def in_one_row(codes: torch.Tensor, state: bitsandbytes.functional.QuantState) -> torch.Tensor:
    """A weight as bitsandbytes dequantises it in float32.

    On CPUs with AVX-512, it takes the scales of the wrong blocks where a block continues in the next row.
    """
    shape, state.dtype = state.shape, torch.float32
    state.shape = torch.Size([1, shape.numel()])
    dense = bitsandbytes.functional.dequantize_4bit(codes, state).reshape(shape)
    state.shape = shape
    return dense


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


# compressed-tensors


def scheme(bits: int, kind: str = "int", *, symmetric: bool = True, **fields) -> dict:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False, **fields}


INT8_INPUT = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
FP8_INPUT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
COMPRESSED = {
    "int4, group": (scheme(4, strategy="group", group_size=32), None),
    "int4, group, zero points": (scheme(4, strategy="group", group_size=16, symmetric=False), None),
    "int4, channel, zero points": (scheme(4, strategy="channel", symmetric=False), None),
    "int8, group": (scheme(8, strategy="group", group_size=32), None),
    "int8, channel, zero points": (scheme(8, strategy="channel", symmetric=False), None),
    "int2, group": (scheme(2, strategy="group", group_size=32), None),
    "int8 with int8 inputs": (scheme(8, strategy="channel"), INT8_INPUT),
    "fp8, tensor": (scheme(8, "float", strategy="tensor"), {**FP8_INPUT, "dynamic": False, "strategy": "tensor"}),
    "fp8, channel": (scheme(8, "float", strategy="channel"), FP8_INPUT),
    "fp8, blocks that divide": (scheme(8, "float", strategy="block", block_structure=[32, 32]), FP8_INPUT),
    "fp8, blocks that do not": (scheme(8, "float", strategy="block", block_structure=[40, 40]), FP8_INPUT),
}


def limits(weight: torch.Tensor, args: ct.QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest number of each group, row, block or tensor, in the shape of its scales."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(2), groups.amax(2)
    rows, columns = args.block_structure
    blocks = [row.split(columns, 1) for row in weight.split(rows, 0)]
    return tuple(torch.stack([torch.stack([f(b) for b in row]) for row in blocks]) for f in (torch.min, torch.max))


def with_compressed_tensors(base: Path, target: Path, weights: dict, inputs: dict | None) -> Expected:
    """A checkpoint that compressed-tensors quantised, and the weights as it decompresses them."""
    model = transformers.Gemma3ForCausalLM.from_pretrained(base)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"]))
    for module in linears(model).values():
        args = module.quantization_scheme.weights
        scale, zero = calculate_qparams(*limits(module.weight.data, args), args)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
    compressor.decompress_model(model)
    return {f"{name}.weight": module.weight.data.clone() for name, module in linears(model).items()}


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


# fp8 of transformers and others


def with_fp8(base: Path, target: Path, rows: int, columns: int, name: str, **settings) -> Expected:
    """A checkpoint with a scale per block of the weights, and the weights as transformers dequantises them."""
    tensors, weights = safetensors.torch.load_file(base / WEIGHTS), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        o, i = tensors[key].shape
        r, c = min(rows, o), min(columns, i)
        blocks = tensors[key].float().reshape(o // r, r, i // c, c)
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).reshape(o, i).to(torch.float8_e4m3fn)
        tensors |= {key: stored, f"{key}{name}": scale, key.replace("weight", "activation_scale"): torch.ones(())}
        weights[key] = Fp8Dequantize(None)._dequantize_one(stored, scale)
    target.mkdir()
    safetensors.torch.save_file(tensors, target / WEIGHTS)
    config = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return weights


FP8 = {
    "transformers, blocks": (32, 32, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "transformers, no size": (32, 32, "_scale_inv", {"quant_method": "fp8"}),
    "transformers, tensor": (10**6, 10**6, "_scale_inv", {"quant_method": "fp8"}),
    "fbgemm, rows": (1, 10**6, "_scale", {"quant_method": "fbgemm_fp8"}),
    "ModelOpt": (10**6, 10**6, "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


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


# Negative controls, and damage


def changed(change: Callable[[Expected], object], directory: Path) -> Path:
    """A checkpoint after a change of its tensors."""
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS)
    return directory


def swap_nibbles(key: str) -> Callable[[Expected], object]:
    def change(tensors: Expected) -> None:
        octets = tensors[key].view(torch.uint8)
        tensors[key] = ((octets << 4) | (octets >> 4)).view(tensors[key].dtype)

    return change


def double(key: str) -> Callable[[Expected], object]:
    return lambda tensors: tensors.update({key: tensors[key] * 2})


NF4, INT4, FP8_BLOCKS = "nf4, nested", "int4, group, zero points", "fp8, blocks that do not"
WRONG = {
    "nibbles of NF4": (NF4, swap_nibbles(f"{Q}.weight")),
    "nested scale of NF4": (NF4, double(f"{Q}.weight.nested_absmax")),
    "scale of int8": ("int8", double(f"{Q}.SCB")),
    "nibbles of int4": (INT4, swap_nibbles(f"{Q}.weight_packed")),
    "scale of int4": (INT4, double(f"{Q}.weight_scale")),
    "zero points of int4": (INT4, swap_nibbles(f"{Q}.weight_zero_point")),
    "scale of fp8": (FP8_BLOCKS, double(f"{Q}.weight_scale")),
}


def quantised(kind: str, base: Path, target: Path) -> Expected:
    if kind in BITSANDBYTES:
        return with_bitsandbytes(base, target, **BITSANDBYTES[kind])[1]
    return with_compressed_tensors(base, target, *COMPRESSED[kind])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_scale_or_order_is_seen(name, base, tmp_path):
    """Negative control: each of these makes the comparison above fail."""
    kind, change = WRONG[name]
    weights = quantised(kind, base, tmp_path / "x")
    assert_dequantised(tmp_path / "x", base, weights, "bfloat16")
    with pytest.raises(AssertionError):
        assert_dequantised(changed(change, tmp_path / "x"), base, weights, "bfloat16")


STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
DAMAGED = {
    "no absmax": (NF4, lambda t: t.pop(f"{Q}.weight.absmax"), f"{Q}.weight"),
    "short absmax": (NF4, lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"][1:]}), "absmax"),
    "no JSON": (NF4, lambda t: t.update({STATE: t[STATE][5:]}), "quant_state.* is damaged"),
    "short codes": (NF4, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][64:]}), "is damaged"),
    "no scale": (INT4, lambda t: t.pop(f"{Q}.weight_scale"), "weight_scale"),
    "short scale": (INT4, lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][1:]}), "does not divide"),
    "no blocks": ("fp8, blocks that divide", lambda t: t.update({f"{Q}.weight_scale": torch.ones(3, 3)}), "config"),
    "short SCB": ("int8", lambda t: t.update({f"{Q}.SCB": t[f"{Q}.SCB"][1:]}), "SCB"),
    "NaN": ("int8", lambda t: t.update({f"{Q}.SCB": t[f"{Q}.SCB"] * torch.nan}), "NaN"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_parts_are_named(name, base, tmp_path):
    """Parts that are missing or do not fit are one line that names them."""
    kind, change, named = DAMAGED[name]
    quantised(kind, base, tmp_path / "x")
    with pytest.raises(CheckpointError, match=named) as caught:
        convert_checkpoint(changed(change, tmp_path / "x"))
    assert "\n" not in str(caught.value)


# Other layouts

U8, U32, F16 = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint32), np.zeros((4, 4), np.float16)
REFUSED = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, {}),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, {}),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, {}),
    "quanto": ({"text_config": {"quantization_config": {"quant_method": "quanto"}}}, {}),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, {}),
    "compressed-tensors in its format nvfp4-pack-quantized": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
        {},
    ),
    "compressed-tensors with sparse weights": (
        {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}},
        {},
    ),
    "compressed-tensors with transforms": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"a": 1}},
            }
        },
        {},
    ),
    "GPTQ or AWQ": ({}, {".qweight": U32.view(np.int32), ".scales": F16, ".qzeros": U32.view(np.int32)}),
    "HQQ": ({}, {".W_q": U8, ".meta": F16}),
    "mlx (": ({}, {".weight": U32, ".scales": F16, ".biases": F16}),
    "NVFP4": ({}, {".weight": U8, ".weight_scale": U8, ".weight_scale_2": F16}),
    "MXFP8": ({}, {".weight": np.zeros((4, 4), "float8_e4m3fn"), ".weight_scale": U8}),
    "a layout of uint8": ({}, {".weight_packed": U8, ".weight_scale": U8}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_layouts_are_refused_by_name(name, base, tmp_path):
    """By the config, or by the keys where the config is silent; with a remedy, and before weights are read."""
    fields, tensors = REFUSED[name]
    config = json.loads((base / "config.json").read_text())
    config = {**config, **fields}
    if "text_config" in fields:
        config = {"model_type": "gemma3", "text_config": {**config, **fields["text_config"]}}
    held = safetensors.torch.load_file(base / WEIGHTS)
    if tensors:
        held.pop(f"{Q}.weight")
    safetensors.torch.save_file(held, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({f"{Q}{key}": array for key, array in tensors.items()}, tmp_path / "b.safetensors")
    listed = {
        **dict.fromkeys(held, "a.safetensors"),
        **dict.fromkeys([f"{Q}{key}" for key in tensors], "b.safetensors"),
    }
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"is quantised by {name}" in message
    assert "-qat-q4_0-unquantized" in message
    assert "\n" not in message


def test_a_config_that_was_left_behind(base, tmp_path):
    """Plain weights beside the settings of bitsandbytes: the model was merged, and it loads as it is stored."""
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    (tmp_path / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes())
    assert equal(convert_checkpoint(tmp_path)[1], convert_checkpoint(base)[1])
