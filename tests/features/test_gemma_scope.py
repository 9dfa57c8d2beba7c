"""Gemma Scope 2: what is read is what was written, at the site that the config or the path says."""

import jax
import numpy as np
import pytest

from gemma3_jax import features
from gemma3_jax.reading import CheckpointError
from tests.features.gemma_scope_files import (
    LAYERS,
    D,
    F,
    encoded,
    layered_output,
    output,
    params,
    write,
    write_layers,
)

X = np.random.default_rng(9).standard_normal((2, 5, D)).astype(np.float32)
LAYERED_X = np.random.default_rng(9).standard_normal((LAYERS, 2, 5, D)).astype(np.float32)
MLP_IN, MLP_OUT = "model.layers.5.pre_feedforward_layernorm.output", "model.layers.5.post_feedforward_layernorm.output"


def test_an_autoencoder(tmp_path):
    """Its features, its output, and its largest features."""
    write(tmp_path, tensors := params(), {"hf_hook_point_in": "model.layers.5.output", "type": "sae"})
    sae = features.load(tmp_path)
    assert isinstance(sae, features.SparseAutoencoder)
    assert (sae.site_in, sae.site_out, sae.width) == ("blocks.5.hook_out", "blocks.5.hook_out", F)
    np.testing.assert_allclose(sae.encode(X), expected := encoded(tensors, X), atol=1e-5)
    np.testing.assert_allclose(sae(X), output(tensors, X), atol=1e-4)
    np.testing.assert_array_equal(sae.decode(sae.encode(X)), sae(X))
    values, indices = sae.encode_topk(X, k=3)
    np.testing.assert_allclose(values, np.sort(expected, axis=-1)[..., :-4:-1], atol=1e-5)
    np.testing.assert_array_equal(values, np.take_along_axis(np.asarray(sae.encode(X)), indices, axis=-1))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder(skip, tmp_path):
    """The skip connection reads the input untransposed."""
    config = {"hf_hook_point_in": MLP_IN, "hf_hook_point_out": MLP_OUT, "type": "transcoder"}
    write(tmp_path, tensors := params(skip=skip), config)
    transcoder = features.load(tmp_path)
    assert isinstance(transcoder, features.Transcoder)
    assert (transcoder.site_in, transcoder.site_out) == ("blocks.5.ln2.hook_out", "blocks.5.ln2_post.hook_out")
    np.testing.assert_allclose(transcoder(X), output(tensors, X), atol=1e-4)
    if skip:
        turned = {**tensors, "affine_skip_connection": tensors["affine_skip_connection"].T}
        assert abs(transcoder(X) - output(turned, X)).max() > 0.1  # control
        np.testing.assert_allclose(  # what features write, without the input
            transcoder.decode(transcoder.encode(X)),
            output(tensors, X) - X @ tensors["affine_skip_connection"],
            atol=1e-4,
        )


def test_a_feature_at_its_threshold_is_not_active(tmp_path):
    """The comparison is strict; and a negative z is 0 under a threshold that is more negative."""
    tensors = params(f=3)
    tensors |= {"w_enc": np.zeros((D, 3), np.float32), "b_enc": np.float32([0.5, np.nextafter(np.float32(0.5), 1), -1])}
    write(tmp_path, {**tensors, "threshold": np.float32([0.5, 0.5, -2])})
    sae = features.load(tmp_path, site_in="blocks.0.hook_out", site_out="blocks.0.hook_out")
    assert (np.asarray(sae.encode(X[0, 0])) > 0).tolist() == [False, True, False]
    assert sae.encode(X[0, 0])[2] == 0


