"""Parameters out, as a checkpoint that Hugging Face loads."""

import dataclasses
import logging
import os
from collections.abc import Callable

import huggingface_hub
import jax
import numpy as np
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.check import check_params
from gemma3_jax.conversion.dtypes import dtype_among
from gemma3_jax.conversion.finite import is_finite
from gemma3_jax.conversion.gemma3 import Entry, dense_entries, entries
from gemma3_jax.conversion.safetensors_file import write_tensors
from gemma3_jax.conversion.sentence_transformers import write_head
from gemma3_jax.conversion.tokenizers import TokenizerSource, check_tokenizer, copy_tokenizer
from gemma3_jax.conversion.transforms import AddOne
from gemma3_jax.conversion.words import listed
from gemma3_jax.model.layout import check_model, unstack_layers
from gemma3_jax.processes import in_all, in_first, to_host
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Params

_log = logging.getLogger(__name__)


def export_checkpoint(
    config: Gemma3Config,
    params: Params,
    directory: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    tokenizer: TokenizerSource | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write parameters as a directory that `transformers.Gemma3ForCausalLM.from_pretrained` loads.

    With an embedding head, it is a directory that `sentence_transformers.SentenceTransformer` loads.

    The inverse of `convert_checkpoint`. Every tensor is written bit for bit as it was read, except norm weights that
    are too small for `1 + w` in float32 (`gemma3_jax.conversion.transforms.AddOne` states the bound). The model's
    results do not change. The directory appears under its name only when it is complete. One tensor at a time is in
    host memory.

    If a program has several processes, each calls this function. The first one writes, and the others send it their
    parts of the parameters.

    Args:
        config: shape of the model.
        params: parameter pytree; stacked parameters (`gemma3_jax.stack_layers`) are unstacked first, which copies them.
        directory: a directory that does not exist yet, or is empty.
        dtype: dtype of the tensors, "float32", "bfloat16" or "float16". None keeps the dtype of each parameter, and
            gives the norms the dtype of the embedding. Weights that are too large for the dtype, which can happen in
            float16, become infinite; a log message names their tensors.
        tokenizer: a tokenizer with `save_pretrained`, or a directory whose tokenizer files are copied, and whose
            `generation_config.json` gives the settings of the exported one, apart from the special tokens.
        max_shard_size: bytes, or a string such as "5GB"; larger models are split, with an index.

    Raises:
        CheckpointError: the parameters do not match the config or have NaN or infinity, the dtype is unknown, the size
            of a shard is not positive, `tokenizer` does not have a tokenizer, or the directory cannot be written.
        FileExistsError: another writer created the directory in the meantime.
        ValueError: the config has only the first layers of a model, and does not allow their logits, which
            Hugging Face would compute. If it allows them, `config.json` has `truncated_from`.
        RuntimeError: it failed in another process.
    """

    def check() -> None:
        files.check_target(directory)
        check_tokenizer(tokenizer)

    in_first(check)
    check_model(config, params)
    config.check_logits("dataclasses.replace(config, allow_truncated_logits=True) writes a checkpoint of these layers")
    number = isinstance(max_shard_size, int | np.integer) and not isinstance(max_shard_size, bool)
    if not (isinstance(max_shard_size, str) or (number and max_shard_size > 0)):
        raise CheckpointError(f'max_shard_size is {max_shard_size!r}; give bytes, at least 1, or text such as "5GB"')
    requested = dtype_among(files.DTYPES, dtype)
    params = unstack_layers(config, params)
    flat = in_all(lambda: check_params(config, params))
    dense = {entry.hf for entry in dense_entries(config)}
    table = {_exported_name(config, entry): entry for entry in entries(config)}
    norm_dtype = flat["embed.weight"].dtype
    dtypes = {
        key: requested or (norm_dtype if isinstance(entry.step, AddOne) else flat[entry.ours].dtype)
        for key, entry in table.items()
    }
    shapes = {key: jax.ShapeDtypeStruct(entry.hf_shape, dtypes[key]) for key, entry in table.items()}
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        {key: shape for key, shape in shapes.items() if key not in dense},
        get_storage_size=lambda leaf: leaf.size * leaf.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    too_large = {}
    with (
        files.writing(directory) as target,
        tqdm(total=len(table), desc="export", unit=" tensors", disable=None) as bar,
    ):

        def read(key: str) -> Callable[[], np.ndarray]:
            parameter = to_host(flat[table[key].ours])

            def tensor_of() -> np.ndarray:
                reverted = table[key].step.revert(parameter)
                with np.errstate(over="ignore"):  # logged below
                    tensor = np.ascontiguousarray(reverted.astype(dtypes[key], copy=False))
                if not is_finite(tensor):
                    too_large[key] = max(float(reverted.max()), -float(reverted.min()))
                bar.update()
                return tensor

            return tensor_of

        def write_others() -> None:
            if shards.is_sharded:
                index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
                files.write_json(target / files.INDEX, index)
            extra: dict[str, object] = {"dtype": str(requested or norm_dtype)}
            if config.embedding_head is not None:
                extra["architectures"] = ["Gemma3TextModel"]  # as in EmbeddingGemma, whose head is in other files
            files.write_configs(target, dataclasses.replace(config, embedding_head=None), tokenizer, **extra)
            write_head(config, {key: tensor() for key, tensor in of_head.items()}, target)
            copy_tokenizer(tokenizer, target)

        for name, keys in shards.filename_to_tensors.items():
            write_tensors(target / name, {key: shapes[key] for key in keys}, read)
        of_head = {key: read(key) for key in dense}
        in_first(write_others)
    if too_large:
        named = listed([f"{key} (up to {largest:,.6g} in magnitude)" for key, largest in too_large.items()])
        _log.warning("%s: weights that are too large for their dtype were written as infinity: %s", directory, named)


def _exported_name(config: Gemma3Config, entry: Entry) -> str:
    prefix = "model." if entry.in_text_model and config.embedding_head is None else ""
    return prefix + entry.hf
