"""Compile quickly: most of the suite's time would go to optimising programs that run once.

Processes that the tests start inherit the environment: few optimisations, torch's one thread, and that no compiled
program is kept. Those that must run code as users do start with that of `tests.helpers.environment.as_users`.
"""

import functools
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")  # their failed assertions show values too

from tests.helpers.environment import compile_quickly  # noqa: E402

compile_quickly()
gc.disable()  # until all files are imported: what imports make stays

import jax  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# JAX makes a context of MLIR for each program, in 6 ms. Most programs are single operations: one context for all saves
# a tenth of the time and half of the memory.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# For meshes; whatever is placed nowhere else stays on the first device.
jax.config.update("jax_num_cpu_devices", 8)

import tests.helpers.shape_checks  # noqa: F401, E402 # jaxtyping finds it as an attribute of `tests`

# Before these are imported. Their functions then check the shapes and dtypes in their signatures while JAX traces them.
install_import_hook(["gemma3_jax.compute", "gemma3_jax.model"], "tests.helpers.shape_checks.checked")


@pytest.fixture(scope="session", autouse=True)
def nothing_is_built_at_import():
    """Importing the tests must not build or run a model: every worker would do so before its first test."""
    modules = [module for name, module in sys.modules.items() if name.startswith("tests.")]
    cached = {value for module in modules for value in vars(module).values() if hasattr(value, "cache_info")}
    called = sorted(f"{each.__module__}.{each.__name__}" for each in cached if each.cache_info().currsize)
    assert not called, "importing the tests called these; call them in tests or fixtures"


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget a file's programs, and, once there are many, the operations outside of jit that files share.

    Linux gives a process 65,530 maps of memory, and XLA dies of one too many. An operation takes four maps, and a
    quarter of a megabyte. Most files add some hundreds of maps, `test_kernels` adds 11,000.
    """
    yield
    from gemma3_jax.run import compiled

    compiled._program.cache_clear()
    if Path("/proc/self/maps").read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.unfreeze()
    keep_out_of_collections()


def keep_out_of_collections():
    """Keep what is alive out of garbage collection: the imports of torch, transformers and jax, and JAX's caches.

    They are millions of objects. An error about a hook that stores its value collects garbage.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    """The same once for the imports, and fewer collections."""
    keep_out_of_collections()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # by default, collections take a thirtieth of the time: tracing makes many objects


def pytest_addoption(parser):
    parser.addoption(
        "--checkpoint",
        metavar="DIR",
        default=os.environ.get("GEMMA3_CHECKPOINT"),
        help="directory of google/gemma-3-270m, for the tests marked `real`. Default: $GEMMA3_CHECKPOINT",
    )


@pytest.fixture(scope="session")
def checkpoint(request) -> Path:
    """The directory of a real checkpoint; without one the test is skipped."""
    directory = request.config.getoption("--checkpoint")
    if not directory:
        pytest.skip("needs a real checkpoint: --checkpoint DIR, or GEMMA3_CHECKPOINT")
    if not (Path(directory) / "config.json").is_file():
        pytest.fail(f"--checkpoint is {directory}, which holds no config.json")
    return Path(directory)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, one for the session."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        message = "no chromium on PATH: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def visit(browser):
    """Opens a file in a tab; what went wrong there, and what was asked of a network."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.route(lambda url: url.startswith(("http", "ws")), lambda route: route.abort())

    def open_(file):
        page, problems = context.new_page(), []
        page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.goto(file.as_uri())
        return page, problems

    yield open_
    context.close()


@pytest.fixture
def command(monkeypatch, capsys):
    """Call `gemma3-jax` in this process; returns what `subprocess.run` does."""
    from gemma3_jax.cli import main as cli

    def call(*arguments) -> subprocess.CompletedProcess:
        given = ["gemma3-jax", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as done:
            cli.main()
        return subprocess.CompletedProcess(given, done.value.code or 0, *capsys.readouterr())

    return call
