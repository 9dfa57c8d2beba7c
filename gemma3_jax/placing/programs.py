"""The programs that a user's call runs, for arguments that are only shapes, and what their compilation says.

Axes: b batch, p position.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey

from gemma3_jax.config import Gemma3Config
from gemma3_jax.generation.decode import go_on, read
from gemma3_jax.generation.loop import prepare
from gemma3_jax.meshes import DATA, spec, tree_shardings
from gemma3_jax.model.layout import BLOCKS, stack_layers
from gemma3_jax.model.transformer import Gemma3
from gemma3_jax.placing.parameters import param_shardings
from gemma3_jax.run.compiled import lowered
from gemma3_jax.run.forward import run
from gemma3_jax.run.gradients import differentiable, gradients
from gemma3_jax.run.request import Request, new_request
from gemma3_jax.run.selection import Edits, ReducedCapture, ReturnType
from gemma3_jax.run.sharing import unshared
from gemma3_jax.types import Params, PyTree

Wrt = Literal["sites", "params", None]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "... required for HLO temporaries (22.92G) exceeds available HBM (15.75G)", "Used 16.63G of 15.75G hbm"
_REFUSALS = r"\(([\d.]+)([KMGT]?)\) exceeds available", r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What to run.

    Attributes:
        config: shape of the model.
        dtype: dtype of the parameters.
        scan_layers: whether the parameters are stacked.
        length: tokens of each row.
        capture: sites to capture, perhaps with reductions, whose large arrays are shapes.
        edits: what acts at some sites, likewise.
        return_type: the result of the run besides the captures.
        generate: number of new tokens, or None.
        gradients: what gradients are taken of: the captured sites, the parameters, or None.
        remat: whether the gradients compute each block again.
    """

    config: Gemma3Config
    dtype: str
    scan_layers: bool
    length: int
    capture: ReducedCapture
    edits: Edits
    return_type: ReturnType
    generate: int | None
    gradients: Wrt
    remat: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or one that the compiler refused.

    Attributes:
        name: "forward", "gradients", "prefill" or "decode".
        peak: bytes on each device while it runs, with the parameters; None if the compiler did not say.
        refused: whether the compiler refused it, because it needs too much memory.
        collectives: number of operations between devices by kind, dtype and shape. Those inside a scan or a loop count
            once.
    """

    name: str
    peak: int | None
    refused: bool
    collectives: dict[str, int]


def abstract_params(config: Gemma3Config, dtype: str, mesh: Mesh, stacked: bool) -> Params:
    """The shapes, dtypes and shardings of the parameters on the mesh."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def init(tokens: jax.Array) -> Params:
        params: Params = Gemma3(config).init(jax.random.key(0), tokens)["params"]
        return stack_layers(config, params) if stacked else params

    shardings, shapes = param_shardings(config, mesh, stacked), jax.eval_shape(init, tokens)

    def placed(path: tuple[DictKey, ...], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        # Norms, which have one axis besides that of stacked layers, are always float32.
        is_norm = leaf.ndim == (2 if path[0].key == BLOCKS else 1)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if is_norm else dtype, sharding=sharding)

    params: Params = jax.tree_util.tree_map_with_path(placed, shapes, shardings)
    return params


