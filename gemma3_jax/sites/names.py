"""Names of sites: resolves a name in a model, and builds canonical names.

A site has a canonical name and may have two more: its TransformerLens name, and the path of its Hugging Face module
with `.input` or `.output`, which nnsight users and published sparse autoencoders write. Only this module resolves them.
"""

import dataclasses
import difflib
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Self, SupportsIndex, TypeAlias

from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.sites.globs import alternatives, matching
from gemma3_jax.sites.table import HEAD_SITES, SITES, Site, sites

# A name, or the arguments of `get_act_name`.
Name: TypeAlias = str | tuple[str, int] | tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class Match:
    """The canonical name of a site, and the layout of its value under the name that was resolved."""

    name: str
    layout: str | None = None


class SiteName(str):
    """A canonical name that is found by its TransformerLens name too, as a predicate of `select` finds it.

    It equals the canonical name and has its hash. `in`, `startswith` and `endswith` look into both names, so that
    `[name for name in cache if "resid_post" in name]` has the residual streams.

    Attributes:
        legacy: TransformerLens' name; the canonical one if it has no other.

    >>> name = SiteName("blocks.3.hook_out", "blocks.3.hook_resid_post")
    >>> name, name == "blocks.3.hook_out", "resid_post" in name, name.endswith("hook_resid_post"), "resid_pre" in name
    ('blocks.3.hook_out', True, True, True, False)
    """

    legacy: str

    def __new__(cls, name: str, legacy: str | None = None) -> Self:
        new = super().__new__(cls, name)
        new.legacy = name if legacy is None else legacy
        return new

    def __contains__(self, part: str) -> bool:  # type: ignore[override] # as `str` itself
        return super().__contains__(part) or part in self.legacy

    def startswith(self, prefix: str | tuple[str, ...], /, *section: SupportsIndex | None) -> bool:
        """Whether one of the names starts with this; arguments as for `str`."""
        return super().startswith(prefix, *section) or self.legacy.startswith(prefix, *section)

    def endswith(self, suffix: str | tuple[str, ...], /, *section: SupportsIndex | None) -> bool:
        """Whether one of the names ends with this; arguments as for `str`."""
        return super().endswith(suffix, *section) or self.legacy.endswith(suffix, *section)


class UnknownSite(KeyError, ValueError):
    """An unknown name; the message lists the nearest names."""

    __str__ = Exception.__str__


# TransformerLens' shorthand words for hooks and parts of a block that have another name in the table.
_HOOK_WORDS = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}


_PART_WORDS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def site_names(config: Gemma3Config) -> tuple[str, ...]:
    """The canonical names of all sites of the model, in the order in which the model computes them."""
    check_config(config)
    return tuple(_table(config))


@functools.cache
def searchable_names(config: Gemma3Config) -> Mapping[str, SiteName]:
    """The `SiteName` of every site, by canonical name.

    >>> searchable_names(Gemma3Config.preset("1b"))["blocks.3.hook_out"].legacy
    'blocks.3.hook_resid_post'
    """
    rows = _table(config).items()
    legacy = {name: row.legacy and row.legacy.replace("{i}", str(layer_of(name))) for name, row in rows}
    return MappingProxyType({name: SiteName(name, other) for name, other in legacy.items()})


def layer_of(name: str) -> int | None:
    """The block index in a canonical name, or None outside the blocks."""
    matched = re.match(r"blocks\.(\d+)\.", name)
    return int(matched[1]) if matched else None


def resolve(name: str, config: Gemma3Config) -> Match:
    """The site with the name `name` (canonical, legacy or Hugging Face path).

    Raises:
        UnknownSite: no site has that name; the message lists the nearest names.
        TypeError: it is not text.
    """
    _check_text(name)
    known = _aliases(config)
    match = known.get(_one_prefix(name))
    if match is None:
        hint = _nearest(_one_prefix(name), known)
        if any(name == entry.short and entry.in_block for entry in _shorthands()):
            hint = f"for the shorthand of one layer, write get_act_name({name!r}, layer)"
        raise UnknownSite(f"no site is named {name!r} in this model of {config.num_hidden_layers} layers; {hint}")
    return match


