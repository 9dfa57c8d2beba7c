"""Gemma3Config against the published sizes and against transformers, in every style that configs come in."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from gemma3_jax import ConfigError, Gemma3Config, Rope
from gemma3_jax.model.rope import rope_tables
from tests.helpers.random_models import SMALL

SLIDING, FULL = "sliding_attention", "full_attention"

# size: d, L, h, g, e, f, window, V, query_pre_attn_scalar, factor of the full layers' rope, max positions
PUBLISHED = {
    "270m": (640, 18, 4, 1, 256, 2048, 512, 262144, 256, 1.0, 32768),
    "1b": (1152, 26, 4, 1, 256, 6912, 512, 262144, 256, 1.0, 32768),
    "4b": (2560, 34, 8, 4, 256, 10240, 1024, 262208, 256, 8.0, 131072),
    "12b": (3840, 48, 16, 8, 256, 15360, 1024, 262208, 256, 8.0, 131072),
    "27b": (5376, 62, 32, 16, 128, 21504, 1024, 262208, 168, 8.0, 131072),
}
# As the 1b was published: old style, every field stated.
PUBLISHED_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# As the 4b was published: multimodal, six fields of the text model.
PUBLISHED_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
# The same model in the new style and in the old one, with nothing at its default.
NEW = {
    **SMALL,
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 7_000.0},
    },
}
OLD = {
    **{key: value for key, value in SMALL.items() if key != "layer_types"},
    "sliding_window_pattern": 2,
    "rope_theta": 500_000.0,
    "rope_local_base_freq": 7_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}


def without(raw: dict, *names: str) -> dict:
    return {key: value for key, value in raw.items() if key not in names}


@st.composite
def configs(draw) -> Gemma3Config:
    """Any config that transformers takes too: it wants hidden_size to be a multiple of the heads."""
    groups, repeats, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rope = st.builds(Rope, theta=st.floats(100.0, 1e7), factor=st.sampled_from([1.0, 1.5, 8.0]))
    return Gemma3Config(
        vocab_size=draw(st.integers(4, 300_000)),
        hidden_size=groups * repeats * draw(st.integers(1, 50)),
        intermediate_size=draw(st.integers(1, 999)),
        num_hidden_layers=layers,
        num_attention_heads=groups * repeats,
        num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 64)),
        # transformers halves and doubles an odd bidirectional window to the even one below, which masks the same.
        sliding_window=2 * draw(st.integers(1, 2048)),
        query_pre_attn_scalar=draw(st.integers(1, 512)),
        layer_types=draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers).map(tuple)),
        rope_full=draw(rope),
        rope_sliding=draw(rope),
        max_position_embeddings=draw(st.integers(1, 200_000)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        final_logit_softcapping=draw(st.none() | st.floats(1.0, 50.0)),
        attention_bias=draw(st.booleans()),
        use_bidirectional_attention=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.none() | st.integers(0, 3)),
        eos_token_id=draw(st.none() | st.integers(0, 3) | st.tuples(st.integers(0, 3), st.integers(0, 3))),
        bos_token_id=draw(st.none() | st.integers(0, 3)),
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_are_the_published_sizes(size):
    """A wrong number in a preset would build a model that no checkpoint fits."""
    c = Gemma3Config.preset(size)
    shape = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    rest = (c.intermediate_size, c.sliding_window, c.vocab_size, c.query_pre_attn_scalar, c.rope_full.factor)
    assert (*shape, *rest, c.max_position_embeddings) == PUBLISHED[size]
    assert (c.rope_full.theta, c.rope_sliding) == (1_000_000, Rope(10_000))
    assert [i for i, kind in enumerate(c.layer_types) if kind == FULL] == list(range(5, c.num_hidden_layers, 6))
    assert (c.rms_norm_eps, c.tie_word_embeddings, c.attention_bias) == (1e-6, True, False)
    assert (c.final_logit_softcapping, c.use_bidirectional_attention) == (None, False)


@pytest.mark.parametrize(("size", "raw"), [("1b", PUBLISHED_1B), ("4b", PUBLISHED_4B)])
def test_published_configs_are_the_presets(size, raw):
    """Old-style configs as they stand on the hub, with the fields they leave out at transformers' defaults."""
    special = {"eos_token_id": (1, 106)} if "text_config" in raw else {}
    assert Gemma3Config.from_hf(raw) == dataclasses.replace(Gemma3Config.preset(size), **special)


