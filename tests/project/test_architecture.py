"""The rooms of the house: which may import which. `python docs/generate.py` prints this table in ARCHITECTURE.md."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In the order of their floors: a room imports from those above it in this list alone, and of these, what it names.
ROOMS = {
    "types": ("short names of the types in signatures", ""),
    "messages": ("text from files, sanitized for messages and logs", ""),
    "atomic": ("files and directories that are written whole or not at all", ""),
    "reading": ("files that others wrote, which may be damaged or hostile: JSON and safetensors", "types messages"),
    "elsewhere": ("names of TransformerLens that are missing here, and what to write", ""),
    "descriptions": ("what objects say of themselves at the prompt and in notebooks", ""),
    "config": ("the shape of a model", "types messages elsewhere descriptions"),
    "kept": ("what is kept on disk from one process to the next", ""),
    "extras": ("optional packages, and the error where one is missing", ""),
    "renamed": ("old names of arguments, which work for one version with a warning", ""),
    "version": ("the installed version", ""),
    "processes": ("what one process of a program on several hosts does, and all of them know", "types"),
    "grids": ("results of many runs, with names for their axes", "descriptions config processes"),
    "positions": ("positions of tokens, and the documents that share a row", "types"),
    "meshes": ("meshes of devices, and which axes of an array are cut over them", "types processes"),
    "inputs": ("the checks of token ids and masks, which every entry point uses", "config types positions"),
    "compute": (
        "numerical kernels: matrix products and attention, with a form for each platform",
        "types positions meshes",
    ),
    "sites": ("the names of everything that can be captured or edited", "config"),
    "hooks": (
        "what happens at a site: interception, edits, reductions, the tracing of users' functions",
        "elsewhere descriptions config types positions meshes inputs compute sites",
    ),
    "edits": ("the public names of `hooks.edits`", "hooks"),
    "reductions": ("the public names of `hooks.reductions`", "hooks"),
    "model": (
        "the equations; beside them the layouts of parameters and the scan",
        "config types positions inputs compute sites hooks",
    ),
    "conversion": (
        "checkpoint in, checkpoint out",
        "messages atomic reading config kept types extras processes sites model",
    ),
    "cache": (
        "what comes out of a run, and the arithmetic of the residual stream",
        "atomic reading elsewhere descriptions config types processes meshes inputs compute sites model",
    ),
    "run": (
        "one request, the forward pass, gradients",
        "config kept types renamed positions meshes inputs sites hooks model cache",
    ),
    "generation": (
        "the KV cache, reading a prompt, writing tokens, sampling",
        "descriptions config types positions meshes inputs sites hooks model cache run",
    ),
    "placing": (
        "how parameters are cut over a mesh; whether a run fits a machine",
        "config types positions meshes inputs sites model conversion run generation",
    ),
    "hooked": (
        "`HookedGemma3`, the interactive interface",
        "messages reading elsewhere descriptions config types positions meshes inputs sites hooks model conversion "
        "cache run generation placing",
    ),
    "analysis": (
        "patching, sweeps, attribution, lenses, circuits",
        "descriptions config grids types renamed positions meshes inputs compute sites hooks model cache run hooked",
    ),
    "harvest": (
        "from a corpus to numbered units to a store of activations, and back",
        "messages atomic reading descriptions config types extras version positions inputs sites hooks cache run "
        "hooked",
    ),
    "pictures": ("heatmaps, coloured texts and maps, as HTML and PNG", "atomic config grids extras sites"),
    "features": (
        "sparse autoencoders, transcoders, CLTs and crosscoders, in the formats of other tools",
        "messages atomic reading descriptions config types processes meshes inputs compute sites hooks model "
        "conversion cache run hooked harvest pictures",
    ),
    "parity": ("the comparison with Hugging Face, in torch", "config types extras sites model conversion run"),
    "cli": (
        "the command line",
        "messages atomic reading kept extras types inputs sites conversion generation placing hooked harvest pictures "
        "features parity reductions",
    ),
}
# Only these rooms import packages that load slowly or are optional.
ONLY_IN = {
    "torch": ["parity"],
    "matplotlib": ["pictures"],
    "typer": ["cli"],
    "gguf": ["conversion"],
    "pyarrow": ["harvest"],
    "fsspec": ["harvest"],
}

FILES = sorted((ROOT / "gemma3_jax").rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


@functools.cache
def imports(file: Path) -> list[str]:
    """The modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in MODULES else str(node.module) for name in inside]
    return names


def room_of(module: str) -> str:
    """The part of the name behind the package's: "" for the package itself, whose public names every room may use."""
    return [*module.split("."), ""][1]


def arrows() -> dict[str, set[str]]:
    """By room, the other rooms that it imports from."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, file in MODULES.items():
        ours = [name for name in imports(file) if name.split(".")[0] == "gemma3_jax"]
        if room_of(module):
            found.setdefault(room_of(module), set()).update(room_of(name) for name in ours)
    return {room: targets - {room} for room, targets in found.items()}


def test_every_room_is_in_the_table():
    """And no other."""
    assert set(arrows()) == {*ROOMS, "__main__"} & {room_of(module) for module in MODULES} - {""}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_allows(room):
    """No more, and no less: the page that prints the table is true. The command line uses the public names too."""
    assert arrows()[room] - ({""} if room == "cli" else set()) == set(ROOMS[room][1].split())


def test_the_tests_of_a_room_are_in_a_folder_of_its_name():
    """The other folders are for what all tests use, for reference implementations, and for the rest of the project."""
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if (folder / "__init__.py").exists()}
    rooms = {room for room in ROOMS if (ROOT / "gemma3_jax" / room).is_dir()}
    assert folders == rooms | {"helpers", "project", "reference"}


def test_arrows_point_to_lower_floors():
    """So there is no circle of rooms."""
    order = list(ROOMS)
    for room, (_, allowed) in ROOMS.items():
        assert all(order.index(target) < order.index(room) for target in allowed.split()), room


def test_no_circle_of_files():
    """A file can be read once those that it imports have been."""
    inside = set(MODULES) - {"gemma3_jax"}  # whose public names are imported when they are first used
    below = {module: set(imports(MODULES[module])) & inside - {module} for module in inside}
    while ready := {module for module, targets in below.items() if not targets & set(below)}:
        below = {module: targets for module, targets in below.items() if module not in ready}
    assert not below


@pytest.mark.parametrize("library", ONLY_IN)
def test_who_may_import_a_library(library):
    """So `import gemma3_jax` neither needs it nor waits for it."""
    rooms = {room_of(module) for module, file in MODULES.items() if library in {n.split(".")[0] for n in imports(file)}}
    assert rooms <= set(ONLY_IN[library])
