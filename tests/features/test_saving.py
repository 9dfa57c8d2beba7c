"""What is written in a format is read again as the same function, at the same sites."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma3_jax import features
from gemma3_jax.reading import CheckpointError
from tests.features.gemma_scope_files import params, write, write_layers
from tests.features.test_other_formats import FIXTURES, ONE_LAYER


def refused(case, dictionary, format):
    """Whether the format cannot hold a dictionary."""
    activation = dictionary.activation
    if isinstance(activation, features.GroupMax):
        return True
    top_k = isinstance(activation, features.TopK)
    if format == "saelens":
        return top_k and isinstance(dictionary, features.Transcoder)
    return top_k or isinstance(activation, features.Gated) or dictionary.normalization is not None


@pytest.mark.parametrize("format", ["gemma_scope", "saelens"])
@pytest.mark.parametrize("case", ONE_LAYER)
def test_a_dictionary_of_one_layer_returns(case, format, tmp_path):
    """The same kind, sites, features and outputs, or an error and no directory."""
    dictionary = features.load(FIXTURES, case)
    if refused(case, dictionary, format):
        with pytest.raises(CheckpointError, match=rf"{format} has no"):
            features.save(dictionary, tmp_path / "new", format)
        assert not list(tmp_path.iterdir())
        return
    features.save(dictionary, tmp_path / "new", format, model_name="google/gemma-3-270m")
    again = features.load(tmp_path / "new")
    assert type(again) is type(dictionary)
    assert (again.site_in, again.site_out) == (dictionary.site_in, dictionary.site_out)
    x = load_file(FIXTURES / case / "expected.safetensors")["x"]
    np.testing.assert_allclose(again.encode(x), dictionary.encode(x), atol=2e-6)
    np.testing.assert_allclose(again(x), dictionary(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["clt", "crosscoder", "circuit_tracer"])
def test_a_dictionary_of_several_layers_returns(kind, tmp_path):
    """A file for each layer; circuit-tracer's relative targets become absolute ones."""
    if kind == "circuit_tracer":
        source = FIXTURES / "circuit_tracer" / "clt_relu"
    else:
        name = "width_16k_l0_big" if kind == "clt" else "layer_2_4_9_width_16k_l0_big"
        write_layers(source := tmp_path / kind / name, causal=kind == "clt", skip=kind == "clt")
    dictionary = features.load(source)
    features.save(dictionary, tmp_path / "new")
    again = features.load(tmp_path / "new")
    assert type(again) is type(dictionary)
    assert (again.site_in, again.site_out) == (dictionary.site_in, dictionary.site_out)
    x = np.random.default_rng(0).standard_normal((3, 4, dictionary.W_enc[0].shape[0])).astype(np.float32)
    np.testing.assert_array_equal(again(x), dictionary(x))
    with pytest.raises(CheckpointError, match="saelens has no"):
        features.save(dictionary, tmp_path / "other", "saelens")


def test_the_files_are_those_of_the_format(tmp_path):
    """Names, keys and orientations, as other tools read them."""
    write(tmp_path / "transcoder" / "layer_5_width_16k_l0_big_affine", tensors := params(skip=True))
    transcoder = features.load(tmp_path / "transcoder" / "layer_5_width_16k_l0_big_affine")
    features.save(transcoder, tmp_path / "scope", model_name="google/gemma-3-270m")
    config = json.loads((tmp_path / "scope" / "config.json").read_text())
    assert config["hf_hook_point_in"] == "model.layers.5.pre_feedforward_layernorm.output"
    assert (config["type"], config["affine_connection"], config["width"]) == ("transcoder", True, 40)
    for key, tensor in load_file(tmp_path / "scope" / "params.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[key])
    features.save(transcoder, tmp_path / "lens", "saelens")
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert (config["architecture"], config["d_out"]) == ("jumprelu_skip_transcoder", 8)
    assert config["metadata"]["hook_name_out"] == "blocks.5.hook_mlp_out"
    skip = load_file(tmp_path / "lens" / "sae_weights.safetensors")["W_skip"]
    np.testing.assert_array_equal(skip, tensors["affine_skip_connection"].T)


def test_negative_features_are_not_lost(tmp_path):
    """circuit-tracer keeps them; where no threshold is negative, there are none."""
    one = features.load(FIXTURES / "circuit_tracer" / "plt_jumprelu_skip")[1]
    for format in ("gemma_scope", "saelens"):
        with pytest.raises(CheckpointError, match="rectify is False"):
            features.save(one, tmp_path / "new", format)
    positive = dataclasses.replace(one, activation=features.JumpRelu(jnp.abs(one.activation.threshold), rectify=False))
    features.save(positive, tmp_path / "new")
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_array_equal(features.load(tmp_path / "new")(x), positive(x))


def test_a_directory_that_is_there_is_kept(tmp_path):
    """Nothing is overwritten; an unknown format is refused."""
    sae = features.load(FIXTURES, "saelens/standard")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        features.save(sae, tmp_path)
    with pytest.raises(CheckpointError, match="'gemma_scope', 'saelens'"):
        features.save(sae, tmp_path / "new", "sae")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
