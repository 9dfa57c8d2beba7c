"""Files that other libraries wrote compute what those libraries compute; `reference.write_dictionaries` wrote both."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma3_jax import features

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(str(file.parent.relative_to(FIXTURES)) for file in FIXTURES.rglob("expected.safetensors"))
ONE_LAYER = [case for case in CASES if not case.startswith("circuit_tracer")]


def assert_equal_to(actual, expected):
    """To 1e-6 of the largest value; also which features are active."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(np.asarray(actual) == 0, expected == 0)


@pytest.mark.parametrize("case", ONE_LAYER)
def test_a_dictionary_equals_that_of_its_library(case):
    """Its features, its output, and its largest features."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    dictionary = features.load(FIXTURES, case)
    assert_equal_to(f := dictionary.encode(expected["x"]), expected["f"])
    assert_equal_to(dictionary(expected["x"]), expected["y"])
    assert_equal_to(dictionary.decode(f, expected["x"]), expected["y"])
    values, indices = dictionary.encode_topk(expected["x"], k=4)
    np.testing.assert_allclose(values, jax.lax.top_k(f, 4)[0], rtol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(f), indices, -1), values, rtol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "circuit_tracer/plt" in case])
def test_transcoders_of_single_layers_equal_those_of_circuit_tracer(case):
    """A folder of several gives a list, and a file gives one; a negative feature above its threshold is kept."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    transcoders = features.load(FIXTURES / case)
    for layer, transcoder in enumerate(transcoders):
        assert (transcoder.site_in, transcoder.site_out) == (
            f"blocks.{layer}.hook_resid_mid",
            f"blocks.{layer}.ln2_post.hook_out",
        )
        assert_equal_to(transcoder.encode(expected["x"][layer]), expected["f"][layer])
        assert_equal_to(transcoder(expected["x"][layer]), expected["y"][layer])
    alone = features.load(FIXTURES / case, "layer_1.safetensors")
    np.testing.assert_array_equal(alone.W_enc, transcoders[1].W_enc)
    assert ("jumprelu" in case) == bool((expected["f"] < 0).any())


@pytest.mark.parametrize("case", [case for case in CASES if "circuit_tracer/clt" in case])
def test_a_cross_layer_transcoder_equals_that_of_circuit_tracer(case):
    """Its targets have relative indices."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    clt = features.load(FIXTURES / case)
    assert clt.site_in == tuple(f"blocks.{layer}.hook_resid_mid" for layer in range(3))
    assert clt.site_out == tuple(f"blocks.{layer}.ln2_post.hook_out" for layer in range(3))
    assert_equal_to(clt.encode(expected["x"]), expected["f"])
    assert_equal_to(clt(expected["x"]), expected["y"])


@pytest.mark.parametrize("case", ["transcoder", "jumprelu_skip_transcoder"])
def test_a_transcoder_of_saelens_never_subtracts_its_bias(case, tmp_path):
    """Early versions wrote `apply_b_dec_to_input: true` for transcoders, and encoded without it, as all versions do."""
    folder = shutil.copytree(FIXTURES / "saelens" / case, tmp_path / case)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    expected = load_file(FIXTURES / "saelens" / case / "expected.safetensors")
    assert_equal_to(features.load(folder)(expected["x"]), expected["y"])


SITES = {
    "saelens/standard": ("blocks.1.hook_out", "blocks.1.hook_out"),
    "saelens/old": ("blocks.1.hook_out", "blocks.1.hook_out"),
    "saelens/hook_z": ("blocks.1.attn.o.hook_in", "blocks.1.attn.o.hook_in"),
    "saelens/skip_transcoder": ("blocks.1.ln2.hook_out", "blocks.1.ln2_post.hook_out"),
    "dictionary_learning/AutoEncoder": ("blocks.1.hook_out", "blocks.1.hook_out"),
    "sparsify/sae/layers.1": ("blocks.1.hook_out", "blocks.1.hook_out"),
    "sparsify/skip/layers.1.mlp": ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"),
    "sparsify/expanded/layers.0.self_attn": ("blocks.0.attn.hook_out", "blocks.0.attn.hook_out"),
}


@pytest.mark.parametrize("case", SITES)
def test_the_sites_of_other_formats(case):
    """By the names that each of them writes."""
    dictionary = features.load(FIXTURES, case)
    assert (dictionary.site_in, dictionary.site_out) == SITES[case]


@pytest.mark.parametrize("case", ["saelens/constant_norm", "saelens/layer_norm"])
def test_a_normalization_is_not_undone_without_its_input(case):
    """The features alone do not say it."""
    sae = features.load(FIXTURES, case)
    with pytest.raises(ValueError, match=r"call decode\(f, x\)"):
        sae.decode(np.zeros((2, sae.width), np.float32))
