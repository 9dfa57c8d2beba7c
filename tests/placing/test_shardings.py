"""The shardings of parameters, and the meshes that are refused."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from gemma3_jax import EmbeddingHead, Gemma3, Gemma3Config, forward
from gemma3_jax.analysis.sweeps import run_bytes
from gemma3_jax.generation.kv_cache import cache_bytes
from gemma3_jax.meshes import several_devices
from gemma3_jax.placing import make_mesh, param_shardings
from gemma3_jax.placing.parameters import param_axes
from tests.placing.on_meshes import TOKENS, config, mesh_of, on, params

UNTIED = dataclasses.replace(
    config(4), tie_word_embeddings=False, attention_bias=True, embedding_head=EmbeddingHead((48, 24))
)


@pytest.mark.parametrize("stacked", [False, True], ids=["blocks", "stacked"])
@pytest.mark.parametrize("shape", [config(4), UNTIED, dataclasses.replace(config(1), truncated_from=9)])
def test_every_parameter_has_a_sharding(shape, stacked):
    """In the structure of the parameters, and of a shape that it divides; for every kind of config."""
    whole = dataclasses.replace(shape, truncated_from=None)
    model = Gemma3(whole, scan_layers=stacked)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])
    shardings = param_shardings(shape, mesh_of(8), stacked)
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, shardings)


def test_letters_of_parameters():
    """As the comments of the model give them; the table of meshes cuts these."""
    axes = param_axes(UNTIED)
    assert (axes["embed"]["weight"], axes["unembed"]["weight"]) == ("V d", "d V")
    attention = {name: part["weight"] for name, part in axes["blocks_1"]["attn"].items()}
    assert attention == {"q": "h d e", "k": "g d e", "v": "g d e", "o": "h e d", "q_norm": "e", "k_norm": "e"}
    assert axes["blocks_1"]["attn"]["q"]["bias"] == "h e"
    assert {name: part["weight"] for name, part in axes["blocks_0"]["mlp"].items()} == {
        "gate": "d f",
        "in": "d f",
        "out": "f d",
    }
    assert [axes[f"dense_{j}"]["weight"] for j in (1, 2)] == ["d n1", "n1 n2"]


def explicit() -> Mesh:
    """What `jax.make_mesh` gives by default."""
    return jax.make_mesh((1, 8), ("data", "model"), devices=jax.devices()[:8])


@pytest.mark.parametrize("stacked", [False, True], ids=["blocks", "stacked"])
def test_what_is_cut(stacked):
    """The embedding by tokens, attention by heads, the MLP by neurons, and no norm; the axis of layers is whole."""
    shardings = param_shardings(UNTIED, mesh_of(4), stacked)
    block = shardings["blocks" if stacked else "blocks_0"]
    layer = (None,) if stacked else ()
    assert tuple(shardings["embed"]["weight"].spec) == ("model", None)
    assert tuple(block["attn"]["k"]["weight"].spec) == (*layer, "model", None, None)
    assert tuple(block["mlp"]["out"]["weight"].spec) == (*layer, "model", None)
    assert tuple(block["attn"]["o"]["bias"].spec) == tuple(block["ln1"]["weight"].spec) == (*layer, None)


def test_axes_that_a_mesh_does_not_divide_are_whole(caplog):
    """Key heads and a resized vocabulary; one line names them."""
    shardings = param_shardings(dataclasses.replace(config(4), vocab_size=509), mesh_of(8))
    attention = shardings["blocks_1"]["attn"]
    whole = shardings["embed"]["weight"], attention["k"]["weight"], attention["v"]["weight"]
    assert all(sharding.is_fully_replicated for sharding in whole)
    assert not attention["q"]["weight"].is_fully_replicated
    [line] = caplog.messages
    assert "8 devices" in line
    assert "g = 4: attn.k.weight, attn.v.weight" in line
    assert "V = 509: embed.weight" in line


def test_a_mesh_that_divides_everything_says_nothing(caplog):
    """As for most models on their usual machines."""
    param_shardings(config(4), mesh_of(4))
    assert not caplog.messages


def test_make_mesh():
    """Neighbouring devices share the parameters; what is left is data."""
    mesh = make_mesh(4)
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert [device.id for device in mesh.devices[0]] == [0, 1, 2, 3]
    assert dict(make_mesh(2, jax.devices()[:2]).shape) == {"data": 1, "model": 2}


@pytest.mark.parametrize("model", [3, 16, 0, -1, 2.0, True, "8"])
def test_make_mesh_refuses(model):
    """Numbers that do not divide the devices; the message has both."""
    with pytest.raises(ValueError, match=rf"model is {model!r}"):
        make_mesh(model)


def test_an_explicit_mesh_is_relabelled():
    """In the shardings of parameters, which move nothing."""
    mesh = param_shardings(config(4), explicit())["embed"]["weight"].mesh
    assert mesh == mesh_of(8)


def test_a_mesh_with_other_axes_is_refused():
    """Not silently replicated."""
    with pytest.raises(ValueError, match=r"'x'.*'data' and 'model'.*make_mesh"):
        param_shardings(config(4), Mesh(np.array(jax.devices()[:1]), ("x",)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("where", ["set", "in the parameters", "set around placed ones"])
def test_forward_refuses_an_explicit_mesh(where, jit):
    """With the remedy; JAX would stop at the first operation."""
    weights = on(mesh_of(8), 4) if where == "set around placed ones" else params(4)
    if where == "in the parameters":
        shardings = param_shardings(config(4), mesh_of(8))
        weights = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(explicit(), s.spec)), weights, shardings)

    def run(weights):
        return forward(config(4), weights, TOKENS)[0]

    with (
        contextlib.nullcontext() if where == "in the parameters" else jax.set_mesh(explicit()),
        pytest.raises(ValueError, match=r"Explicit axes.*gemma3_jax\.placing\.make_mesh.*param_shardings"),
    ):
        (jax.jit(run) if jit else run)(weights)


def test_where_several_devices_compute():
    """A mesh that is set, or that of an argument; a mesh of one device is not several."""
    x, placed = jax.numpy.ones(8), on(mesh_of(8), 4)["embed"]["weight"]
    assert several_devices(x, placed)
    assert not several_devices(x)
    with jax.set_mesh(mesh_of(8)):
        assert several_devices(x)
    with jax.set_mesh(make_mesh(1, jax.devices()[:1])):
        assert not several_devices(x)


def test_estimates_are_of_each_device():
    """The KV cache and the runs of a sweep: cut over what the mesh divides, whole where it does not."""
    shape = Gemma3Config.preset("27b")
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    whole, cut = (cache_bytes(shape, 8, 4096, mesh=each)["total"] for each in (None, mesh))
    assert whole == 8 * cut
    assert cache_bytes(shape, 3, 4096, mesh=mesh)["total"] * 4 * 8 == 3 * whole
    runs = [run_bytes(shape, (8, 512), 8 * 512, mesh=each) for each in (None, mesh)]
    assert 4 < runs[0] / runs[1] <= 8
