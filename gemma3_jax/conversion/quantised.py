"""Quantised weights, dequantised by plain arithmetic in NumPy.

Each layout is a set of tensors beside the weight: its parts. A weight is dequantised in float32, in which every product
of a stored number and its scale is exact or rounded once, and is then rounded to the dtype of the parameters.

Sources: bitsandbytes 0.50 (`bitsandbytes.functional`), compressed-tensors 0.20 (`compressed_tensors.compressors`) and
the fp8 layouts of transformers 5 (`transformers.integrations.finegrained_fp8` and `.fbgemm_fp8`).
"""

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Mapping

import numpy as np

from gemma3_jax.conversion.quantised_settings import (
    Read,
    StoredParts,
    block_size,
    check_method,
    invalid,
    of_weights,
    refused,
)
from gemma3_jax.conversion.words import listed
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
# Parts of activations and caches, which a model without quantised activations does not need.
_ACTIVATIONS = tuple(
    f".{name}"
    for name in (
        "input_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
        "activation_scale",
        "input_scale_ub",
        "q_scale",
        "k_scale",
        "v_scale",
    )
)
# bitsandbytes' int8_vectorwise_dequant multiplies by this approximation of 1 / 127.
_ONE_127TH = np.float32(7.874015718698502e-3)
_WORD = 32  # bits
_DEFAULT_BLOCK = (128, 128)  # of transformers' FineGrainedFP8Config


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantised weight: its shape, the layout's name, the keys that hold it, and a function that dequantises it.

    `dequantise` returns float32 of that shape.
    """

    shape: tuple[int, ...]
    layout: str
    parts: tuple[str, ...]
    dequantise: Callable[[], np.ndarray]


def quantised_weights(
    checkpoint: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    read: Read,
    settings: Settings,
) -> tuple[dict[str, Weight], frozenset[str]]:
    """The quantised weights of a checkpoint by key, and the keys of all tensors that only quantisation needs.

    Weights are recognised by their keys and dtypes, so a state dict needs no settings.

    Args:
        checkpoint: name of the checkpoint, for messages.
        shapes: shapes by key.
        dtypes: NumPy names of dtypes by key.
        read: returns the tensor of a key. Only the few bytes of shapes are read here.
        settings: the `quantization_config` of config.json, or an empty mapping.

    Raises:
        CheckpointError: the weights are quantised in a layout that this library does not dequantise.
    """
    stored = StoredParts(checkpoint, shapes, dtypes, read, settings)
    check_method(stored)
    weights = {}
    for key in shapes:
        for layout in (_bitsandbytes_4bit, _bitsandbytes_int8, _packed, _scaled):
            found = layout(stored, key)
            if found is not None:
                name, weight = found
                weights[name] = dataclasses.replace(weight, dequantise=_checked(stored, name, weight))
                break
    activations = {key for key in shapes if key.endswith(_ACTIVATIONS)} if weights else set()
    return weights, frozenset(activations.union(*(weight.parts for weight in weights.values())))


def _checked(stored: StoredParts, name: str, weight: Weight) -> Callable[[], np.ndarray]:
    """The weight's function, with an error that names the weight if its parts do not fit together."""

    def dequantise() -> np.ndarray:
        try:
            values = weight.dequantise()
        except CheckpointError:
            raise
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise CheckpointError(f"{stored.checkpoint}: {name} ({weight.layout}) is damaged: {error}") from error
        if values.shape != weight.shape:
            raise CheckpointError(f"{stored.checkpoint}: {name} ({weight.layout}) has {values.shape} numbers")
        return values

    return dequantise


# bitsandbytes