def _check_text(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} does not name a site: give a name, such as 'blocks.3.hook_out'")


def spellings(names: Iterable[str], config: Gemma3Config) -> list[str]:
    """All names of some sites, which are given by their canonical names: those first, then the others.

    >>> spellings(["blocks.0.hook_out"], Gemma3Config.preset("1b"))
    ['blocks.0.hook_out', 'blocks.0.hook_resid_post', 'model.layers.0.output']
    """
    canonical = dict.fromkeys(names)
    return [*canonical, *(n for n, match in _aliases(config).items() if match.name in canonical and n not in canonical)]


def rows_named(part: str) -> tuple[Site, ...]:
    """The rows of the table that have a name with this part, in the table's order.

    Args:
        part: text, or a glob as in `select`; the number of a layer stands for any layer.

    Raises:
        UnknownSite: no row has; the message lists the nearest names.

    >>> [row.name for row in rows_named("blocks.3.hook_resid_p*")]
    ['blocks.{i}.hook_in', 'blocks.{i}.hook_out']
    """
    rows = {alias: row for row in (*SITES, *HEAD_SITES) for alias in (row.name, row.legacy, row.hf) if alias}
    # In the table, {i} and {j} stand for numbers.
    chosen = [_in_table(glob) for glob in alternatives(part.replace("{i}", "0").replace("{j}", "0"))]
    found = {alias for wanted in chosen for alias in matching(f"**{wanted}**", rows)}
    if not found:
        raise UnknownSite(f"no site has {part!r} in its name; {_nearest(chosen[0], rows)}")
    return tuple(dict.fromkeys(row for alias, row in rows.items() if alias in found))


def _in_table(part: str) -> str:
    """A part of a name as the table has it, with {i} for the number of a layer and {j} for that of a dense one."""
    wanted = re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", _one_prefix(part))
    return re.sub(r"\bdense_\d+", "dense_{j}", wanted)


def get_act_name(
    name: str, layer: int | None = None, layer_type: str | None = None, *, config: Gemma3Config | None = None
) -> str:
    """The canonical name for TransformerLens' shorthand.

    Args:
        name: the part of a canonical or legacy name after `hook_`: "resid_post", "q", "scale", "out". "q3" and
            "scale0ln1" are names with their layer and part.
        layer: block index; None for sites outside the blocks. Negative ones count from the end.
        layer_type: the component that has the site, "ln1", "attn", "attn.q_norm" or "q_norm"; "" for the block itself.
            None means any component, which is an error if several components of a block have a site with that name.
        config: shape of the model, to count negative layers and to check that the layer exists.

    Returns:
        A canonical name, such as "blocks.3.attn.q.hook_out".

    Raises:
        UnknownSite: no site matches the shorthand, or several do; or the model has no such layer.
        TypeError: it is not text.

    >>> get_act_name("q", 3), get_act_name("scale", 0, "ln1"), get_act_name("embed"), get_act_name("k6")
    ('blocks.3.attn.q.hook_out', 'blocks.0.ln1.hook_scale', 'embed.hook_out', 'blocks.6.attn.k.hook_out')
    """
    _check_text(name)
    together = re.fullmatch(r"([a-z_]+)(\d+)(\w*)", name)
    if together and layer is None:
        name, layer, layer_type = together[1], int(together[2]), together[3] or layer_type
    short = _HOOK_WORDS.get(name, name)
    part = layer_type and _PART_WORDS.get(layer_type, layer_type)
    known = [entry for entry in _shorthands() if entry.in_block == (layer is not None)]
    matches = {e.name for e in known if e.short == short and part in (None, e.part, e.part.split(".")[-1])}
    written = ", ".join(repr(word) for word in (name, layer, layer_type) if word is not None)
    if not matches:
        raise UnknownSite(f"({written}) does not match a site; {_shorthand_hint(short, known)}")
    if len(matches) > 1:
        raise UnknownSite(f"({written}) matches several sites: {', '.join(sorted(matches))}; also name the part")
    return matches.pop().replace("{i}", str(_checked_layer(layer, config)))


