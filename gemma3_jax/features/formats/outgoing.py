"""The files of a dictionary that is to be written, and what both formats say in the same way.

Axes: i features of the input, o of the output, f features of the dictionary.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from gemma3_jax.features.activations import Activation, Gated, JumpRelu, Relu
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.processes import to_host
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, which is made when it is written.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: makes it in host memory; all processes call it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """The files of a dictionary.

    Attributes:
        tensors: by the name of a file and the key.
        config_name: name of the file with the config.
        config: its content.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    config_name: str
    config: JsonObject


def as_is(array: jax.Array | np.ndarray) -> Tensor:
    """An array of the dictionary."""
    return Tensor(array.shape, array.dtype, lambda: to_host(array))


def transposed(array: jax.Array | np.ndarray) -> Tensor:
    """An array of the dictionary, with its axes in the opposite order."""
    return Tensor(array.shape[::-1], array.dtype, lambda: to_host(array).T)


def threshold_of(activation: Activation, width: int, format: str) -> Tensor:
    """The thresholds [f] float32 of an activation as a JumpReLU that also sets negative values to 0.

    Raises:
        CheckpointError: the activation is another function.
    """
    if isinstance(activation, Relu):
        return Tensor((width,), np.dtype(np.float32), lambda: np.zeros(width, np.float32))
    if not isinstance(activation, JumpRelu):
        kind = type(activation).__name__
        remedy = "; use format='saelens'" if isinstance(activation, Gated) or format == "gemma_scope" else ""
        raise CheckpointError(f"{format} has no {kind} for this kind of dictionary{remedy}")
    threshold = to_host(activation.threshold).astype(np.float32)
    if not activation.rectify and threshold.min() < 0:
        raise CheckpointError(
            f"{format} sets negative features to 0, and this dictionary keeps some of them: thresholds are negative, "
            f"down to {threshold.min():.3g}, and rectify is False"
        )
    return Tensor((width,), threshold.dtype, lambda: np.broadcast_to(threshold, (width,)))


def folded_bias(dictionary: SparseAutoencoder | Transcoder) -> Tensor:
    """The encoder's bias [f], with what is subtracted from the input folded in."""
    if not dictionary.subtracts_b_dec:
        return as_is(dictionary.b_enc)
    shape, dtype = dictionary.b_enc.shape, dictionary.b_enc.dtype

    def read() -> np.ndarray:
        W_enc, b_enc, b_dec = (
            to_host(array).astype(np.float64) for array in (dictionary.W_enc, dictionary.b_enc, dictionary.b_dec)
        )
        # [o] x [i, f] -> [f]
        return (b_enc - b_dec @ W_enc).astype(dtype)

    return Tensor(shape, dtype, read)
