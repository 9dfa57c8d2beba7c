"""Dictionaries on a mesh, in little memory, and from the hub."""

import dataclasses
import fnmatch
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma3_jax import features
from gemma3_jax.features import largest
from gemma3_jax.features.dictionaries import _encode, _encode_topk, _reconstruct
from gemma3_jax.reading import CheckpointError
from tests.features.gemma_scope_files import D, params, write, write_layers
from tests.features.test_other_formats import FIXTURES
from tests.helpers.environment import as_users
from tests.placing.on_meshes import collectives, mesh_of, size_of

X = np.random.default_rng(3).standard_normal((2, 3, D)).astype(np.float32)
CONFIG = {"hf_hook_point_in": "model.layers.5.output", "type": "sae"}


@pytest.fixture
def folder(tmp_path):
    """An autoencoder of 64 features."""
    write(tmp_path, params(f=64), CONFIG)
    return tmp_path


def test_a_mesh_gives_what_one_device_gives(folder):
    """The width is cut over "model"; the largest features are compared as lists, and not as all features."""
    sae, mesh = features.load(folder), mesh_of(8)
    cut = features.load(folder, mesh=mesh)
    assert tuple(cut.W_enc.sharding.spec) == tuple(cut.W_dec.sharding.spec)[::-1] == (None, "model")
    assert tuple(cut.activation.threshold.sharding.spec) == ("model",)
    np.testing.assert_allclose(cut.encode(X), sae.encode(X), atol=1e-5)
    np.testing.assert_allclose(cut(X), sae(X), atol=1e-5)
    for k in (3, 9, 20):  # of eight features on each device
        values, indices = cut.encode_topk(X, k)
        np.testing.assert_allclose(values, sae.encode_topk(X, k)[0], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(np.asarray(sae.encode(X)), indices, -1), values, atol=1e-5)
    with jax.set_mesh(mesh):
        assert not collectives(_encode.lower(cut, jnp.asarray(X)).compile())
        assert set(collectives(_reconstruct.lower(cut, jnp.asarray(X)).compile())) == {("all-reduce", "f32[2,3,8]")}
        found = collectives(_encode_topk.lower(cut, jnp.asarray(X), 3).compile())
    assert found
    assert all(size_of(shape) <= 4 * X[..., 0].size * 8 * 3 for _, shape in found)


def test_layers_on_a_mesh(tmp_path):
    """A cross-layer transcoder, decoders included."""
    write_layers(tmp_path / "clt" / "width_16k_l0_big")
    clt, cut = (features.load(tmp_path, "clt/width_16k_l0_big", mesh=mesh) for mesh in (None, mesh_of(8)))
    assert tuple(cut.W_dec[1].sharding.spec) == ("model", None, None)
    x = np.stack([X, 2 * X, 3 * X])
    np.testing.assert_allclose(cut(x), clt(x), atol=1e-4)
    np.testing.assert_allclose(cut.encode_topk(x, 4)[0], clt.encode_topk(x, 4)[0], atol=1e-5)


@pytest.mark.parametrize("chunk", [64, 16, 15, 1])
def test_chunks_of_any_size(chunk, tmp_path, monkeypatch):
    """The last may be smaller; of equal values, the first features are kept, as without chunks."""
    monkeypatch.setattr(largest, "CHUNK", chunk)
    write(tmp_path, params(f=60 + chunk), CONFIG)  # a width of its own: programs are kept by shapes
    sae = features.load(tmp_path)
    values, indices = jax.lax.top_k(sae.encode(X), 20)
    found = sae.encode_topk(X, 20)
    np.testing.assert_allclose(found[0], values, atol=1e-5)
    np.testing.assert_array_equal(found[1], indices)


def test_groups_are_not_cut_by_chunks(folder, monkeypatch):
    """Of 16 neighbours the largest is active, whatever the size of a chunk and on a mesh that would cut them."""
    sae = dataclasses.replace(features.load(folder), activation=features.GroupMax(16))
    assert ((np.asarray(sae.encode(X)).reshape(2, 3, 4, 16) > 0).sum(-1) <= 1).all()
    wanted = jax.lax.top_k(sae.encode(X), 5)
    monkeypatch.setattr(largest, "CHUNK", 20)
    for each in (sae, jax.device_put(sae, features.shardings(sae, mesh_of(8)))):
        np.testing.assert_allclose(each.encode_topk(X, 5)[0], wanted[0], atol=1e-5)


