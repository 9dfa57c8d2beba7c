"""The names that other tools give to sites, resolved to canonical names, or refused where they have meant several.

Only names that have one meaning are resolved. Where one has had several, the error names the candidates, and the
caller chooses one with `site_in=` and `site_out=`.
"""

import math
import re
from collections.abc import Sequence
from typing import NoReturn

from gemma3_jax.config import Gemma3Config
from gemma3_jax.reading import CheckpointError
from gemma3_jax.sites.names import UnknownSite, block, layer_of, resolve
from gemma3_jax.sites.table import axis_size, site

# Names are looked up in the deepest published model, so a name that it does not have is not one of Gemma 3's.
_DEEPEST = Gemma3Config.preset("27b")

# Legacy names that have meant several tensors, with these. TransformerLens' `hook_mlp_in` was the residual stream
# before ln2 up to 2.16, the norm's output in 3.0, and the residual stream again from 3.7 on; SAELens has written it
# for transcoders that read the norm's output.
_AMBIGUOUS = {"hook_mlp_in": ("hook_resid_mid", "ln2.hook_out")}


def site_of(name: object, where: object, argument: str) -> str:
    """The canonical name of the site that a config names.

    Args:
        name: as the config has it.
        where: the file and the field that have it, for messages.
        argument: the argument of `load` that settles it.

    Raises:
        CheckpointError: the name is unknown, or has meant several sites.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{where} is {name!r}, not the name of a site; give {argument}= to load")
    ambiguous = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if ambiguous and ambiguous[2] in _AMBIGUOUS:
        refuse(name, [block(ambiguous[1], part) for part in _AMBIGUOUS[ambiguous[2]]], where, argument)
    return canonical(name, where, argument)


def canonical(name: str, where: object, argument: str) -> str:
    """The canonical name for a name of the table, which has one meaning.

    Raises:
        CheckpointError: no site has the name.
    """
    try:
        return resolve(name, _DEEPEST).name
    except UnknownSite as error:
        raise CheckpointError(f"{where}: {error}; or give {argument}= to load") from None


def refuse(name: object, candidates: Sequence[str], where: object, argument: str) -> NoReturn:
    """Raise a CheckpointError for a name with several meanings."""
    listed = " or ".join(f"{argument}={candidate!r}" for candidate in candidates)
    raise CheckpointError(f"{where}: {name} has meant several sites; give {listed} to load")


def expanded(names: str | Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    """One name for each layer, of a name with `{all}`, `{5,9}` or `*` in place of the layer, or of a list.

    >>> expanded("model.layers.{5,9}.output", range(2)), expanded("blocks.*.hook_out", [3])
    (('model.layers.5.output', 'model.layers.9.output'), ('blocks.3.hook_out',))
    """
    if not isinstance(names, str):
        return tuple(names)
    pattern = re.search(r"\{([\d, ]+)\}", names)
    if pattern:
        layers = [int(layer) for layer in pattern[1].split(",")]
    return tuple(re.sub(r"\{[^}]*\}|\*", str(layer), names) for layer in layers)


def given_or_named(given: object, name: object, where: object, argument: str) -> str:
    """The site that the caller gives, or else the one that a config names.

    Raises:
        CheckpointError: as in `site_of`, or as in `canonical`.
    """
    return site_of(name, where, argument) if given is None else canonical(str(given), argument, argument)


def module_site(module: str, end: str, where: object, argument: str) -> str:
    """The site at the "input" or "output" of a Hugging Face module, such as "layers.5.mlp"."""
    return canonical(f"{module}.{end}", where, argument)


def huggingface_name(name: str) -> str:
    """The Hugging Face path of a site, or its canonical name if no module's boundary has its value.

    >>> huggingface_name("blocks.3.attn.o.hook_in"), huggingface_name("blocks.3.ln2.hook_normalized")
    ('model.layers.3.self_attn.o_proj.input', 'blocks.3.ln2.hook_normalized')
    """
    return (site(name).hf or name).replace("{i}", str(layer_of(name)))


def transformer_lens_name(name: str) -> str:
    """TransformerLens' name for a site, or its canonical name if it has no other, or one that has meant several sites.

    >>> transformer_lens_name("blocks.3.hook_out"), transformer_lens_name("blocks.3.ln2.hook_in")
    ('blocks.3.hook_resid_post', 'blocks.3.ln2.hook_in')
    """
    legacy = (site(name).legacy or name).replace("{i}", str(layer_of(name)))
    return name if legacy.split(".")[-1] in _AMBIGUOUS else legacy


def check_size(name: str, d: int, model_name: object, where: object, argument: str) -> None:
    """Refuse a site if its size in a published model is not that of the dictionary, but that of another site is.

    Raises:
        CheckpointError: so it is: the config names another tensor than the dictionary was trained on.

    >>> check_size("blocks.9.attn.o.hook_in", 1024, "google/gemma-3-270m", "config.json", "site_in")
    """
    published = re.search(r"gemma-(?:3|scope-2)-(270m|1b|4b|12b|27b)\b", str(model_name))
    if published is None:
        return
    config = Gemma3Config.preset(published[1])
    others = [other for part in _PUBLISHED if _features(other := block(layer_of(name) or 0, part), config) == d]
    if others and (size := _features(name, config)) != d:
        raise CheckpointError(
            f"{where}: {name} has {size} features in {published[0]}, and the dictionary has {d}, as have "
            f"{' and '.join(others)}; give {argument}= to load"
        )


# The sites of published dictionaries.
_PUBLISHED = ("attn.o.hook_in", "hook_out", "ln2.hook_out", "ln2_post.hook_out")


def _features(name: str, config: Gemma3Config) -> int:
    """The number of features of a site, those of all heads together."""
    return math.prod(axis_size(letter, config, 1, 1) for letter in site(name).axes.split() if letter not in "bp")
