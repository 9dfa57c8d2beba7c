"""Names: every way to write a site leads to it, nothing else does, and the table lists what the model has."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gemma3_jax import Gemma3, Gemma3Config, HookPoint, UnknownSite, forward, site_names
from gemma3_jax.sites.names import Match, is_glob, layer_of, resolve, select
from gemma3_jax.sites.table import SITES, site
from tests.helpers.random_models import SMALL, hf_config, hf_model

# The contract, written out: canonical name, TransformerLens' name where it is another, axes. B is blocks.{i}.
CONTRACT = """
embed.hook_out               hook_embed             b p d
B.hook_in                    B.hook_resid_pre       b p d
B.hook_attn_in               -                      b p h d
B.hook_q_input               -                      b p h d
B.hook_k_input               -                      b p g d
B.hook_v_input               -                      b p g d
B.ln1.hook_in                -                      b p d
B.ln1.hook_out               -                      b p d
B.attn.hook_in               -                      b p d
B.attn.q.hook_out            B.attn.hook_q          b p h e
B.attn.k.hook_out            B.attn.hook_k          b p g e
B.attn.v.hook_out            B.attn.hook_v          b p g e
B.attn.q_norm.hook_out       B.attn.hook_q_normed   b p h e
B.attn.k_norm.hook_out       B.attn.hook_k_normed   b p g e
B.attn.hook_cos              -                      b p e
B.attn.hook_sin              -                      b p e
B.attn.hook_rot_q            -                      b p h e
B.attn.hook_rot_k            -                      b k g e
B.attn.hook_attn_scores      -                      b h p k
B.attn.hook_pattern          -                      b h p k
B.attn.o.hook_in             B.attn.hook_z          b p h e
B.attn.hook_result           -                      b p h d
B.attn.o.hook_out            -                      b p d
B.attn.hook_out              -                      b p d
B.ln1_post.hook_out          B.hook_attn_out        b p d
B.hook_resid_mid             -                      b p d
B.ln2.hook_in                B.hook_mlp_in          b p d
B.ln2.hook_out               -                      b p d
B.mlp.hook_in                -                      b p d
B.mlp.gate.hook_out          B.mlp.hook_pre         b p f
B.mlp.in.hook_out            B.mlp.hook_pre_linear  b p f
B.mlp.out.hook_in            B.mlp.hook_post        b p f
B.mlp.out.hook_out           -                      b p d
B.mlp.hook_out               -                      b p d
B.ln2_post.hook_out          B.hook_mlp_out         b p d
B.hook_out                   B.hook_resid_post      b p d
ln_final.hook_in             -                      b p d
ln_final.hook_out            -                      b p d
unembed.hook_in              -                      b p d
unembed.hook_out             hook_unembed           b p V
B.ln1.hook_scale             -                      b p 1
B.ln1.hook_normalized        -                      b p d
B.ln1_post.hook_scale        -                      b p 1
B.ln1_post.hook_normalized   -                      b p d
B.ln2.hook_scale             -                      b p 1
B.ln2.hook_normalized        -                      b p d
B.ln2_post.hook_scale        -                      b p 1
B.ln2_post.hook_normalized   -                      b p d
B.attn.q_norm.hook_scale     -                      b p h 1
B.attn.q_norm.hook_normalized -                     b p h e
B.attn.k_norm.hook_scale     -                      b p g 1
B.attn.k_norm.hook_normalized -                     b p g e
ln_final.hook_scale          -                      b p 1
ln_final.hook_normalized     -                      b p d
"""
ROWS = [
    (*(name.replace("B.", "blocks.{i}.") for name in line.split(maxsplit=2)[:2]), line.split(maxsplit=2)[2])
    for line in CONTRACT.strip().splitlines()
]

# Hugging Face's modules, and the component that each of them is.
COMPONENTS = {
    "model.embed_tokens": "embed",
    "model.layers.{i}": "blocks.{i}",
    "model.layers.{i}.input_layernorm": "blocks.{i}.ln1",
    "model.layers.{i}.self_attn": "blocks.{i}.attn",
    "model.layers.{i}.self_attn.q_proj": "blocks.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "blocks.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "blocks.{i}.attn.v",
    "model.layers.{i}.self_attn.o_proj": "blocks.{i}.attn.o",
    "model.layers.{i}.self_attn.q_norm": "blocks.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blocks.{i}.attn.k_norm",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.ln1_post",
    "model.layers.{i}.pre_feedforward_layernorm": "blocks.{i}.ln2",
    "model.layers.{i}.mlp": "blocks.{i}.mlp",
    "model.layers.{i}.mlp.gate_proj": "blocks.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "blocks.{i}.mlp.in",
    "model.layers.{i}.mlp.down_proj": "blocks.{i}.mlp.out",
    "model.layers.{i}.post_feedforward_layernorm": "blocks.{i}.ln2_post",
    "model.norm": "ln_final",
    "lm_head": "unembed",
}
# Layers with one and with two digits.
DEEP = Gemma3Config.from_hf(hf_config(num_hidden_layers=12, layer_types=None))
SHALLOW = Gemma3Config.from_hf(hf_config())
RESIDUALS = ["blocks.1.hook_in", "blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in", "blocks.1.hook_out"]


def named(matches: tuple[Match, ...]) -> list[str]:
    return [match.name for match in matches]


# --- one name, one site ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("canonical", "legacy", "axes"), ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("layer", ["0", "7", "11"])
def test_contract_rows_resolve(canonical, legacy, axes, layer):
    """Every row of the contract is found under its canonical and its legacy name, with the axes written there."""
    name = canonical.replace("{i}", layer)
    assert resolve(name, DEEP) == Match(name)
    if legacy != "-":
        assert resolve(legacy.replace("{i}", layer), DEEP) == Match(name)
    assert site(name) is site(canonical)
    assert (site(name).name, site(name).axes) == (canonical, axes)


@pytest.mark.parametrize(("module", "component"), COMPONENTS.items())
def test_hf_paths_resolve(module, component):
    """Hugging Face's module path with .input or .output is hook_in or hook_out of the component that it is."""
    for layer in ("0", "11"):
        path, name = module.replace("{i}", layer), component.replace("{i}", layer)
        assert resolve(f"{path}.input", DEEP).name == f"{name}.hook_in"
        assert resolve(f"{path}.output", DEEP).name == f"{name}.hook_out"


