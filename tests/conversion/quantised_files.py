"""Checkpoints that quantising libraries write, and their own dequantisation of them."""

import json
from pathlib import Path

import bitsandbytes
import compressed_tensors.quantization as ct
import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization.utils import calculate_qparams
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from conversion import convert_checkpoint, convert_state_dict

WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
Expected = dict[str, torch.Tensor]


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
