"""The table of hook sites: every name a value inside the model has, its shape, and what an edit there reaches.

A site has a canonical name and may have two more: the one that TransformerLens users write, and the path of the
Hugging Face module (with `.input` or `.output`) that nnsight users and published sparse autoencoders write. All
three resolve here, and nowhere else.

Axes: b batch, p (query) position, k key position, h query heads, g key/value heads, e head_dim, d hidden_size,
f intermediate_size, V vocabulary.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable

from gemma3_jax.config import Gemma3Config

# From our layout of values with a head axis to the two that Hugging Face's modules have.
_FLAT = "... n e -> ... (n e)"
_HEADS_FIRST = "... p n e -> ... n p e"


@dataclasses.dataclass(frozen=True)
class Site:
    """One row of the table; `{i}` in a name stands for the block's index.

    Attributes:
        name: canonical name.
        axes: one letter per axis, or "1".
        dtype: "activation" for the model's dtype, else the dtype itself.
        holds: what the value is.
        reaches: what an edit there changes.
        legacy: TransformerLens' name, if it has another.
        hf: path of Hugging Face's module and `.input` or `.output`, if a module boundary of its own has the value.
        hf_layout: einops pattern from our layout to the one that Hugging Face has there, if they differ.
    """

    name: str
    axes: str
    dtype: str
    holds: str
    reaches: str
    legacy: str | None = None
    hf: str | None = None
    hf_layout: str | None = None


@dataclasses.dataclass(frozen=True)
class Match:
    """What a name resolves to: the canonical name, and the layout in which that name has its value."""

    name: str
    layout: str | None = None


class UnknownSite(KeyError, ValueError):
    """A name that no site has; the message lists the nearest ones."""

    __str__ = Exception.__str__


def _norm(name: str, hf: str, axes: str, of: str, reaches: str, *, legacy_in=None, legacy_out=None, layout=None):
    scale_axes = f"{axes[:-1]}1"
    return [
        Site(f"{name}.hook_in", axes, "activation", of, reaches, legacy_in, f"{hf}.input", layout),
        Site(f"{name}.hook_scale", scale_axes, "float32", "sqrt(mean(x^2) + eps)", "the norm's output"),
        Site(f"{name}.hook_normalized", axes, "float32", "x / scale, before the weight", "the norm's output"),
        Site(
            f"{name}.hook_out",
            axes,
            "activation",
            "after the weight, cast back",
            reaches,
            legacy_out,
            f"{hf}.output",
            layout,
        ),
    ]


def _site(name, axes, holds, reaches, *, legacy=None, hf=None, layout=None, dtype="activation"):
    return Site(name, axes, dtype, holds, reaches, legacy, hf, layout)


def _projection(name: str, heads: str, hf: str) -> list[Site]:
    b = "blocks.{i}.attn"
    own = "the layer's queries" if name == "q" else f"the layer's {'keys' if name == 'k' else 'values'}"
    what = "before its norm and RoPE" if name != "v" else "values"
    return [
        _site(f"{b}.{name}.hook_in", "b p d", "= attn.hook_in", own, hf=f"{hf}.input"),
        _site(
            f"{b}.{name}.hook_out",
            f"b p {heads} e",
            f"{name} projection, {what}",
            own,
            legacy=f"{b}.hook_{name}",
            hf=f"{hf}.output",
            layout=_FLAT,
        ),
    ]


def _attention() -> list[Site]:
    b, hf = "blocks.{i}.attn", "model.layers.{i}.self_attn"
    z = "the layer's attention output"
    return [
        _site(f"{b}.hook_in", "b p d", "ln1's output", "q, k and v", hf=f"{hf}.input"),
        *_projection("q", "h", f"{hf}.q_proj"),
        *_projection("k", "g", f"{hf}.k_proj"),
        *_projection("v", "g", f"{hf}.v_proj"),
        *_norm(
            f"{b}.q_norm",
            f"{hf}.q_norm",
            "b p h e",
            "= q.hook_out",
            "the layer's queries",
            legacy_out=f"{b}.hook_q_normed",
            layout=_HEADS_FIRST,
        ),
        *_norm(
            f"{b}.k_norm",
            f"{hf}.k_norm",
            "b p g e",
            "= k.hook_out",
            "the layer's keys",
            legacy_out=f"{b}.hook_k_normed",
            layout=_HEADS_FIRST,
        ),
        _site(f"{b}.hook_cos", "b p e", "RoPE cosines of this layer", "the layer's q and k", dtype="float32"),
        _site(f"{b}.hook_sin", "b p e", "RoPE sines of this layer", "the layer's q and k", dtype="float32"),
        _site(f"{b}.hook_rot_q", "b p h e", "q after its norm and RoPE", "the layer's scores"),
        _site(f"{b}.hook_rot_k", "b k g e", "k after its norm and RoPE", "the layer's scores"),
        _site(f"{b}.hook_attn_scores", "b h p k", "scaled and masked, before softmax", z, dtype="float32"),
        _site(f"{b}.hook_pattern", "b h p k", "softmax of the scores", z, dtype="float32"),
        _site(
            f"{b}.o.hook_in",
            "b p h e",
            "pattern @ v, before W_O (Gemma Scope 2 attn_out reads this)",
            z,
            legacy=f"{b}.hook_z",
            hf=f"{hf}.o_proj.input",
            layout=_FLAT,
        ),
        _site(f"{b}.hook_result", "b p h d", "z W_O of each head, before ln1_post", z),
        _site(f"{b}.o.hook_out", "b p d", "sum of the heads' results, before ln1_post", z, hf=f"{hf}.o_proj.output"),
        _site(f"{b}.hook_out", "b p d", "= attn.o.hook_out", z, hf=f"{hf}.output"),
    ]


def _mlp() -> list[Site]:
    b, hf = "blocks.{i}.mlp", "model.layers.{i}.mlp"
    out = "the layer's MLP output"
    gate, up, down = f"{hf}.gate_proj", f"{hf}.up_proj", f"{hf}.down_proj"
    return [
        _site(f"{b}.hook_in", "b p d", "ln2's output (Gemma Scope 2 transcoders read this)", out, hf=f"{hf}.input"),
        _site(f"{b}.gate.hook_in", "b p d", "= mlp.hook_in", "the gate", hf=f"{gate}.input"),
        _site(
            f"{b}.gate.hook_out",
            "b p f",
            "gate projection",
            "the gate",
            legacy=f"{b}.hook_pre",
            hf=f"{gate}.output",
        ),
        _site(f"{b}.in.hook_in", "b p d", "= mlp.hook_in", "the up projection", hf=f"{up}.input"),
        _site(
            f"{b}.in.hook_out",
            "b p f",
            "up projection",
            "the up projection",
            legacy=f"{b}.hook_pre_linear",
            hf=f"{up}.output",
        ),
        _site(
            f"{b}.out.hook_in",
            "b p f",
            "gelu(gate) * up: the neurons",
            out,
            legacy=f"{b}.hook_post",
            hf=f"{down}.input",
        ),
        _site(f"{b}.out.hook_out", "b p d", "MLP output, before ln2_post", out, hf=f"{down}.output"),
        _site(f"{b}.hook_out", "b p d", "= mlp.out.hook_out", out, hf=f"{hf}.output"),
    ]


def _block() -> list[Site]:
    b, hf = "blocks.{i}", "model.layers.{i}"
    one = "the attention of that head"
    return [
        _site(
            f"{b}.hook_in",
            "b p d",
            "residual stream entering the block",
            "skip and attention",
            legacy=f"{b}.hook_resid_pre",
            hf=f"{hf}.input",
        ),
        _site(f"{b}.hook_attn_in", "b p h d", "residual copied per query head, before ln1", one),
        _site(f"{b}.hook_q_input", "b p h d", "residual copied per query head, before ln1", "that head's queries"),
        _site(f"{b}.hook_k_input", "b p g d", "residual copied per key head, before ln1", "that head's keys"),
        _site(f"{b}.hook_v_input", "b p g d", "residual copied per value head, before ln1", "that head's values"),
        *_norm(f"{b}.ln1", f"{hf}.input_layernorm", "b p d", "= hook_resid_pre", "attention only"),
        *_attention(),
        *_norm(
            f"{b}.ln1_post",
            f"{hf}.post_attention_layernorm",
            "b p d",
            "= attn.hook_out",
            "the residual stream from hook_resid_mid on",
            legacy_out=f"{b}.hook_attn_out",
        ),
        _site(f"{b}.hook_resid_mid", "b p d", "resid_pre + attn_out", "skip and MLP"),
        *_norm(
            f"{b}.ln2",
            f"{hf}.pre_feedforward_layernorm",
            "b p d",
            "= hook_resid_mid",
            "MLP only",
            legacy_in=f"{b}.hook_mlp_in",
        ),
        *_mlp(),
        *_norm(
            f"{b}.ln2_post",
            f"{hf}.post_feedforward_layernorm",
            "b p d",
            "= mlp.hook_out",
            "the residual stream from hook_out on",
            legacy_out=f"{b}.hook_mlp_out",
        ),
        _site(
            f"{b}.hook_out",
            "b p d",
            "residual stream leaving the block",
            "everything after",
            legacy=f"{b}.hook_resid_post",
            hf=f"{hf}.output",
        ),
    ]


# TransformerLens' words, in its shorthand, for the hooks and the parts of a block that have another name in the table.
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

# Every site, in the order in which the model computes them; rows with {i} stand for one site per block.
SITES: tuple[Site, ...] = (
    _site("embed.hook_in", "b p", "token ids", "everything", hf="model.embed_tokens.input", dtype="int32"),
    _site(
        "embed.hook_out",
        "b p d",
        "embedding after the sqrt(d) factor",
        "everything",
        legacy="hook_embed",
        hf="model.embed_tokens.output",
    ),
    *_block(),
    *_norm("ln_final", "model.norm", "b p d", "residual stream after the last block", "logits"),
    _site("unembed.hook_in", "b p d", "= ln_final.hook_out", "logits", hf="lm_head.input"),
    _site(
        "unembed.hook_out",
        "b p V",
        "logits, before final_logit_softcapping",
        "logits",
        legacy="hook_unembed",
        hf="lm_head.output",
        dtype="float32",
    ),
)


def site_names(config: Gemma3Config) -> tuple[str, ...]:
    """The canonical names of every site of that model, in the order in which it computes them."""
    return tuple(_table(config.num_hidden_layers))


def site(name: str) -> Site:
    """The table's row for a canonical name, `blocks.5.hook_out` or `blocks.{i}.hook_out`."""
    return _rows()[re.sub(r"^blocks\.\d+", "blocks.{i}", name)]