def test_heads_are_flattened(tmp_path):
    """The site has an axis of heads, and so has the output."""
    write(tmp_path, tensors := params(), {"hf_hook_point_in": "model.layers.0.self_attn.o_proj.input", "type": "sae"})
    sae = features.load(tmp_path)
    assert sae.site_in == "blocks.0.attn.o.hook_in"
    by_head = X.reshape(2, 5, 2, D // 2)
    np.testing.assert_array_equal(sae.encode(by_head), sae.encode(X))
    np.testing.assert_allclose(sae(by_head), output(tensors, X).reshape(by_head.shape), atol=1e-4)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.o\.hook_in.* reads 8 features"):
        sae.encode(X[..., :-1])


PATHS = [
    ("resid_post/layer_9_width_16k_l0_medium", "blocks.9.hook_out", "blocks.9.hook_out"),
    ("resid_post_all/layer_0_width_262k_l0_small", "blocks.0.hook_out", "blocks.0.hook_out"),
    ("attn_out/layer_12_width_16k_l0_big", "blocks.12.attn.o.hook_in", "blocks.12.attn.o.hook_in"),
    ("mlp_out_all/layer_3_width_16k_l0_big", "blocks.3.ln2_post.hook_out", "blocks.3.ln2_post.hook_out"),
    ("transcoder/layer_5_width_16k_l0_big_affine", "blocks.5.ln2.hook_out", "blocks.5.ln2_post.hook_out"),
]


@pytest.mark.parametrize(("path", "site_in", "site_out"), PATHS)
def test_a_path_says_the_site_where_there_is_no_config(path, site_in, site_out, tmp_path):
    """As in some published folders."""
    write(tmp_path / path, params())
    loaded = features.load(tmp_path, path)
    assert (loaded.site_in, loaded.site_out) == (site_in, site_out)


@pytest.mark.parametrize("config", [{"hf_hook_point_out": None}, {"type": "sae"}, {}])
def test_an_autoencoder_without_an_output(config, tmp_path):
    """It is at its input; a transcoder's is not, and is asked for."""
    write(tmp_path, params(), {"hf_hook_point_in": "model.layers.5.output", **config})
    assert isinstance(features.load(tmp_path), features.SparseAutoencoder)
    write(tmp_path, params(), {"hf_hook_point_in": MLP_IN})
    with pytest.raises(CheckpointError, match="give site_out= to load"):
        features.load(tmp_path)


def test_sites_that_nobody_says_are_refused(tmp_path):
    """With the remedy, which works."""
    write(tmp_path, params())
    with pytest.raises(CheckpointError, match="give site_in= to load"):
        features.load(tmp_path)
    assert features.load(tmp_path, site_in="model.layers.1.output", site_out="blocks.1.hook_resid_post").site_in == (
        "blocks.1.hook_out"
    )
    with pytest.raises(CheckpointError, match=r"no site is named 'blocks\.1\.nothing'"):
        features.load(tmp_path, site_in="blocks.1.nothing")


@pytest.mark.parametrize("on_device", [False, True])
def test_a_cross_layer_transcoder(on_device, tmp_path):
    """Its decoders are read from the file, or are on a device; targets have absolute indices."""
    points = {
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        "type": "clt",
    }
    layers = write_layers(tmp_path, config=points)
    clt = features.load(tmp_path)
    assert isinstance(clt, features.CrossLayerTranscoder)
    assert isinstance(clt.W_dec[0], np.ndarray)
    assert clt.site_in == tuple(f"blocks.{layer}.ln2.hook_out" for layer in range(LAYERS))
    assert clt.site_out == tuple(f"blocks.{layer}.ln2_post.hook_out" for layer in range(LAYERS))
    clt = jax.device_put(clt) if on_device else clt
    expected = layered_output(layers, LAYERED_X)
    np.testing.assert_allclose(clt(LAYERED_X), expected, atol=1e-4)
    np.testing.assert_allclose(clt(dict(zip(clt.site_in, LAYERED_X, strict=True))), expected, atol=1e-4)
    np.testing.assert_allclose(clt.encode(LAYERED_X)[1], encoded(layers[1], LAYERED_X[1]), atol=1e-5)
    values, indices = clt.encode_topk(list(LAYERED_X), k=4)
    assert values.shape == indices.shape == (LAYERS, 2, 5, 4)
    assert abs(clt(LAYERED_X[::-1]) - expected).max() > 0.1  # control


def test_what_dictionaries_say_of_themselves(tmp_path):
    """At the prompt: their sizes and sites, and no numbers; also without arrays, as inside `jit`."""
    write(tmp_path / "transcoder" / "layer_5_width_16k_l0_big", params())
    write_layers(tmp_path / "clt" / "width_262k_l0_big")
    transcoder, clt = (
        features.load(tmp_path, path) for path in ("transcoder/layer_5_width_16k_l0_big", "clt/width_262k_l0_big")
    )
    lines = repr(transcoder).splitlines()
    assert lines[0] == "Transcoder: 40 features, JumpRelu"
    assert lines[1].split() == ["reads", "blocks.5.ln2.hook_out", "8"]
    assert lines[2].split() == ["writes", "blocks.5.ln2_post.hook_out", "8"]
    assert repr(clt).splitlines()[0] == "CrossLayerTranscoder: 3 layers of 40 features, JumpRelu"
    assert "blocks.0.ln2_post.hook_out to blocks.2.ln2_post.hook_out" in repr(clt)
    shapes = jax.eval_shape(lambda: transcoder)
    assert repr(shapes) == repr(transcoder)


def test_a_cross_layer_transcoder_that_writes_backwards_warns(tmp_path):
    """Its parts for earlier layers are left out."""
    layers = write_layers(tmp_path / "clt" / "width_262k_l0_big", causal=False)
    with pytest.warns(UserWarning, match=r"w_dec of the layers \[1, 2\] has targets before"):
        clt = features.load(tmp_path / "clt" / "width_262k_l0_big")
    for layer, tensors in enumerate(layers):
        tensors["w_dec"][:, :layer] = 0
    np.testing.assert_allclose(clt(LAYERED_X), layered_output(layers, LAYERED_X), atol=1e-4)


@pytest.mark.parametrize("sites", ["blocks.5.ln2.hook_out", ["blocks.0.hook_out"] * 3, ["blocks.0.hook_out"]])
def test_several_layers_have_several_sites(sites, tmp_path):
    """A name without a place for the layer is refused, and "*" is that place."""
    write_layers(tmp_path)
    outputs = [f"model.layers.{layer}.mlp.output" for layer in range(LAYERS)]
    with pytest.raises(CheckpointError, match=r"site_in: .* are 1 sites, for 3 layers"):
        features.load(tmp_path, site_in=sites, site_out=outputs)
    clt = features.load(tmp_path, site_in="blocks.*.ln2.hook_normalized", site_out=outputs)
    assert (clt.site_in[2], clt.site_out[1]) == ("blocks.2.ln2.hook_normalized", "blocks.1.mlp.hook_out")


@pytest.mark.parametrize("named", [False, True])
def test_a_crosscoder(named, tmp_path):
    """Its layers are those of its config or its path; what it writes to each is used."""
    path = tmp_path / "crosscoder" / "layer_5_9_12_width_16k_l0_small"
    config = {"hf_hook_point_in": "model.layers.{5,9,12}.output", "type": "crosscoder"} if named else None
    layers = write_layers(path, causal=False, skip=False, config=config)
    crosscoder = features.load(path)
    assert isinstance(crosscoder, features.Crosscoder)
    assert crosscoder.site_in == crosscoder.site_out == tuple(f"blocks.{layer}.hook_out" for layer in (5, 9, 12))
    np.testing.assert_allclose(crosscoder(LAYERED_X), layered_output(layers, LAYERED_X, skip=False), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_dec": np.zeros((F, D + 1), np.float32)}, r"b_dec has shape \[8\]; it must be \[o\] = \[9\]"),
        ({"threshold": np.zeros(F, np.int32)}, "threshold has dtype int32"),
        ({"b_enc": None}, r"params\.safetensors has no tensor b_enc; its tensors are: b_dec"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    """With their names and shapes."""
    tensors = {key: value for key, value in {**params(), **change}.items() if value is not None}
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        features.load(tmp_path, site_in="blocks.0.hook_out", site_out="blocks.0.hook_out")


def test_a_folder_without_a_dictionary_is_refused(tmp_path):
    """The message has what is there; a missing layer of a CLT is named."""
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"it has notes\.txt"):
        features.load(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder nowhere"):
        features.load(tmp_path, "nowhere")
    write_layers(tmp_path)
    (tmp_path / "params_layer_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not params_layer_1\.safetensors"):
        features.load(tmp_path)
