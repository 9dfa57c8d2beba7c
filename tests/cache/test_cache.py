"""The activation cache: its names and shorthands, slices, gradients, its life as a pytree and as a file."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import ActivationCache, Gemma3Config, UnknownSite, forward
from gemma3_jax.sites.names import get_act_name, site_names
from gemma3_jax.sites.table import SITES, site
from tests.helpers.small_model import LAYERS, TOKENS, assert_same, same, small

B, P = TOKENS.shape


@functools.cache
def everything() -> ActivationCache:
    """Every site of a run."""
    config, params = small()
    cache = jax.jit(lambda params: forward(config, params, TOKENS, "**")[1])(params)
    return cache.with_params(params)


def with_grads(cache: ActivationCache) -> ActivationCache:
    """The cache with arrays of the same shapes for gradients."""
    grads = ActivationCache(cache.config, {name: -0.5 * value for name, value in cache.items()}, batched=cache.batched)
    return ActivationCache(cache.config, cache, cache.params, grads, cache.batched)


def tiny() -> ActivationCache:
    """A few values in each dtype, and gradients."""
    values = {
        "embed.hook_in": jnp.asarray([[1, 2, 3]], jnp.int32),
        "blocks.0.hook_in": jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 48)), jnp.bfloat16),
        "blocks.1.attn.hook_pattern": jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 3, 3)), jnp.float32),
    }
    grads = {"blocks.0.hook_in": jnp.full((1, 3, 48), np.float32(1) / 3)}
    config, params = small()
    return ActivationCache(config, values, params, ActivationCache(config, grads))


# --- shorthands -------------------------------------------------------------------------------------------------------

# What TransformerLens' get_act_name makes of its arguments, in its own words; B is blocks.1.
SHORTHANDS = {
    ("q", 1): "B.attn.hook_q",
    ("k", 1, "a"): "B.attn.hook_k",
    ("v", 1, "attn"): "B.attn.hook_v",
    ("query", 1): "B.attn.hook_q",
    ("key", 1): "B.attn.hook_k",
    ("value", 1): "B.attn.hook_v",
    ("z", 1): "B.attn.hook_z",
    ("rot_k", 1): "B.attn.hook_rot_k",
    ("rot_q", 1): "B.attn.hook_rot_q",
    ("result", 1, "attn"): "B.attn.hook_result",
    ("pattern", 1): "B.attn.hook_pattern",
    ("attn", 1): "B.attn.hook_pattern",
    ("attn_scores", 1, "attention"): "B.attn.hook_attn_scores",
    ("attn_logits", 1): "B.attn.hook_attn_scores",
    ("pre", 1): "B.mlp.hook_pre",
    ("mlp_pre", 1): "B.mlp.hook_pre",
    ("pre_linear", 1, "m"): "B.mlp.hook_pre_linear",
    ("post", 1, "mlp"): "B.mlp.hook_post",
    ("mlp_post", 1): "B.mlp.hook_post",
    ("resid_pre", 1): "B.hook_resid_pre",
    ("resid_mid", 1, "block"): "B.hook_resid_mid",
    ("resid_post", 1, "b"): "B.hook_resid_post",
    ("resid_post", -1): "B.hook_resid_post",
    ("attn_out", 1, "blocks"): "B.hook_attn_out",
    ("mlp_out", 1): "B.hook_mlp_out",
    ("mlp_in", 1): "B.hook_mlp_in",
    ("attn_in", 1): "B.hook_attn_in",
    ("q_input", 1): "B.hook_q_input",
    ("normalized", 1, "ln2"): "B.ln2.hook_normalized",
    ("scale", -1, "ln1"): "B.ln1.hook_scale",
    ("scale", 1, "q_norm"): "B.attn.q_norm.hook_scale",
    ("scale", 1, "attn.k_norm"): "B.attn.k_norm.hook_scale",
    ("out", 1, ""): "B.hook_out",
    ("out", 1, "attn"): "B.attn.hook_out",
    ("out", 1, "o"): "B.attn.o.hook_out",
    ("in", 1, "in"): "B.mlp.in.hook_in",
    ("embed",): "hook_embed",
    ("unembed",): "hook_unembed",
    ("scale",): "ln_final.hook_scale",
    ("normalized", None, "ln_final"): "ln_final.hook_normalized",
}


@pytest.mark.parametrize(("shorthand", "name"), SHORTHANDS.items(), ids=str)
def test_shorthands_are_transformerlens(shorthand, name):
    """The cache takes TransformerLens' tuples, with its synonyms, and layers that count from the end."""
    cache = everything()
    name = name.replace("B.", "blocks.1.")
    assert cache[shorthand] is cache[name]
    assert shorthand in cache
    assert cache[name] is cache[get_act_name(*shorthand, config=cache.config)]


