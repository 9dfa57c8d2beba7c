"""Compile quickly: most of the suite's time would go to optimising programs that run once.

Processes that the tests start do not see this, so that the command line holds parity with code as users run it. They
do inherit torch's one thread, and that no compiled program is kept.
"""

import os
import subprocess
import sys
from importlib.metadata import version

# Before torch is imported. Each test process has a core: torch's own threads would only wait for each other's.
os.environ["OMP_NUM_THREADS"] = "1"
# Before jax is imported. The command line keeps compiled programs in the home directory: no test reads or fills it.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import pytest
from jaxlib import xla_client

# The older emitters of XLA:CPU compile in two thirds of the time. An XLA that does not know a flag ends the process.
if version("jaxlib").startswith("0.10."):
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_use_fusion_emitters=false"
    assert xla_client.CompileOptions().executable_build_options.debug_options  # reads the flags, once
    os.environ["XLA_FLAGS"] = given

jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget a file's compiled programs: Linux gives a process 65,530 maps of memory, and XLA dies of one too many."""
    yield
    jax.clear_caches()


@pytest.fixture
def command(monkeypatch, capsys):
    """Call `gemma3-jax` in this process; returns what `subprocess.run` does."""
    from gemma3_jax import cli

    def call(*arguments) -> subprocess.CompletedProcess:
        given = ["gemma3-jax", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as done:
            cli.main()
        return subprocess.CompletedProcess(given, done.value.code or 0, *capsys.readouterr())

    return call
