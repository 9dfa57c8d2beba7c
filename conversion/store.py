"""Converted parameters on disk, through Orbax: for what is trained or edited, and to be read in shards."""

import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from conversion import files
from conversion.checkpoint import Params, check_params, parameter_dtype
from conversion.files import CheckpointError
from conversion.gemma3 import entries
from conversion.steps import AddOne
from gemma3_jax.config import Gemma3Config
from gemma3_jax.stacking import unstack_layers

_PARAMS = "params"
# Chunks of this size, uncompressed, are read in less than half of the time of the defaults, which take a fifth less.
_CHUNK_BYTES = 2**25


def save_params(
    config: Gemma3Config, params: Params, directory: str | os.PathLike[str], *, tokenizer: Any = None
) -> None:
    """Write converted parameters with their config, all or nothing.

    Args:
        config: shape of the model.
        params: parameter pytree; stacked ones (`gemma3_jax.stack_layers`) are stored unstacked.
        directory: does not exist yet, or is empty.
        tokenizer: as in `export_checkpoint`.

    Raises:
        CheckpointError: parameters that do not fit the config, or a directory that holds something already.
    """
    params = unstack_layers(config, params)
    check_params(config, params)
    with files.writing(directory) as target:
        chunks = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
        with _checkpointer() as checkpointer:
            checkpointer.save(target / _PARAMS, ocp.args.PyTreeSave(params, chunks))
        files.write_json(target / "config.json", config.to_hf())
        if tokenizer is not None:
            files.copy_tokenizer(tokenizer, target)


def load_params(directory: str | os.PathLike[str], dtype: DTypeLike | None = None) -> tuple[Gemma3Config, Params]:
    """Read what `save_params` wrote, onto JAX's default device.

    Args:
        directory: that it wrote.
        dtype: as in `convert_checkpoint`; None keeps what was saved.

    Raises:
        CheckpointError: the directory does not hold converted parameters, or not those of its config.
    """
    source = Path(directory).absolute()
    if not is_converted(source):
        raise CheckpointError(f"{source} holds no converted parameters, as `save_params` writes them")
    config = files.read_config(source)
    target = parameter_dtype(dtype)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with _checkpointer() as checkpointer:
            stored = checkpointer.metadata(source / _PARAMS).item_metadata.tree
            leaves = flax.traverse_util.flatten_dict(stored)
            norms = {entry.path for entry in entries(config) if isinstance(entry.step, AddOne)}
            wanted = {
                path: ocp.ArrayRestoreArgs(dtype=leaf.dtype if path in norms else target, sharding=sharding)
                for path, leaf in leaves.items()
            }
            how = ocp.args.PyTreeRestore(restore_args=flax.traverse_util.unflatten_dict(wanted))
            params = checkpointer.restore(source / _PARAMS, how)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source / _PARAMS} is damaged: {str(error).splitlines()[0]}") from error
    check_params(config, params)
    return config, params


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def is_converted(directory: Path) -> bool:
    """Whether a directory holds converted parameters rather than a Hugging Face checkpoint."""
    return (directory / _PARAMS).is_dir()
