"""Hugging Face checkpoints to parameter pytrees and back, one tensor at a time, without torch."""

import collections
import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from conversion import files
from conversion.files import CheckpointError
from conversion.gemma3 import Entry, entries, find_head, find_prefix, is_vision
from conversion.steps import AddOne
from gemma3_jax.config import Gemma3Config
from gemma3_jax.stacking import unstack_layers

Params = dict[str, Any]

_log = logging.getLogger(__name__)
_THREADS = min(8, os.cpu_count() or 1)  # a few saturate a memory bus
_STRIP = 256  # elements


def convert_checkpoint(
    source: str | os.PathLike[str], dtype: DTypeLike | None = None, revision: str | None = None
) -> tuple[Gemma3Config, Params]:
    """Read a Gemma 3 checkpoint into the model's parameter pytree.

    Everything is checked against the headers before any data is read. Peak host memory is at most the converted
    parameters, plus the largest tensor, plus 300 MB.

    Args:
        source: a directory with `config.json` and safetensors (one file, or shards with their index), as
            `save_pretrained` writes it, or the id of a model on the Hugging Face hub.
        dtype: of the parameters: "float32", "bfloat16" or "float16"; None keeps what is stored. Norm weights are
            float32 always.
        revision: branch, tag or commit on the hub.

    Returns:
        (config, params); params[f"blocks_{i}"]["attn"]["q"]["weight"] is [h, d, e], and so on down the table in
        `conversion.gemma3`. The vision half of a multimodal checkpoint is left out, and named in one log message. The
        config's stop tokens are those of `generation_config.json` where it has some, by which Hugging Face generates.

    Raises:
        CheckpointError: naming the file and the tensor: missing or unexpected keys, a wrong shape, a truncated
            or corrupt file, two shards with one key.
        ConfigError: naming the field.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> params["blocks_0"]["attn"]["q"]["weight"].shape == (
    ...     config.num_attention_heads, config.hidden_size, config.head_dim)
    True
    """
    directory = files.locate(source, revision)
    config = files.read_config(directory)
    stored = files.read_headers(directory)
    for key, tensor in stored.items():
        if tensor.dtype not in files.STORED_DTYPES and not is_vision(key):
            raise CheckpointError(f"{tensor.file}: {key} has dtype {tensor.dtype}; this port reads {_known_dtypes()}")
    shapes = {key: tensor.shape for key, tensor in stored.items()}

    def read(key: str) -> np.ndarray:
        return files.map_tensor(key, stored[key])

    return config, _convert(config, shapes, read, dtype, lambda key: str(stored[key].file), str(directory))


def convert_state_dict(state_dict: Mapping[str, Any], config: Gemma3Config, dtype: DTypeLike | None = None) -> Params:
    """Turn a Hugging Face model's `state_dict()` into the model's parameter pytree.

    Args:
        state_dict: tensors by Hugging Face key, torch tensors or numpy arrays. They are copied.
        config: of the model; `Gemma3Config.from_hf(hf_model.config)`.
        dtype: as in `convert_checkpoint`.

    Raises:
        CheckpointError: as in `convert_checkpoint`.
    """
    for key, tensor in state_dict.items():
        if not hasattr(tensor, "dtype"):
            raise CheckpointError(f"{key} is a {type(tensor).__name__}; give torch tensors or numpy arrays")
        # str: torch.float32 or float32
        if str(tensor.dtype).removeprefix("torch.") not in files.DTYPES and not is_vision(key):
            raise CheckpointError(f"{key} has dtype {tensor.dtype}; this port reads {_known_dtypes()}")

    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}

    def read(key: str) -> np.ndarray:
        return _to_numpy(state_dict[key])

    return _convert(config, shapes, read, dtype, lambda key: "the state dict", "the state dict")


