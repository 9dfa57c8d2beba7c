"""The types of the public functions: what mypy infers from a call, and how they print."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from gemma3_jax import HookedGemma3, analysis, forward, grad_at, stack_layers
from gemma3_jax.compute.projections import linear
from gemma3_jax.generation.loop import generate
from gemma3_jax.model.rope import rotate

CALLS = Path(__file__).with_name("typed_calls.py")
ROOT = Path(__file__).parents[2]


def test_mypy_infers_the_types_of_calls():
    """The overloads hold, and the mistakes at the end of the file, the negative controls, are errors."""
    expected = {
        (number, code)
        for number, line in enumerate(CALLS.read_text().splitlines(), start=1)
        for code in re.findall(r"# error: (\S+)$", line)
    }
    assert len(expected) >= 5
    # In mypy's usual cache, which a later check of the whole package then has.
    command = [sys.executable, "-m", "mypy", str(CALLS)]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = re.findall(r"^\S+typed_calls\.py:(\d+): error: .*\[(\S+)\]$", report.stdout, re.MULTILINE)
    assert {(int(number), code) for number, code in errors} == expected, report.stdout + report.stderr
    assert f"Found {len(expected)} errors in 1 file" in report.stdout


@pytest.mark.parametrize(
    "function",
    [
        HookedGemma3.run_with_cache,
        HookedGemma3.run_with_hooks,
        HookedGemma3.generate,
        forward,
        grad_at,
        generate,
        stack_layers,
        *(function for name in analysis.__all__ if inspect.isfunction(function := getattr(analysis, name))),
    ],
)
def test_signatures_print_short(function):
    """`help` shows the names of types, and not the unions behind them."""
    for parameter in inspect.signature(function).parameters.values():
        assert len(str(parameter)) < 90, parameter
        assert "collections.abc" not in str(parameter)


def test_shapes_are_checked():
    """In tests, functions of `compute` and `model` check the shapes and dtypes in their signatures."""
    x, tables = jnp.ones((1, 2, 3, 4)), (jnp.ones((1, 2, 4)),) * 2
    assert linear(x[0], jnp.ones((4, 5))).shape == (2, 3, 5)
    with pytest.raises(TypeCheckError):
        linear(x[0], jnp.ones((3, 5)))
    assert rotate(x, *tables).shape == x.shape
    with pytest.raises(TypeCheckError):
        rotate(x.astype(int), *tables)


def uses_of_any(code: str) -> int:
    """How often code uses `Any`: in annotations, aliases and casts, not in imports, comments and docstrings."""
    names = (getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(ast.parse(code)))
    return sum(name == "Any" for name in names)


def test_any_is_rare():
    """Signatures say what they take: `Any` is for the values of other libraries and of files."""
    assert uses_of_any("from typing import Any\n\ndef f(x: Any) -> dict[str, typing.Any]:\n    'Any x.'") == 2
    files = [file for package in ("conversion", "gemma3_jax") for file in (ROOT / package).rglob("*.py")]
    uses = {str(file.relative_to(ROOT)): n for file in files if (n := uses_of_any(file.read_text()))}
    assert sum(uses.values()) < 100, dict(sorted(uses.items(), key=lambda item: -item[1]))