def test_every_row_of_the_table_has_a_shorthand():
    """Name, layer and component of any canonical or legacy name lead to its site, and to no other."""
    for row in SITES:
        for alias in filter(None, (row.name, row.legacy)):
            *parts, short = alias.replace("blocks.{i}", "B").split(".")
            layer = 3 if "B" in parts else None
            found = get_act_name(short.removeprefix("hook_"), layer, ".".join(part for part in parts if part != "B"))
            assert found == row.name.replace("{i}", "3")


@pytest.mark.parametrize(
    ("shorthand", "said"),
    [
        (("resid_psot", 1), ["resid_post"]),
        (("patern", 1), ["pattern"]),
        (("embd",), ["embed"]),
        (("q",), ["give a layer"]),
        (("embed", 1), ["leave the layer out"]),
        (("scale", 1, "ln3"), ["'ln1'", "'ln2_post'", "'attn.q_norm'"]),
        (("out", 1), ["blocks.{i}.hook_out", "blocks.{i}.attn.o.hook_out", "name the part"]),
        (("scale", 1), ["blocks.{i}.ln1.hook_scale", "blocks.{i}.attn.q_norm.hook_scale"]),
        (("out",), ["embed.hook_out", "ln_final.hook_out"]),
        (("q", LAYERS), [f"no layer {LAYERS}", f"{LAYERS} layers"]),
        (("q", -LAYERS - 1), [f"no layer {-LAYERS - 1}"]),
    ],
    ids=str,
)
def test_shorthands_that_mean_nothing_or_too_much(shorthand, said):
    """Are errors that list the nearest, or the candidates, and say what to add or leave out."""
    with pytest.raises(UnknownSite) as caught:
        everything()[shorthand]
    assert all(words in str(caught.value) for words in said), caught.value
    assert shorthand not in everything()


@pytest.mark.parametrize("key", [3, None, (), (1, 2), ("resid_pre", 1.0), ("resid_pre", "1")])
def test_what_is_no_name(key):
    """Is absent, and an error that says so; a layer that is not an integer is none, with a config or without."""
    assert key not in everything()
    with pytest.raises(UnknownSite, match=r"does not name a site|is not an integer"):
        everything()[key]
    with pytest.raises(UnknownSite, match=r"layer 1\.0 is not an integer"):
        get_act_name("q", 1.0)


def test_the_end_is_not_known_without_a_config():
    """get_act_name by itself takes layers from the start only."""
    with pytest.raises(UnknownSite, match="config"):
        get_act_name("q", -1)
    assert get_act_name("q", -1, config=Gemma3Config.preset("1b")) == "blocks.25.attn.q.hook_out"


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_by_name():
    """Under `.grads`, and under any name or shorthand with TransformerLens' suffix."""
    cache = with_grads(everything())
    value = cache["blocks.1.hook_resid_pre"]
    for name in ("blocks.1.hook_resid_pre_grad", "blocks.1.hook_in_grad", ("resid_pre_grad", -1)):
        np.testing.assert_array_equal(cache[name], -0.5 * value)
        assert name in cache
    z = "model.layers.0.self_attn.o_proj.input"
    np.testing.assert_array_equal(cache[f"{z}_grad"], -0.5 * cache[z])
    assert list(cache) == list(everything())
    with pytest.raises(KeyError, match="incl_bwd"):
        everything()["blocks.1.hook_resid_pre_grad"]
    assert "blocks.1.hook_resid_pre_grad" not in everything()
    with pytest.raises(UnknownSite, match="resid_pre"):
        cache["resid_per_grad", 1]


