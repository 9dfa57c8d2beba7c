"""Where parameters go: the devices of each part of an array, and the array that the parts make up."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from etils import epy
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from gemma3_jax.conversion.words import listed
from gemma3_jax.model.layout import BLOCKS
from gemma3_jax.types import Shardings

with epy.lazy_imports():  # a third of a second, which `gemma3-jax info` does not need
    import flax.traverse_util

Path = tuple[str, ...]
Part = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array goes.

    Attributes:
        shape: its shape, all devices together.
        sharding: how it is cut; None puts it on JAX's default device.
    """

    shape: tuple[int, ...]
    sharding: Sharding | None = None

    @property
    def parts(self) -> list[Part]:
        """The parts of the array that this process holds, each once."""
        return [part for part, _ in self._targets()]

    def place(self, make: Callable[[Part, Sharding | None], jax.Array], dtype: np.dtype) -> jax.Array:
        """The array, of which `make` makes every part of this process on the first of its devices.

        One part after the other: no more than one is in host memory. The other devices of a part copy it from the
        first. `jax.make_array_from_callback` makes a part for each of its devices, and all of them before the first is
        copied to its device.
        """
        arrays = []
        for part, (first, *others) in self._targets():
            made = make(part, first)
            arrays += [made, *(jax.device_put(made, target) for target in others)]
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays, dtype=dtype)

    def _targets(self) -> Iterable[tuple[Part, list[Sharding | None]]]:
        """Each part of the array with the devices of this process that hold it."""
        if self.sharding is None:
            return [((slice(None),) * len(self.shape), [None])]
        targets: dict[tuple[tuple[int, int, int], ...], list[Sharding | None]] = collections.defaultdict(list)
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(along.indices(n) for along, n in zip(index or (), self.shape, strict=True))
            targets[bounds].append(SingleDeviceSharding(device, memory_kind=self.sharding.memory_kind))
        return [(tuple(slice(*along) for along in bounds), devices) for bounds, devices in targets.items()]


def placements_of(shapes: Mapping[Path, tuple[int, ...]], shardings: Shardings | None) -> dict[Path, Placement]:
    """The placement of each parameter, by path.

    Args:
        shapes: shapes of the parameters by path.
        shardings: as in `convert_checkpoint`.

    Raises:
        ValueError: `shardings` lack a parameter, have another one, or cannot cut one; the message names it.
    """
    if shardings is None:
        return {path: Placement(shape) for path, shape in shapes.items()}
    if isinstance(shardings, Sharding):
        by_path = dict.fromkeys(shapes, shardings)
    else:
        by_path = flax.traverse_util.flatten_dict(dict(shardings))
    _check_paths(set(shapes), set(by_path))
    return {path: _checked("/".join(path), shape, by_path[path]) for path, shape in shapes.items()}


def _check_paths(expected: set[Path], given: set[Path]) -> None:
    if any(path[0] == BLOCKS for path in given):
        raise ValueError("shardings are for stacked layers; give those of the layers one by one, and stack afterwards")
    for does, paths in (("lack", expected - given), ("have", given - expected)):
        if paths:
            named = listed(["/".join(path) for path in sorted(paths)])
            raise ValueError(f"shardings {does} {named}; they need the structure of the parameters of this config")


def _checked(name: str, shape: tuple[int, ...], sharding: object) -> Placement:
    if not isinstance(sharding, Sharding):
        kind = type(sharding).__name__
        raise ValueError(f"shardings: {name} is a {kind}; give a jax.sharding.Sharding, such as NamedSharding")
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        raise ValueError(f"shardings: {name} {list(shape)} has fewer axes than its spec, {sharding.spec}")
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"shardings do not suit {name} {list(shape)}; param_shardings replicates what it cannot divide: {error}"
        ) from error
    return Placement(shape, sharding)
