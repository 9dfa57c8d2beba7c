"""The arrays of `save_params` as Zarr files, which Orbax reads and writes too; this module is its handler of arrays.

How an array is cut into files depends on its shape alone. So the files are the same, however many devices and processes
have the array. Orbax's own handler cuts by device, and writes names that are random or count the processes.

Axes: d hidden_size, h query heads, e head_dim, f intermediate_size.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Sharding

from gemma3_jax.conversion import files
from gemma3_jax.conversion.placement import Part, Placement
from gemma3_jax.processes import to_host
from gemma3_jax.types import Settings

# Each array has as many files as a host has devices, or fewer: every device then writes and reads whole files.
_FILES = 8
# A directory gets its name when it is complete, so no single file needs to be on the disk at once.
_CONTEXT = ts.Context({"file_io_sync": False})


class Arrays(ocp.type_handlers.ArrayHandler):
    """Writes and reads arrays one after the other: no more than one part of one is in host memory.

    Args:
        kind: the name that Orbax gives to the type of the arrays.
        skipped: the first parts of the names of arrays that may be missing, because they are not read.
    """

    def __init__(self, kind: str, skipped: Collection[str] = ()):
        super().__init__()
        self._kind, self._skipped = kind, skipped

    def typestr(self) -> str:
        """The name of the type of the arrays."""
        return self._kind

    async def serialize(
        self,
        values: Sequence[np.ndarray | jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[ocp.future.Future]:
        """Write arrays; nothing is left to wait for."""
        for value, info in zip(values, infos, strict=True):
            _write(value, Path(info.parent_dir) / info.name)
        return []

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.ArrayRestoreArgs],
    ) -> list[jax.Array]:
        """Read arrays in the dtypes and shardings of `args`."""
        return [_read(_stored(info), arg.dtype, arg.sharding) for info, arg in zip(infos, args, strict=True)]

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes; those of skipped arrays are not known, and stand for nothing."""
        return [self._description(info) for info in infos]

    def _description(self, info: ocp.type_handlers.ParamInfo) -> jax.ShapeDtypeStruct:
        if info.name.partition(".")[0] in self._skipped:
            return jax.ShapeDtypeStruct((), np.float32)
        stored = _stored(info)
        return jax.ShapeDtypeStruct(stored.shape, stored.dtype.numpy_dtype)


def shape_of_a_file(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the part of an array that each file has.

    Matrices are cut along their longest axis, which is that of tokens or neurons; the weights of heads [h, d, e] along
    the first. These are the axes that `placing` cuts over devices.

    >>> shape_of_a_file([640, 2048]), shape_of_a_file([4, 640, 256]), shape_of_a_file([640])
    ((640, 256), (1, 640, 256), (640,))
    """
    axis = {0: None, 1: None, 2: int(np.argmax(shape))}.get(len(shape), 0)
    return tuple(n // math.gcd(n, _FILES) if i == axis else n for i, n in enumerate(shape))


def _write(array: np.ndarray | jax.Array, directory: Path) -> None:
    """Write an array, whose parts may be on devices of all processes."""
    is_first = jax.process_index() == 0
    is_everywhere = not isinstance(array, jax.Array) or array.is_fully_addressable
    if is_everywhere and not is_first:
        return
    part = shape_of_a_file(array.shape)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "dtype": array.dtype.name,
        "metadata": {"shape": array.shape, "chunks": part, "compressor": None},
        "store_data_equal_to_fill_value": True,
    }
    stored = ts.open(spec, create=is_first, open=True, assume_metadata=not is_first, context=_CONTEXT).result()
    if isinstance(array, jax.Array) and _has_whole_files(array, part):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                stored[shard.index].write(np.asarray(shard.data), can_reference_source_data_indefinitely=True).result()
        return
    whole = to_host(array)
    if is_first:
        stored.write(whole, can_reference_source_data_indefinitely=True).result()


def _has_whole_files(array: jax.Array, part: Sequence[int]) -> bool:
    """Whether each device has whole files: two processes must not write the same one."""
    return all(n % along == 0 for n, along in zip(array.sharding.shard_shape(array.shape), part, strict=True))


def _stored(info: ocp.type_handlers.ParamInfo) -> ts.TensorStore:
    """An array on disk, open for reading; earlier versions wrote all arrays into one database."""
    kvstore: Settings = {"driver": "file", "path": f"{info.parent_dir}/{info.name}/"}
    if info.is_ocdbt_checkpoint:
        kvstore = {"driver": "ocdbt", "base": f"file://{info.parent_dir}/", "path": f"{info.name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, read=True, context=_CONTEXT).result()


def _read(stored: ts.TensorStore, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """An array from disk, of which each device gets its part."""
    cast = stored if stored.dtype.numpy_dtype == dtype else ts.cast(stored, dtype)

    def read(part: Part, target: Sharding | None) -> jax.Array:
        source = cast[part]
        array = files.aligned_empty(source.shape, np.dtype(dtype))
        ts.array(array).write(source).result()
        return jax.device_put(array, target, may_alias=True)

    return Placement(stored.shape, sharding).place(read, dtype)
