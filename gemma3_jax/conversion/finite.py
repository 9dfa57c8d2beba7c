"""Checks that weights are finite by their bits: several times faster than `isfinite`, and without a copy."""

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {2: np.uint16, 4: np.uint32}
_SIGNED = {2: np.int16, 4: np.int32}


def is_finite(array: np.ndarray) -> bool:
    """Whether a float32, bfloat16 or float16 array, of any shape and strides, does not have NaN or infinity.

    >>> [is_finite(np.float32([1, value])) for value in (-3e38, -np.inf, np.nan)]
    [True, False, False]
    """
    size = array.dtype.itemsize
    bits = array.view(_UNSIGNED[size])
    # The first bit of the exponent is set from a magnitude of 2 on. Most weights are smaller: one reduction is enough.
    if not int(np.bitwise_or.reduce(bits, axis=None)) >> (8 * size - 2) & 1:
        return True
    # As integers, the bits of infinity and NaN are the largest: as signed integers for positive numbers, and as
    # unsigned integers for negative numbers.
    infinity, minus_infinity = np.array([np.inf, -np.inf]).astype(array.dtype).view(_UNSIGNED[size])
    return bool(array.view(_SIGNED[size]).max() < infinity and bits.max() < minus_infinity)


def all_finite(parameter: np.ndarray | jax.Array) -> bool:
    """`is_finite` of the parts of a parameter that are on this process's devices; of copies, the first is checked.

    On accelerators, they are checked there, without a copy to the host.
    """
    if not isinstance(parameter, jax.Array):
        return is_finite(np.asarray(parameter))
    parts = [shard.data for shard in parameter.addressable_shards if shard.replica_id == 0]
    on_cpu = all(device.platform == "cpu" for device in parameter.devices())
    return all(is_finite(np.asarray(part)) if on_cpu else bool(_all_finite_on_device(part)) for part in parts)


def first_not_finite(array: np.ndarray) -> list[int]:
    """The index of the first element that is NaN or infinite.

    >>> first_not_finite(np.float32([[1, 2], [np.inf, np.nan]]))
    [1, 0]
    """
    rows = array.reshape(len(array), -1)
    # One row at a time, to avoid large temporaries.
    i = next(i for i, row in enumerate(rows) if not is_finite(row))
    j = int(np.argmin(np.isfinite(rows[i].astype(np.float32))))
    return [int(at) for at in np.unravel_index(i * rows.shape[1] + j, array.shape)]


_all_finite_on_device = jax.jit(lambda parameter: jnp.isfinite(parameter).all())