def select(wanted: str | Iterable[str] | Callable[[str], bool], config: Gemma3Config) -> tuple[Match, ...]:
    """All sites that the names, globs or predicate select, each once, in the model's order.

    In a glob, `*` and `?` stay within one dot-separated part, and `**` crosses parts: `blocks.*.hook_out` is the
    residual stream of every block, and `blocks.3.**` is all of block 3. Braces have alternatives, as in
    `blocks.{5,9}.hook_out` and `blocks.{0..8}.hook_out`; each of them must match a site. A predicate is called with
    every site's canonical and legacy name. A site that is selected only by a Hugging Face path keeps its layout.

    Raises:
        UnknownSite: a name, a glob or a predicate does not match a site.
        TypeError: it is none of these.
    """
    if callable(wanted):
        known = _aliases(config)
        chosen = [m for name, m in known.items() if not name.startswith(("model.", "lm_head.")) and wanted(name)]
        if not chosen:
            raise UnknownSite(
                f"the predicate {described(wanted)} does not match a site; `gemma3-jax sites` lists all sites"
            )
    else:
        chosen = [match for name in _names_in(wanted) for match in _expand(name, config)]
    order = _order(config)
    # A match without a layout comes last, so that it overrides the same site under its Hugging Face path.
    by_name = {match.name: match for match in sorted(chosen, key=lambda match: match.layout is None)}
    return tuple(sorted(by_name.values(), key=lambda match: order[match.name]))


def _names_in(wanted: str | Iterable[str]) -> list[str]:
    """The names and globs, after a check that they are text."""
    names = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str | bytes) else [wanted]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{wanted!r} does not name sites: give a name, a glob, a list of these or a predicate; "
            "get_act_name(name, layer) makes a name of TransformerLens' shorthand"
        )
    return names


