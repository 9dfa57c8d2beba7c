"""The check of prose that pre-commit runs, `.ci/words`: what it refuses, what it leaves alone, and where it looks."""

import runpy
import subprocess
from pathlib import Path

import pytest

COMMAND = str(Path(__file__).parents[2] / ".ci" / "words")
REFUSED = [  # one for each entry of the list
    "The file is no directory.",
    "What was not changed need not be saved.",
    "It is placed again without more ado.",
    "New values compile nothing.",
    "Export is the way back.",
    "The scores stay unless somebody watches them.",
    "Each site is held against PyTorch.",
    "A name that means nothing is an error.",
    "Kernels of each platform's own are missing.",
    "A string names what is none.",
    "A new shape compiles anew.",
    "Greedy sampling spares the draw.",
    "The array stands at two places.",
    "The picture has no place there.",
    "The page has both names of everything.",
]
PLAIN = [
    "There is no network, and it is no longer needed.",
    "Save only the parameters that you changed.",
    "Changing values does not trigger recompilation.",
    "An unknown name raises an error that suggests close matches.",
]


@pytest.fixture
def lines_refused():
    """A function from a file to the line numbers of what is refused in it."""
    findings = runpy.run_path(COMMAND)["findings"]
    return lambda file: [line for line, _ in findings(file)]


def test_each_construction_is_refused(lines_refused, tmp_path):
    """One finding per sentence, with its line; those without it, and idioms that resemble it, pass."""
    page = tmp_path / "page.md"
    page.write_text("".join(f"{sentence}\n\n" for sentence in REFUSED))
    assert lines_refused(page) == [2 * i + 1 for i in range(len(REFUSED))]
    assert len(REFUSED) == len(runpy.run_path(COMMAND)["LIST"])
    page.write_text("A plain line.\n\nA sentence goes over two lines: it\n  is\n  no directory.\n")
    assert lines_refused(page) == [4]
    page.write_text("\n".join(PLAIN))
    assert lines_refused(page) == []


@pytest.mark.parametrize(
    "code",
    [
        '"""A module that\n{}"""\n',
        'def f():\n    """{}"""\n',
        "x = 1\n# {}\n",
        'def f(name):\n    raise ValueError(f"{{name}}: {}")\n',
    ],
    ids=["module", "function", "comment", "error"],
)
def test_prose_in_code_is_read(lines_refused, code, tmp_path):
    """Docstrings, comments and error messages; every construction in each of them."""
    module = tmp_path / "module.py"
    for sentence in REFUSED:
        module.write_text(code.format(sentence))
        assert lines_refused(module) == [2], sentence
    module.write_text(code.format(PLAIN[0]))
    assert lines_refused(module) == []


def test_other_strings_are_not_prose(lines_refused):
    """Data may hold any words: this file does."""
    assert lines_refused(Path(__file__)) == []


def test_the_command_prints_its_findings(tmp_path):
    """Exit code 1 and one line per finding, as compilers write them; 0 and no output for a plain page."""
    page = tmp_path / "page.md"
    for text, code, printed in [(PLAIN[0], 0, ""), (REFUSED[0], 1, f'{page}:1: "is no"; write: is not a ...\n')]:
        page.write_text(text)
        done = subprocess.run([COMMAND, str(page)], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")