def test_hf_paths_are_the_modules_of_hugging_face():
    """The paths are those that Hugging Face's model has, and none of its modules that hold values is left out."""
    modules = {name for name, _ in hf_model().named_modules()}
    ours = {module.replace("{i}", str(i)) for module in COMPONENTS for i in range(SMALL["num_hidden_layers"])}
    assert ours <= modules
    assert {name.split(".")[-1] for name in modules - ours} == {"", "model", "layers", "rotary_emb", "act_fn"}


def test_table_rows_and_names_are_unique():
    """No two rows have one canonical name, and no name of any kind stands for two sites."""
    names = [name for row in SITES for name in (row.name, row.legacy, row.hf) if name]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    assert not twice
    every = site_names(DEEP)
    assert len(every) == len(set(every)) == len([row for row in SITES if "{i}" in row.name]) * 12 + 8


def test_contract_is_in_the_table_and_the_rest_are_module_boundaries():
    """The table has the contract's rows; what it has beyond them is the input or output of a component."""
    extra = {row.name for row in SITES} - {row[0] for row in ROWS}
    assert {row[0] for row in ROWS} <= {row.name for row in SITES}
    assert all(name.endswith(("hook_in", "hook_out")) for name in extra)
    boundaries = {f"{component}.{hook}" for component in COMPONENTS.values() for hook in ("hook_in", "hook_out")}
    assert extra <= boundaries


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
def test_hf_prefixes(prefix):
    """The paths of every Hugging Face class that holds the text model, and of its bare half, name the same sites."""
    assert resolve(f"{prefix}layers.5.output", DEEP) == Match("blocks.5.hook_out")
    assert resolve(f"{prefix}embed_tokens.output", DEEP) == Match("embed.hook_out")
    assert resolve(f"{prefix}norm.input", DEEP) == Match("ln_final.hook_in")
    assert resolve(f"{prefix}layers.5.self_attn.o_proj.input", DEEP).name == "blocks.5.attn.o.hook_in"
    assert named(select(f"{prefix}layers.*.mlp.output", SHALLOW)) == [f"blocks.{i}.mlp.hook_out" for i in range(3)]
    with pytest.raises(UnknownSite):
        resolve(f"other.{prefix}layers.5.output", DEEP)


@pytest.mark.parametrize("head", ["lm_head.output", "language_model.lm_head.output"])
def test_hf_prefixes_of_the_head(head):
    """The unembedding stands beside the text model, under two prefixes."""
    assert resolve(head, DEEP) == Match("unembed.hook_out")


