"""Meshes of devices, and the one table of which array axes are cut over which axis of a mesh.

A mesh has two axes, "data" and "model". Rows of a batch are cut over "data"; the vocabulary, heads and neurons over
"model". All other axes are replicated, so the residual stream is whole on each device of "model".

Axes: b batch, h query heads, g key/value heads, f intermediate_size, V vocabulary.
"""

import contextlib
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemma3_jax.processes import own_bounds
from gemma3_jax.types import PyTree

DATA, MODEL = "data", "model"
# The mesh axis of each axis letter; the letters are those of docstrings and of the table of sites.
MESH_AXES = {"b": DATA, "V": MODEL, "h": MODEL, "g": MODEL, "f": MODEL}


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data" and "model", for `param_shardings` and `jax.set_mesh`.

    Neighbouring devices share "model", over which every layer adds up its results.

    Args:
        model: number of devices that share one copy of the parameters.
        devices: the devices. Default: all devices of all processes.

    Returns:
        A mesh of [len(devices) / model, model] devices, with Auto axes: the compiler chooses how to cut intermediate
        values.

    Raises:
        ValueError: `model` is not a positive integer, or does not divide the number of devices.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> dict(mesh.shape)
    {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if isinstance(model, bool) or not isinstance(model, int) or model < 1:
        raise ValueError(f"model is {model!r}; it must be a positive integer, the devices that share the parameters")
    if not devices or len(devices) % model:
        kind = f" ({devices[0].device_kind})" if devices else ""
        raise ValueError(
            f"model is {model}, which does not divide the {len(devices)} devices{kind}; give a divisor, or the devices "
            "to use"
        )
    shape = len(devices) // model, model
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def as_auto(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes, which is what the model computes on; moves nothing.

    `jax.make_mesh` makes Explicit axes by default.

    Raises:
        ValueError: the mesh has neither an axis "data" nor an axis "model".

    >>> as_auto(jax.make_mesh((1, 1), ("data", "model"))).axis_types
    (Auto, Auto)
    """
    if not {DATA, MODEL} & set(mesh.axis_names):
        names = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(
            f"the mesh has the axes {names}; the model is cut over axes named {DATA!r} and {MODEL!r}, as "
            "gemma3_jax.placing.make_mesh makes them"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_auto(arrays: PyTree) -> None:
    """Check that neither the mesh that is set nor that of an array has Explicit axes.

    Raises:
        ValueError: one has; the message has the remedy.
    """
    if any(AxisType.Explicit in mesh.axis_types for mesh in _meshes(arrays)):
        raise ValueError(
            "the mesh has Explicit axes (the default of jax.make_mesh), and the model needs Auto axes; make the mesh "
            "with gemma3_jax.placing.make_mesh, or with axis_types=(jax.sharding.AxisType.Auto,) * 2, and place the "
            "parameters with gemma3_jax.placing.param_shardings"
        )


def several_devices(*arrays: jax.Array) -> bool:
    """Whether a computation on these arrays is cut over devices: a mesh is set, or an array is on one.

    >>> several_devices(jax.numpy.ones(2))
    False
    """
    return any(mesh.size > 1 for mesh in _meshes(arrays))


def placed(x: jax.Array, axes: str) -> jax.Array:
    """The same array; on a mesh, the axes that the table cuts are cut so, or whole if the mesh does not divide them.

    The compiler still chooses for the other axes, and inside `jax.shard_map`, where the caller has cut the arrays.

    Args:
        x: an array.
        axes: its axes, as in `spec`.

    >>> x = jax.numpy.ones((2, 3))
    >>> placed(x, "b p") is x
    True
    """
    mesh = _mesh(x)
    if mesh is None:
        return x
    pairs = zip(axes.split(), spec(axes, x.shape, mesh), strict=True)
    cut = [name if MESH_AXES.get(letter) in mesh.shape else PartitionSpec.UNCONSTRAINED for letter, name in pairs]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*cut)))


def spec(axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How to cut an array over the mesh: an axis that the mesh does not divide is replicated.

    Args:
        axes: one letter for each axis, as in `Site.axes`.
        shape: the array's shape.
        mesh: has one or both of the axes "data" and "model".

    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    >>> tuple(spec("b p h e", (6, 5, 8, 10), mesh)), tuple(spec("b p g e", (6, 5, 1, 10), mesh))
    (('data', None, 'model', None), ('data', None, None, None))
    """
    whole = undivided(axes, shape, mesh)
    cut = [None if letter in whole else MESH_AXES.get(letter) for letter in axes.split()]
    return PartitionSpec(*(name if name in mesh.shape else None for name in cut))


def undivided(axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The letters that the table cuts but this mesh does not divide, with their sizes; arguments as in `spec`.

    >>> undivided("b p g e", (6, 5, 1, 10), jax.sharding.AbstractMesh((2, 4), ("data", "model")))
    {'g': 1}
    """
    sizes = zip(axes.split(), shape, strict=True)
    return {letter: size for letter, size in sizes if size % mesh.shape.get(MESH_AXES.get(letter, ""), 1)}


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """How the arrays of a pytree are cut over a mesh: a `NamedSharding` for each.

    The class of a node may have `array_axes`, the axis letters of its arrays by attribute, as `spec` takes them. An
    attribute may also be a pytree of arrays. Arrays with another number of axes, and all other arrays, are whole on
    each device.
    """

    def of_node(node: PyTree) -> PyTree:
        letters = getattr(type(node), "array_axes", {})

        def sharding(path: Sequence[object], leaf: object) -> NamedSharding:
            axes = letters.get(getattr(path[0], "name", ""), "") if path else ""
            shape = getattr(leaf, "shape", ())
            return NamedSharding(mesh, spec(axes, shape, mesh) if len(axes.split()) == len(shape) else PartitionSpec())

        return jax.tree_util.tree_map_with_path(sharding, node)

    return jax.tree.map(of_node, tree, is_leaf=lambda node: hasattr(type(node), "array_axes"))


def part(letter: str, size: int, mesh: Mesh | AbstractMesh | None) -> int:
    """The length of an axis on each device of a mesh; None stands for one device.

    >>> part("h", 8, jax.sharding.AbstractMesh((2, 4), ("data", "model"))), part("g", 1, None)
    (2, 1)
    """
    if mesh is None:
        return size
    return int(NamedSharding(mesh, spec(letter, (size,), mesh)).shard_shape((size,))[0])


def auto_mesh() -> AbstractMesh | None:
    """The mesh that is set, if it has several devices and Auto axes.

    >>> auto_mesh() is None
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto} else None


def mesh_of(arrays: PyTree) -> Mesh | None:
    """The mesh of the arrays, if it has several devices; else None.

    >>> mesh_of(jax.numpy.ones(2)) is None
    True
    """
    for leaf in jax.tree.leaves(arrays)[:1]:  # the parameters of a model are on one mesh
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def set_mesh_of(arrays: PyTree) -> contextlib.AbstractContextManager[object]:
    """`jax.set_mesh` with the mesh of the arrays; nothing if they are on one device."""
    mesh = mesh_of(arrays)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def own_rows(arrays: PyTree, b: int) -> slice:
    """The rows of a batch of b rows that are on the devices of this process, on the mesh of the arrays."""
    mesh = mesh_of(arrays)
    return slice(0, b) if mesh is None else own_bounds(NamedSharding(mesh, spec("b", (b,), mesh)), (b,))[0]


def constrained(value: jax.Array, axes: str) -> jax.Array:
    """The value, cut over its mesh as the table says, and whole along the other axes.

    The value itself if it is not on a mesh, or does not have these axes. Its mesh is the one that is set, or that its
    computation began with.

    Args:
        value: an array of a function that is being traced.
        axes: one letter for each axis.
    """
    mesh = _mesh(value)
    if mesh is None or len(axes.split()) != value.ndim:
        return value
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec(axes, value.shape, mesh)))


