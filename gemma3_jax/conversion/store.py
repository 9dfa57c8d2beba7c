"""Converted parameters on disk, with Orbax: for parameters that you trained or edited, and for reading in shards."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from etils import epy
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.check import check_params, check_shapes
from gemma3_jax.conversion.dtypes import loaded_dtype, parameter_dtype
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.conversion.placement import placements_of
from gemma3_jax.conversion.tokenizers import TokenizerSource, check_tokenizer, copy_tokenizer
from gemma3_jax.conversion.transforms import AddOne
from gemma3_jax.conversion.truncation import truncate
from gemma3_jax.model.layout import check_model, unstack_layers
from gemma3_jax.processes import in_all, in_first
from gemma3_jax.reading import CheckpointError, check_file
from gemma3_jax.sites.names import block_key
from gemma3_jax.types import Params, Shardings

with epy.lazy_imports():  # they take longer than all other imports of this module
    import flax.traverse_util
    import orbax.checkpoint as ocp
    from etils import epath

    from gemma3_jax.conversion import zarr

PARAMS = "params"


def save_params(
    config: Gemma3Config,
    params: Params,
    directory: str | os.PathLike[str],
    *,
    tokenizer: TokenizerSource | None = None,
) -> None:
    """Write converted parameters with their config, whole or not at all.

    Parameters that are cut over the devices of several processes are written by all of them: each calls this function,
    with a directory that all of them reach. The files are the same, byte for byte, however the parameters are cut.

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
    check_model(config, params)
    params = unstack_layers(config, params)
    in_all(lambda: check_params(config, params))
    with files.writing(directory) as target:

        def write_others() -> None:
            files.write_configs(target, config, tokenizer)
            copy_tokenizer(tokenizer, target)

        with ThreadPoolExecutor(1) as thread:
            # Orbax cannot be stopped. If Ctrl-C or a signal interrupts this line, the end of the block waits for it:
            # otherwise it would write to the directory while it is removed.
            save = ocp.args.PyTreeSave(params)
            in_all(thread.submit(_handler().save, epath.Path(target / PARAMS), args=save).result)
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
    leaves = stored_params(source, skipped)
    with _named(source):
        check_shapes(config, leaves)
    dtypes = stored_dtypes(config, leaves, dtype, source)
    placements = placements_of({path: leaf.shape for path, leaf in leaves.items()}, shardings)
    restore_args = {
        path: ocp.ArrayRestoreArgs(dtype=dtypes[path], sharding=placements[path].sharding) for path in leaves
    }
    restore = ocp.args.PyTreeRestore(
        item=flax.traverse_util.unflatten_dict(leaves),
        restore_args=flax.traverse_util.unflatten_dict(restore_args),
        partial_restore=True,
    )
    with _damage_named(source):
        params = _handler().restore(epath.Path(source / PARAMS), args=restore)
    with _named(source):
        check_params(config, params)
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


def stored_params(directory: Path, skipped: Collection[str] = ()) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter that `save_params` wrote, by its path; data is not read.

    Parameters below the keys `skipped` are left out, and may be missing.

    Raises:
        CheckpointError: the parameters are damaged.
    """
    for file in (directory / PARAMS).rglob("*"):
        if not file.is_dir():
            check_file(file)  # Orbax would wait for a FIFO
    with _damage_named(directory):
        metadata = _handler(skipped).metadata(epath.Path(directory.absolute() / PARAMS))
        stored: dict[tuple[str, ...], jax.ShapeDtypeStruct] = flax.traverse_util.flatten_dict(metadata.tree)
        return {path: leaf for path, leaf in stored.items() if path[0] not in skipped}


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
def _named(directory: Path) -> Iterator[None]:
    """Errors about parameters, with the directory that they come from."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    """Errors of Orbax as a CheckpointError that names the directory."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax has no class for its errors
        why = [*str(error).splitlines(), type(error).__name__][0].partition(" [tensorstore_spec=")[0]
        raise CheckpointError(f"{directory / PARAMS} is damaged: {why}") from error


def _handler(skipped: Collection[str] = ()) -> "ocp.PyTreeCheckpointHandler":
    """Writes and reads the list of the parameters, and leaves the arrays to `zarr`.

    Not inside `ocp.Checkpointer`, which writes the time into a file, waits for the other processes to read, and makes
    a temporary directory in ours.
    """
    # Orbax alone reads NumPy arrays without being told where to place them. Earlier versions wrote the other name, too.
    arrays, earlier = (zarr.Arrays(kind, skipped) for kind in ("np.ndarray", "jax.Array"))
    kinds = (jax.Array, arrays), (np.ndarray, arrays), (jax.ShapeDtypeStruct, earlier)
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)


def is_converted(directory: Path) -> bool:
    """Whether a directory has converted parameters rather than a Hugging Face checkpoint."""
    return (directory / PARAMS).is_dir()
