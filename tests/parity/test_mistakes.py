"""Negative controls of parity: every mistake in the parameters and every wrong constant of the config is seen."""

import dataclasses
import functools

import pytest

from gemma3_jax.parity import SMALL_BAR, compare_sites, our_activations
from tests.helpers.random_models import hf_model
from tests.parity.checks import LINEAR, TOKENS, converted, drop_one, failures, shift_layers, truth_of


@functools.cache
def small_truth():
    """Of the small model, on `TOKENS`."""
    return truth_of(hf_model(), TOKENS)


def swap_norms(params):
    """ln1_post and ln2_post change places."""

    def swapped(block):
        return {**block, "ln1_post": block["ln2_post"], "ln2_post": block["ln1_post"]}

    return {key: swapped(value) if "blocks" in key else value for key, value in params.items()}


def swap_gate_and_in(params):
    """The MLP's two projections change places."""

    def swapped(block):
        return {**block, "mlp": {**block["mlp"], "gate": block["mlp"]["in"], "in": block["mlp"]["gate"]}}

    return {key: swapped(value) if "blocks" in key else value for key, value in params.items()}


NORMS = ["ln1", "ln1_post", "ln2", "ln2_post", "attn/q_norm", "attn/k_norm", "ln_final"]
WRONG = {
    "layers shifted": shift_layers,
    "post-norms swapped": swap_norms,
    "gate and in swapped": swap_gate_and_in,
    **{f"no + 1 on {norm}": drop_one(f"{norm}/weight") for norm in NORMS},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_wrong_parameters_fail(change):
    """Negative control: each of these mistakes in the conversion is seen."""
    config, params = converted(hf_model())
    assert failures(compare_sites(small_truth(), our_activations(config, change(params), TOKENS), SMALL_BAR))


WRONG_CONFIGS = {
    "scaled by head_dim": {"query_pre_attn_scalar": 10},
    "window one larger": {"sliding_window": 8},
    "window one smaller": {"sliding_window": 6},
    "rope bases swapped": {"swap_ropes": True},
    "layer types shifted": {"layer_types": ("full_attention", "sliding_attention", "sliding_attention")},
    "another epsilon": {"rms_norm_eps": 1e-3},
    "no factor": {"rope_full": "theta only"},
    "softcap": {"final_logit_softcapping": 30.0},
    "bidirectional": {"use_bidirectional_attention": True},
}


@functools.cache
def linear_truth():
    """Of the small model with scaled RoPE, on `TOKENS`."""
    return truth_of(hf_model(rope_parameters=LINEAR), TOKENS)


@pytest.mark.parametrize("change", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_wrong_configs_fail(change):
    """Negative control: each constant of the architecture is seen."""
    model = hf_model(rope_parameters=LINEAR)
    config, params = converted(model)
    if "swap_ropes" in change:
        change = {"rope_full": config.rope_sliding, "rope_sliding": config.rope_full}
    if "rope_full" in change and change["rope_full"] == "theta only":
        change = {"rope_full": dataclasses.replace(config.rope_full, factor=1.0)}
    wrong = dataclasses.replace(config, **change)
    assert failures(compare_sites(linear_truth(), our_activations(wrong, params, TOKENS), SMALL_BAR))
