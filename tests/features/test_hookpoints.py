"""Names of sites in configs have one meaning, or are refused with the choices."""

import json
import shutil
from pathlib import Path

import pytest

from gemma3_jax import features
from gemma3_jax.features.hookpoints import site_of
from gemma3_jax.reading import CheckpointError
from tests.features.gemma_scope_files import params, write

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def with_config(tmp_path):
    """A function that copies a case and changes its config; None removes a setting."""

    def change(case, file="cfg.json", **settings):
        folder = shutil.copytree(FIXTURES / case, tmp_path / case)
        config = json.loads((folder / file).read_text())
        for name, value in settings.items():
            part = config if name in config else config.get("metadata") or config.get("trainer") or config
            part[name] = value
        (folder / file).write_text(json.dumps(config))
        return folder

    return change


def test_a_name_that_has_meant_two_tensors_is_refused(with_config):
    """SAELens' hook_mlp_in; the message has both, either of which works, and a Hugging Face name settles it."""
    folder = with_config("saelens/transcoder", hook_name="blocks.4.hook_mlp_in")
    with pytest.raises(CheckpointError, match=r"give site_in='(\S+)' or site_in='(\S+)' to load") as refused:
        features.load(folder)
    for choice in ("blocks.4.hook_resid_mid", "blocks.4.ln2.hook_out"):
        assert repr(choice) in str(refused.value)
        assert features.load(folder, site_in=choice).site_in == choice
    named = with_config(
        "saelens/skip_transcoder",
        hook_name="blocks.4.hook_mlp_in",
        hf_hook_name="model.layers.4.pre_feedforward_layernorm.output",
    )
    assert features.load(named).site_in == "blocks.4.ln2.hook_out"


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_pre_layer_7", "blocks.7.hook_in"),
        ("model.layers.7.mlp.output", "blocks.7.mlp.hook_out"),
        ("mlp_out_layer_7", None),
        ("attn_out_layer_7", None),
        ("residual", None),
        (None, None),
    ],
)
def test_names_of_submodules(name, site, with_config):
    """dictionary_learning's users choose them; without a post-norm they would be plain, so Gemma's are refused."""
    folder = with_config("dictionary_learning/BatchTopKSAE", "config.json", submodule_name=name)
    if site is None:
        with pytest.raises(CheckpointError, match="site_in="):
            features.load(folder)
        site = "blocks.7.ln2_post.hook_out"
        assert features.load(folder, site_in=site).site_in == site
    else:
        assert features.load(folder).site_in == site


def test_a_transcoder_needs_both_sites(with_config):
    """The output's is never guessed from the input's."""
    folder = with_config("saelens/transcoder", hook_name_out=None)
    with pytest.raises(CheckpointError, match=r"hook_name_out.*site_out="):
        features.load(folder)
    assert features.load(folder, site_out="blocks.1.hook_mlp_out").site_out == "blocks.1.ln2_post.hook_out"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "matching_pursuit"}, "the architecture 'matching_pursuit' is not supported"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is 'covariance_whitening'"),
        ({"hook_head_index": 3}, "one head alone"),
        ({"hook_name": "blocks.99.hook_resid_post"}, r"no site is named 'blocks\.99\.hook_resid_post'"),
        ({"hook_name": 5}, "is 5, not the name of a site"),
    ],
)
def test_settings_of_saelens_that_are_refused(settings, message, with_config):
    """What would compute something else is an error."""
    with pytest.raises(CheckpointError, match=message):
        features.load(with_config("saelens/standard", **settings))


@pytest.mark.parametrize("value", [True, "expected_average_only_in"])
def test_a_scale_that_the_files_do_not_have_warns(value, with_config):
    """A boolean is from before version 6."""
    with pytest.warns(UserWarning, match="scaled to an average norm"):
        features.load(with_config("saelens/old", normalize_activations=value))


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.3.output", "blocks.3.hook_out"),
        ("model.language_model.layers.3.self_attn.o_proj.input", "blocks.3.attn.o.hook_in"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.o.hook_in"),
        ("blocks.3.hook_mlp_out", "blocks.3.ln2_post.hook_out"),
        ("blocks.3.hook_attn_out", "blocks.3.ln1_post.hook_out"),
        ("blocks.3.ln2.hook_normalized", "blocks.3.ln2.hook_normalized"),
    ],
)
def test_names_with_one_meaning(name, site):
    """Of all three systems, whatever class of Hugging Face they are from."""
    assert site_of(name, "config", "site_in") == site


def test_a_site_of_another_size_is_refused(tmp_path):
    """SAELens once named the output of attention for dictionaries of its heads: the sizes tell them apart."""
    write(tmp_path, params(d_in=1024, d_out=1024, f=3))
    config = {"hf_hook_point_in": "blocks.9.hook_attn_out", "type": "sae", "model_name": "google/gemma-3-270m-it"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has 640 features in gemma-3-270m.*1024, as have blocks\.9\.attn\.o\.h"):
        features.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hf_hook_point_in": "blocks.9.attn.hook_z"}))
    assert features.load(tmp_path).site_in == "blocks.9.attn.o.hook_in"  # control
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_name": "a model of my own"}))
    assert features.load(tmp_path).site_in == "blocks.9.ln1_post.hook_out"