_PARTS_OF_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _bitsandbytes_4bit(stored: StoredParts, key: str) -> tuple[str, Weight] | None:
    """NF4 and FP4: two codes per byte, the first in the high half; a table of 16 numbers; a scale per block."""
    name, found, kind = key.partition(".quant_state.bitsandbytes__")
    if not found:
        return None
    parts = stored.among(*(f"{name}.{part}" for part in _PARTS_OF_4BIT))
    absmax, quant_map, nested_absmax, nested_map = (f"{name}.{part}" for part in _PARTS_OF_4BIT)
    is_nested = stored.dtypes.get(absmax) == "uint8"
    # Everything that is not a tensor is JSON in the bytes of this one.
    content = stored.read(key).tobytes()
    try:
        state = json.loads(content)
        shape, block = tuple(map(operator.index, state["shape"])), operator.index(state["blocksize"])
        nested = (operator.index(state["nested_blocksize"]), np.float32(state["nested_offset"])) if is_nested else None
        blocks = math.ceil(math.prod(shape) / block)
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{stored.checkpoint}: {key} is damaged: {error!r}") from error
    needed = {absmax, quant_map, name, *((nested_absmax, nested_map) if is_nested else ())}
    missing = sorted(needed - set(stored.shapes))
    if missing:
        raise CheckpointError(f"{stored.checkpoint} lacks {listed(missing)}, which {name} needs")
    if stored.shapes[absmax] != (blocks,):
        raise CheckpointError(f"{stored.checkpoint}: {absmax} has shape {list(stored.shapes[absmax])}, not [{blocks}]")

    def dequantise() -> np.ndarray:
        scale = stored.read(absmax)
        if nested is not None:
            # The scales are quantised to 8 bits themselves, around an offset.
            scale = _by_block(stored.read(nested_map)[scale], stored.read(nested_absmax), nested[0]) + nested[1]
        storage = stored.read(name)
        packed = storage.reshape(-1).view(np.uint8)
        if not 0 <= 2 * packed.size - math.prod(shape) < 2 * storage.itemsize:
            raise ValueError(f"it has {packed.size} bytes for shape {list(shape)}")
        table = stored.read(quant_map).astype(np.float32)
        # Both numbers of a byte are looked up at once, as 8 bytes: three times faster than one by one.
        pairs = np.stack(np.broadcast_arrays(table[:, None], table), axis=-1).reshape(256, 2)
        values = pairs.view(np.uint64)[:, 0][packed].view(np.float32)[: math.prod(shape)]
        return _by_block(values, scale.astype(np.float32, copy=False), block).reshape(shape)

    return name, Weight(shape, f"bitsandbytes {kind}", (key, *parts), dequantise)