# --- pytree -----------------------------------------------------------------------------------------------------------


def test_a_pytree_of_values_and_gradients():
    """jit, vmap and tree.map give a cache with its names, gradients and flags; the parameters are not in it."""
    cache = tiny().remove_batch_dim()
    for change in (lambda x: x * 2, jax.jit(lambda x: x * 2)):
        doubled = change_all(change, cache)
        assert list(doubled) == list(cache)
        assert not doubled.batched
        np.testing.assert_array_equal(doubled["resid_pre_grad", 0], 2 * cache["resid_pre_grad", 0])
        assert doubled.params is None
        assert doubled.with_params(cache.params).params is cache.params
    assert cache.params is not None
    assert len(jax.tree.leaves(cache)) == 4  # three values and one gradient: no parameters
    assert jax.tree.structure(cache) == jax.tree.structure(cache.with_params(None))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert paths[0] == "['embed.hook_in']"
    assert paths[-1] == ".grads['blocks.0.hook_in']"
    rows = jax.vmap(lambda one: one)(tiny())
    np.testing.assert_array_equal(rows["pattern", 1], cache["pattern", 1][None])


def change_all(change, cache: ActivationCache) -> ActivationCache:
    return jax.tree.map(change, cache)


# --- slices -----------------------------------------------------------------------------------------------------------

WHICH = st.one_of(st.none(), st.integers(-2, 1), st.slices(2).filter(lambda s: len(range(2)[s])))
WHERE = st.one_of(st.none(), st.integers(-P, P - 1), st.slices(P).filter(lambda s: len(range(P)[s])))


@settings(max_examples=25, deadline=None)
@given(batch=WHICH, positions=WHERE)
def test_slices(batch, positions):
    """At every site: rows of the batch axis and positions of the query axis, an int as an axis of length 1."""
    cache = with_grads(in_numpy())
    cut = cache.sliced(batch, positions)
    rows, places = (np.arange(n)[[i] if isinstance(i, int) else i] for n, i in ((B, batch), (P, positions)))
    rows, places = rows.reshape(-1), places.reshape(-1)  # None adds an axis
    for name in site_names(cache.config):
        axes = site(name).axes.split()
        # hook_rot_k is the one site whose positions are keys
        where = axes.index("k" if name.endswith("hook_rot_k") else "p")
        expected = cache[name].take(rows, axes.index("b")).take(places, where)
        np.testing.assert_array_equal(cut[name], expected)
        np.testing.assert_array_equal(cut.grads[name], -0.5 * expected)
    assert cut.params is cache.params


@functools.cache
def in_numpy() -> ActivationCache:
    return everything().numpy()


def test_slices_that_select_nothing():
    """Are errors, as is a batch to slice where there is no such axis."""
    cache = everything()
    for options in ({"positions": P}, {"positions": -P - 1}, {"positions": slice(4, 4)}, {"batch": 2}):
        with pytest.raises(ValueError, match="selects none of the"):
            cache.sliced(**options)
    with pytest.raises(TypeError, match=r"positions is \[0, 2\]; it must be an integer or a slice"):
        cache.sliced(positions=[0, 2])
    alone = cache.sliced(batch=0).remove_batch_dim()
    with pytest.raises(ValueError, match="no batch axis"):
        alone.sliced(batch=0)


