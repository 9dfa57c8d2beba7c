"""`fits`: whether a run fits a machine that is not there, by the compilers of TPUs and GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from gemma3_jax.config import PRESETS, RUN_DTYPES, Gemma3Config
from gemma3_jax.conversion.sources import locate_sources, read_config
from gemma3_jax.inputs import as_array
from gemma3_jax.placing.compiling import Job, is_within, not_sent, peak_of
from gemma3_jax.placing.machines import Machine, machine
from gemma3_jax.placing.programs import Program, Work, Wrt
from gemma3_jax.positions import Extent
from gemma3_jax.run.selection import Edits, ReducedCapture, ReturnType, captured_names, captures, placed_edits
from gemma3_jax.types import JsonObject, PyTree

# What each platform's compiler needs: a module, the extra that installs it, and variables of the environment.
_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# There is no GPU to try kernels on.
_GPU = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
_LARGE = 2**20  # bytes; what is smaller may be positions, whose values are needed
_QUIET = {"TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the compiler says of a run; all bytes are those of one device.

    Attributes:
        machine: name of the machine.
        mesh: devices of the mesh's axes, "data" and "model".
        batch: rows.
        weights: bytes of the parameters.
        added: bytes of the large arrays of reductions and edits, such as the dictionaries of `features`.
        limit: bytes that a program may use.
        programs: the compiled programs, up to the first that the compiler refused.
        largest_batch: rows that were found to fit; None if that was not asked for.
    """

    machine: str
    mesh: dict[str, int]
    batch: int
    weights: int
    added: int
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
    capture: ReducedCapture = (),
    edits: Edits = (),
    return_type: ReturnType = "logits",
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
        capture: sites to capture, as in `forward`, perhaps with reductions; with `generate` or `gradients="sites"`,
            whole values only. An array in a reduction may be a `jax.ShapeDtypeStruct`, as `jax.eval_shape` makes
            them of a dictionary of features; these count each time that they occur.
        edits: as in `forward`, likewise. Dictionaries are cut over "model" as `features.shardings` does it, and other
            arrays are whole on each device.
        return_type: as in `forward`; None for a run that ends after the last captured site, as `harvest` and
            `activations` do. A model with an embedding head returns embeddings in place of logits.
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
        ValueError: there is no such machine, or an argument is out of range; a reduction or an edit is a function that
            another process cannot import.
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
    return_type = _result(config, return_type, gradients, generate)
    extent = Extent(batch, length)
    if gradients == "sites" or generate:
        names: Collection[str] = captured_names(config, capture)
    else:
        names = captures(config, capture, extent, return_type=return_type)
    if not names and (gradients == "sites" or return_type is None):
        what = "return_type=None" if return_type is None else "gradients='sites'"
        raise ValueError(f"{what} needs the sites to capture; name them in capture")
    placed_edits(config, edits, extent, new=(generate or 1) - 1, return_type=return_type)
    scan_layers = generate is None if scan_layers is None else scan_layers
    captured = as_shapes(capture) if isinstance(capture, Mapping) else tuple(names)
    work = Work(config, dtype, scan_layers, length, captured, as_shapes(edits), return_type, generate, gradients, remat)
    result = _answer(target, Job(work, target, model, batch, largest_batch))
    programs = tuple(Program(**program) for program in result.pop("programs"))
    mesh = {"data": target.devices // model, "model": model}
    return Fit(machine=on, mesh=mesh, batch=batch, limit=target.limit, programs=programs, **result)


def _result(config: Gemma3Config, return_type: ReturnType, gradients: Wrt, generate: int | None) -> ReturnType:
    """What the run returns besides the captures."""
    if return_type not in get_args(ReturnType):
        raise ValueError(f"return_type is {return_type!r}; it must be one of {get_args(ReturnType)}")
    if return_type != "logits" and (gradients or generate):
        raise ValueError(f"return_type is {return_type!r}; leave it out with generate and gradients")
    if gradients is not None:
        return "loss"
    if return_type == "logits" and config.embedding_head is not None:
        return "embedding"
    return return_type if config.has_logits or return_type != "logits" else None


def as_shapes(tree: PyTree) -> PyTree:
    """The pytree with shapes in place of large arrays, each array once, and NumPy arrays in place of small ones.

    >>> import jax.numpy as jnp
    >>> as_shapes({"W": jnp.ones((1024, 1024)), "positions": jnp.asarray([3])})
    {'W': ShapeDtypeStruct(shape=(1024, 1024), dtype=float32), 'positions': array([3], dtype=int32)}
    """
    by_id: dict[int, jax.ShapeDtypeStruct] = {}

    def shape(leaf: object) -> object:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = as_array(leaf)
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        if leaf.nbytes < _LARGE:
            return np.asarray(leaf)
        return by_id.setdefault(id(leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    return jax.tree.map(shape, tree)


def _config_of(source: str | os.PathLike[str] | Gemma3Config, revision: str | None) -> Gemma3Config:
    """The config of a preset, a config or a checkpoint, whose weights are not read."""
    if isinstance(source, Gemma3Config) or (source in PRESETS and not Path(source).exists()):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but only a model on the hub has revisions; leave it out")
        return source if isinstance(source, Gemma3Config) else Gemma3Config.preset(os.fspath(source))
    return read_config(locate_sources(source, revision, download=False))


def _answer(target: Machine, job: Job) -> JsonObject:
    """The answer of a process that compiles."""
    try:
        question = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(not_sent(error)) from error
    check_compiler(target)
    environment = os.environ | _QUIET | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for name, value in (_TPU if target.platform == "tpu" else _GPU).items():
        environment[name] = f"{os.environ.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
    code = "from gemma3_jax.placing.compiling import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, env=environment)
    if done.returncode or not done.stdout:
        end = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"compiling for {target.name} failed (exit code {done.returncode}): {end}")
    result: JsonObject = json.loads(done.stdout.splitlines()[-1])
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
