"""Compiled programs are kept for the next process, wherever that runs, unless the user has other settings for JAX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.environment import as_users

SCRIPT = """
import jax
{before}
from gemma3_jax import HookedGemma3, TINY
HookedGemma3.from_pretrained(TINY)("ba ke")
print(jax.config.jax_compilation_cache_dir)
"""


def run(home: Path, before: str = "", folder: Path | None = None, base: dict | None = None, **variables: str) -> str:
    """What such a process says is JAX's directory; programs that compile in less than a second are kept, too."""
    environment = (base or os.environ) | {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(home)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        cwd=folder or home.parent,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # XLA's own log may have lines: on some CPUs it cannot read what it wrote
    return done.stdout.strip()


def programs(home: Path) -> set[str]:
    return {file.name for file in home.glob("gemma3-jax/*-cache")}


def test_a_process_in_another_folder_compiles_nothing(tmp_path):
    """So a notebook that moves, or a script beside it, starts as fast."""
    home, other = tmp_path / "home", tmp_path / "other"
    other.mkdir()
    assert run(home, base=as_users()) == str(home / "gemma3-jax")
    first = programs(home)
    assert any("run_and_cut" in name or "forward" in name for name in first)
    run(home, folder=other, base=as_users())
    assert programs(home) == first


@pytest.mark.parametrize("before", ["", "jax.config.update('jax_compilation_cache_dir', {!r})"])
def test_the_users_directory_stays(before, tmp_path):
    """Whether the environment or the program names it."""
    theirs = str(tmp_path / "theirs")
    variables = {} if before else {"JAX_COMPILATION_CACHE_DIR": theirs}
    assert run(tmp_path / "home", before.format(theirs), **variables) == theirs
    assert not programs(tmp_path / "home")


def test_a_cache_that_is_off_stays_off(tmp_path):
    assert run(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false") == "None"
    assert not (tmp_path / "home").exists()


def test_a_home_that_cannot_be_written(tmp_path):
    """JAX would warn at each program."""
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == "None"


def test_a_user_without_a_home(tmp_path):
    """In a container, a user may have no HOME and no entry in the list of users; `Path.home` is then an error."""
    no_home = "import os; del os.environ['XDG_CACHE_HOME']; os.environ['HOME'] = '~'"
    assert run(tmp_path / "unused", no_home) == "None"
