"""The table of hook sites: the names of each value in the model, its shape, and the values that an edit there changes.

To add a site, add its row here, a `HookPoint` in the model, and its oracle in the tests.

Axes: b batch, p (query) position, k key position, h query heads, g key/value heads, e head_dim, d hidden_size,
f intermediate_size, V vocabulary. In an embedding head: nj output of the dense layer j, n embedding.
"""

import dataclasses
import functools
import itertools
import re
from typing import Literal, TypeAlias

from gemma3_jax.config import Gemma3Config

Computed: TypeAlias = Literal["always", "per_head", "scores"]

# From our layout of values with an axis of heads to the two layouts of Hugging Face's modules.
_FLAT = "... n e -> ... (n e)"
_HEADS_FIRST = "... p n e -> ... n p e"


@dataclasses.dataclass(frozen=True)
class Site:
    """One row of the table; `{i}` in a name is the block's index.

    Attributes:
        name: canonical name.
        axes: one letter per axis (`n1`, `n2` in an embedding head), or "1".
        dtype: "activation" for the model's dtype, else the dtype itself.
        holds: description of the value.
        reaches: the values that an edit there changes.
        legacy: TransformerLens' name, if it has another; in an embedding head, the name of the module alone.
        hf: path of Hugging Face's module with `.input` or `.output`, if a module boundary there has the value.
        hf_layout: einops pattern from our layout to Hugging Face's, if they differ.
        computed: "always"; or, for sites that are computed only when they are captured or edited, "per_head" (a value
            for each head takes memory) or "scores" (in texts of at least 512 tokens, they are never all stored).
    """

    name: str
    axes: str
    dtype: str
    holds: str
    reaches: str
    legacy: str | None = None
    hf: str | None = None
    hf_layout: str | None = None
    computed: Computed = "always"


def _norm(
    name: str,
    hf: str,
    axes: str,
    of: str,
    reaches: str,
    *,
    legacy_in: str | None = None,
    legacy_out: str | None = None,
    layout: str | None = None,
) -> list[Site]:
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


def _site(
    name: str,
    axes: str,
    holds: str,
    reaches: str,
    *,
    legacy: str | None = None,
    hf: str | None = None,
    layout: str | None = None,
    dtype: str = "activation",
    computed: Computed = "always",
) -> Site:
    return Site(name, axes, dtype, holds, reaches, legacy, hf, layout, computed)


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
        _site(
            f"{b}.hook_attn_scores",
            "b h p k",
            "scaled and masked, before softmax",
            z,
            dtype="float32",
            computed="scores",
        ),
        _site(f"{b}.hook_pattern", "b h p k", "softmax of the scores", z, dtype="float32", computed="scores"),
        _site(
            f"{b}.o.hook_in",
            "b p h e",
            "pattern @ v, before W_O (Gemma Scope 2 attn_out reads this)",
            z,
            legacy=f"{b}.hook_z",
            hf=f"{hf}.o_proj.input",
            layout=_FLAT,
        ),
        _site(f"{b}.hook_result", "b p h d", "z W_O of each head, before ln1_post", z, computed="per_head"),
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
        _site(f"{b}.hook_attn_in", "b p h d", "residual copied per query head, before ln1", one, computed="per_head"),
        _site(
            f"{b}.hook_q_input",
            "b p h d",
            "residual copied per query head, before ln1",
            "that head's queries",
            computed="per_head",
        ),
        _site(
            f"{b}.hook_k_input",
            "b p g d",
            "residual copied per key head, before ln1",
            "that head's keys",
            computed="per_head",
        ),
        _site(
            f"{b}.hook_v_input",
            "b p g d",
            "residual copied per value head, before ln1",
            "that head's values",
            computed="per_head",
        ),
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


# The sites of a block with a copy of the residual stream for every head.
HEAD_COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


# All sites, in the order in which the model computes them; a row with {i} is one site per block.
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


def _dense(j: int | str, before: str, after: str) -> tuple[Site, ...]:
    """The rows of a dense layer of an embedding head, from `before` to `after` features."""
    name, output = f"dense_{j}", "output of the dense layer"
    return (
        _site(f"{name}.hook_in", f"b {before}", "output of the module before", "the embedding", dtype="float32"),
        _site(f"{name}.hook_out", f"b {after}", output, "the embedding", legacy=name, dtype="float32"),
    )