def bytes_per_device(arrays: PyTree) -> int:
    """Bytes of abstract arrays on one device; those of an array that occurs twice count once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.ShapeDtypeStruct)}.values()
    return sum(leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)


def added_bytes(work: Work, mesh: Mesh) -> int:
    """Bytes on each device of the large arrays of reductions and edits."""
    return bytes_per_device(_placed((work.capture, work.edits), mesh))


def compiled_programs(work: Work, mesh: Mesh, batch: int) -> list[Program]:
    """Compile the programs for a batch of that many rows, up to the first that is refused."""
    # Rows are padded to a multiple of the devices that share them.
    shares = mesh.shape[DATA]
    shape = -(-batch // shares) * shares, work.length
    return _one_run(work, mesh, shape) if work.generate is None else _generation(work, mesh, shape, work.generate)


def _one_run(work: Work, mesh: Mesh, shape: tuple[int, int]) -> list[Program]:
    """The program of `run_with_cache`, or of the gradients of the mean next-token loss."""
    config, (capture, edits) = work.config, _placed((work.capture, work.edits), mesh)
    params = abstract_params(config, work.dtype, mesh, work.scan_layers)
    tokens, captured = np.zeros(shape, np.int32), () if work.gradients == "sites" else capture
    request: PyTree = new_request(config, tokens, captured, edits, return_type=work.return_type, remat=work.remat)
    request = request.replace(source=_rows(shape, mesh))
    with jax.set_mesh(mesh):
        if work.gradients == "sites":
            sites = differentiable(config, capture)
            program = lowered(gradients, params, request, None, named=sites)
        else:
            program = lowered(run if work.gradients is None else _gradients_of_params, params, request)
    compiled, _ = _compiled("forward" if work.gradients is None else "gradients", program)
    return [compiled]


def _placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """A pytree whose abstract arrays are on the mesh: those of a dictionary of features are cut over it."""
    by_id: dict[int, jax.ShapeDtypeStruct] = {}

    def placed(leaf: object, sharding: NamedSharding) -> object:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return by_id.setdefault(id(leaf), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

    return jax.tree.map(placed, tree, tree_shardings(tree, mesh))


def _gradients_of_params(params: Params, request: Request) -> PyTree:
    """The loss and the captures, and the gradients of the loss, in the dtypes of the parameters."""
    return jax.value_and_grad(run, has_aux=True)(params, request)


def _generation(work: Work, mesh: Mesh, shape: tuple[int, int], new: int) -> list[Program]:
    """The programs of `generate`: the prefill, and the decode loop if there are tokens left for it."""
    params = abstract_params(work.config, work.dtype, mesh, stacked=False)
    # Stacked parameters are unstacked, and kept beside the copy that the programs take.
    blocks = {name: value for name, value in params.items() if name.startswith(BLOCKS)}
    held = bytes_per_device(blocks) if work.scan_layers else 0
    capture, edits = _placed((work.capture, work.edits), mesh)
    prompts = np.zeros(shape, np.int32)
    given = prepare(work.config, np.dtype(work.dtype), prompts, new, capture=capture, edits=edits)
    tokens, start = _rows(given.tokens.shape, mesh), _rows(given.start.shape, mesh)
    # Outside of `set_mesh`: its devices cannot hold an array.
    steps = jnp.int32(new - 1)
    with jax.set_mesh(mesh):
        prefill = lowered(read, params, given.task, tokens, start, new=given.room, keep_logits=False)
    first, executable = _compiled("prefill", prefill, held)
    if executable is None or new == 1:
        return [first]
    text = unshared(jax.tree.map(_as_shape, executable.out_info))
    with jax.set_mesh(mesh):
        decode = lowered(go_on, params, given.task, text, steps, donate=1)
    second, _ = _compiled("decode", decode, held)
    return [first, second]


def _rows(shape: tuple[int, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    """int32 of that shape, [b, p] or [b], cut by rows."""
    axes = "b p" if len(shape) == 2 else "b"
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec(axes, shape, mesh)))


def _as_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _compiled(name: str, program: jax.stages.Lowered, held: int = 0) -> tuple[Program, jax.stages.Compiled | None]:
    """What the compilation says, and the executable unless it is refused; `held` bytes are in use beside it."""
    try:
        executable = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error))
        return Program(name, None if needed is None else needed + held, True, {}), None
    memory, text = executable.memory_analysis(), executable.as_text()
    assert memory is not None  # the compilers of TPUs and GPUs have both
    assert text is not None
    return Program(name, memory.peak_memory_in_bytes + held, False, collectives(text)), executable


def needed_bytes(refusal: str) -> int | None:
    """The bytes on each device that a refused program needs, from the compiler's message; None if it does not say.

    >>> needed_bytes("the total memory required for HLO temporaries (22.50G) exceeds available HBM (15.75G).") / 2**30
    22.5
    >>> needed_bytes("Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm.") / 2**30
    16.5
    """
    for pattern in _REFUSALS:
        if found := re.search(pattern, refusal):
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def collectives(text: str) -> dict[str, int]:
    """The number of collective operations in a compiled program's text, by kind, dtype and shape of the result.

    >>> collectives("%x = bf16[8,16]{1,0} all-reduce(%y), channel_id=1")
    {'all-reduce bf16[8,16]': 1}
    """
    found: collections.Counter[str] = collections.Counter()
    for result, kind, start in _COLLECTIVE.findall(text):
        arrays = re.findall(r"\w+\[[\d,]*\]", result)
        # The start of an operation has its argument, its result and flags; that of an all-reduce has only results.
        shown = arrays[1:2] if start and kind != "all-reduce" else arrays
        found[f"{kind} {' '.join(shown)}"] += 1
    return dict(sorted(found.items()))
