"""The tensors of a checkpoint, by Hugging Face key: what every kind of source offers, and the conversion reads."""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import numpy as np

from gemma3_jax import reading
from gemma3_jax.conversion import files
from gemma3_jax.conversion.gemma3 import is_unembedding
from gemma3_jax.conversion.quantised import quantised_weights
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

_log = logging.getLogger(__name__)

Tensor = TypeVar("Tensor")

# Reads a tensor of which only these rows are needed. It has the shape of the whole tensor; its other rows may have
# anything, and cost neither time nor memory.
Reader = Callable[[slice], np.ndarray]

# Modules that torch puts around another to compile it, to shard it, or to recompute its activations.
_WRAPPER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MODULE = re.compile(r"(?:^|\.)(?:layers|embed_tokens|norm|lm_head)\.")


class ForeignTensor(Protocol):
    """What is read of the tensors of a state dict: of torch, of NumPy or of JAX."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint, by Hugging Face key, whatever stores them.

    Attributes:
        checkpoint: name of the checkpoint, for messages.
        shapes: shape of every tensor, by key, in file order.
        dtypes: dtype of every tensor, by key, as `read` returns it: the name in NumPy of one in `files.DTYPES`, or
            else the name in the source.
        open: returns the reader of a key. What can only be computed as a whole, such as a dequantised or merged matrix,
            is computed here, once. A reader of a file keeps no memory between its calls.
        file_of: returns the file of a key, for messages.
        default_dtype: dtype of the parameters if none is asked for; None keeps the stored ones.
        norms_hold_one: whether norm weights are stored as 1 + w, as in the model; Hugging Face stores w.
    """

    checkpoint: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    open: Callable[[str], Reader]
    file_of: Callable[[str], str]
    default_dtype: str | None = None
    norms_hold_one: bool = False

    def read(self, key: str) -> np.ndarray:
        """The whole tensor of a key."""
        return self.open(key)(slice(None))


def reader_of(tensor: np.ndarray) -> Reader:
    """The reader of a tensor in memory."""
    return lambda rows: tensor


def of_directory(directory: Path, is_wanted: Callable[[str], bool] = lambda key: True) -> Tensors:
    """The tensors of a directory's safetensors; only headers are read, and only of files with a wanted key.

    Quantised weights are read dequantised.

    Raises:
        CheckpointError: a file is damaged, or weights are quantised in a way that this library does not dequantise.
    """
    return of_stored(str(directory), files.read_headers(directory, is_wanted), files.read_quantization(directory))


def of_stored(
    checkpoint: str,
    stored: Mapping[str, reading.Stored],
    quantization: Settings | None = None,
    read: Callable[[str], np.ndarray] | None = None,
) -> Tensors:
    """The tensors with these headers, by key; `quantization` is what the config says about their quantisation.

    `read` returns the tensor of a key; None reads it from its file.
    """
    stored = _unwrapped(checkpoint, stored)
    whole = read or (lambda key: reading.map_tensor(key, stored[key]))
    return _tensors(
        checkpoint=checkpoint,
        shapes={key: tensor.shape for key, tensor in stored.items()},
        dtypes={key: tensor.dtype for key, tensor in stored.items()},
        open=lambda key: lambda rows: whole(key),
        file_of=lambda key: str(stored[key].file),
        quantization=quantization or {},
    )


def of_state_dict(state_dict: Mapping[str, ForeignTensor]) -> Tensors:
    """The tensors of a `state_dict()`, torch tensors or NumPy arrays. Quantised weights are read dequantised.

    Raises:
        CheckpointError: a value is not a tensor, or weights are quantised in a way that this library does not
            dequantise.
    """
    for key, tensor in state_dict.items():
        if not hasattr(tensor, "dtype"):
            raise CheckpointError(f"{key} is a {type(tensor).__name__}; give torch tensors or numpy arrays")
    state_dict = _unwrapped("the state dict", state_dict)
    return _tensors(
        checkpoint="the state dict",
        shapes={key: tuple(tensor.shape) for key, tensor in state_dict.items()},
        dtypes={key: str(tensor.dtype).removeprefix("torch.") for key, tensor in state_dict.items()},
        open=lambda key: reader_of(_to_numpy(state_dict[key])),
        file_of=lambda key: "the state dict",
        quantization={},
    )


def _unwrapped(checkpoint: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the keys that they have without wrappers around parts of the model; a prefix stays as it is."""
    unwrapped: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module = _MODULE.search(key)
        name = key if module is None else key[: module.end()] + _WRAPPER.sub("", key[module.end() :])
        if name in unwrapped:
            raise CheckpointError(f"{checkpoint} has {name} twice: with and without one of torch's wrappers")
        unwrapped[name] = tensor
    return unwrapped


def without_unembedding(tensors: Tensors) -> Tensors:
    """The same tensors without an unembedding, for a model that uses its embedding in its place."""
    shapes = {key: shape for key, shape in tensors.shapes.items() if not is_unembedding(key)}
    return dataclasses.replace(tensors, shapes=shapes)


def _tensors(
    checkpoint: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    open: Callable[[str], Reader],
    file_of: Callable[[str], str],
    quantization: Settings,
) -> Tensors:
    """The tensors as a model has them, of the tensors as they are stored; `dtypes` are as the source names them."""
    names = {key: str(reading.NUMPY_DTYPES.get(name, name)) for key, name in dtypes.items()}
    weights, parts = quantised_weights(checkpoint, shapes, names, lambda key: open(key)(slice(None)), quantization)
    if weights:
        layouts = sorted({weight.layout for weight in weights.values()})
        _log.warning("%s: dequantised %d weights (%s)", checkpoint, len(weights), ", ".join(layouts))
    # A weight takes the place of the first tensor that holds it.
    places = {part: name for name, weight in weights.items() for part in (name, *weight.parts)}
    in_order = dict.fromkeys(places.get(key, key) for key in shapes if key in places or key not in parts)
    return Tensors(
        checkpoint=checkpoint,
        shapes={key: weights[key].shape if key in weights else shapes[key] for key in in_order},
        dtypes={
            key: "float32" if key in weights else names[key] if names[key] in files.DTYPES else dtypes[key]
            for key in in_order
        },
        open=lambda key: reader_of(weights[key].dequantise()) if key in weights else open(key),
        file_of=lambda key: file_of(weights[key].parts[0] if key in weights and key not in shapes else key),
        default_dtype="bfloat16" if weights else None,
    )


def _to_numpy(tensor: ForeignTensor) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    # torch's .numpy() does not support bfloat16; DLPack does.
    return np.asarray(jax.dlpack.from_dlpack(tensor.detach().cpu().contiguous()))