def test_the_batch_axis_can_go():
    """Of one row, at every site, with the gradients'; never of two. Positions are still found without it."""
    cache = with_grads(everything())
    with pytest.raises(ValueError, match="2 rows"):
        cache.remove_batch_dim()
    alone = cache.sliced(batch=1).remove_batch_dim()
    assert not alone.batched
    assert not alone.grads.batched
    assert alone.remove_batch_dim() is alone
    late = alone.sliced(positions=-1)
    for name in ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.0.attn.hook_rot_k"):
        np.testing.assert_array_equal(alone[name], cache[name][1])
        np.testing.assert_array_equal(alone.grads[name], -0.5 * cache[name][1])
    np.testing.assert_array_equal(late["pattern", 0], cache["pattern", 0][1][:, -1:])
    np.testing.assert_array_equal(late["rot_k", 0], cache["rot_k", 0][1][-1:])
    assert same(alone["z", 1], cache["z", 1][1])
    assert not same(alone["z", 1], cache["z", 1][0])  # control


def test_slices_inside_jit():
    """Slicing a traced cache is slicing its values."""
    ours = jax.jit(lambda cache: cache.sliced(1, slice(2, 4)).remove_batch_dim())(everything())
    assert_same(ours["resid_post", -1], everything()["resid_post", -1][1, 2:4])
    assert not ours.batched


# --- numpy and files --------------------------------------------------------------------------------------------------


def test_numpy():
    """Values and gradients in host memory, in their own dtypes."""
    cache = tiny().numpy()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cache))
    assert cache["resid_pre", 0].dtype == ml_dtypes.bfloat16
    assert cache.params is tiny().params
    for name in cache:
        np.testing.assert_array_equal(cache[name], tiny()[name])
    np.testing.assert_array_equal(cache["resid_pre_grad", 0], tiny()["resid_pre_grad", 0])


def transposed(cache: ActivationCache) -> ActivationCache:
    """With an array whose memory is in another order than its axes."""
    pattern = np.arange(72, dtype=np.float32).reshape(3, 3, 8, 1).T
    return ActivationCache(cache.config, {**cache, "blocks.1.attn.hook_pattern": pattern}, None, cache.grads)


@pytest.mark.parametrize(
    "change",
    [lambda cache: cache, ActivationCache.remove_batch_dim, ActivationCache.numpy, transposed],
    ids=["as it is", "no batch axis", "numpy", "transposed"],
)
def test_a_file_gives_back_what_it_was_given(tmp_path, change):
    """Bit for bit, in dtype, order, config, gradients and batch axis; without the parameters."""
    cache = change(tiny())
    file = tmp_path / "cache.safetensors"
    cache.save(file)
    back = ActivationCache.load(file)
    assert list(back) == list(cache)
    assert (back.config, back.batched, back.params) == (cache.config, cache.batched, None)
    assert jax.tree.structure(back) == jax.tree.structure(cache)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(cache), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]


def test_no_gradients_is_not_empty_gradients(tmp_path):
    """A cache without gradients comes back without, and a file is replaced by the next save."""
    cache = tiny()
    cache.save(tmp_path / "cache")
    ActivationCache(cache.config, {}).save(tmp_path / "cache")
    back = ActivationCache.load(tmp_path / "cache")
    assert len(back) == 0
    assert back.grads is None
    ActivationCache(cache.config, {}, grads=ActivationCache(cache.config, {})).save(tmp_path / "cache")
    assert ActivationCache.load(tmp_path / "cache").grads is not None


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """Neither half a file nor a temporary one: the last whole one."""
    cache, file = tiny(), tmp_path / "cache"
    cache.save(file)
    before = file.read_bytes()

    def fail(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.sliced(positions=0).save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert file.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        cache.save(tmp_path / "nowhere" / "cache")


def test_files_that_are_no_cache(tmp_path):
    """Each is an error that names the file."""
    file = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="cache"):
        ActivationCache.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cache is truncated or corrupt"):
        ActivationCache.load(file)
    safetensors.numpy.save_file({"a": np.zeros(2)}, file)
    with pytest.raises(ValueError, match="is not an activation cache"):
        ActivationCache.load(file)
    metadata = {"config": json.dumps(small()[0].to_hf()), "batched": "true", "grads": "false"}
    safetensors.numpy.save_file({"blocks.7.hook_out": np.zeros(2)}, file, metadata)
    with pytest.raises(ValueError, match=r"has blocks\.7\.hook_out, which its model does not have"):
        ActivationCache.load(file)
