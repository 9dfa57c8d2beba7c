"""The dtypes of parameters: what a checkpoint stores, and what a model runs in."""

import logging

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.config import PAST_FLOAT16, RUN_DTYPES
from gemma3_jax.conversion.files import DTYPES
from gemma3_jax.conversion.words import either
from gemma3_jax.reading import CheckpointError

_log = logging.getLogger(__name__)


def parameter_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """The NumPy dtype of a `dtype` argument, or None.

    Raises:
        CheckpointError: the model cannot run in this dtype.
    """
    return dtype_among(RUN_DTYPES, dtype)


def loaded_dtype(asked_for: np.dtype | None, has_float16: bool, source: str) -> np.dtype | None:
    """The dtype in which all parameters except norms are loaded; None keeps the dtype of each."""
    if asked_for is not None or not has_float16:
        return asked_for
    message = '%s has float16 weights and is loaded in float32, because %s; dtype="bfloat16" takes half the memory'
    _log.warning(message, source, PAST_FLOAT16)
    # float32 represents every float16 exactly. bfloat16 weights in the same checkpoint become float32 too: a model runs
    # in the dtype of its embedding, a product of the two dtypes is computed in float32 in any case, and stacked blocks
    # must have the same dtypes.
    return np.dtype("float32")


def dtype_among(names: tuple[str, ...], dtype: DTypeLike | None) -> np.dtype | None:
    """The NumPy dtype of a `dtype` argument, which must be one of these; or None."""
    if dtype is None:
        return None
    try:
        requested = jnp.dtype(dtype)
    except TypeError:
        requested = None
    if requested is not None and requested.name in names:
        return requested
    why = f"; the model cannot run in it, because {PAST_FLOAT16}" if requested == np.float16 else ""
    raise CheckpointError(f"dtype is {dtype!r}{why}; use {either(names)}")


def known_dtypes() -> str:
    """The dtypes that a checkpoint may have, for messages."""
    return ", ".join(DTYPES)
