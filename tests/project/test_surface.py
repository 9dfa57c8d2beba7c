"""The public names: they are there, they are what they say, and none comes or goes unseen."""

import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import chex
import pytest

import gemma3_jax
from gemma3_jax import HookedGemma3, analysis, grad_at
from tests.helpers.small_model import TOKENS, small

SURFACE = {
    "gemma3_jax": "TINY ActivationCache ConfigError EmbeddingHead FactoredMatrix Gemma3 Gemma3Config Hook HookPoint "
    "HookedGemma3 Rope UnknownSite analysis edits features forward get_act_name grad_at harvest next_token_loss "
    "patching pictures reductions site_names stack_layers unstack_layers",
    "conversion": "CheckpointError convert_checkpoint convert_state_dict export_checkpoint load_params read_heads "
    "save_params",
    "conversion.parity": "Report Row compare compare_sites parity",
    "gemma3_jax.edits": "Add Clamp FromCache FromRow Mean Noise Only ProjectOut Replace Scale only",
    "gemma3_jax.features": "TINY CrossLayerTranscoder Crosscoder Encode Gated GroupMax JumpRelu LayerNorm Relu "
    "SparseAutoencoder TopK Transcoder UnitNorm dashboard feature_attribution load prompt_view save search "
    "shardings splice steer train",
    "gemma3_jax.generation": "Generation generate",
    "gemma3_jax.harvest": "ActivationStore JsonLines Parquet StoreError TextLines harvest verify",
    "gemma3_jax.placing": "Fit fits make_mesh param_shardings",
    "gemma3_jax.reductions": "At Cast Int8 Int8Values Mean Project TopK TopValues",
    "gemma3_jax.pictures": "BlockMap Heatmaps ParityPicture SideBySide TokenFlow attention_patterns block_map "
    "feature_on_texts generated_values logit_lens_table parity_picture patching_heatmap side_by_side token_values",
}
MEMBERS = {
    "HookedGemma3": "W_E W_K W_O W_Q W_U W_V W_gate W_in W_out activations attention_mask embed encode from_hf "
    "from_pretrained "
    "generate generate_stream get_token_position inputs mesh run_with_cache run_with_hooks to_single_str_token "
    "to_single_token to_str_tokens to_string to_tokens tokens_to_residual_directions tree_flatten_with_keys "
    "tree_unflatten",
    "ActivationCache": "accumulated_resid apply_ln_to_stack compute_head_results decompose_resid get "
    "get_full_resid_decomposition get_neuron_results items keys load logit_attrs neuron_logit_attrs numpy real "
    "remove_batch_dim save sliced stack_activation stack_head_results stack_neuron_results tree_flatten_with_keys "
    "tree_unflatten values with_inputs with_params",
}
MODULES = {"analysis", "edits", "features", "gemma3_jax.harvest", "patching", "pictures", "reductions"}


@pytest.mark.parametrize("name", SURFACE)
def test_public_names(name):
    """A change of the public names changes this list, and the changelog."""
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(SURFACE[name].split())
    assert set(module.__all__) <= set(dir(module))
    for public in module.__all__:
        is_module = public in MODULES or f"{name}.{public}" in MODULES  # `harvest.harvest` is a function
        assert isinstance(getattr(module, public), types.ModuleType) == is_module, public


@pytest.mark.parametrize("name", SURFACE)
def test_public_functions_have_docstrings(name):
    """And classes."""
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), public


@pytest.mark.parametrize("name", MEMBERS)
def test_public_members_of_a_class(name):
    """Each is there, has a docstring, and is listed."""
    public = {member for member in dir(getattr(gemma3_jax, name)) if not member.startswith("_")}
    assert public == set(MEMBERS[name].split())
    inherited = set(dir(Mapping)) | {"tree_flatten_with_keys", "tree_unflatten"}
    for member in public - inherited:
        assert inspect.getdoc(getattr(getattr(gemma3_jax, name), member)), member


@pytest.mark.parametrize(
    ("call", "new"),
    [
        (lambda model, **names: grad_at(model.config, model.params, TOKENS, **names)[1], "capture"),
        (lambda model, **names: analysis.logit_lens(model, TOKENS, **names), "names_filter"),
    ],
)
def test_the_old_name_of_an_argument_warns(call, new):
    """It gives the same result; both names at once are refused."""
    model, sites = HookedGemma3(*small()), "blocks.*.hook_resid_post"
    with pytest.warns(DeprecationWarning, match=f"names is now {new}"):
        old = call(model, names=sites)
    chex.assert_trees_all_equal(old, call(model, **{new: sites}))
    with pytest.raises(TypeError, match=new):
        call(model, names=sites, **{new: sites})


def run(code, directory):
    """Run code in a new process that starts in the directory, which comes first on the path."""
    code = f"import sys; sys.path[:0] = ['.', {str(Path(__file__).parents[2])!r}]\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=False)


def test_a_module_of_the_users_does_not_hide_ours(tmp_path):
    """A file `conversion.py` in the working directory is the user's; a model loads all the same."""
    (tmp_path / "conversion.py").write_text("x = 1\n")
    code = (
        "import conversion, gemma3_jax; assert conversion.x; gemma3_jax.HookedGemma3.from_pretrained(gemma3_jax.TINY)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import gemma3_jax, conversion", {"jax", "flax", "torch", "tensorstore", "transformers"}),
        ("from conversion import convert_checkpoint", {"torch", "tensorstore", "transformers", "matplotlib"}),
        ("from gemma3_jax import HookedGemma3, pictures", {"torch", "tensorstore", "matplotlib"}),
        (
            "import gemma3_jax; gemma3_jax.HookedGemma3.from_pretrained(gemma3_jax.TINY).generate('ba ke', 2)",
            {"torch", "tensorstore", "matplotlib"},
        ),
    ],
)
def test_imports_wait_until_they_are_needed(code, absent, tmp_path):
    """The first line of a script does not cost what only its last line needs."""
    done = run(f"{code}\nprint(*sys.modules)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not absent & set(done.stdout.split())