def export_checkpoint(
    config: Gemma3Config,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write parameters as a directory that `transformers.Gemma3ForCausalLM.from_pretrained` loads.

    The inverse of `convert_checkpoint`: every tensor comes back bit for bit, but for norm weights too small to
    survive `1 + w` in float32 (`conversion.steps.AddOne` states the bound), with which the model computes the same.
    All or nothing: the directory appears under its name when it is complete.

    Args:
        config: shape of the model.
        params: parameter pytree; stacked ones (`gemma3_jax.stack_layers`) are unstacked first, a second copy.
        directory: does not exist yet, or is empty.
        dtype: of the tensors; None keeps each parameter's, and gives the norms the dtype of the embedding.
        tokenizer: a directory whose tokenizer files are copied, or a tokenizer with `save_pretrained`.
        max_shard_size: bytes, or a string such as "5GB"; larger models are split, with an index.

    Raises:
        CheckpointError: parameters that do not fit the config, or a directory that holds something already.
    """
    flat = check_params(config, unstack_layers(config, params))
    table = {_exported_name(entry): entry for entry in entries(config)}
    norm_dtype = flat["embed.weight"].dtype
    dtypes = {
        key: parameter_dtype(dtype) or (norm_dtype if isinstance(entry.step, AddOne) else flat[entry.ours].dtype)
        for key, entry in table.items()
    }
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        {key: jax.ShapeDtypeStruct(entry.hf_shape, dtypes[key]) for key, entry in table.items()},
        get_storage_size=lambda leaf: leaf.size * leaf.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with (
        files.writing(directory) as target,
        tqdm(total=len(table), desc="export", unit=" tensors", disable=None) as bar,
    ):
        for name, keys in shards.filename_to_tensors.items():
            tensors = {}
            for key in keys:
                reverted = table[key].step.revert(np.asarray(flat[table[key].ours])).astype(dtypes[key], copy=False)
                # safetensors writes the buffer as it lies, whatever its strides say.
                tensors[key] = np.ascontiguousarray(reverted)
                bar.update()
            safetensors.numpy.save_file(tensors, target / name, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            files.write_json(target / files.INDEX, index)
        files.write_json(
            target / "config.json",
            {**config.to_hf(), "dtype": str(norm_dtype if dtype is None else parameter_dtype(dtype))},
        )
        if tokenizer is not None:
            files.copy_tokenizer(tokenizer, target)


def check_params(config: Gemma3Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter pytree by adapter key, once they are those that the config calls for.

    Raises:
        CheckpointError: a parameter is missing, unknown, or of another shape.
    """
    flat = flax.traverse_util.flatten_dict(params)
    wanted = {entry.path: entry for entry in entries(config)}
    missing, extra = sorted(set(wanted) - set(flat)), sorted(set(flat) - set(wanted))
    if missing:
        raise CheckpointError(f"the parameters lack {_listed(['/'.join(path) for path in missing])}")
    if extra:
        raise CheckpointError(
            f"the parameters have {_listed(['/'.join(path) for path in extra])}, unknown to the config"
        )
    for path, entry in wanted.items():
        shape = jax.eval_shape(entry.step.convert, jax.ShapeDtypeStruct(entry.hf_shape, jnp.float32)).shape
        name, leaf = "/".join(path), flat[path]
        if getattr(leaf, "shape", None) != shape:
            found = list(leaf.shape) if hasattr(leaf, "shape") else type(leaf).__name__
            raise CheckpointError(f"{name} has shape {found}; the config calls for {list(shape)}")
        if jnp.dtype(leaf.dtype).name not in files.DTYPES:
            raise CheckpointError(f"{name} has dtype {leaf.dtype}; parameters take {_known_dtypes()}")
    return {entry.ours: flat[path] for path, entry in wanted.items()}


def parameter_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """The numpy dtype that a `dtype` argument means, or None.

    Raises:
        CheckpointError: it is none that parameters can have.
    """
    if dtype is None:
        return None
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted.name not in files.DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; parameters take {_known_dtypes()}")
    return wanted


def _convert(
    config: Gemma3Config,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike | None,
    file_of: Callable[[str], str],
    whole: str,
) -> Params:
    """Check every key and shape, then convert tensor by tensor."""
    target = parameter_dtype(dtype)
    plan = _plan(config, shapes, file_of, whole)
    if config.tie_word_embeddings:
        _check_tied(shapes, plan, read, whole)
    # In the order in which they lie on the disk, which reads ahead.
    order = {key: i for i, key in enumerate(shapes)}
    keys = sorted(((order[key], entry, key) for entry, key in plan.items()), key=lambda item: item[0])
    size = {key: math.prod(shapes[key]) for key in plan.values()}
    room = max(size.values())

    def convert(item: tuple[int, Entry, str]) -> tuple[tuple[str, ...], jax.Array]:
        _, entry, key = item
        converted = np.asarray(entry.step.convert(read(key)))
        return entry.path, _on_device(converted, None if isinstance(entry.step, AddOne) else target)

    # A tensor is in memory twice while it is converted. As many at once as have room where the largest has, alone.
    alone = [item for item in keys if size[item[2]] * _THREADS > room]
    together = [item for item in keys if size[item[2]] * _THREADS <= room]
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(keys), desc="convert", unit=" tensors", disable=None) as bar,
    ):
        flat = {}
        for path, parameter in itertools.chain(map(convert, alone), pool.map(convert, together)):
            flat[path] = parameter
            bar.update()
    return flax.traverse_util.unflatten_dict(flat)


