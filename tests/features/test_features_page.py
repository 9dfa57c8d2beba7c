"""docs/features.md is true: its names are those of one tensor, and its formats are those that are loaded."""

import re
from pathlib import Path

import pytest

from gemma3_jax import Gemma3Config
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.formats.gemma_scope import read
from gemma3_jax.features.formats.saelens import _AUTOENCODERS, _TRANSCODERS
from gemma3_jax.features.hookpoints import _AMBIGUOUS
from gemma3_jax.sites.names import resolve
from tests.features.gemma_scope_files import params, write

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
CONFIG = Gemma3Config.preset("270m")
ARTIFACTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| (input of |output of )?`(resid|attn|mlp|transcoder|crosscoder)", line) and line.count("|") == 7
]


@pytest.mark.parametrize("row", ARTIFACTS, ids=lambda row: row[0].replace("`", ""))
def test_the_three_names_of_an_artifact_are_one_site(row, tmp_path):
    """And that is where a folder of this name is loaded, if it is of one layer."""
    names = [re.findall(r"`(blocks\.5[^`]*|model\.layers[^`]*)`", cell)[0] for cell in row[1:4]]
    assert {resolve(name, CONFIG).name for name in names} == {names[0]}
    for artifact in re.findall(r"`(\w+)`", row[0]):
        if artifact in ("clt", "crosscoder"):
            continue
        write(folder := tmp_path / artifact / "layer_5_width_16k_l0_small", params())
        found = read(Folder(folder))
        assert names[0] == (found.site_out if row[0].startswith("output") else found.site_in)


def test_the_page_lists_everything():
    """All artifacts, names that are refused, and architectures of SAELens."""
    assert len(ARTIFACTS) == 6
    assert all(f"`blocks.5.{name}`" in PAGE for name in _AMBIGUOUS)
    assert all(architecture in PAGE for architecture in _AUTOENCODERS)
    assert "four transcoders" in PAGE
    assert len(_TRANSCODERS) == 4
