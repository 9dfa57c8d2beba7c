"""Quantised weights whose parts or settings are damaged or hostile: one line each, and never a wrong number."""

import json

import ml_dtypes
import numpy as np
import pytest

from gemma3_jax.conversion.quantised import quantised_weights
from gemma3_jax.reading import CheckpointError
from tests.helpers.hostile_files import NESTED

STATE = {"shape": [4, 64], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16"}
NESTED_STATE = {**STATE, "nested_blocksize": 256, "nested_offset": 0.1}


def dequantised(tensors, settings=None) -> np.ndarray:
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    dtypes = {key: str(tensor.dtype) for key, tensor in tensors.items()}
    weights, _ = quantised_weights("checkpoint", shapes, dtypes, tensors.__getitem__, settings or {})
    return weights["w.weight"].dequantise()


def nf4(state=STATE, **parts):
    state = state if isinstance(state, bytes) else json.dumps(state).encode()
    return {
        "w.weight": np.zeros((128, 1), np.uint8),
        "w.weight.absmax": np.ones(4, np.float32),
        "w.weight.quant_map": np.arange(16, dtype=np.float32),
        "w.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    } | {f"w.weight.{name}".removesuffix(".codes"): array for name, array in parts.items()}


def nested(state=NESTED_STATE, **parts):
    scales = {"nested_absmax": np.ones(1, np.float32), "nested_quant_map": np.arange(256, dtype=np.float32)}
    tensors = nf4(state, absmax=np.ones(4, np.uint8), **(scales | parts))
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def int8(**parts):
    return {"w.weight": np.ones((4, 64), np.int8), "w.SCB": np.ones(4, np.float32)} | {
        f"w.{name}": array for name, array in parts.items()
    }


def packed(shape=(4, 64), groups=2):
    return {
        "w.weight_packed": np.zeros((4, 8), np.int32),
        "w.weight_shape": np.array(shape, np.int64),
        "w.weight_scale": np.ones((4, groups), np.float32),
    }


def fp8(grid, shape=(200, 130)):
    scales = np.arange(1, 1 + np.prod(grid, dtype=int), dtype=np.float32).reshape(grid)
    return {"w.weight": np.ones(shape, ml_dtypes.float8_e4m3fn), "w.weight_scale_inv": scales}


@pytest.mark.parametrize("tensors", [nf4(), nested(), int8(), packed(), int8(weight_format=np.zeros((), np.uint8))])
def test_control(tensors):
    """The same parts without damage."""
    assert dequantised(tensors).shape == (4, 64)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (nf4({**STATE, "blocksize": 0}), "division by zero"),
        (nf4({**STATE, "blocksize": 64.0}), "'float' object cannot be interpreted as an integer"),
        (nf4({**STATE, "shape": [4.0, 64.0]}), "'float' object cannot be interpreted as an integer"),
        (nf4({**STATE, "shape": [2**40, 2**40]}), "absmax has shape"),
        (nf4({**STATE, "shape": None}), "is damaged"),
        (nf4(NESTED), "RecursionError"),
        (nf4([]), "is damaged"),
        (nf4(b"\xff\xfe"), "is damaged"),
        (nf4(quant_map=np.arange(8, dtype=np.float32)), "is damaged"),
        (nf4(codes=np.zeros((200, 1), np.uint8)), "has 200 bytes for shape"),
        (nf4(codes=np.zeros((20, 1), np.uint8)), "has 20 bytes for shape"),
        (nf4(absmax=np.ones(4, np.uint8)), "nested_blocksize"),  # its scales are quantised themselves
        (nested(nested_quant_map=None), "lacks w.weight.nested_quant_map"),
        (nested(nested_absmax=None), "lacks w.weight.nested_absmax"),
        (nested({**NESTED_STATE, "nested_blocksize": 0}), "is damaged"),
        (nested({**NESTED_STATE, "nested_offset": "x"}), "could not convert"),
        (int8(weight_format=np.ones((), np.uint8)), "in an order other than by rows"),
        (packed((4, 64, 1)), "weight_shape is"),
        (packed((2**40, 64)), "weight_shape is"),
        (packed((-4, 64)), "weight_shape is"),
        (packed(groups=3), "does not divide"),
    ],
)
def test_damaged_parts(tensors, says):
    """The message names the checkpoint and the part."""
    with pytest.raises(CheckpointError) as caught:
        dequantised(tensors)
    assert str(caught.value).startswith("checkpoint")
    assert says in str(caught.value)


def of_groups(groups) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (of_groups("x"), "config_groups of its quantization_config is 'x'"),
        (of_groups({"g": {"weights": "x"}}), "weights of its quantization_config is 'x'"),
        (of_groups({"g": {"weights": {"num_bits": "four"}}}), "num_bits of its quantization_config is 'four'"),
        (of_groups({"g": {"weights": {"num_bits": [4]}}}), "num_bits of its"),
        (of_groups({"g": {"weights": {"num_bits": 3}}}), "integers of 3 bits"),
        (of_groups({"g": {"weights": {"block_structure": "axb"}}}), "the size of blocks"),
        ({"quant_method": "compressed-tensors", "sparsity_config": "x"}, "sparsity_config of its"),
        ({"quant_method": "compressed-tensors", "transform_config": ["x"]}, "transform_config of its"),
        ({"quant_method": ["x"]}, r"is quantised by ['x']"),
        *(
            ({"weight_block_size": size}, "the size of blocks")
            for size in ([0, 0], [-1, 8], [8], 5, {"a": 1}, [1.5, 2])
        ),
    ],
)
def test_damaged_settings(settings, says):
    """The message names the field and its value."""
    with pytest.raises(CheckpointError) as caught:
        dequantised(packed(), settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "rows"), [({}, 128), ({"weight_block_size": [128, 128]}, 128), ({"weight_block_size": [100, 65]}, 100)]
)
def test_blocks_without_a_size_are_those_of_transformers(settings, rows):
    """They have 128 rows and columns, also where an equal division of the weight would fit the scales."""
    values = dequantised(fp8((2, 2)), settings)
    assert (values[rows - 1, 0], values[rows, 0]) == (1, 3)
    assert dequantised(fp8((2, 1)), of_groups({"g": {"weights": {"block_structure": "100x130"}}}))[
        99:101, 0
    ].tolist() == [1, 2]


def test_a_group_of_columns_is_no_block():
    """Control: scales per row and group divide the columns."""
    values = dequantised(fp8((200, 2)))
    assert (values[1, 64], values[1, 65]) == (3, 4)