def _on_device(view: np.ndarray, dtype: np.dtype | None) -> jax.Array:
    """A copy of the view, which may be a transposed one, in `dtype`."""
    dtype = dtype or view.dtype
    straight = view.flags.c_contiguous
    if view.dtype == dtype and not straight:
        # JAX transposes several times faster than numpy.
        return jax.block_until_ready(jax.device_put(view, may_alias=False))
    # numpy casts and copies faster than JAX: it compiles nothing, and asks the system for large pages.
    copy = files.aligned_empty(view.shape, dtype)
    with np.errstate(over="ignore"):  # float16 has no room for some: they become infinite
        # By strips, so that what is read stays in the processor's cache until the last of it is written.
        for start in range(0, view.shape[0 if straight else -1], _STRIP):
            strip = slice(start, start + _STRIP)
            at = strip if straight else (..., strip)
            copy[at] = view[at]
    return jax.device_put(copy, may_alias=True)


def _plan(
    config: Gemma3Config, shapes: Mapping[str, tuple[int, ...]], file_of: Callable[[str], str], whole: str
) -> dict[Entry, str]:
    """For each entry its key, once every key and shape is as the config has it."""
    prefix = find_prefix(shapes)
    if prefix is None:
        raise CheckpointError(f"{whole} holds no Gemma 3 text model: no key ends in embed_tokens.weight")
    head = find_head(shapes)
    plan = {
        entry: (head or entry.hf) if entry.hf == "lm_head.weight" else prefix + entry.hf for entry in entries(config)
    }
    missing = [key for key in plan.values() if key not in shapes]
    if missing:
        raise CheckpointError(f"{whole} lacks {_listed(missing)}, which its config calls for")
    extra = set(shapes) - set(plan.values()) - {head}
    vision = sorted(key for key in extra if is_vision(key))
    unexpected = sorted(extra - set(vision))
    if unexpected:
        raise CheckpointError(f"{file_of(unexpected[0])} has {_listed(unexpected)}, for which its config has no place")
    for entry, key in plan.items():
        if shapes[key] != entry.hf_shape:
            raise CheckpointError(
                f"{file_of(key)}: {key} has shape {list(shapes[key])}; its config calls for {list(entry.hf_shape)}"
            )
    if vision:
        groups = collections.Counter(re.sub(r"\.\d+\.", ".*.", key) for key in vision)
        names = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in groups.items())
        _log.warning("%s: left out %d vision tensors, which the text model does not use: %s", whole, len(vision), names)
    return plan


def _check_tied(
    shapes: Mapping[str, tuple[int, ...]], plan: Mapping[Entry, str], read: Callable[[str], np.ndarray], whole: str
) -> None:
    """A tied checkpoint may repeat the embedding as its head; a head of its own would be lost, silently."""
    head = find_head(shapes)
    embedding = next(key for entry, key in plan.items() if entry.ours == "embed.weight")
    if head is not None and not _equal_bits(read(head), read(embedding)):
        raise CheckpointError(
            f"{whole}: {head} differs from {embedding}, but its config has tie_word_embeddings; set that to false"
        )


def _equal_bits(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows))


def _exported_name(entry: Entry) -> str:
    return entry.hf if entry.hf == "lm_head.weight" else f"model.{entry.hf}"


def _to_numpy(tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    # numpy has no bfloat16 of its own, which torch's .numpy() would need; DLPack hands it over.
    return np.asarray(jax.dlpack.from_dlpack(tensor.detach().cpu().contiguous()))


def _known_dtypes() -> str:
    return ", ".join(files.DTYPES)


def _listed(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