def described(function: Callable[..., object]) -> str:
    """The name of a function, for messages."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def is_glob(name: str) -> bool:
    """Whether `name` is a glob, which may match several sites."""
    return bool(set(name) & set("*?{}"))


@functools.lru_cache(maxsize=1024)
def _expand(name: str, config: Gemma3Config) -> tuple[Match, ...]:
    return tuple(match for glob in alternatives(name) for match in _matches(glob, config))


def _matches(name: str, config: Gemma3Config) -> tuple[Match, ...]:
    """The sites of a name, or of a glob without braces."""
    if not is_glob(name):
        return (resolve(name, config),)
    known = _aliases(config)
    matches = tuple(known[alias] for alias in matching(_one_prefix(name), known))
    if not matches:
        globs = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", alias) for alias in known)
        hint = _nearest(_one_prefix(name), globs)
        raise UnknownSite(
            f"no site matches {name!r} (`*` stays within one dot-separated part, `**` crosses parts); {hint}"
        )
    return matches


@dataclasses.dataclass(frozen=True)
class _Shorthand:
    """One shorthand for a row of the table: `blocks.{i}.{part}.hook_{short}`, or without the block."""

    in_block: bool
    part: str
    short: str
    name: str


@functools.cache
def _shorthands() -> tuple[_Shorthand, ...]:
    """The shorthands of all canonical and legacy names."""
    pattern = re.compile(r"(blocks\.\{i\}\.)?(?:(.+)\.)?hook_(.+)")
    names = [(alias, row.name) for row in SITES for alias in (row.name, row.legacy) if alias]
    parsed = [(pattern.fullmatch(alias), name) for alias, name in names]
    return tuple(_Shorthand(bool(found[1]), found[2] or "", found[3], name) for found, name in parsed if found)


def _shorthand_hint(short: str, known: Iterable[_Shorthand]) -> str:
    """A hint for an unknown shorthand: the known ones that are similar."""
    parts = [repr(entry.part) for entry in known if entry.short == short]
    if parts:
        return f"{short!r} is a site of {', '.join(dict.fromkeys(parts))}"
    if any(entry.short == short for entry in _shorthands()):
        inside = any(entry.in_block for entry in known)
        return (
            f"{short!r} lies {'outside the blocks: leave the layer out' if inside else 'in the blocks: give a layer'}"
        )
    return _nearest(short, dict.fromkeys(entry.short for entry in known))


def _checked_layer(layer: int | None, config: Gemma3Config | None) -> int | None:
    """The layer index counted from the first block."""
    if layer is None:
        return None
    try:
        layer = operator.index(layer)
    except TypeError:
        raise UnknownSite(f"layer {layer!r} is not an integer") from None
    layers = None if config is None else config.num_hidden_layers
    if layers is None and layer < 0:
        raise UnknownSite(f"layer {layer} counts from the end: also pass the model's config")
    if layers is not None and not -layers <= layer < layers:
        raise UnknownSite(f"there is no layer {layer} in this model of {layers} layers")
    return layer if layers is None else range(layers)[layer]


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"the nearest names are {', '.join(nearest)}" if nearest else "`gemma3-jax sites` lists them all"


def _one_prefix(name: str) -> str:
    """A Hugging Face path of any model class, with the prefix that the table uses."""
    name = re.sub(r"^(model\.language_model\.|language_model\.model\.)", "model.", name)
    name = re.sub(r"^(language_model\.)?lm_head\.", "lm_head.", name)
    return re.sub(r"^(layers\.|embed_tokens\.|norm\.)", r"model.\1", name)


@functools.cache
def _table(config: Gemma3Config) -> dict[str, Site]:
    """Every site by canonical name, in the model's order."""
    rows = sites(config)
    first = next(i for i, row in enumerate(rows) if "{i}" in row.name)
    per_block = [row for row in rows if "{i}" in row.name]
    head, tail = rows[:first], rows[first + len(per_block) :]
    blocks = {row.name.replace("{i}", str(i)): row for i in range(config.num_hidden_layers) for row in per_block}
    return {**{row.name: row for row in head}, **blocks, **{row.name: row for row in tail}}


@functools.cache
def _order(config: Gemma3Config) -> dict[str, int]:
    """The index of every site, by canonical name."""
    return {name: i for i, name in enumerate(_table(config))}


@functools.cache
def _aliases(config: Gemma3Config) -> dict[str, Match]:
    """The match of every name of every site."""
    known = {}
    for name, row in _table(config).items():
        index = str(layer_of(name))
        known[name] = Match(name)
        if row.legacy:
            known[row.legacy.replace("{i}", index)] = Match(name)
        if row.hf:
            known[row.hf.replace("{i}", index)] = Match(name, row.hf_layout)
    return known


def block(layer: int | str, name: str) -> str:
    """The canonical name of a block's site or component; the layer "*" means all layers.

    >>> block(3, "mlp.out.hook_in"), block("*", "hook_out")
    ('blocks.3.mlp.out.hook_in', 'blocks.*.hook_out')
    """
    return f"blocks.{layer}.{name}"


def block_key(layer: int) -> str:
    """The key of a block's parameters, which is also the name of its module.

    >>> block_key(3)
    'blocks_3'
    """
    return f"blocks_{layer}"


def path_of(name: str) -> tuple[str, ...]:
    """The path of a component in the parameters: "blocks.3.attn.q" -> ("blocks_3", "attn", "q")."""
    return tuple(name.replace("blocks.", "blocks_").split("."))


def name_of(path: Iterable[str]) -> str:
    """The inverse of `path_of`."""
    return ".".join(path).replace("blocks_", "blocks.")
