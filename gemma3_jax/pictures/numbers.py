"""The numbers that a picture is made of."""

import numpy as np
from numpy.typing import ArrayLike


def numbers(values: ArrayLike) -> np.ndarray:
    """The values in float32, with NaN for values that are not finite."""
    array = np.asarray(values, np.float32)
    return np.where(np.isfinite(array), array, np.float32(np.nan))


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], reason: str) -> None:
    """Raise a ValueError unless the shape is the expected one."""
    if shape != expected:
        raise ValueError(f"{name} has shape {shape}; {reason} need {expected}")
