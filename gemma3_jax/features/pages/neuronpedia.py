"""The page that Neuronpedia has for a feature, where a published dictionary has an id there.

SAELens keeps the id in its files. Of Gemma Scope 2 some artifacts have one: those that the registry of SAELens 6.54
lists, which names the folder and the id of each. A dictionary that is not published has no id, and no link is guessed.
"""

import re

from gemma3_jax.features.formats import saelens
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.parts import Feature
from gemma3_jax.features.placement import Dictionary

_SITE = "https://www.neuronpedia.org"
_ID = re.compile(r"\w[\w.@-]*/\w[\w.@-]*")
# By the model of a Gemma Scope 2 repository, the widths whose artifacts Neuronpedia has: of l0_medium at resid_post,
# and of l0_small_affine at transcoder_all.
_RESIDUAL = {
    **dict.fromkeys(("270m-pt", "1b-pt", "4b-pt", "12b-pt", "27b-it"), ("16k", "65k", "262k", "1m")),
    **dict.fromkeys(("270m-it", "1b-it", "4b-it"), ("16k", "65k", "262k")),
}
_TRANSCODERS = dict.fromkeys(("4b-it", "27b-it"), ("262k",))
_ARTIFACT = re.compile(
    r"gemma-scope-2-(?P<model>\w+-[pi]t)/(?:.*/)?"
    r"(?:resid_post/layer_(?P<res>\d+)_width_(?P<res_width>\w+?)_l0_medium"
    r"|transcoder_all/layer_(?P<transcoder>\d+)_width_(?P<transcoder_width>\w+?)_l0_small_affine)$"
)


def note_id(sae: Dictionary, folder: Folder) -> None:
    """Note the id of a dictionary that was read from a folder; its copies with other weights do not have it."""
    object.__setattr__(sae, "_neuronpedia", id_of(folder))  # the dataclass is frozen


def url_of(sae: Dictionary, feature: Feature) -> str | None:
    """The address of a feature's page; None if the dictionary has no id."""
    known = getattr(sae, "_neuronpedia", None)
    return None if known is None or isinstance(feature, tuple) else f"{_SITE}/{known}/{feature}"


def id_of(folder: Folder) -> str | None:
    """The id of the dictionary in a folder, such as gemma-3-270m/9-gemmascope-2-res-16k; None if it has none."""
    named = saelens.neuronpedia_id(folder)
    if isinstance(named, str) and _ID.fullmatch(named):
        return named
    found = _ARTIFACT.search(folder.path.absolute().as_posix())
    if found is None:
        return None
    for kind, published in (("res", _RESIDUAL), ("transcoder", _TRANSCODERS)):
        layer, width = found[kind], found[f"{kind}_width"]
        if layer is not None and width in published.get(found["model"], ()):
            return f"gemma-3-{found['model'].removesuffix('-pt')}/{layer}-gemmascope-2-{kind}-{width}"
    return None
