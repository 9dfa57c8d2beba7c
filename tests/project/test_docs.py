"""What the documentation says is true today: examples run and print what is shown, generated pages are current."""

import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import gemma3_jax

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_example_prints_what_the_readme_shows():
    """The example that a newcomer reads first, and its output below it."""
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(EXAMPLES[0], {})
    assert shown is not None
    assert printed.getvalue() == shown[1]


NAMES = ["convert", "hooks", "capture", "look inside", "generate", "devices"]


@pytest.mark.parametrize("code", EXAMPLES[1:], ids=NAMES)
def test_other_examples_run(code, tmp_path, monkeypatch):
    """Every other block of Python runs as it stands."""
    monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.parametrize("page", ["sites", "conversion", "migration", "command"])
def test_generated_pages_are_current(page):
    """`python docs/generate.py` would change nothing."""
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / f"{page}.md").read_text() == generate[f"{page}_page"]()


def test_the_picture_of_a_block_is_current():
    """docs/sites.md shows every site of the table."""
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "block.svg").read_text() == generate["block_picture"]()


def test_the_table_of_rooms_is_current():
    """ARCHITECTURE.md prints what `test_architecture` holds."""
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "ARCHITECTURE.md").read_text() == generate["architecture_page"]()


def test_calls_of_the_migration_page_exist():
    """Every name in its right column is in the library."""
    calls = runpy.run_path(str(ROOT / "docs" / "generate.py"))["CALLS"]
    for _, ours in calls:
        for path in ours.split(", "):
            functools.reduce(getattr, path.split("."), gemma3_jax)
    with pytest.raises(AttributeError):  # control
        functools.reduce(getattr, ["HookedGemma3", "add_hook"], gemma3_jax)


def test_links_lead_somewhere():
    """Every relative link in the README, its neighbours and the pages."""
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_training_example_trains(tmp_path):
    """A few steps of the script that made the shipped model, in a process of its own; it exports a checkpoint."""
    script = ROOT / "examples" / "train_induction.py"
    command = [sys.executable, str(script), str(tmp_path / "model"), "--steps", "3", "--rows", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "tokenizer.json").exists()