def cut_residual(value: jax.Array, axes: str) -> jax.Array:
    """A value that leaves the program: what the table keeps whole on "model", as a residual stream, is cut over d.

    `constrained` must come first. Otherwise the compiler would also cut the computation itself, and add operations
    between devices to put it together again. Arguments as there.
    """
    mesh, letters = _mesh(value), axes.split()
    if mesh is None or MODEL not in mesh.shape or letters[-1] != "d" or len(letters) != value.ndim:
        return value
    whole = spec(axes, value.shape, mesh)
    if MODEL in whole or value.shape[-1] % mesh.shape[MODEL]:
        return value
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(*whole[:-1], MODEL)))


def by_rows(value: jax.Array, b: int) -> jax.Array:
    """An array that may have the b rows of the batch on its first axis, and is then cut by rows over the mesh."""
    mesh = _mesh(value)
    if mesh is None or value.shape[:1] != (b,):
        return value
    others = [PartitionSpec.UNCONSTRAINED] * (value.ndim - 1)
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(*spec("b", (b,), mesh), *others)))


def replicated(value: jax.Array) -> jax.Array:
    """The value, whole on every device of its mesh."""
    mesh = _mesh(value)
    return value if mesh is None else jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec()))


def _mesh(value: jax.Array) -> AbstractMesh | None:
    """The mesh of several devices on which a value is computed, if its axes are Auto."""
    mesh = next((mesh for mesh in _meshes(value) if mesh.size > 1), None)
    return mesh if mesh is not None and set(mesh.axis_types) == {AxisType.Auto} else None


def _meshes(arrays: PyTree) -> list[AbstractMesh]:
    """The mesh that is set, and those of the arrays; each may be empty."""
    return [jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays))]
