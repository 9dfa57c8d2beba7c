"""Every public function of a config and parameters says so where it is given something else."""

import pytest

from conversion import convert_state_dict, export_checkpoint, save_params
from gemma3_jax import Gemma3, HookedGemma3, analysis, forward, grad_at, site_names, stack_layers, unstack_layers
from gemma3_jax.generation import generate
from gemma3_jax.placing import make_mesh, param_shardings
from tests.helpers.small_model import TOKENS, small

OF_BOTH = {
    "all_composition_scores": lambda *pair: analysis.all_composition_scores(*pair, "Q"),
    "center_unembed": analysis.center_unembed,
    "export_checkpoint": lambda *pair: export_checkpoint(*pair, "never"),
    "fold_ln": analysis.fold_ln,
    "forward": lambda *pair: forward(*pair, TOKENS),
    "generate": lambda *pair: generate(*pair, TOKENS),
    "grad_at": lambda *pair: grad_at(*pair, TOKENS, "blocks.0.hook_out"),
    "ov_circuit": analysis.ov_circuit,
    "qk_circuit": analysis.qk_circuit,
    "save_params": lambda *pair: save_params(*pair, "never"),
    # As users call them: in tests, beartype would be the first to refuse other types.
    "stack_layers": stack_layers.__wrapped__,
    "unstack_layers": unstack_layers.__wrapped__,
}
OF_A_CONFIG = {
    "Gemma3": lambda config: Gemma3(config).apply({"params": {}}, TOKENS),
    "HookedGemma3": lambda config: HookedGemma3(config, {}),
    "convert_state_dict": lambda config: convert_state_dict({}, config),
    "param_shardings": lambda config: param_shardings(config, make_mesh()),
    "site_names": site_names,
}


@pytest.mark.parametrize("name", OF_BOTH)
def test_config_and_params(name, tmp_path, monkeypatch):
    """The wrong way round, a model, or the variables of Flax: the message says what to pass, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    config, params = small()
    model = HookedGemma3(config, params)
    with pytest.raises(TypeError, match="Gemma3Config, which comes before params"):
        OF_BOTH[name](params, config)
    for wrong in (model, None):
        with pytest.raises(TypeError, match=f"params is a {type(wrong).__name__}; .*model.params"):
            OF_BOTH[name](config, wrong)
    with pytest.raises(ValueError, match=r"variables\['params'\]"):
        OF_BOTH[name](config, {"params": params})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OF_A_CONFIG)
def test_config_alone(name):
    """The settings of a config, as in config.json, are not a config."""
    with pytest.raises(TypeError, match=r"it must be a Gemma3Config.*from_hf"):
        OF_A_CONFIG[name]({"hidden_size": 8})
