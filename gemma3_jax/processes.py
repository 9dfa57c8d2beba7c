"""The processes of one program on several hosts (`jax.distributed`): what one of them does and all of them know.

All processes call these functions, in the same order, or they wait for each other for ever. In a program with one
process, nothing waits.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epy
from jax.sharding import Sharding

with epy.lazy_imports():  # for programs with several processes only
    from jax.experimental import multihost_utils

from gemma3_jax.types import PyTree

Result = TypeVar("Result")

_PAGE = 4096  # bytes: messages are padded to multiples of it, because each length is compiled


def in_all(function: Callable[[], Result]) -> Result:
    """What a function returns in this process, after all processes have called it.

    Raises:
        BaseException: what the function raises in this process; also a Ctrl-C that comes while it runs.
        RuntimeError: it raised something in another process; the message is that of the first one.

    >>> in_all(lambda: 1 + 1)
    2
    """
    if jax.process_count() == 1:
        return function()
    error = None
    try:
        result = function()
    except BaseException as raised:  # Ctrl-C in one process, too
        error = raised
    text = str(error) or type(error).__name__
    reason = _first_text("" if error is None else f"process {jax.process_index()}: {text}")
    if error is not None:
        raise error
    if reason:
        raise RuntimeError(f"another process failed: {reason}")
    return result


def in_first(function: Callable[[], str | None]) -> str:
    """The text that a function returns, in every process; only the first process calls it. None is an empty text.

    Raises:
        BaseException: as in `in_all`.

    >>> in_first(lambda: "a name that is chosen at random")
    'a name that is chosen at random'
    """
    text = in_all(lambda: function() if jax.process_index() == 0 else None) or ""
    return text if jax.process_count() == 1 else _first_text(text)


def in_this(function: Callable[[], str | None]) -> str:
    """`in_first` for a program with one process, and for what each process does for itself."""
    return function() or ""


def to_host(array: np.ndarray | jax.Array) -> np.ndarray:
    """The whole of an array in the memory of this host, also if it is cut over the devices of several processes."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    # `np.asarray` of the array itself would keep this copy as long as the array lives. `process_allgather` would put
    # the whole array on every device.
    whole, is_ours = np.empty(array.shape, array.dtype), array.is_fully_addressable
    # In the same order in every process: the property has the order of a set.
    for shard in sorted(array.global_shards, key=lambda shard: shard.device.id):
        if shard.replica_id == 0:
            whole[shard.index] = shard.data if is_ours else _of_its_process(shard, whole[shard.index])
    return whole


def _of_its_process(shard: jax.Shard, like: np.ndarray) -> np.ndarray:
    """The data of a shard, which one process has, in all of them; `like` has its shape and dtype."""
    # As bytes: the other processes add zeros, which changes -0.0 and NaN.
    sent = np.zeros(like.nbytes, np.uint8)
    if shard.data is not None:
        sent[...] = np.asarray(shard.data).reshape(-1).view(np.uint8)
    received = multihost_utils.broadcast_one_to_all(sent, shard.data is not None)
    return received.view(like.dtype).reshape(like.shape)


def own_part(array: np.ndarray | jax.Array) -> np.ndarray:
    """The part of an array on the devices of this process, in host memory; all of it if no other process has a part.

    Raises:
        ValueError: the devices of this process hold parts that do not make up one block.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return to_host(array)
    bounds = own_bounds(array.sharding, array.shape)
    part = np.empty([along.stop - along.start for along in bounds], array.dtype)
    filled = {}
    for shard in array.addressable_shards:
        index = [slice(*along.indices(n)[:2]) for along, n in zip(shard.index, array.shape, strict=True)]
        at = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(index, bounds, strict=True))
        filled[str(at)] = shard.data.size
        part[at] = shard.data
    if sum(filled.values()) != part.size:
        raise ValueError(
            f"the devices of process {jax.process_index()} hold parts of an array {list(array.shape)} that are not one "
            "block; order the mesh by process, as gemma3_jax.placing.make_mesh does, or ask for the whole array"
        )
    return part


def own_bounds(sharding: Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest block of an array that has every part on the devices of this process.

    >>> own_bounds(jax.numpy.zeros((3, 2)).sharding, (3, 2))
    (slice(0, 3, None), slice(0, 2, None))
    """
    parts = [part or () for part in sharding.addressable_devices_indices_map(shape).values()]
    bounds = [[along.indices(n)[:2] for along, n in zip(part, shape, strict=True)] for part in parts]
    # for each axis, its bounds in every part
    return tuple(slice(min(axis)[0], max(stop for _, stop in axis)) for axis in zip(*bounds, strict=True))


def spans_processes(tree: PyTree) -> bool:
    """Whether an array is on devices of several processes."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def _first_text(text: str) -> str:
    """The text of the first process that has one that is not empty; an empty text if none has."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    if not sizes.any():
        return ""
    source = int(np.argmax(sizes > 0))
    is_source, size = jax.process_index() == source, int(sizes[source])
    message = np.zeros(-(-size // _PAGE) * _PAGE, np.uint8)
    if is_source:
        message[:size] = content
    return multihost_utils.broadcast_one_to_all(message, is_source)[:size].tobytes().decode()
