"""A cache of compiled programs.

JAX keeps every program of a jitted function. Here each program is a separate jitted function, and only the `KEPT` most
recently used programs are kept. A program takes 7 MB for a small model and 20 MB for a deep one.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.tree_util import PyTreeDef

from gemma3_jax.kept import keep_programs
from gemma3_jax.meshes import replicated, set_mesh_of
from gemma3_jax.run.sharing import Shared, shared, unshared
from gemma3_jax.types import Params, PyTree

KEPT = 64
Result = TypeVar("Result")


def run_compiled(
    function: Callable[..., Result],
    params: Params | None,
    *arguments: PyTree,
    donate: int | None = None,
    replicate: bool = True,
    **static: Hashable,
) -> Result:
    """`function(params, *arguments, **static)`, compiled once for arguments of the same structure, shapes and dtypes.

    If the parameters are on a mesh of devices, the function runs while that mesh is set.

    An array that occurs several times in the arguments, or in the result, is passed only once. JAX runs programs in the
    background, on the memory of NumPy arrays, so these are copied.

    Args:
        function: a pure function at the top level of a module; programs are kept for each function object.
        params: parameter pytree.
        *arguments: pytrees of arrays.
        donate: index in `arguments`, which `params` is not among, of one whose memory the result may reuse; its arrays
            can no longer be used.
        replicate: on a mesh, make the results whole on every device. Otherwise they are as `function` leaves them.
        **static: hashable values, which are constants of the program.

    >>> import jax.numpy as jnp
    >>> run_compiled(jnp.add, jnp.ones(2), 1.0).tolist()
    [2.0, 2.0]
    """
    program, packed, donated = _bound(function, arguments, donate, replicate, static)
    with set_mesh_of(params):
        result: Result = unshared(program(params, packed, donated))
    return result


def lowered(
    function: Callable[..., PyTree],
    params: Params,
    *arguments: PyTree,
    donate: int | None = None,
    **static: Hashable,
) -> jax.stages.Lowered:
    """The program that `run_compiled` runs for such arguments, to compile for other devices; it is not kept.

    The result of the program is a `Shared` pytree, on a mesh as `function` leaves it. Arguments as in `run_compiled`;
    a leaf may be a `jax.ShapeDtypeStruct`, with a sharding.
    """
    # The caller holds arguments that the program does not read as well: the compiler counts them in its peak.
    program, packed, donated = _bound(function, arguments, donate, False, static, keep_unused=True)
    return program.lower(params, packed, donated)


def lowered_if_new(
    function: Callable[..., PyTree],
    params: Params | None,
    *arguments: PyTree,
    donate: int | None = None,
    **static: Hashable,
) -> jax.stages.Lowered | None:
    """The program that `run_compiled(replicate=False)` runs for such arguments; None if an earlier call made it.

    After its `compile()`, which may run in another thread, `run_compiled` does not compile it again. Arguments as in
    `run_compiled`; a leaf may be a `jax.ShapeDtypeStruct`, which stands for an array that is not committed to a device.
    """
    known = _program.cache_info().misses
    program, packed, donated = _bound(function, arguments, donate, False, static)
    if _program.cache_info().misses == known:
        return None
    with set_mesh_of(params):
        return program.lower(params, packed, donated)


def _bound(
    function: Callable[..., PyTree],
    arguments: Sequence[PyTree],
    donate: int | None,
    replicate: bool,
    static: Mapping[str, Hashable],
    keep_unused: bool = False,
) -> tuple[jax.stages.Wrapped, Shared, PyTree]:
    """The jitted program, and its arguments after the parameters."""
    packed = _with_own_memory(shared([argument for i, argument in enumerate(arguments) if i != donate]))
    donated = None if donate is None else arguments[donate]
    leaves, structure = jax.tree.flatten((packed, donated))
    types, constants = tuple(map(jax.typeof, leaves)), tuple(sorted(static.items()))
    return _program(function, structure, types, donate, replicate, constants, keep_unused), packed, donated


def _with_own_memory(packed: Shared) -> Shared:
    """The same arrays, with copies of NumPy's: a program may read its arguments after the caller has changed them."""
    own = [leaf.copy() if isinstance(leaf, np.ndarray) else leaf for leaf in packed.leaves]
    return dataclasses.replace(packed, leaves=own)


@functools.lru_cache(maxsize=KEPT)
def _program(
    function: Callable[..., PyTree],
    structure: PyTreeDef,
    types: tuple[jax.core.AbstractValue, ...],
    donate: int | None,
    replicate: bool,
    static: tuple[tuple[str, Hashable], ...],
    keep_unused: bool,
) -> jax.stages.Wrapped:
    keep_programs()

    def program(params: Params | None, packed: Shared, donated: PyTree) -> Shared:
        arguments = unshared(packed)
        if donate is not None:
            arguments.insert(donate, donated)
        result = function(params, *arguments, **dict(static))
        return shared(jax.tree.map(replicated, result) if replicate else result)

    program.__name__ = function.__name__  # the name in profiles
    return jax.jit(program, donate_argnums=() if donate is None else 2, keep_unused=keep_unused)