def test_gradients_and_transforms(folder):
    """Through active features, as for a ReLU; the same through the largest features; and a dictionary is a pytree."""
    sae = features.load(folder)
    x = jnp.asarray(X)
    active = (sae.encode(x) > 0).astype(jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda x: sae.encode(x).sum())(x), active @ sae.W_enc.T, rtol=1e-5)
    most = int(active.sum(-1).max())
    largest = jax.grad(lambda x: sae.encode_topk(x, most)[0].sum())(x)
    np.testing.assert_allclose(largest, active @ sae.W_enc.T, rtol=1e-4, atol=1e-5)
    of_weights = jax.jit(jax.grad(lambda sae: sae(x).sum()))(sae)
    np.testing.assert_allclose(of_weights.b_dec, np.full(D, 6.0))
    np.testing.assert_allclose(jax.vmap(sae.encode)(x), sae.encode(x), atol=1e-6)
    assert sae.encode(x.astype(jnp.bfloat16)).dtype == sae(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_weights_of_other_dtypes(dtype, folder):
    """Everything is computed in float32."""
    weights = {key: value.astype(dtype) for key, value in params(f=64).items()}
    save_file(weights, folder / "params.safetensors")
    sae = features.load(folder)
    z = X @ weights["w_enc"].astype(np.float32) + weights["b_enc"].astype(np.float32)
    expected = np.maximum(z, 0) * (z > weights["threshold"].astype(np.float32))
    np.testing.assert_allclose(sae.encode(X), expected, atol=1e-5)
    assert sae.encode_topk(X, 2)[0].dtype == np.float32


def test_weights_that_are_not_finite_are_refused(folder):
    """The message has the attribute; an infinite threshold is that of a dead feature."""
    tensors = params(f=64)
    tensors["threshold"][0] = np.inf
    write(folder, tensors)
    assert not np.asarray(features.load(folder).encode(X))[..., 0].any()
    tensors["w_dec"][3, 2] = np.nan
    write(folder, tensors)
    with pytest.raises(CheckpointError, match="W_dec has NaN or infinity"):
        features.load(folder)


CHILD = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from gemma3_jax import features

def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

jnp.zeros(1).block_until_ready()
base = memory("VmRSS")
clt = features.load(sys.argv[1])
x = np.ones((len(clt.W_enc), 4, clt.W_enc[0].shape[0]), np.float32)
f = np.asarray(clt.encode(x))
y = np.asarray(clt.decode(f, x))
values, _ = clt.encode_topk(x, 8)
print(json.dumps({"base": base, "peak": memory("VmHWM"), "active": int((f > 0).sum()), "y": float(abs(y).max())}))
"""


def test_a_cross_layer_transcoder_in_a_tenth_of_its_size(tmp_path):
    """Of 18 layers in the published layout. The files are mostly holes, which are read as zeros."""
    layers, d, f = 18, 640, 3072
    large = tmp_path / "clt" / "width_55k_l0_big"
    large.mkdir(parents=True)
    sizes = {"b_dec": (d,), "b_enc": (f,), "threshold": (f,), "w_dec": (f, layers, d), "w_enc": (d, f)}
    for layer in range(layers):
        header, end = {}, 0
        for key, shape in sizes.items():
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * int(np.prod(shape))]}
        content = json.dumps(header).encode()
        with (large / f"params_layer_{layer}.safetensors").open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            start = file.tell()
            file.seek(start + header["b_enc"]["data_offsets"][0])
            file.write(np.float32([1.0] * 50).tobytes())  # these features are active
            file.truncate(start + end)
    total = sum(file.stat().st_size for file in large.iterdir())
    command = [sys.executable, "-c", CHILD, str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=as_users())
    found = json.loads(done.stdout)
    assert found["active"] == layers * 4 * 50
    assert found["peak"] - found["base"] < total / 10, f"{(found['peak'] - found['base']) / total:.3f} of the files"


def test_only_the_files_of_a_dictionary_are_downloaded(tmp_path, monkeypatch):
    """Not its examples, which are large, nor other folders; of several layers in a folder, the one that was named."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    path = "resid_post/layer_9_width_16k_l0_medium"
    write(hub / path, params(), CONFIG)
    for other in (f"{path}/examples.safetensors", "resid_post/layer_5_width_16k_l0_medium/params.safetensors"):
        (hub / other).parent.mkdir(parents=True, exist_ok=True)
        (hub / other).write_bytes(b"large")
    shutil.copytree(FIXTURES / "circuit_tracer" / "plt_relu", hub / "plt")

    def download(name, revision=None, allow_patterns=()):
        for file in hub.rglob("*"):
            local = str(file.relative_to(hub))
            if file.is_file() and any(fnmatch.fnmatch(local, pattern) for pattern in allow_patterns):
                (cache / local).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / local)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sae = features.load("google/gemma-scope-2-270m-pt", path)
    assert sae.site_in == "blocks.5.hook_out"  # as the config says
    assert {file.name for file in cache.rglob("*") if file.is_file()} == {"config.json", "params.safetensors"}
    one = features.load("org/plt", "plt/layer_1.safetensors")
    assert one.site_in == "blocks.1.hook_resid_mid"
    assert {file.name for file in (cache / "plt").iterdir()} == {"config.yaml", "layer_1.safetensors"}
    np.testing.assert_array_equal(one.W_enc, load_file(hub / "plt" / "layer_1.safetensors")["W_enc"].T)
    with pytest.raises(CheckpointError, match=re.escape("has no folder nothing")):
        features.load("org/plt", "nothing")


def test_the_largest_features_take_the_memory_of_a_chunk():
    """Not that of all features of every token. Control: all features do."""
    d, f, tokens = 8, 2**18, 256
    of = jax.ShapeDtypeStruct
    sae = features.SparseAutoencoder(
        W_enc=of((d, f), jnp.float32),
        b_enc=of((f,), jnp.float32),
        W_dec=of((f, d), jnp.float32),
        b_dec=of((d,), jnp.float32),
        activation=features.JumpRelu(of((f,), jnp.float32)),
        site_in="blocks.0.hook_out",
    )
    x = of((tokens, d), jnp.float32)
    chunk = 4 * largest.CHUNK * (tokens + d)
    memory = _encode_topk.lower(sae, x, 16).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * chunk < 4 * f * tokens / 4
    assert _encode.lower(sae, x).compile().memory_analysis().output_size_in_bytes >= 4 * f * tokens