def test_layouts_belong_to_hf_paths_only():
    """Values with a head axis have Hugging Face's layout under its path, and ours under every other name."""
    for row in SITES:
        if row.hf:
            heads = set(row.axes.split()) & {"h", "g"}
            assert (resolve(row.hf.replace("{i}", "1"), SHALLOW).layout is not None) == bool(heads)
        for name in filter(None, (row.name, row.legacy)):
            assert resolve(name.replace("{i}", "1"), SHALLOW).layout is None


def test_layer_of():
    """The block index is read from the name, two digits too; outside the blocks there is none."""
    assert [layer_of(name) for name in ("blocks.0.hook_in", "blocks.11.attn.q.hook_out")] == [0, 11]
    assert layer_of("ln_final.hook_out") is None
    assert layer_of("embed.hook_out") is None


# --- selecting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("blocks.*.hook_out", ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out"]),
        ("blocks.*.hook_resid_post", ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out"]),
        ("model.layers.*.output", ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.2.hook_out"]),
        ("blocks.?.attn.hook_z", ["blocks.0.attn.o.hook_in", "blocks.1.attn.o.hook_in", "blocks.2.attn.o.hook_in"]),
        ("blocks.1.attn.hook_r?t_*", ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"]),
        ("*.hook_out", ["embed.hook_out", "ln_final.hook_out", "unembed.hook_out"]),
        ("blocks.2.**.hook_pre", ["blocks.2.mlp.gate.hook_out"]),
        ("**.hook_pattern", [f"blocks.{i}.attn.hook_pattern" for i in range(3)]),
        ("hook_*", ["embed.hook_out", "unembed.hook_out"]),
        (["unembed.hook_out", "hook_embed", "embed.hook_out"], ["embed.hook_out", "unembed.hook_out"]),
        (("blocks.1.hook_resid_*", "blocks.1.hook_mlp_in"), RESIDUALS),
        (lambda name: name.endswith("resid_mid"), [f"blocks.{i}.hook_resid_mid" for i in range(3)]),
        (lambda name: name == "blocks.2.hook_resid_pre", ["blocks.2.hook_in"]),
        (lambda name: name == "blocks.2.hook_in", ["blocks.2.hook_in"]),
        ((), []),
    ],
)
def test_select(wanted, expected):
    """Globs (`*` and `?` within a part, `**` across parts), lists and predicates give each site once, in order."""
    assert named(select(wanted, SHALLOW)) == expected


def test_double_star_crosses_parts_and_star_does_not():
    """`blocks.3.**` is all of block 3, `blocks.3.*` only what stands directly in it, `**` is everything."""
    of_block = [name for name in site_names(DEEP) if name.startswith("blocks.3.")]
    assert named(select("blocks.3.**", DEEP)) == of_block
    assert "blocks.3.attn.hook_cos" in of_block
    assert "blocks.3.attn.hook_cos" not in named(select("blocks.3.*", DEEP))
    assert tuple(named(select("**", DEEP))) == site_names(DEEP)
    assert named(select("blocks.1.hook_out", DEEP)) == ["blocks.1.hook_out"]
    assert len(select("blocks.1*.hook_out", DEEP)) == 3  # 1, 10 and 11


def test_dots_in_a_glob_are_dots():
    """A glob is not a regular expression: its dot matches only a dot."""
    with pytest.raises(UnknownSite):
        select("blocksX*Xhook_out", SHALLOW)
    assert is_glob("blocks.*.hook_out")
    assert not is_glob("blocks.0.hook_out")


def test_selecting_a_site_under_two_names_keeps_our_layout():
    """A site selected by a Hugging Face path alone has that path's layout; by any other name too, it has ours."""
    path, name = "model.layers.0.self_attn.o_proj.input", "blocks.0.attn.hook_z"
    assert select(path, SHALLOW)[0].layout is not None
    for both in ([path, name], [name, path]):
        assert select(both, SHALLOW) == (Match("blocks.0.attn.o.hook_in"),)


# --- unknown names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("blocks.0.hook_resid_psot", "blocks.0.hook_resid_post"),
        ("blocks.0.atn.hook_pattern", "blocks.0.attn.hook_pattern"),
        ("blocks.3.hook_out", "blocks.2.hook_out"),
        ("blocks.-1.hook_out", "blocks.1.hook_out"),
        ("model.layers.1.self_attn.o_proj.inptu", "model.layers.1.self_attn.o_proj.input"),
        ("unembed", "unembed.hook_in"),
        ("blocks.*.hook_resid_psot", "hook_resid_post"),
        ("blocks.*.atn.hook_pattern", "attn.hook_pattern"),
        ("**.hook_patern", "hook_pattern"),
    ],
)
def test_unknown_names_list_the_nearest(wrong, nearest):
    """A name or glob that matches nothing is an error, a KeyError and a ValueError, that lists the nearest names."""
    with pytest.raises(UnknownSite) as caught:
        select(wrong, SHALLOW)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert repr(wrong) in message
    assert not message.startswith(("'", '"'))  # KeyError would show the quoted repr of its message
    assert nearest in message