def shape_of(name: str, config: Gemma3Config, b: int, p: int) -> tuple[int, ...]:
    """The shape that a site's value has for b rows of p tokens."""
    return tuple(axis_size(letter, config, b, p) for letter in site(name).axes.split())


def axis_size(letter: str, config: Gemma3Config, b: int, p: int) -> int:
    """The length of the axis that the letter (or "1") stands for, for b rows of p tokens."""
    sizes = {"1": 1, "b": b, "p": p, "k": p, "h": config.num_attention_heads, "g": config.num_key_value_heads}
    sizes |= {"e": config.head_dim, "d": config.hidden_size, "f": config.intermediate_size, "V": config.vocab_size}
    return sizes[letter]


def layer_of(name: str) -> int | None:
    """The block index in a canonical name, or None outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def resolve(name: str, config: Gemma3Config) -> Match:
    """The site that `name` (canonical, legacy or Hugging Face path) means.

    Raises:
        UnknownSite: no site has that name; the message lists the nearest names.
    """
    known = _aliases(config.num_hidden_layers)
    found = known.get(_one_prefix(name))
    if found is None:
        hint = _nearest(_one_prefix(name), known)
        raise UnknownSite(f"no site is named {name!r} in this model of {config.num_hidden_layers} layers; {hint}")
    return found


def get_act_name(
    name: str, layer: int | None = None, layer_type: str | None = None, *, config: Gemma3Config | None = None
) -> str:
    """The canonical name that TransformerLens' shorthand stands for.

    Args:
        name: a site's canonical or legacy name from behind `hook_` on: "resid_post", "q", "scale", "out".
        layer: block index; None for the sites outside the blocks. Negative ones count from the end.
        layer_type: the component that has the site, "ln1", "attn", "attn.q_norm" or "q_norm"; "" for the block's own.
            Needed where several components of a block have a site of that name.
        config: shape of the model, to count negative layers and to check that the layer exists.

    Raises:
        UnknownSite: the shorthand stands for no site, or for several; or the model has no such layer.

    >>> get_act_name("q", 3), get_act_name("scale", 0, "ln1"), get_act_name("embed")
    ('blocks.3.attn.q.hook_out', 'blocks.0.ln1.hook_scale', 'embed.hook_out')
    """
    short = _HOOK_WORDS.get(name, name)
    part = layer_type and _PART_WORDS.get(layer_type, layer_type)
    known = [entry for entry in _shorthands() if entry.in_block == (layer is not None)]
    found = {e.name for e in known if e.short == short and part in (None, e.part, e.part.split(".")[-1])}
    written = ", ".join(repr(word) for word in (name, layer, layer_type) if word is not None)
    if not found:
        raise UnknownSite(f"({written}) stands for no site; {_shorthand_hint(short, known)}")
    if len(found) > 1:
        raise UnknownSite(f"({written}) stands for several sites: {', '.join(sorted(found))}; name the part as well")
    return found.pop().replace("{i}", str(_checked_layer(layer, config)))


def select(wanted: str | Iterable[str] | Callable[[str], bool], config: Gemma3Config) -> tuple[Match, ...]:
    """All sites that the names, globs or predicate select, each once, in the model's order.

    In a glob `*` and `?` stay within one dot-separated part, `**` crosses parts: `blocks.*.hook_out` is the residual
    stream of every block, `blocks.3.**` all of block 3. A predicate is asked about every site's canonical and
    legacy name. A site that is selected by a Hugging Face path alone keeps that path's layout.

    Raises:
        UnknownSite: a name or a glob that matches nothing.
    """
    if isinstance(wanted, str):
        wanted = (wanted,)
    if callable(wanted):
        known = _aliases(config.num_hidden_layers)
        chosen = [m for name, m in known.items() if not name.startswith(("model.", "lm_head.")) and wanted(name)]
    else:
        chosen = [match for name in wanted for match in _expand(name, config)]
    order = _order(config.num_hidden_layers)
    # A match without a layout comes last, so that it wins over the same site under its Hugging Face path.
    by_name = {match.name: match for match in sorted(chosen, key=lambda match: match.layout is None)}
    return tuple(sorted(by_name.values(), key=lambda match: order[match.name]))


def is_glob(name: str) -> bool:
    """Whether `name` stands for several sites."""
    return bool(set(name) & set("*?"))


def _expand(name: str, config: Gemma3Config) -> list[Match]:
    if not is_glob(name):
        return [resolve(name, config)]
    pattern = re.compile(_glob_to_regex(_one_prefix(name)))
    found = [match for known, match in _aliases(config.num_hidden_layers).items() if pattern.fullmatch(known)]
    if not found:
        globs = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", known) for known in _aliases(config.num_hidden_layers))
        hint = _nearest(_one_prefix(name), globs)
        raise UnknownSite(
            f"no site matches {name!r} (`*` stays within one dot-separated part, `**` crosses parts); {hint}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Shorthand:
    """One way to write a row of the table in short: `blocks.{i}.{part}.hook_{short}`, or without the block."""

    in_block: bool
    part: str
    short: str
    name: str


@functools.cache
def _shorthands() -> tuple[_Shorthand, ...]:
    """Of every canonical and legacy name."""
    pattern = re.compile(r"(blocks\.\{i\}\.)?(?:(.+)\.)?hook_(.+)")
    names = [(alias, row.name) for row in SITES for alias in (row.name, row.legacy) if alias]
    parsed = [(pattern.fullmatch(alias), name) for alias, name in names]
    return tuple(_Shorthand(bool(found[1]), found[2] or "", found[3], name) for found, name in parsed if found)


def _shorthand_hint(short: str, known: Iterable[_Shorthand]) -> str:
    """What might have been meant by a shorthand that is not among the known ones of its kind, in a block or outside."""
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
    """The layer counted from the first."""
    if layer is None:
        return None
    layers = None if config is None else config.num_hidden_layers
    if layers is None and layer < 0:
        raise UnknownSite(f"layer {layer} counts from the end: pass the model's config as well")
    if layers is not None and not -layers <= layer < layers:
        raise UnknownSite(f"there is no layer {layer} in this model of {layers} layers")
    return layer if layers is None else range(layers)[layer]


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"the nearest names are {', '.join(nearest)}" if nearest else "`gemma3-jax sites` lists them all"


def _glob_to_regex(glob: str) -> str:
    parts = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(parts.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*|\*|\?)", glob))


def _one_prefix(name: str) -> str:
    """Bring a Hugging Face path of any model class under the one prefix of the table."""
    name = re.sub(r"^(model\.language_model\.|language_model\.model\.)", "model.", name)
    name = re.sub(r"^(language_model\.)?lm_head\.", "lm_head.", name)
    return re.sub(r"^(layers\.|embed_tokens\.|norm\.)", r"model.\1", name)


@functools.cache
def _rows() -> dict[str, Site]:
    return {row.name: row for row in SITES}


@functools.cache
def _table(n_layers: int) -> dict[str, Site]:
    """Every site by canonical name, in the model's order."""
    first = next(i for i, row in enumerate(SITES) if "{i}" in row.name)
    per_block = [row for row in SITES if "{i}" in row.name]
    head, tail = SITES[:first], SITES[first + len(per_block) :]
    blocks = {row.name.replace("{i}", str(i)): row for i in range(n_layers) for row in per_block}
    return {**{row.name: row for row in head}, **blocks, **{row.name: row for row in tail}}


@functools.cache
def _order(n_layers: int) -> dict[str, int]:
    """The place of every site, by canonical name."""
    return {name: i for i, name in enumerate(_table(n_layers))}


@functools.cache
def _aliases(n_layers: int) -> dict[str, Match]:
    """Every name of every site."""
    known = {}
    for name, row in _table(n_layers).items():
        index = str(layer_of(name))
        known[name] = Match(name)
        if row.legacy:
            known[row.legacy.replace("{i}", index)] = Match(name)
        if row.hf:
            known[row.hf.replace("{i}", index)] = Match(name, row.hf_layout)
    return known