def _by_block(values: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """`values` [n] in place, each block of `block` values times its scale [ceil(n / block)]."""
    whole = len(values) // block
    values[: whole * block].reshape(whole, block)[...] *= scales[:whole, None]
    values[whole * block :] *= scales[whole:]
    return values


def _bitsandbytes_int8(stored: StoredParts, key: str) -> tuple[str, Weight] | None:
    """LLM.int8: rows of int8, with the largest magnitude of each row."""
    name = key.removesuffix(".SCB")
    weight = f"{name}.weight"
    if name == key or stored.dtypes.get(weight) != "int8":
        return None
    if stored.shapes[key] != stored.shapes[weight][:1]:
        raise CheckpointError(f"{stored.checkpoint}: {key} must have one number for each row of {weight}")
    order = stored.among(f"{name}.weight_format")

    def dequantise() -> np.ndarray:
        if order and stored.read(order[0]).any():
            raise refused(stored, "bitsandbytes int8 in an order other than by rows", f" ({order[0]})")
        values = np.multiply(stored.read(weight), stored.read(key)[:, None], dtype=np.float32)
        values *= _ONE_127TH
        return values

    return weight, Weight(stored.shapes[weight], "bitsandbytes int8", (key, *order), dequantise)


# compressed-tensors, and fp8


def _packed(stored: StoredParts, key: str) -> tuple[str, Weight] | None:
    """Integers of 1, 2, 4 or 8 bits, packed along rows into int32, with scales and, if asymmetric, zero points."""
    name = key.removesuffix("_packed")
    if name == key or not key.endswith("weight_packed"):
        return None
    if stored.dtypes[key] != "int32" or not stored.has(f"{name}_shape"):
        raise refused(stored, f"a layout of {stored.dtypes[key]}", f" ({key})")
    stated = stored.read(f"{name}_shape").reshape(-1).tolist()
    if len(stated) != 2 or stated[0] != stored.shapes[key][0]:
        raise CheckpointError(
            f"{stored.checkpoint}: {name}_shape is {stated}, and {key} has shape {list(stored.shapes[key])}"
        )
    o, i = stated
    bits = _bits(stored, key, i)
    scale, zero, order = (f"{name}_{part}" for part in ("scale", "zero_point", "g_idx"))
    if not stored.has(scale):
        raise CheckpointError(f"{stored.checkpoint}: {key} needs {scale}")
    block = None if stored.has(order) else _block(stored, scale, (o, i))

    def dequantise() -> np.ndarray:
        values = _unpack(stored.read(key), bits, i).astype(np.float32)
        zeros = None
        if stored.has(zero):
            zeros = stored.read(zero)
            if zeros.dtype == np.int32:  # packed along columns: [ceil(o * bits / 32), groups]
                zeros = _unpack(zeros.T, bits, o).T
        scales = stored.read(scale)
        if block is not None:
            return _times_scales(values, scales, zeros, block)
        # Each column names its group, in place of groups of neighbouring columns.
        groups = stored.read(order)
        if groups.min(initial=0) < 0:
            raise ValueError(f"{order} has negative numbers")
        values -= 0 if zeros is None else zeros[:, groups]
        values *= scales[:, groups].astype(np.float32)
        return values

    parts = (key, *stored.among(f"{name}_shape", scale, zero, order))
    return name, Weight((o, i), f"compressed-tensors int{bits}", parts, dequantise)


def _bits(stored: StoredParts, key: str, columns: int) -> int:
    """How many bits a packed integer has: among those that the config names, those that fit the shape."""
    stated = set()
    for bits in of_weights(stored, "num_bits"):
        if not isinstance(bits, int):
            raise invalid(stored, "num_bits", bits)
        stated.add(bits)
    words = stored.shapes[key][-1]
    fitting = [bits for bits in (1, 2, 4, 8) if words == math.ceil(columns * bits / _WORD)]
    chosen = [bits for bits in fitting if bits in (stated or (4, 8))]
    if len(chosen) != 1:
        sizes = ", ".join(str(bits) for bits in sorted(stated)) or "4 or 8"
        raise refused(stored, f"integers of {sizes} bits, {columns} of them in {words} words", f" ({key})")
    return chosen[0]


def _unpack(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """[r, w] int32 -> [r, n] int8. The first integer is in the lowest bits of a word, as an offset from the smallest.

    >>> _unpack(np.array([[0x10F]], np.int32), 4, 3)
    array([[ 7, -8, -7]], dtype=int8)
    """
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)  # [r, 4w]
    mask, shifts = np.uint8((1 << bits) - 1), np.arange(0, 8, bits, dtype=np.uint8)
    codes = octets if bits == 8 else ((octets[..., None] >> shifts) & mask).reshape(len(words), -1)
    return (codes[:, :n] - np.uint8(1 << (bits - 1))).view(np.int8)


def _scaled(stored: StoredParts, key: str) -> tuple[str, Weight] | None:
    """int8 or float8, as it is, with scales per tensor, row, group or block; float8 may have no scales."""
    kind = stored.dtypes[key]
    if kind not in ("int8", *_FLOAT8) or not f".{key}".endswith(".weight"):
        return None
    # `scale_inv` is the inverse of what the weight was multiplied by, so all of these multiply what is stored.
    names = stored.among(f"{key}_scale", f"{key}_scale_inv")
    if not names and (kind == "int8" or stored.shapes[key] == ()):
        return None
    scale, zero = names[0] if names else None, f"{key}_zero_point"
    if scale is not None and stored.dtypes[scale] == "uint8":
        raise refused(stored, "MXFP8", f" ({scale})")
    block = (1, 1) if scale is None else _block(stored, scale, stored.shapes[key])

    def dequantise() -> np.ndarray:
        values = stored.read(key).astype(np.float32)
        zeros = stored.read(zero) if stored.has(zero) else None
        return values if scale is None else _times_scales(values, stored.read(scale), zeros, block)

    parts = (*names, *stored.among(zero))
    return key, Weight(stored.shapes[key], "int8" if kind == "int8" else "fp8", parts, dequantise)


def _block(stored: StoredParts, scale: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many rows and columns of a weight share a scale: as the config says, or as the two shapes divide."""
    grid = _grid(stored.shapes[scale])
    structures = [block_size(stored, value) for value in of_weights(stored, "block_structure")]
    size = stored.settings.get("weight_block_size")
    structures += [_DEFAULT_BLOCK if size is None else block_size(stored, size)]
    if len(shape) == 2:
        for rows, columns in structures:
            if grid == (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)):
                return rows, columns
        if all(m and n % m == 0 for n, m in zip(shape, grid, strict=True)):
            return shape[0] // grid[0], shape[1] // grid[1]
    weight = scale.removesuffix("_inv").removesuffix("_scale")
    raise CheckpointError(
        f"{stored.checkpoint}: {scale} has shape {list(stored.shapes[scale])}, which does not divide {weight} "
        f"{list(shape)}; if it has blocks, config.json must give their size"
    )


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of scales as a matrix: a number, one per row, or a matrix."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def _times_scales(
    values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, block: tuple[int, int]
) -> np.ndarray:
    """(values - zeros) * scales in place; `values` [o, i] float32, `scales` and `zeros` a grid of blocks."""
    grid = _grid(scales.shape)

    def rows(grid_values: np.ndarray) -> np.ndarray:  # [o, blocks of columns]
        as_grid = grid_values.astype(np.float32).reshape(grid)
        return np.repeat(as_grid, block[0], axis=0)[: len(values)]

    scales, zeros = rows(scales), None if zeros is None else rows(zeros)
    for j in range(grid[1]):
        columns = values[:, j * block[1] : (j + 1) * block[1]]
        if zeros is not None:
            columns -= zeros[:, j : j + 1]
        columns *= scales[:, j : j + 1]
    return values
