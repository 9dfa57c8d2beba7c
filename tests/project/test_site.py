"""The documentation site: it builds without a warning, has every public name, and its links lead somewhere.

The site is in build/site afterwards. The tutorials run as it is built, each once, so these are their tests, too.
"""

import functools
import html.parser
import importlib
import inspect
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from sphinx.util.inventory import InventoryFile

import gemma3_jax
from tests.project.test_surface import MEMBERS, MODULES, SURFACE

ROOT = Path(__file__).parents[2]


def sphinx(source: Path, site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build a site with our settings; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", str(ROOT / "docs"), *options, str(source), str(site)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site() -> Path:
    """The directory of the site, built from the beginning: Sphinx does not repeat warnings about unchanged pages."""
    site = ROOT / "build" / "site"
    shutil.rmtree(site, ignore_errors=True)
    done = sphinx(ROOT, site, "--keep-going")
    assert done.returncode == 0, done.stderr
    return site


def test_every_public_name_is_on_the_site(site):
    """Those of `test_surface`, and the public members of the two large classes."""
    objects = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in objects.items() if kind.startswith("py:") for name in names}
    wanted = {f"{module}.{name}" for module, names in SURFACE.items() for name in names.split()} - {
        f"gemma3_jax.{name}" for name in MODULES
    }
    inherited = set(dir(Mapping)) | {"tree_flatten_with_keys", "tree_unflatten"}
    wanted |= {
        f"gemma3_jax.{name}.{member}" for name, members in MEMBERS.items() for member in {*members.split()} - inherited
    }
    patching = importlib.import_module("gemma3_jax.analysis.patching")
    wanted |= {f"{patching.__name__}.{name}" for name in dir(patching) if name.startswith("get_act_patch")}
    # An object with two public names is described under one of them.
    documented |= {name for name in wanted if _found_at(name) in documented}
    assert wanted <= documented, sorted(wanted - documented)
    assert "gemma3_jax.analysis.attribution._moved" not in documented  # control
    assert _found_at("gemma3_jax.FactoredMatrix") == "gemma3_jax.analysis.factored.FactoredMatrix"


def _found_at(name: str) -> str:
    """The name of the object's definition."""
    module, *rest = name.removeprefix("gemma3_jax.").split(".")
    value = functools.reduce(getattr, [module, *rest], gemma3_jax) if name.startswith("gemma3_jax.") else None
    return f"{inspect.getmodule(value).__name__}.{value.__name__}" if inspect.isclass(value) else name


class Page(html.parser.HTMLParser):
    """The anchors of a page and the targets of its links and pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = {""}
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or given.get("name") or "")
        if target := given.get("href" if tag in ("a", "link") else "src"):
            self.targets.add(target)


def broken_links(site: Path) -> list[str]:
    """The links within a site that lead to a file or an anchor that is not there, each with its page."""
    pages = {file.resolve(): Page(file.read_text()) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for target in page.targets:
            path, anchor = urldefrag(target)
            if ":" in path or path.startswith("//"):
                continue  # external, or data
            to = (file.parent / unquote(path).partition("?")[0]).resolve() if path else file
            if not to.exists() or (to in pages and unquote(anchor) not in pages[to].anchors):
                broken.append(f"{file.relative_to(site)}: {target}")
    return broken


def test_links_within_the_site(site, tmp_path):
    """Every link and picture of every page, with its anchor."""
    assert broken_links(site.resolve()) == []
    links = '<a href="#here">1</a> <a href="#gone">2</a> <a href="b.html">3</a>'
    (tmp_path / "a.html").write_text(f'<p id="here"></p> {links}')
    assert len(broken_links(tmp_path)) == 2  # control


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[there](nowhere.md) and [there](#not-here)", ["nowhere", "not-here"]),
        ("```{code-cell}\nundefined\n```", ["undefined"]),
    ],
    ids=["links", "code"],
)
def test_a_broken_page_fails(text, named, tmp_path):
    """Control: links to a page and a heading that are not there, and code that raises an error."""
    page = tmp_path / "docs" / "index.md"
    page.parent.mkdir()
    page.write_text(f"# Title\n\n{text}\n")
    done = sphinx(tmp_path, tmp_path / "site", "--keep-going")
    assert done.returncode != 0
    assert all(word in done.stderr for word in named), done.stderr


def test_pages_with_cells_become_notebooks(tmp_path):
    """The first cell of each installs the library, and the second of the first page draws; all are Python."""
    cells = runpy.run_path(str(ROOT / "docs" / "cells.py"))
    cells["write_notebooks"](tmp_path, "the-library")
    assert {file.stem for file in tmp_path.iterdir()} == {page.stem for page in cells["pages"]()} >= {"start", "ioi"}
    for file in tmp_path.iterdir():
        written = json.loads(file.read_text())["cells"]
        install, *code = ("".join(cell["source"]) for cell in written if cell["cell_type"] == "code")
        assert install == "%pip install --quiet the-library"
        assert len(code) == len(cells["CELL"].findall(next(ROOT.glob(f"docs/**/{file.stem}.md")).read_text()))
        for source in code:
            compile(source, file.name, "exec")
        assert not any(
            "](" in cell["source"].replace("](https:", "") for cell in written if cell["cell_type"] != "code"
        )
    start = json.loads((tmp_path / "start.ipynb").read_text())["cells"]
    second = [cell["source"] for cell in start if cell["cell_type"] == "code"][1]
    assert cells["run_cell"](second, {})[1].title == "Attention patterns"
