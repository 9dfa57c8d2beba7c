"""Machines by the names that people use, and how the compilers call them.

A machine need not be there: XLA compiles for a description of it. `limit` is what a program may use of a device's
memory; the TPU compilers name it when they refuse a program.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Machine:
    """A TPU slice, or GPUs.

    Attributes:
        name: as people write it, such as "v5e-8" or "h100x8".
        platform: the compiler's platform.
        topology: the compiler's name of the machine, such as "v5e:2x4", or "1x1x8" for GPUs: slices, hosts, GPUs.
        options: other options of the compiler's description.
        devices: number of devices that JAX sees.
        limit: bytes that a program may use on each device.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    topology: str
    options: Mapping[str, str | tuple[int, ...]]
    devices: int
    limit: int


class _Tpu(NamedTuple):
    """A generation of TPUs.

    Attributes:
        limit: GiB that a program may use on each device.
        slices: topology by the number in the slice's name.
        per_chip: devices that JAX sees on each chip.
        options: options of the description.
    """

    limit: float
    slices: Mapping[int, str]
    per_chip: int = 1
    options: Mapping[str, str] = {}


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# These are named by cores, of which a chip has two.
_DEEP = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
_TPUS = {
    "v2": _Tpu(7.48, {8: "2x2"}, per_chip=2),
    "v3": _Tpu(15.48, {8: "2x2"}, per_chip=2),
    "v4": _Tpu(30.75, _DEEP, options={"chip_config_name": "megacore"}),
    "v5e": _Tpu(15.75, _FLAT),
    "v5p": _Tpu(95.74, _DEEP),
    "v6e": _Tpu(31.25, _FLAT),
}
_ONE_HOST = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}  # chips of a flat slice; larger ones have 4 on each host


class _Chip(NamedTuple):
    """A GPU chip; figures are from NVIDIA's data sheets and the CUDA programming guide."""

    capability: int
    cores: int  # streaming multiprocessors
    lanes: int  # float32 lanes of each of them
    shared: int  # bytes of shared memory of each
    clock: float  # GHz
    cache: int  # bytes, L2


class _Gpu(NamedTuple):
    """A card: its name, memory in bytes, bytes per second, and chip."""

    title: str
    memory: int
    bandwidth: int
    chip: _Chip


_AMPERE = _Chip(capability=8, cores=108, lanes=64, shared=164 * 2**10, clock=1.41, cache=40 * 2**20)
_HOPPER = _Chip(capability=9, cores=132, lanes=128, shared=228 * 2**10, clock=1.98, cache=50 * 2**20)
_GPUS = {
    "a100-40gb": _Gpu("NVIDIA A100-SXM4-40GB", 42_298_834_944, 1_555_200_000_000, _AMPERE),
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, _AMPERE),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, _HOPPER),
    "h200": _Gpu("NVIDIA H200", 151_397_597_184, 4_800_000_000_000, _HOPPER),
}
_GPUS_OF_A_HOST = 8


def machine(name: str) -> Machine:
    """The machine with that name: a slice such as "v5e-8" (or "v5litepod-8"), or GPUs such as "h100" and "h100x8".

    Raises:
        ValueError: there is no machine with that name; the message lists the names.

    >>> machine("v5e-8").topology, machine("v5e-8").devices, machine("v5p-8").devices, machine("h100x16").topology
    ('v5e:2x4', 8, 4, '1x2x8')
    """
    spelled = str(name).lower().replace("v5litepod-", "v5e-")
    kind, _, number = spelled.partition("-")
    if kind in _TPUS and number.isdecimal() and int(number) in _TPUS[kind].slices:
        return _slice(spelled, kind, int(number))
    card, _, number = spelled.partition("x")
    count = int(number) if re.fullmatch("[1-9][0-9]{0,3}", number) else 1 if spelled in _GPUS else 0
    if card in _GPUS and count and (count <= _GPUS_OF_A_HOST or not count % _GPUS_OF_A_HOST):
        return _gpus(spelled, card, count)
    raise ValueError(
        f"there is no machine {name!r}; TPU slices are {', '.join(slice_names())}; GPUs are {', '.join(_GPUS)}, with "
        f"their number as in h100x8 (at most {_GPUS_OF_A_HOST}, or a multiple of it on several hosts)"
    )


def slice_names() -> list[str]:
    """The names of all TPU slices.

    >>> slice_names()[0]
    'v2-8'
    """
    return [f"{kind}-{number}" for kind, tpu in _TPUS.items() for number in tpu.slices]


def _slice(name: str, kind: str, number: int) -> Machine:
    tpu = _TPUS[kind]
    shape = tpu.slices[number]
    options: dict[str, str | tuple[int, ...]] = dict(tpu.options)
    if tpu.slices is _FLAT and number in _ONE_HOST:
        options["chips_per_host_bounds"] = _ONE_HOST[number]
    chips = math.prod(map(int, shape.split("x")))
    return Machine(name, "tpu", f"{kind}:{shape}", options, chips * tpu.per_chip, int(tpu.limit * GIB))


def _gpus(name: str, card: str, count: int) -> Machine:
    gpu, each = _GPUS[card], min(count, _GPUS_OF_A_HOST)
    topology = f"1x{count // each}x{each}"
    limit = int(gpu.memory * memory_fraction())
    return Machine(name, "cuda", topology, {"target_config": _target(gpu)}, count, limit)


def memory_fraction() -> float:
    """The share of a GPU's memory that JAX takes: 0.75, unless the variable of the environment says otherwise."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return next((float(os.environ[name]) for name in names if os.environ.get(name)), 0.75)


def _target(gpu: _Gpu) -> str:
    """A `GpuTargetConfigProto` of XLA, as text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.chip.shared - 2**10}
  shared_memory_per_core: {gpu.chip.shared}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: {gpu.chip.cores}
  fpus_per_core: {gpu.chip.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.chip.cache}
  clock_rate_ghz: {gpu.chip.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.chip.capability} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.title}"
"""
