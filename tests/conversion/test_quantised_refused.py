"""Negative controls of dequantisation; damage and layouts that are not read are named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from conversion import CheckpointError, convert_checkpoint
from tests.conversion.quantised_files import (
    BITSANDBYTES,
    COMPRESSED,
    WEIGHTS,
    Expected,
    Q,
    assert_dequantised,
    equal,
    with_bitsandbytes,
    with_compressed_tensors,
    written,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model whose quantised blocks of 64 numbers continue in the next row."""
    return written(tmp_path_factory.mktemp("base"), intermediate_size=96)


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