@pytest.mark.parametrize("wrong", ["", "hook", "blocks", "blocks.0", "blocks.00.hook_out", "BLOCKS.0.hook_out", "^.*$"])
def test_nothing_is_ignored_silently(wrong):
    """An unknown name is an error wherever a site is named: in capture, in a list, and in edits."""
    tokens = jnp.zeros((1, 3), jnp.int32)
    for arguments in (
        {"capture": wrong},
        {"capture": ["blocks.0.hook_out", wrong]},
        {"edits": {wrong: lambda value, hook: value}},
    ):
        with pytest.raises(UnknownSite):
            forward(SHALLOW, {}, tokens, **arguments)


# --- the table and the model ----------------------------------------------------------------------------------------


def walk(config: Gemma3Config, watched: frozenset[str]) -> set[str]:
    """The sites that a run of the model comes by, seen by an interceptor of our own."""
    seen = set()

    def record(next_fun, args, kwargs, context):
        path = ".".join(context.module.path).replace("blocks_", "blocks.")
        if context.method_name == "__call__" and path:
            seen.update({path} if isinstance(context.module, HookPoint) else {f"{path}.hook_in", f"{path}.hook_out"})
        return next_fun(*args, **kwargs)

    def run(tokens):
        with nn.intercept_methods(record):
            return Gemma3(config, watched=watched).init_with_output(jax.random.key(0), tokens)

    jax.eval_shape(run, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return seen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_walking_the_model_finds_exactly_the_table(layers, tied):
    """The table's names are the modules and hook points that the model runs through, no more and no fewer."""
    config = Gemma3Config.from_hf(hf_config(num_hidden_layers=layers, layer_types=None, tie_word_embeddings=tied))
    every = frozenset(site_names(config))
    assert walk(config, watched=every) == every


def test_walking_an_unwatched_model_misses_what_is_computed_on_demand():
    """Control for the walk: it sees the difference that watching makes, and that a layer makes."""
    missed = frozenset(site_names(SHALLOW)) - walk(SHALLOW, watched=frozenset())
    on_demand = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    on_demand += ("attn.hook_result",)
    assert missed == {f"blocks.{i}.{name}" for i in range(3) for name in on_demand}
    assert walk(DEEP, watched=frozenset()) - frozenset(site_names(SHALLOW))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes_are_the_tables(dtype):
    """Every captured value has the axes and the dtype that its row states; no two axes have one length."""
    b, p = 3, 9
    sizes = {
        "b": b,
        "p": p,
        "h": SHALLOW.num_attention_heads,
        "g": SHALLOW.num_key_value_heads,
        "e": SHALLOW.head_dim,
        "d": SHALLOW.hidden_size,
        "f": SHALLOW.intermediate_size,
        "V": SHALLOW.vocab_size,
        "1": 1,
    }
    assert len(set(sizes.values())) == len(sizes)
    sizes["k"] = p  # a whole prompt has as many keys as queries
    tokens = jnp.zeros((b, p), jnp.int32)
    shapes = jax.eval_shape(Gemma3(SHALLOW).init, jax.random.key(0), tokens)["params"]
    # Norm weights, the only ones with one axis, stay float32.
    params = jax.tree.map(lambda x: x if x.ndim == 1 else jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    logits, cache = jax.eval_shape(lambda params: forward(SHALLOW, params, tokens, "**"), params)

    assert tuple(cache) == site_names(SHALLOW)
    for name, value in cache.items():
        row = site(name)
        assert value.shape == tuple(sizes[axis] for axis in row.axes.split()), name
        assert value.dtype == (dtype if row.dtype == "activation" else jnp.dtype(row.dtype)), name
    assert (logits.shape, logits.dtype) == ((b, p, SHALLOW.vocab_size), jnp.float32)
    kept_exact = {"hook_scale", "hook_normalized", "hook_cos", "hook_sin", "hook_attn_scores", "hook_pattern"}
    assert {name.split(".")[-1] for name in site_names(SHALLOW) if site(name).dtype == "float32"} == (
        kept_exact | {"hook_out"}  # unembed.hook_out, the logits
    )