def test_unknown_preset_lists_the_known_ones():
    """A typing error in a size is answered with the sizes."""
    with pytest.raises(ConfigError, match=r"'3b'.*270m, 1b, 4b, 12b, 27b"):
        Gemma3Config.preset("3b")


def test_old_and_new_style_are_one_config():
    """Both spellings of rope and of the layer pattern, with every value off its default."""
    config = Gemma3Config.from_hf(NEW)
    assert config == Gemma3Config.from_hf(OLD)
    assert (config.rope_full, config.rope_sliding) == (Rope(500_000.0, 4.0), Rope(7_000.0))
    assert config.layer_types == (SLIDING, FULL, SLIDING)
    assert (config.rope(FULL), config.rope(SLIDING)) == (config.rope_full, config.rope_sliding)


@pytest.mark.parametrize("name", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_layer_pattern(name):
    """Either spelling of the pattern counts, every sixth layer is full without one, and layer_types win over both."""
    raw = {**without(SMALL, "layer_types"), "num_hidden_layers": 12}
    every_third, every_sixth = ((SLIDING,) * 2 + (FULL,)) * 4, ((SLIDING,) * 5 + (FULL,)) * 2
    assert Gemma3Config.from_hf({**raw, name: 3}).layer_types == every_third
    assert Gemma3Config.from_hf(raw).layer_types == every_sixth
    assert Gemma3Config.from_hf({**raw, name: 3, "layer_types": list(every_sixth)}).layer_types == every_sixth


@pytest.mark.parametrize(
    "raw",
    [
        {},
        NEW,
        OLD,
        without(OLD, "rope_theta"),
        without(OLD, "rope_local_base_freq", "rope_scaling"),
        {**NEW, "rope_parameters": {FULL: NEW["rope_parameters"][FULL]}},
        {**NEW, "rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: None}, "rope_theta": 2e5},
        {**NEW, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {**SMALL, "rope_parameters": {FULL: {"rope_type": "default", "factor": 3.0}}},
        {**SMALL, "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 3.0}}},
        {**SMALL, "use_bidirectional_attention": True, "sliding_window": 8},
        {**SMALL, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "attention_bias": True},
        {**SMALL, "eos_token_id": [1, 5], "pad_token_id": None, "tie_word_embeddings": False},
    ],
)
def test_dicts_are_read_as_transformers_reads_them(raw):
    """The dict, the transformers config made from it, its to_dict and its JSON give one Gemma3Config."""
    theirs = transformers.Gemma3TextConfig(**json.loads(json.dumps(raw)))
    assert Gemma3Config.from_hf(raw) == Gemma3Config.from_hf(theirs)
    assert Gemma3Config.from_hf(raw) == Gemma3Config.from_hf(json.loads(theirs.to_json_string(use_diff=False)))


@pytest.mark.parametrize("outer", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize(
    "inner", [{}, {"tie_word_embeddings": False}, {"use_bidirectional_attention": True, "sliding_window": 8}]
)
def test_multimodal_configs_are_read_as_transformers_reads_them(outer, inner):
    """The text model is taken out of a multimodal config; the outer field decides on tying, by default too."""
    raw = {"model_type": "gemma3", "text_config": {**SMALL, "model_type": "gemma3_text", **inner}, **outer}
    config = Gemma3Config.from_hf(raw)
    theirs = transformers.Gemma3Config(**json.loads(json.dumps(without(raw, "model_type"))))
    assert config == Gemma3Config.from_hf(theirs)
    assert config.tie_word_embeddings == outer.get("tie_word_embeddings", True)
    fields = {**SMALL, **inner, "tie_word_embeddings": config.tie_word_embeddings}
    assert config == Gemma3Config.from_hf(fields)


def test_bidirectional_window_is_not_halved_twice():
    """transformers holds w // 2 + 1 in memory and writes w; the port keeps w, whichever of them it reads."""
    theirs = transformers.Gemma3TextConfig(**{**SMALL, "use_bidirectional_attention": True, "sliding_window": 512})
    assert theirs.sliding_window == 257
    for source in (theirs, theirs.to_dict(), transformers.Gemma3TextConfig(**theirs.to_dict())):
        assert Gemma3Config.from_hf(source).sliding_window == 512
    assert transformers.Gemma3TextConfig(**Gemma3Config.from_hf(theirs).to_hf()).sliding_window == 257


@given(configs())
@settings(max_examples=60, deadline=None)
def test_round_trip(config):
    """to_hf loses nothing, through JSON and through transformers' own class, which sees equal rope frequencies."""
    written = json.loads(json.dumps(config.to_hf()))
    assert Gemma3Config.from_hf(written) == config
    theirs = transformers.Gemma3TextConfig(**written)
    assert Gemma3Config.from_hf(theirs) == config
    assert len({config, dataclasses.replace(config)}) == 1

    positions = np.arange(4)[None]
    rotary = Gemma3RotaryEmbedding(theirs)
    for kind in set(config.layer_types):
        ours = rope_tables(config.rope(kind), jnp.asarray(positions), config.head_dim)
        for table, expected in zip(ours, rotary(torch.zeros(1), torch.tensor(positions), kind), strict=True):
            np.testing.assert_allclose(table, expected.numpy(), atol=2e-6)


def test_rope_of_the_other_layer_type_is_seen():
    """Negative control of the round trip: with the two rope entries swapped, configs and frequencies differ."""
    config = Gemma3Config.from_hf(NEW)
    swapped = dataclasses.replace(config, rope_full=config.rope_sliding, rope_sliding=config.rope_full)
    assert Gemma3Config.from_hf(swapped.to_hf()) != config
    ours, theirs = (rope_tables(c.rope(FULL), jnp.arange(4)[None], c.head_dim)[0] for c in (config, swapped))
    assert float(jnp.abs(ours - theirs).max()) > 1e-3


def test_frozen_and_hashable():
    """A config can be a static argument of jit: nothing in it can change, equal ones hash equally."""
    config = Gemma3Config.from_hf({**NEW, "eos_token_id": [1, 106]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 7
    assert len({config, Gemma3Config.from_hf({**NEW, "eos_token_id": [1, 106]}), Gemma3Config.from_hf(NEW)}) == 2


def test_lists_do_not_spoil_the_hash():
    """layer_types and eos_token_id given as lists, as a config.json has them, still make a hashable config."""
    config = Gemma3Config.from_hf(NEW)
    listed = dataclasses.replace(config, layer_types=list(config.layer_types))
    assert len({config, listed}) == 1


BAD_VALUES = [
    ("model_type", "llama", "model_type"),
    ("model_type", None, "model_type"),
    ("text_config", 5, "text_config"),
    ("text_config", {"model_type": "gemma2"}, "model_type"),
    ("hidden_activation", "silu", "hidden_activation"),
    ("hidden_act", "gelu", "hidden_act"),
    *[
        (name, bad, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for bad in (0, -1, None, "3", 2.5)
    ],
    *[
        (name, bad, name)
        for name in ("num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings")
        for bad in (0, None, 7.5)
    ],
    *[
        (name, bad, name)
        for name in ("query_pre_attn_scalar", "rms_norm_eps")
        for bad in (0, -1.0, float("nan"), float("inf"), "x")
    ],
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("head_dim", 9, "head_dim"),
    ("layer_types", [SLIDING], "layer_types"),
    ("layer_types", [SLIDING, FULL, "linear_attention"], "layer_types"),
    ("layer_types", [[SLIDING], FULL, FULL], "layer_types"),
    ("layer_types", 5, "layer_types"),
    ("sliding_window_pattern", 0, "sliding_window_pattern"),
    ("sliding_window_pattern", "6", "sliding_window_pattern"),
    ("rope_theta", "x", "rope_theta"),
    ("rope_theta", None, "rope_theta"),
    ("rope_theta", 0, "rope"),
    ("rope_local_base_freq", "x", "rope_local_base_freq|rope_theta"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}, "rope_type"),
    ("rope_scaling", {"rope_type": "linear"}, "factor"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}, "factor"),
    ("rope_scaling", {"rope_type": "linear", "factor": "x"}, "factor"),
    ("rope_scaling", {"rope_type": ["linear"], "factor": 2.0}, "rope_type"),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}, "beta_fast"),
    ("rope_scaling", [8.0], "rope_scaling"),
    ("rope_parameters", 5, "rope_parameters"),
    ("rope_parameters", {FULL: 5}, "rope_parameters|full_attention"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "rope_type of full_attention"),
    ("rope_parameters", {FULL: {"rope_type": "default"}, "beta_fast": 32.0}, "rope_parameters has beta_fast"),
    ("rope_parameters", {SLIDING: {"rope_type": "dynamic", "factor": 2.0}}, "rope_type of sliding_attention"),
    ("rope_parameters", {FULL: {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("use_bidirectional_attention", "all", "use_bidirectional_attention"),
    ("attention_bias", "yes", "attention_bias"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings"),
    ("final_logit_softcapping", 0.0, "final_logit_softcapping"),
    ("final_logit_softcapping", "30", "final_logit_softcapping"),
    ("final_logit_softcapping", 1e300, "final_logit_softcapping is 1e[+]300; .* float32 can hold"),
    ("rms_norm_eps", 1e-60, "rms_norm_eps is 1e-60; .* float32 can hold"),
    ("query_pre_attn_scalar", 1e-300, "query_pre_attn_scalar"),
    ("rope_theta", 1e-300, "rope_theta of full_attention is 1e-300; .* float32 can hold"),
    ("rope_theta", 10**400, "rope_theta of full_attention .* float32 can hold"),
    ("rope_scaling", {"rope_type": "linear", "factor": 1e300}, "factor of full_attention .* float32 can hold"),
    ("rope_scaling", {"rope_type": "linear", "factor": 1e-36}, "rope_full .* overflow float32"),
    ("query_pre_attn_scalar", 10**400, "query_pre_attn_scalar"),
    ("sliding_window", 2**31, "sliding_window is 2147483648; .* int32 can hold"),
    ("eos_token_id", 2**31, "eos_token_id"),
    ("eos_token_id", "a", "eos_token_id"),
    ("eos_token_id", [[1]], "eos_token_id"),
    ("pad_token_id", 1.5, "pad_token_id"),
]


@pytest.mark.parametrize(("field", "value", "named"), BAD_VALUES, ids=lambda v: str(v).replace("\n", " ")[:40])
def test_a_value_that_cannot_be_honoured_is_an_error_naming_its_field(field, value, named):
    """Each wrong value is a ConfigError in one line with the field's name, never a traceback from inside."""
    raw = {**SMALL, field: value}
    if field in ("sliding_window_pattern", "num_hidden_layers"):
        raw = without(raw, "layer_types")
    with pytest.raises(ConfigError, match=named) as caught:
        Gemma3Config.from_hf(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], 5, "gemma-3-1b"], ids=repr)
def test_what_is_no_config_at_all(raw):
    """A config.json may hold any JSON value."""
    with pytest.raises(ConfigError):
        Gemma3Config.from_hf(raw)
