"""`run_with_cache`: which sites are kept, under which names, and which positions of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import UnknownSite, site_names
from gemma3_jax.sites.table import SITES, site
from tests.hooked.word_model import BLOCKS, CONFIG, IDS, LAYERS, assert_close, differ, everything, hf_values, hooked


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.1.hook_resid_post", BLOCKS[1:]),
        ("model.layers.1.output", BLOCKS[1:]),
        ("blocks.*.hook_resid_post", BLOCKS),
        (["blocks.1.hook_out", "blocks.0.hook_out"], BLOCKS),
        (lambda name: name.endswith("hook_resid_post"), BLOCKS),
        (None, site_names(CONFIG)),
        ([], []),
    ],
    ids=["name", "HF path", "glob", "list", "predicate", "None", "empty list"],
)
def test_names_filter(names_filter, expected):
    """A name, a glob, a list or a predicate keeps those sites, in the model's order; None keeps all."""
    _, cache = hooked().run_with_cache(IDS, names_filter, return_type=None)
    assert list(cache) == list(expected)
    assert len(cache) == len(expected)
    if "blocks.1.hook_out" in expected:
        assert_close(cache["blocks.1.hook_out"], hf_values()[1]["model.layers.1.output"])


def test_hf_paths_have_hugging_faces_values_in_its_layout():
    """Under the path of any of Hugging Face's modules the cache gives what that module took or returned."""
    cache, values = everything(), hf_values()[1]
    paths = {row.hf.replace("{i}", str(i)) for row in SITES if row.hf for i in range(LAYERS)}
    assert paths == {path for path in values if "act_fn" not in path}
    for path in paths:
        assert cache[path].shape == tuple(values[path].shape), path
        assert_close(cache[path], values[path].numpy())
    z = "model.layers.0.self_attn.o_proj.input"
    assert cache[z].shape == (2, 9, 80)
    assert cache["blocks.0.attn.hook_z"].shape == (2, 9, 8, 10)
    other_order = np.swapaxes(cache["blocks.0.attn.hook_z"], -1, -2).reshape(2, 9, 80)
    assert differ(other_order, cache[z])  # control


def test_the_cache_takes_any_name():
    """Canonical, legacy and prefixed Hugging Face names index one value; membership and iteration agree."""
    cache = everything()
    names = ("blocks.1.hook_out", "blocks.1.hook_resid_post", "model.layers.1.output", "layers.1.output")
    for name in (*names, "model.language_model.layers.1.output", "language_model.model.layers.1.output"):
        np.testing.assert_array_equal(cache[name], cache["blocks.1.hook_out"])
        assert name in cache
        assert cache.get(name) is not None
    assert "nonsense" not in cache
    assert set(cache.keys()) == set(cache) == set(dict(cache.items()))
    assert repr(cache).splitlines()[1].split() == ["embed.hook_in", "[2,", "9]", "int32"]


def test_a_missing_entry_says_what_is_there():
    """A site that was not captured is a KeyError that lists what was; a name of no site is an UnknownSite."""
    _, cache = hooked().run_with_cache(IDS, BLOCKS)
    with pytest.raises(KeyError) as caught:
        cache["blocks.0.attn.hook_z"]
    message = str(caught.value)
    assert "blocks.0.attn.o.hook_in was not captured" in message
    assert all(name in message for name in BLOCKS)
    with pytest.raises(UnknownSite, match="hook_resid_post"):
        cache["blocks.0.hook_resid_psot"]
    assert "blocks.0.attn.hook_z" not in cache
    _, empty = hooked().run_with_cache(IDS, [])
    with pytest.raises(KeyError, match="nothing"):
        empty["blocks.0.hook_out"]


def test_the_cache_is_a_pytree():
    """tree.map and jit take a cache and give one back, with its names."""
    _, cache = hooked().run_with_cache(IDS, BLOCKS)
    doubled = jax.tree.map(lambda value: value * 2, cache)
    assert type(doubled) is type(cache)
    assert list(doubled) == BLOCKS
    np.testing.assert_array_equal(doubled["blocks.0.hook_resid_post"], cache["blocks.0.hook_out"] * 2)
    through = jax.jit(lambda cache: jax.tree.map(jnp.sum, cache))(cache)
    assert through["blocks.1.hook_out"] == pytest.approx(float(cache["blocks.1.hook_out"].sum()), rel=1e-4)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert paths == [f"['{name}']" for name in BLOCKS]
    moved = jax.tree.map(lambda one, two: one - two, doubled, cache)
    np.testing.assert_array_equal(moved["blocks.1.hook_out"], cache["blocks.1.hook_out"])


@pytest.mark.parametrize("stop", [0, 1, -1])
def test_stop_at_layer(stop):
    """The stream that enters the layer is returned, and only what ran before it is kept."""
    before = stop % LAYERS
    out, cache = hooked().run_with_cache(IDS, "**.hook_out", stop_at_layer=stop)
    assert_close(out, everything()[f"blocks.{before}.hook_in"])
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {str(i) for i in range(before)}
    assert "embed.hook_out" in cache


# Kept from block 0 alone, so that little compiles: sites with one position axis, with two, and on the key axis.
SLICED = ("embed.hook_in", "blocks.0.hook_in", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_k")


@pytest.mark.parametrize(
    ("pos_slice", "kept"),
    [
        (3, slice(3, 4)),
        (-1, slice(8, 9)),
        (slice(2, 5), slice(2, 5)),
        (slice(-2, None), slice(7, 9)),
        (slice(None, None, 3), slice(None, None, 3)),
    ],
)
def test_pos_slice(pos_slice, kept):
    """Only those (query) positions are kept, and an int keeps its axis, of length 1."""
    _, cache = hooked().run_with_cache(IDS, SLICED, return_type=None, pos_slice=pos_slice)
    for name, value in cache.items():
        axes = site(name).axes.split()
        axis = axes.index("p" if "p" in axes else "k")
        assert_close(value, np.asarray(everything()[name])[(slice(None),) * axis + (kept,)])
    assert cache["blocks.0.attn.hook_pattern"].shape[-1] == 9


def test_remove_batch_dim():
    """A batch of one loses its axis in the cache, under every name; the result keeps it."""
    out, cache = hooked().run_with_cache(IDS[:1], SLICED, stop_at_layer=1, remove_batch_dim=True, pos_slice=-1)
    assert out.shape == (1, 9, 48)
    assert {name: value.shape for name, value in cache.items()} == {
        "embed.hook_in": (1,),
        "blocks.0.hook_in": (1, 48),
        "blocks.0.attn.hook_pattern": (8, 1, 9),
        "blocks.0.attn.hook_rot_k": (1, 2, 10),
    }
    assert_close(cache["blocks.0.hook_in"], everything()["blocks.0.hook_in"][0, -1:])
    assert cache["model.layers.0.input"].shape == (1, 48)
