"""Hugging Face checkpoints to parameter pytrees and back, one tensor at a time, without torch."""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.assemble import assemble
from gemma3_jax.conversion.gemma3 import is_other_head
from gemma3_jax.conversion.hub import locate, refuse_revision
from gemma3_jax.conversion.plan import find_prefix
from gemma3_jax.conversion.sources import convert_sources, locate_sources
from gemma3_jax.conversion.tensors import ForeignTensor, of_directory, of_state_dict
from gemma3_jax.types import Params, Shardings


def convert_checkpoint(
    source: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    *,
    first_n_layers: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    tie_word_embeddings: bool | None = None,
    shardings: Shardings | None = None,
) -> tuple[Gemma3Config, Params]:
    """Read a Gemma 3 checkpoint into the model's parameter pytree.

    Everything is checked against the headers before any data is read. Peak host memory is at most the converted
    parameters, plus the largest tensor, plus 300 MB. With `shardings`, it is at most what the CPU devices of this
    process hold, plus the largest part of a parameter on one device, plus 300 MB. But quantised weights, other than
    those of GGUF files, and weights with an adapter are computed one by one as a whole, in every process.

    Args:
        source: a directory with `config.json` and safetensors (one file, or shards with their index), as
            `save_pretrained` writes it; a GGUF file, which needs the extra `gguf`; or the id of a model on the Hugging
            Face hub, followed by the name of the file if it is a GGUF file: "org/model/file.gguf". Or the directory or
            id of a PEFT adapter, which is merged into the base that its config names.
        dtype: dtype of the parameters: "float32" or "bfloat16". None keeps the stored dtype, except that a float16
            checkpoint is loaded in float32, with a log message, because the residual stream of Gemma 3 exceeds the
            largest float16. Weights that are stored quantised, as in most GGUF files, are dequantised, by default into
            bfloat16, and then all weights are bfloat16. Norm weights are always float32.
        revision: branch, tag or commit of the source on the hub.
        first_n_layers: load only these layers, and read and download nothing of the others. The config then has
            `truncated_from`, and refuses to compute logits: see `Gemma3Config`.
        adapter: directory or hub id of a PEFT adapter, which is merged into the source tensor by tensor, as
            `merge_and_unload` merges it into a base in the same dtype. A merged tensor is in memory three times, in
            float32.
        tie_word_embeddings: whether the embedding is the unembedding, too. None is the config's choice, with an error
            if the checkpoint has an unembedding that would be lost.
        shardings: how parameters are cut over devices: a pytree of `jax.sharding.Sharding` with the structure of the
            parameters, as `gemma3_jax.placing.param_shardings` makes it, or one sharding for all of them. Each process
            reads the parts of its own devices. None is the default device of this process.

    Returns:
        (config, params). For example, params[f"blocks_{i}"]["attn"]["q"]["weight"] is [h, d, e]; the table in
        `gemma3_jax.conversion.gemma3` lists all parameters. The keys of the checkpoint may have any prefix. The vision
        half of a multimodal checkpoint is left out, and so are other heads (`read_heads` returns them); one log message
        for each names them. A folder of `sentence_transformers`, such as EmbeddingGemma, gives a config with an
        `embedding_head`, and its dense layers as params["dense_1"]["weight"] [in, out] and so on. If
        `generation_config.json` has stop tokens, the config has these, as in Hugging Face.

    Raises:
        CheckpointError: a key is missing or unexpected, a shape is wrong, a file is truncated or corrupt, two shards
            have the same key, or a weight is NaN or infinite; the message names the file and the tensor. Or the weights
            are quantised in a way that this library does not read, the model cannot run in the dtype, or the adapter
            does not match its base or cannot be merged.
        ModuleNotFoundError: `source` is a GGUF file, and the `gguf` package is not installed.
        ConfigError: a config field is invalid or not supported; the message names the field.
        ValueError: `shardings` do not have the structure of the parameters, or do not divide one of them.

    >>> from conversion import convert_checkpoint
    >>> from gemma3_jax import TINY
    >>> config, params = convert_checkpoint(TINY)
    >>> params["blocks_0"]["attn"]["q"]["weight"].shape == (
    ...     config.num_attention_heads, config.hidden_size, config.head_dim)
    True
    >>> from gemma3_jax.placing import make_mesh, param_shardings
    >>> mesh = make_mesh(model=1)  # the number of devices that share one copy of the parameters
    >>> config, params = convert_checkpoint(TINY, shardings=param_shardings(config, mesh))
    """
    sources = locate_sources(source, revision, adapter, first_n_layers=first_n_layers)
    return convert_sources(
        sources,
        dtype,
        first_n_layers=first_n_layers,
        tie_word_embeddings=tie_word_embeddings,
        shardings=shardings,
    )


def read_heads(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, jax.Array]:
    """The tensors of heads other than the unembedding, such as the `score` of a reward model or a `v_head`.

    `convert_checkpoint` leaves them out. Arguments as there.

    Returns:
        Arrays by checkpoint key, with the stored shapes and dtypes: a `score.weight` is [labels, d], and its logits are
        `x @ score.T` of the final norm's output x [b, p, d]. Quantised ones are dequantised into float32.

    Raises:
        CheckpointError: as in `convert_checkpoint`.

    >>> from gemma3_jax import TINY
    >>> read_heads(TINY)
    {}
    """
    refuse_revision(source, revision)
    directory = locate(source, revision)
    tensors = of_directory(directory)
    prefix = find_prefix(files.read_config(directory), tensors)
    return {key: jnp.asarray(tensors.read(key)) for key in tensors.shapes if is_other_head(key, prefix)}


def convert_state_dict(
    state_dict: Mapping[str, ForeignTensor], config: Gemma3Config, dtype: DTypeLike | None = None
) -> Params:
    """Turn a Hugging Face model's `state_dict()` into the model's parameter pytree.

    Args:
        state_dict: tensors by Hugging Face key, torch tensors or numpy arrays. They are copied.
        config: shape of the model; `Gemma3Config.from_hf(hf_model.config)`.
        dtype: as in `convert_checkpoint`.

    Raises:
        CheckpointError: as in `convert_checkpoint`.
    """
    check_config(config)
    return assemble(config, of_state_dict(state_dict), dtype)