_POOLED: tuple[Site, ...] = (
    _site("pooled.hook_in", "b p d", "= ln_final.hook_out", "the embedding"),
    _site("pooled.hook_out", "b d", "mean over real tokens", "the embedding", legacy="pooled", dtype="float32"),
)
_EMBEDDING: tuple[Site, ...] = (
    _site("embedding.hook_in", "b n", "output of the last dense layer", "the embedding", dtype="float32"),
    _site("embedding.hook_out", "b n", "divided by its L2 norm", "the embedding", legacy="embedding", dtype="float32"),
)
# The sites of an embedding head, in which a model has a dense layer for each j.
HEAD_SITES: tuple[Site, ...] = (*_POOLED, *_dense("{j}", "n{j-1}", "n{j}"), *_EMBEDDING)


def sites(config: Gemma3Config) -> tuple[Site, ...]:
    """The rows of the model's table, in the order of computation. All text models have the same rows.

    A model with an embedding head has more. A run computes either the sites of the logits or those of this head.

    >>> len(sites(Gemma3Config.preset("1b"))) == len(SITES)
    True
    """
    if config.embedding_head is None:
        return SITES
    names = ["d", *(f"n{j}" for j, _ in enumerate(config.embedding_head.dense, start=1))]
    dense = [row for j, pair in enumerate(itertools.pairwise(names), start=1) for row in _dense(j, *pair)]
    return (*SITES, *_POOLED, *dense, *_EMBEDDING)


def of_embedding_head(name: str) -> bool:
    """Whether a canonical name is that of a site in the embedding head.

    >>> of_embedding_head("dense_1.hook_out"), of_embedding_head("embed.hook_out")
    (True, False)
    """
    return re.match(r"(pooled|dense_\d+|embedding)\.", name) is not None


def on_demand(computed: str) -> frozenset[str]:
    """The sites of a block that are computed only when they are watched, for the reason `computed`, without "blocks.i".

    >>> sorted(on_demand("scores"))
    ['attn.hook_attn_scores', 'attn.hook_pattern']
    """
    return frozenset(row.name.removeprefix("blocks.{i}.") for row in SITES if row.computed == computed)


def site(name: str) -> Site:
    """The table's row for a canonical name, `blocks.5.hook_out` or `blocks.{i}.hook_out`."""
    dense = re.match(r"dense_(\d+)\.", name)
    if dense:
        j = int(dense[1])
        return next(row for row in _dense(j, "d" if j == 1 else f"n{j - 1}", f"n{j}") if row.name == name)
    return _rows()[re.sub(r"^blocks\.\d+", "blocks.{i}", name)]


def shape_of(name: str, config: Gemma3Config, b: int, p: int) -> tuple[int, ...]:
    """The shape of a site's value for b rows of p tokens."""
    return tuple(axis_size(letter, config, b, p) for letter in site(name).axes.split())


def axis_size(letter: str, config: Gemma3Config, b: int, p: int) -> int:
    """The length of the axis with this letter (or "1"), for b rows of p tokens."""
    sizes = {"1": 1, "b": b, "p": p, "k": p, "h": config.num_attention_heads, "g": config.num_key_value_heads}
    sizes |= {"e": config.head_dim, "d": config.hidden_size, "f": config.intermediate_size, "V": config.vocab_size}
    dense = () if config.embedding_head is None else config.embedding_head.dense
    sizes |= {"n": dense[-1] if dense else config.hidden_size, **{f"n{j}": n for j, n in enumerate(dense, start=1)}}
    return sizes[letter]


def token_axis(name: str, layout: str | None = None) -> int:
    """The axis of a site's value that runs over tokens; with queries and keys, the axis of queries.

    Raises:
        ValueError: the site has one value for each text.

    >>> token_axis("blocks.0.hook_out"), token_axis("blocks.0.attn.hook_pattern")
    (1, 2)
    """
    theirs = layout.split(" -> ")[1].split() if layout else []
    if "p" in theirs:  # only one of Hugging Face's layouts moves it: heads first
        return theirs.index("p")
    axes = site(name).axes.split()
    if not {"p", "k"} & set(axes):
        raise ValueError(f"{name} has one value for each text, [{' '.join(axes)}], and no axis of tokens")
    return axes.index("p" if "p" in axes else "k")


@functools.cache
def _rows() -> dict[str, Site]:
    return {row.name: row for row in (*SITES, *_POOLED, *_EMBEDDING)}
