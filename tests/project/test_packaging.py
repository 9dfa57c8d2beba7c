"""What an installation is: its version, its command, and the packages that it can do without."""

import ast
import os
import struct
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import gemma3_jax
from gemma3_jax.extras import needs_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = ("gguf", "matplotlib", "protobuf", "pyarrow", "sentencepiece", "torch", "typer")
DISTRIBUTIONS = {
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
}  # where a package is not imported by the name that pip knows
# Runs first: finds every package but these, as where they are not installed.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {packages} else self.finder.find_spec(name, *rest)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run Python on this checkout, also where another one is installed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def run_without(packages: tuple[str, ...], code: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run code in a process of its own in which the packages are not installed."""
    return run(["-c", WITHOUT.format(packages=packages) + code], cwd)


def declared(requirements: list[str]) -> set[str]:
    """The names of requirements such as "jax>=0.10"."""
    return {requirement.split(">=")[0].split("[")[0] for requirement in requirements}


def imported() -> dict[str, str]:
    """Every top-level package that the packages import, and one file that imports it."""
    files = [file for package in ("conversion", "gemma3_jax") for file in sorted((ROOT / package).rglob("*.py"))]
    names = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0]: str(file) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names[node.module.partition(".")[0]] = str(file)
    return names


def test_models_run_without_the_extras(tmp_path):
    """Import, load, run and generate need no optional package; a picture names the extra and leaves no file."""
    code = """
import numpy as np
import gemma3_jax
from gemma3_jax import TINY, Gemma3Config, HookedGemma3, pictures

model = HookedGemma3.from_pretrained(TINY)
print(model.generate("ba ke lo mu ti so re ba ke", max_new_tokens=1))
heatmap = pictures.patching_heatmap(np.zeros((26, 4)), Gemma3Config.preset("1b"), axes="layer head")
flow = pictures.token_values(["ba"], [1.0])
for picture, name in [(heatmap, "a.html"), (heatmap, "a.png"), (flow, "b.html"), (flow, "b.png")]:
    try:
        picture.save(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = run_without(OPTIONAL, code, tmp_path)
    assert done.returncode == 0, done.stderr
    message = "pictures need matplotlib: pip install 'gemma3-jax[plots]'"
    assert done.stdout.splitlines() == ["ba ke lo mu ti so re ba ke lo", *4 * [message]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("typer", "ModuleNotFoundError: the command line needs typer: pip install 'gemma3-jax[cli]'"),
        ("torch", "error: parity needs torch: pip install 'gemma3-jax[parity]'"),
    ],
)
def test_the_command_names_a_missing_extra(package, message, tmp_path):
    """The last line of the error names the package and the extra."""
    done = run_without((package,), "sys.argv[1:] = ['parity']\nimport gemma3_jax.__main__", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message


def test_gguf_names_its_extra(tmp_path):
    """A GGUF file needs the package that dequantises."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)  # one tensor, without metadata
    (tmp_path / "a.gguf").write_bytes(header + struct.pack("<Q1sIQIQ", 1, b"a", 1, 1, 0, 0) + bytes(64))
    done = run_without(("gguf",), "sys.argv[1:] = ['info', 'a.gguf']\nimport gemma3_jax.__main__", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: GGUF files need gguf: pip install 'gemma3-jax[gguf]'"]


def test_other_import_errors_pass_through():
    """A package that is installed and broken is not reported as missing."""
    with pytest.raises(ImportError, match="libcuda") as raised, needs_extra("plots", "pictures need"):
        raise ImportError("libcuda.so is missing")
    assert not isinstance(raised.value, ModuleNotFoundError)


def test_imports_are_declared():
    """Each package that the code imports is a dependency or is in an extra, and none is declared for nothing."""
    extras = PROJECT["optional-dependencies"]
    required = declared(PROJECT["dependencies"])
    names = ("cli", "gguf", "parity", "parquet", "plots", "sentencepiece")
    optional = declared([package for name in names for package in extras[name]])
    ours = {"conversion", "gemma3_jax"}
    used = {DISTRIBUTIONS.get(name, name) for name in imported() if name not in sys.stdlib_module_names} - ours
    assert optional == set(OPTIONAL)
    assert not required & optional
    assert used == required | optional


def test_version_is_the_installed_one():
    """`__version__` is written in one place, pyproject.toml; other unknown attributes stay errors."""
    assert gemma3_jax.__version__ == version("gemma3-jax") == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute '__versions__'"):
        gemma3_jax.__versions__  # noqa: B018


def test_python_dash_m_is_the_command(tmp_path):
    """`python -m gemma3_jax` takes the arguments of `gemma3-jax`, and has its exit codes."""
    listing = run(["-m", "gemma3_jax", "sites", "--markdown"], tmp_path)
    assert listing.returncode == 0
    assert listing.stdout.startswith("| site |")
    assert run(["-m", "gemma3_jax", "site"], tmp_path).returncode == 2
