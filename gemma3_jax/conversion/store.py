"""Converted parameters on disk, with Orbax: for parameters that you trained or edited, and for reading in shards."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epy
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.check import check_params
from gemma3_jax.conversion.dtypes import loaded_dtype, parameter_dtype
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.conversion.placement import placements_of
from gemma3_jax.conversion.tokenizers import TokenizerSource, check_tokenizer, copy_tokenizer
from gemma3_jax.conversion.transforms import AddOne
from gemma3_jax.conversion.truncation import truncate
from gemma3_jax.model.layout import unstack_layers
from gemma3_jax.processes import in_all, in_first, to_host
from gemma3_jax.reading import CheckpointError, check_file
from gemma3_jax.sites.names import block_key
from gemma3_jax.types import Params, Shardings

with epy.lazy_imports():  # they take longer than all other imports of this module
    import flax.traverse_util
    import orbax.checkpoint as ocp

_T = TypeVar("_T")

PARAMS = "params"
# Uncompressed chunks of this size read in less than half the time of Orbax's defaults, which take a fifth less space.
_CHUNK_BYTES = 2**25


def save_params(
    config: Gemma3Config,
    params: Params,
    directory: str | os.PathLike[str],
    *,
    tokenizer: TokenizerSource | None = None,
) -> None:
    """Write converted parameters with their config, whole or not at all.

    Parameters that are cut over the devices of several processes are written by all of them: each calls this function,
    with a directory that all of them reach.

    Args:
        config: shape of the model.
        params: parameter pytree; stacked parameters (`gemma3_jax.stack_layers`) are stored unstacked.
        directory: a directory that does not exist yet, or is empty.
        tokenizer: as in `export_checkpoint`.

    Raises:
        CheckpointError: the parameters do not match the config or have NaN or infinity, `tokenizer` does not have a
            tokenizer, or the directory cannot be written.
        FileExistsError: another writer created the directory in the meantime.
        RuntimeError: it failed in another process.
    """

    def check() -> None:
        files.check_target(directory)
        check_tokenizer(tokenizer)

    in_first(check)
    params = unstack_layers(config, params)
    in_all(lambda: check_params(config, params))
    with files.writing(directory) as target:

        def write_others() -> None:
            files.write_configs(target, config, tokenizer)
            copy_tokenizer(tokenizer, target)

        chunks = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
        save = ocp.args.PyTreeSave(jax.tree.map(_storable, params), chunks)
        with _checkpointer(ocp.options.MultiprocessingOptions()) as checkpointer, ThreadPoolExecutor(1) as thread:
            # Orbax's threads cannot be stopped. If Ctrl-C or a signal interrupts this line, the end of the block waits
            # for them: otherwise they would write to the directory while it is removed.
            thread.submit(checkpointer.save, target / PARAMS, save).result()
        in_first(write_others)


def load_params(
    directory: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    first_n_layers: int | None = None,
    shardings: Shardings | None = None,
) -> tuple[Gemma3Config, Params]:
    """Read parameters that `save_params` wrote.

    Args:
        directory: the directory that `save_params` wrote.
        dtype: as in `convert_checkpoint`; None keeps the saved dtype, and loads float16 in float32.
        first_n_layers: load only these layers, as in `convert_checkpoint`.
        shardings: as in `convert_checkpoint`, however the parameters were cut when they were saved.

    Raises:
        CheckpointError: the directory does not have converted parameters, or they do not match its config; a parameter
            has NaN or infinity; or the model cannot run in the dtype.
        ValueError: as in `convert_checkpoint`.
    """
    source = Path(directory).absolute()
    config = saved_config(source, first_n_layers)
    layers = config.truncated_from or config.num_hidden_layers
    skipped = {block_key(layer) for layer in range(config.num_hidden_layers, layers)}
    leaves = {path: leaf for path, leaf in stored_params(source).items() if path[0] not in skipped}
    dtypes = stored_dtypes(config, leaves, dtype, source)
    placements = placements_of({path: leaf.shape for path, leaf in leaves.items()}, shardings)
    default = jax.device_put(np.float32(0)).sharding  # also while a mesh is set
    restore_args = {
        path: ocp.ArrayRestoreArgs(dtype=dtypes[path], sharding=placements[path].sharding or default) for path in leaves
    }
    restore = ocp.args.PyTreeRestore(
        item=flax.traverse_util.unflatten_dict(leaves),
        restore_args=flax.traverse_util.unflatten_dict(restore_args),
        partial_restore=True,
    )
    with _damage_named(source), _checkpointer(_alone()) as checkpointer:
        params = checkpointer.restore(source / PARAMS, restore)
    try:
        check_params(config, params)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config, params


def saved_config(directory: Path, first_n_layers: int | None = None) -> Gemma3Config:
    """The config of parameters that `save_params` wrote, for a load of these layers.

    Raises:
        CheckpointError: the directory does not have converted parameters.
    """
    if not is_converted(directory):
        raise CheckpointError(f"{directory} has no converted parameters; write them with `save_params`")
    config = files.read_config(directory)
    return config if first_n_layers is None else truncate(config, first_n_layers)


def stored_params(directory: Path) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter that `save_params` wrote, by its path; data is not read.

    Raises:
        CheckpointError: the parameters are damaged.
    """
    for file in (directory / PARAMS).rglob("*"):
        if not file.is_dir():
            check_file(file)  # Orbax would wait for a FIFO
    with _damage_named(directory), _checkpointer(_alone()) as checkpointer:
        metadata = checkpointer.metadata(directory.absolute() / PARAMS).item_metadata
        if metadata is None:
            raise CheckpointError(f"{directory / PARAMS} is damaged: its list of parameters cannot be read")
        leaves = flax.traverse_util.flatten_dict(metadata.tree)
        return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def stored_dtypes(
    config: Gemma3Config,
    stored: Mapping[tuple[str, ...], jax.ShapeDtypeStruct],
    dtype: DTypeLike | None,
    directory: Path,
) -> dict[tuple[str, ...], np.dtype]:
    """The dtype in which each stored parameter is loaded; `dtype` as in `load_params`."""
    norms = {entry.path for entry in entries(config) if isinstance(entry.step, AddOne)}
    float16 = {path for path, leaf in stored.items() if leaf.dtype == np.float16}
    target = loaded_dtype(parameter_dtype(dtype), not float16 <= norms, str(directory))
    of_norms = {path: np.dtype("float32") if path in float16 else stored[path].dtype for path in norms & stored.keys()}
    return {path: of_norms.get(path, target or leaf.dtype) for path, leaf in stored.items()}


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """Errors of Orbax as a CheckpointError that names the directory."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax has no class for its errors
        why = [*str(error).splitlines(), type(error).__name__][0]
        raise CheckpointError(f"{directory / PARAMS} is damaged: {why}") from error


def _storable(leaf: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """A parameter as Orbax takes it: one that each process has for itself as a NumPy array, which the first writes."""
    is_own = jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return to_host(leaf) if is_own else leaf


def _alone() -> "ocp.options.MultiprocessingOptions":
    """For reading: this process does not wait for the others."""
    return ocp.options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})


def _checkpointer(options: "ocp.options.MultiprocessingOptions") -> "ocp.Checkpointer":
    arrays = (jax.Array, _array_handler())
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        multiprocessing_options=options,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            arrays, (np.ndarray, ocp.type_handlers.NumpyHandler())
        ),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _array_handler() -> "ocp.type_handlers.ArrayHandler":
    class Waiting(ocp.type_handlers.ArrayHandler):
        """Ends all reads when one fails: Orbax would close their event loop, and each would print an error later."""

        async def metadata(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
            return await _with_its_tasks(super().metadata(*args, **kwargs))

        async def deserialize(self, *args: Any, **kwargs: Any) -> Sequence[jax.Array]:
            return await _with_its_tasks(super().deserialize(*args, **kwargs))

    # By default, Orbax cuts an array that several devices have, so that all of them write it. It compiles each cut:
    # seconds for a small model, where writing takes half a second.
    return Waiting(use_replica_parallel=False)


async def _with_its_tasks(reads: Awaitable[_T]) -> _T:
    """What `reads` returns. If it fails, the tasks that it has begun end before its error is raised."""
    before = asyncio.all_tasks()
    try:
        return await reads
    except Exception:
        await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)
        raise


def is_converted(directory: Path) -> bool:
    """Whether a directory has converted parameters rather than a Hugging Face checkpoint."""
    return (directory / PARAMS).is_dir()
