"""`fits`: whether a run fits a machine that is not there, by the compilers of TPUs and GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from gemma3_jax.config import PRESETS, RUN_DTYPES, Gemma3Config
from gemma3_jax.conversion.sources import locate_sources, read_config
from gemma3_jax.placing.compiling import Job, is_within, peak_of
from gemma3_jax.placing.machines import Machine, machine
from gemma3_jax.placing.programs import Program, Work, Wrt
from gemma3_jax.run.selection import Capture, captured_names

# What each platform's compiler needs: a module, the extra that installs it, and variables of the environment.
_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# There is no GPU to try kernels on.
_GPU = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
_QUIET = {"TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the compiler says of a run; all bytes are those of one device.

    Attributes:
        machine: name of the machine.
        mesh: devices of the mesh's axes, "data" and "model".
        batch: rows.
        weights: bytes of the parameters.
        limit: bytes that a program may use.
        programs: the compiled programs, up to the first that the compiler refused.
        largest_batch: rows that were found to fit; None if that was not asked for.
    """

    machine: str
    mesh: dict[str, int]
    batch: int
    weights: int
    limit: int
    programs: tuple[Program, ...]
    largest_batch: int | None

    @property
    def fits(self) -> bool:
        """Whether all programs fit."""
        return is_within(list(self.programs), self.limit)

    @property
    def peak(self) -> int | None:
        """Bytes that the program with the highest peak needs, or would need; None if the compiler does not say."""
        return peak_of(list(self.programs))

    @property
    def collectives(self) -> dict[str, int]:
        """Number of operations between devices, by kind, dtype and shape, in all programs together."""
        total: dict[str, int] = {}
        for program in self.programs:
            for name, count in program.collectives.items():
                total[name] = total.get(name, 0) + count
        return total


def fits(
    source: str | os.PathLike[str] | Gemma3Config,
    on: str,
    *,
    model: int = 1,
    batch: int = 1,
    length: int = 1024,
    capture: Capture = (),
    generate: int | None = None,
    gradients: Wrt = None,
    remat: bool = False,
    dtype: str = "bfloat16",
    scan_layers: bool | None = None,
    largest_batch: bool = True,
    revision: str | None = None,
) -> Fit:
    """Whether a run fits a machine, which need not be there: compiles the real program for it, in another process.

    It needs the compiler of the machine, `pip install 'gemma3-jax[tpu]'` (x86-64 Linux only) or
    `pip install 'gemma3-jax[gpu-compiler]'`, and no such device. It takes half a minute to some minutes.

    A TPU's compiler refuses a program that does not fit, and says what it would need. JAX takes 0.75 of a GPU's memory,
    unless the environment has `XLA_CLIENT_MEM_FRACTION`; the limit follows it. Results of earlier runs that you still
    hold come on top.

    Args:
        source: "270m", "1b", "4b", "12b" or "27b"; a config; or a directory, hub id or GGUF file, of which only the
            config is read.
        on: a TPU slice such as "v5e-8", or GPUs such as "h100x8". A wrong name raises an error that lists them.
        model: devices that share one copy of the parameters, as in `make_mesh`; the others share the rows.
        batch: rows. As in a run, they are padded to a multiple of the devices that share them.
        length: tokens of each row, or of the prompt if `generate` is set.
        capture: sites to capture, as in `forward`; whole values, without reductions.
        generate: number of new tokens: compile the prefill and the decode loop in place of one run.
        gradients: "sites" for those of the mean next-token loss at the captured sites, as `run_with_cache(...,
            incl_bwd=True)` returns them; "params" for those of all parameters.
        remat: take the gradients as `forward(remat=True)` does, which needs less memory.
        dtype: "bfloat16" or "float32".
        scan_layers: stack the parameters, as in `HookedGemma3`, with which compile time does not grow with depth.
            Default: True, and False if `generate` is set, because generation would hold a second copy of the blocks.
        largest_batch: search for the largest batch that fits, which compiles up to five times more.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such machine, or an argument is out of range.
        UnknownSite: a name in `capture` is not a site.
        ModuleNotFoundError: the machine's compiler is not installed; the message has the command.
        CheckpointError, ConfigError: the source cannot be read.
        RuntimeError: the compiler failed for another reason than memory.

    >>> from gemma3_jax.placing import fits
    >>> fits("27b", on="v5e-9")
    Traceback (most recent call last):
    ValueError: there is no machine 'v5e-9'; TPU slices are v2-8, ...
    """
    target = machine(on)
    sizes = {"model": model, "batch": batch, "length": length} | ({} if generate is None else {"generate": generate})
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    if target.devices % model:
        raise ValueError(
            f"model is {model}, which does not divide the {target.devices} devices of {on}; give a divisor"
        )
    if dtype not in RUN_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(RUN_DTYPES)}")
    if gradients not in get_args(Wrt) or (gradients and generate):
        raise ValueError(f"gradients is {gradients!r}; it must be 'sites', 'params' or None, and None with generate")
    if remat and not gradients:
        raise ValueError("remat=True changes gradients alone; set gradients='sites' or 'params'")
    config = _config_of(source, revision)
    context = config.max_position_embeddings
    if generate and length + generate > context:
        raise ValueError(
            f"length is {length} and generate is {generate}; the text exceeds the model's context of {context} tokens"
        )
    names = captured_names(config, capture)
    if gradients == "sites" and not names:
        raise ValueError("gradients='sites' needs the sites of the gradients; name them in capture")
    scan_layers = generate is None if scan_layers is None else scan_layers
    work = Work(config, dtype, scan_layers, length, names, generate, gradients, remat)
    result = _answer(target, Job(work, target, model, batch, largest_batch))
    programs = tuple(Program(**program) for program in result.pop("programs"))
    mesh = {"data": target.devices // model, "model": model}
    return Fit(machine=on, mesh=mesh, batch=batch, limit=target.limit, programs=programs, **result)


def _config_of(source: str | os.PathLike[str] | Gemma3Config, revision: str | None) -> Gemma3Config:
    """The config of a preset, a config or a checkpoint, whose weights are not read."""
    if isinstance(source, Gemma3Config) or (source in PRESETS and not Path(source).exists()):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but only a model on the hub has revisions; leave it out")
        return source if isinstance(source, Gemma3Config) else Gemma3Config.preset(os.fspath(source))
    return read_config(locate_sources(source, revision, download=False))


def _answer(target: Machine, job: Job) -> dict[str, Any]:
    """The answer of a process that compiles."""
    check_compiler(target)
    environment = os.environ | _QUIET | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for name, value in (_TPU if target.platform == "tpu" else _GPU).items():
        environment[name] = f"{os.environ.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
    code = "from gemma3_jax.placing.compiling import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(job), capture_output=True, env=environment)
    if done.returncode or not done.stdout:
        end = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"compiling for {target.name} failed (exit code {done.returncode}): {end}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise ValueError(result["error"])
    return result


def check_compiler(target: Machine) -> None:
    """Check that the compiler of a machine is installed.

    Raises:
        ModuleNotFoundError: it is not; the message has the command to install it.
    """
    tpu = target.platform == "tpu"
    modules = ["libtpu"] if tpu else ["jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"]
    if not any(map(_is_installed, modules)):
        package, extra = ("libtpu", "tpu") if tpu else ("a CUDA plugin of jax", "gpu-compiler")
        raise ModuleNotFoundError(f"compiling for {target.name} needs {package}: pip install 'gemma3-jax[{extra}]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
