"""The environment of the test processes, and of those that they start: most of it is there to compile quickly."""

import os

# The older emitters of XLA:CPU compile in two thirds of the time, and modules that are not split for several threads in
# two thirds of that. An XLA that does not know a flag ends the process, but passes over an extra option.
FLAGS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"


def compile_quickly() -> None:
    """Set the variables. It must come before jax is imported, and before torch is."""
    # Each test process has a core: torch's own threads would only wait for each other's.
    os.environ["OMP_NUM_THREADS"] = "1"
    # The command line keeps compiled programs in the home directory: no test reads or fills it.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # The quick benchmarks, in a process of their own, take two thirds of their CPU time with it. Bits may differ.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    os.environ["XLA_FLAGS"] = f"{_flags_of_users()} {FLAGS}".strip()


def as_users() -> dict[str, str]:
    """The environment without quick compilation: programs are optimised as for users."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    return environment | {"XLA_FLAGS": _flags_of_users()}


def on_devices(devices: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}".strip()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def _flags_of_users() -> str:
    """XLA's flags without ours; a process that a test process starts has them already."""
    return os.environ.get("XLA_FLAGS", "").replace(FLAGS, "").strip()
