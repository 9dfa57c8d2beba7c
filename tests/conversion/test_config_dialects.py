"""Dialects of config.json: what transformers reads, what it read when the dialect was written, and other Gemmas."""

import json

import pytest
import transformers

from gemma3_jax import ConfigError, Gemma3Config, Rope

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
FULL = "full_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}


def ropes(**fields) -> tuple[Rope, Rope]:
    """The rotary embeddings (full, sliding) of a config with these fields."""
    config = Gemma3Config.from_hf({**SIZES, **fields})
    return config.rope_full, config.rope_sliding


def as_transformers(**fields) -> Gemma3Config:
    """The config that transformers makes of these fields, read back."""
    return Gemma3Config.from_hf(transformers.Gemma3TextConfig(**json.loads(json.dumps({**SIZES, **fields}))))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_parameters": LINEAR}, (Rope(5e5, 8.0), Rope(1e4))),
        ({"rope_parameters": LINEAR, "rope_local_base_freq": 7e3}, (Rope(5e5, 8.0), Rope(7e3))),
        ({"rope_parameters": {"type": "linear", "factor": 8.0}, "rope_theta": 2e5}, (Rope(2e5, 8.0), Rope(1e4))),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (Rope(1e6), Rope(1e4))),
        ({"rope_parameters": {}}, (Rope(1e6), Rope(1e4))),
    ],
)
def test_flat_rope_parameters_are_those_of_the_full_layers(fields, expected):
    """As rope_theta and rope_scaling were: Gemma 3 never scales the rotary embedding of its sliding layers."""
    assert ropes(**fields) == expected


def test_flat_parameters_beside_an_entry_per_layer_type_are_not_read():
    """transformers 5 writes both when it saves a config that it read from a flat one, and reads the entries."""
    saved = transformers.Gemma3TextConfig(**SIZES, rope_parameters=dict(LINEAR)).to_dict()
    assert {"factor", FULL} <= set(saved["rope_parameters"])
    assert ropes(rope_parameters=saved["rope_parameters"]) == (Rope(1e6), Rope(1e4))
    assert as_transformers(rope_parameters=saved["rope_parameters"]).rope_full == Rope(1e6)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 8.0}, Rope(1e6, 8.0)),
        ({"type": "default"}, Rope(1e6)),
        ({"type": "linear", "rope_type": "linear", "factor": 8.0}, Rope(1e6, 8.0)),
        ({"type": "linear", "rope_type": "default", "factor": 8.0}, Rope(1e6)),
    ],
)
def test_rope_scaling_with_the_old_key(scaling, expected):
    """`type` counts unless `rope_type` is there, as in transformers 4.50, which was the first with Gemma 3."""
    assert ropes(rope_scaling=scaling)[0] == expected
    entry = {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e6}}}
    assert ropes(rope_scaling=scaling, **entry)[0] == expected
    if "rope_type" in scaling:
        assert as_transformers(rope_scaling=scaling).rope_full == expected


@pytest.mark.parametrize(
    ("fields", "full"),
    [
        ({}, [5, 11]),
        ({"layer_types": None}, [5, 11]),
        ({"sliding_window_pattern": 3}, [2, 5, 8, 11]),
        ({"sliding_window_pattern": 2, "_sliding_window_pattern": 3}, [1, 3, 5, 7, 9, 11]),
        ({"_sliding_window_pattern": 6}, [5, 11]),
        ({"sliding_window_pattern": 1}, list(range(12))),
    ],
)
def test_layers_without_layer_types_are_as_transformers_reads_them(fields, full):
    """The pattern of the layers, from the pattern that the config names or from Gemma 3's own."""
    config = Gemma3Config.from_hf({**SIZES, **fields})
    assert [i for i, kind in enumerate(config.layer_types) if kind == FULL] == full
    assert config == as_transformers(**fields)


def test_angles_that_overflow_float32():
    """With a base below 1, the last frequency is the largest; its angles were NaN after the cosine."""
    small = {**SIZES, "head_dim": 256, "rope_theta": 1e-37}
    with pytest.raises(ConfigError, match=r"rope_full .* overflow float32"):
        Gemma3Config.from_hf(small)
    Gemma3Config.from_hf({**small, "rope_theta": 1e-3})


@pytest.mark.parametrize("outer", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("inner", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_shieldgemma2_is_read_as_transformers_reads_it(outer, inner):
    """ShieldGemma 2 is a Gemma 3 4b in a wrapper; it is untied only if both configs are."""
    raw = {"text_config": {**SIZES, "model_type": "gemma3_text", **inner}, **outer}
    theirs = transformers.ShieldGemma2Config(**json.loads(json.dumps(raw)))
    ours = Gemma3Config.from_hf({**raw, "model_type": "shieldgemma2"})
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours == Gemma3Config.from_hf({**SIZES, **inner, "tie_word_embeddings": theirs.tie_word_embeddings})


OTHERS = {
    "vaultgemma": transformers.VaultGemmaConfig,
    "t5gemma2": transformers.T5Gemma2Config,
    "gemma3n": transformers.Gemma3nConfig,
    "gemma3n_text": transformers.Gemma3nTextConfig,
    "gemma4": transformers.Gemma4Config,
    "gemma4_text": transformers.Gemma4TextConfig,
    "gemma2": transformers.Gemma2Config,
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_gemmas_are_refused_by_name(model_type):
    """Their equations are not Gemma 3's. The message names the model and what this library takes."""
    config = OTHERS[model_type]()
    for raw in (config, json.loads(config.to_json_string())):
        with pytest.raises(ConfigError, match=rf"model_type is '{model_type}'; .*gemma3_text") as caught:
            Gemma3Config.from_hf(raw)
        assert "\n" not in str(caught.value)
