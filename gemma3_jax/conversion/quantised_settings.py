"""What a checkpoint says about the quantisation of its weights, checked."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

Read = Callable[[str], np.ndarray]

_REMEDY = (
    "convert the model that it was made from, or one of Google's checkpoints whose name ends in -qat-q4_0-unquantized"
)
# The methods and formats whose layout is one of those below.
_METHODS = ("bitsandbytes", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
# Endings of keys that belong to layouts that are not read. Config.json may be silent about them.
_OTHER_LAYOUTS = {
    ".qweight": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    "._data": "quanto",
    ".weight_qdata": "torchao",
    "._weight_qdata": "torchao",
    ".weight_scale_2": "NVFP4",
    ".weight_global_scale": "NVFP4",
}


@dataclasses.dataclass(frozen=True)
class StoredParts:
    """The tensors of a checkpoint: shapes and NumPy names of dtypes by key, and what its config says about them."""

    checkpoint: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Read
    settings: Settings

    def has(self, key: str) -> bool:
        return key in self.shapes

    def among(self, *keys: str) -> tuple[str, ...]:
        """Those of `keys` that are there."""
        return tuple(key for key in keys if key in self.shapes)


def check_method(stored: StoredParts) -> None:
    """Raise if the config or a key names a layout that is not read."""
    settings = stored.settings
    method = settings.get("quant_method") or ("compressed-tensors" if "config_groups" in settings else None)
    if method is not None and method not in _METHODS:
        raise refused(stored, str(method))
    if method == "compressed-tensors":
        for name in [settings.get("format"), *(group.get("format") for group in _groups(stored))]:
            if name is not None and name not in _FORMATS:
                raise refused(stored, f"compressed-tensors in its format {name}")
        if _mapping(stored, settings, "sparsity_config").get("format", "dense") != "dense":
            raise refused(stored, "compressed-tensors with sparse weights")
        if _mapping(stored, settings, "transform_config").get("config_groups"):
            raise refused(stored, "compressed-tensors with transforms of its activations")
    for ending, layout in _OTHER_LAYOUTS.items():
        for key in stored.shapes:
            if key.endswith(ending):
                raise refused(stored, layout, f" ({key})")
    for key in stored.shapes:
        if stored.dtypes[key] == "uint32" and stored.has(f"{key.removesuffix('.weight')}.scales"):
            raise refused(stored, "mlx", f" ({key})")


def _mapping(stored: StoredParts, settings: Settings, name: str) -> Settings:
    """A field that is an object or absent."""
    value = settings.get(name) or {}
    if not isinstance(value, Mapping):
        raise invalid(stored, name, value)
    return value


def _groups(stored: StoredParts) -> list[Settings]:
    """The groups of weights in the settings of compressed-tensors; a group that only names a preset has no fields."""
    groups = _mapping(stored, stored.settings, "config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)]


def of_weights(stored: StoredParts, name: str) -> list[object]:
    """A field of the weights in each group that has it."""
    values = [_mapping(stored, group, "weights").get(name) for group in _groups(stored)]
    return [value for value in values if value is not None]


def invalid(stored: StoredParts, name: str, value: object) -> CheckpointError:
    return CheckpointError(f"{stored.checkpoint}: {name} of its quantization_config is {value!r}, which is not valid")


def block_size(stored: StoredParts, value: Any) -> tuple[int, int]:
    """The rows and columns of a block: [128, 128], or "128x128" as older files have it."""
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) if isinstance(size, str) else operator.index(size) for size in sizes)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) <= 0:
        raise invalid(stored, "the size of blocks", value)
    return rows, columns


def refused(stored: StoredParts, layout: str, key: str = "") -> CheckpointError:
    return CheckpointError(
        f"{stored.checkpoint} is quantised by {layout}{key}, which this library does not read; {_REMEDY}"
    )
