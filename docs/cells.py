"""Pages that are notebooks: Markdown whose `{code-cell}` blocks run, in order, when Sphinx reads the page.

The cells run in the process of Sphinx, so all pages share its imports and compiled programs, and a page takes seconds.
A cell that raises an error, or a Python warning, is a warning of Sphinx. Jupyter opens the pages by jupytext; this
command writes them as notebooks for Jupyter and Colab, each with a first cell that installs the library:

    python docs/cells.py DIRECTORY [--install REQUIREMENT]

Without `--install`, it also writes a wheel there, which the first cell installs: upload it beside the notebook.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
HEADER = re.compile(r"\A---\n.*?^---\n", re.MULTILINE | re.DOTALL)


def run_cell(code: str, namespace: dict[str, Any], name: str = "cell") -> tuple[str, Any]:
    """What a cell prints, and the value of its last line, if that is an expression. A Python warning is an error."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("error")
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace) if last else None
    return printed.getvalue(), value


def pages() -> list[Path]:
    """The pages with cells."""
    return sorted(page for page in DOCS.rglob("*.md") if CELL.search(page.read_text()))


def notebook(text: str, requirement: str) -> dict[str, Any]:
    """A page as a notebook, in Jupyter's format; its first cell installs the requirement."""
    parts = CELL.split(HEADER.sub("", text))
    # Links to other pages do not lead anywhere from a notebook.
    texts = [re.sub(r"!?\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", part.strip()) for part in parts[::2]]
    cells = [_code(f"%pip install --quiet {requirement}")]
    for prose, code in zip(texts, [*parts[1::2], ""], strict=True):
        cells += [{"cell_type": "markdown", "metadata": {}, "source": prose}] if prose else []
        cells += [_code(code.strip())] if code else []
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _code(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": source}


def write_notebooks(directory: Path, requirement: str | None) -> None:
    """Write every page with cells as a notebook; without a requirement, also a wheel that they install."""
    directory.mkdir(parents=True, exist_ok=True)
    if requirement is None:
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory)]
        subprocess.run([*wheel, str(DOCS.parent)], check=True)
        [file] = directory.glob("gemma3_jax-*.whl")
        requirement = f'"{file.name}[plots]"'
    for page in pages():
        made = notebook(page.read_text(), requirement)
        (directory / f"{page.stem}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def setup(app: Any) -> dict[str, bool]:
    """Give Sphinx the directive `code-cell`."""
    from docutils import nodes
    from sphinx.util import logging
    from sphinx.util.docutils import SphinxDirective

    logger = logging.getLogger(__name__)

    class CodeCell(SphinxDirective):
        """The code, and below it what it prints and the value of its last line."""

        has_content = True
        optional_arguments = 1

        def run(self) -> list[nodes.Node]:
            code = "\n".join(self.content)
            shown: list[nodes.Node] = [nodes.literal_block(code, code, language="python")]
            namespace = self.env.temp_data.setdefault("cells", {"__name__": "__main__"})
            try:
                printed, value = run_cell(code, namespace, f"a cell of {self.env.docname}")
            except Exception:
                logger.warning("a cell failed: %s", traceback.format_exc(), location=self.get_location())
                return shown
            if printed:
                shown.append(nodes.literal_block(printed, printed, language="none", classes=["output"]))
            if hasattr(value, "_repr_html_"):
                picture = nodes.raw("", value._repr_html_(), format="html")
                shown.append(nodes.container("", picture, classes=["output"]))
            elif value is not None:
                shown.append(nodes.literal_block(repr(value), repr(value), language="python", classes=["output"]))
            return shown

    app.add_directive("code-cell", CodeCell)
    return {"parallel_read_safe": False}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the pages with cells as notebooks.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--install", metavar="REQUIREMENT", help="what the first cell installs, such as a URL")
    arguments = parser.parse_args()
    write_notebooks(arguments.directory, arguments.install)
