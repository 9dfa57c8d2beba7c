"""The port equals Hugging Face at every site, for every kind of Gemma 3: the claim that the library stands on."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_models import hf_model, hf_multimodal, random_tokens

from conversion import convert_checkpoint, convert_state_dict
from conversion.parity import SMALL_BAR, compare, compare_bfloat16, compare_sites, huggingface, our_activations, parity
from gemma3_jax import Gemma3Config, forward
from gemma3_jax.kernels import SHORT
from gemma3_jax.sites import SITES, site_names

LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
# What sets each checkpoint apart from random_models.SMALL, which has 8 heads in 2 groups, a head_dim that is not
# hidden_size / heads, a query_pre_attn_scalar that is not head_dim, and custom layer types.
MODELS = {
    "small": {},
    "linear rope": {"rope_parameters": LINEAR},
    "one group": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 8},
    "all full": {"layer_types": ["full_attention"] * 3},
    "all sliding": {"layer_types": ["sliding_attention"] * 3},
    "default pattern": {"layer_types": None, "num_hidden_layers": 7},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True},
    "softcap": {"final_logit_softcapping": 3.0},
    "bidirectional": {"use_bidirectional_attention": True, "sliding_window": 9},
    "window of one": {"sliding_window": 1},
}
# Four windows and more.
TOKENS = random_tokens((2, 30))


def converted(model):
    config = Gemma3Config.from_hf(model.config)
    return config, convert_state_dict(model.state_dict(), config)


def failures(rows):
    return [row for row in rows if not row.passed]


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_every_site_and_gradient_is_within_the_bar(overrides):
    """Each variant of the architecture, several windows long, in float32; with its layers shifted by one it fails."""
    model = hf_model(**overrides)
    config, params = converted(model)
    rows = compare(model, config, params, TOKENS)
    assert not failures(rows)
    shifted = our_activations(config, shift_layers(params), TOKENS)
    assert failures(compare_sites(huggingface.activations(model, TOKENS), shifted, SMALL_BAR))
    assert {row.kind for row in rows} >= {row.name for row in SITES} | {"logits"}


@pytest.mark.parametrize("length", [1, 6, 7, 8, 15])
def test_at_the_edges_of_the_window(length):
    """A window of 7 counts the query itself: one token less and one more must both be right."""
    model = hf_model()
    wanted = huggingface.activations(model, TOKENS[:, :length])
    assert not failures(compare_sites(wanted, our_activations(*converted(model), TOKENS[:, :length]), SMALL_BAR))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side):
    """A padded batch equals Hugging Face on real tokens, and each row equals the row alone."""
    model = hf_model()
    config, params = converted(model)
    lengths = (30, 19)
    mask = np.zeros((2, 30), np.int64)
    for row, n in enumerate(lengths):
        mask[row, slice(30 - n, None) if side == "left" else slice(n)] = 1
    tokens = np.where(mask, TOKENS, 0)
    assert not failures(compare(model, config, params, tokens, mask))

    padded, _ = forward(config, params, jnp.asarray(tokens), attention_mask=jnp.asarray(mask))
    for row in range(2):
        real = np.flatnonzero(mask[row])
        alone, _ = forward(config, params, jnp.asarray(tokens[row : row + 1, real]))
        np.testing.assert_allclose(padded[row, real], alone[0], rtol=0, atol=2e-5)
    # Negative control: without the mask, left padding does change the row; right padding lies behind it.
    unmasked, _ = forward(config, params, jnp.asarray(tokens))
    moved = float(jnp.max(jnp.abs(unmasked - padded)[1, mask[1].astype(bool)]))
    assert (moved > 1e-2) == (side == "left")


LONG = SHORT + 88
LONG_MODELS = {
    "causal": ({}, "left"),
    "both ways": ({"use_bidirectional_attention": True, "sliding_window": 9}, "right"),
}


@pytest.mark.parametrize(("overrides", "side"), LONG_MODELS.values(), ids=LONG_MODELS.keys())
def test_long_prompts(overrides, side):
    """Where nobody watches scores or patterns long prompts take kernels that never hold them all, and other sums.

    Padded, every other site of the port and gradients are those of Hugging Face; with layers shifted they are not.
    """
    model = hf_model(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], **overrides)
    config, params = converted(model)
    tokens, mask = random_tokens((2, LONG)), np.ones((2, LONG), np.int64)
    mask[1, slice(70) if side == "left" else slice(LONG - 70, None)] = 0

    def unwatched(params):
        names = [name for name in site_names(config) if not name.endswith(("hook_attn_scores", "hook_pattern"))]
        run = jax.jit(lambda params, *args: forward(config, params, args[0], names, attention_mask=args[1]))
        logits, cache = run(params, jnp.asarray(tokens), jnp.asarray(mask))
        return {name: np.asarray(value) for name, value in {**cache, "logits": logits}.items()}

    # The gradients that `compare` takes watch nothing.
    assert not failures(compare(model, config, params, tokens, mask))
    ours = unwatched(params)
    wanted = huggingface.activations(model, tokens, mask)
    wanted = {name: value for name, value in wanted.items() if name in ours}
    assert not failures(compare_sites(wanted, ours, SMALL_BAR, mask))
    assert failures(compare_sites(wanted, unwatched(shift_layers(params)), SMALL_BAR, mask))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_a_multimodal_checkpoint(tmp_path, prefix):
    """Both prefixes that multimodal checkpoints have been published under."""
    from safetensors.numpy import load_file, save_file

    model = hf_multimodal()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    written = next(k.removesuffix("embed_tokens.weight") for k in tensors if k.endswith("embed_tokens.weight"))
    save_file({k.replace(written, prefix): v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    config, params = convert_checkpoint(tmp_path)
    wanted = huggingface.activations(model, TOKENS)
    assert not failures(compare_sites(wanted, our_activations(config, params, TOKENS), SMALL_BAR))
    assert failures(compare_sites(wanted, our_activations(config, shift_layers(params), TOKENS), SMALL_BAR))


def test_bfloat16_is_no_further_from_float32_than_hugging_face_is():
    """At a width where rounding averages out, at every site."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "query_pre_attn_scalar": 32}
    model = hf_model(torch.bfloat16, **wide)
    config, params = converted(model)
    assert params["blocks_0"]["attn"]["q"]["weight"].dtype == jnp.bfloat16
    reference = copy.deepcopy(model).float()
    # Enough of them that the design's bar itself holds, without the allowance that `compare_bfloat16` makes for few.
    tokens = random_tokens((8, 256))
    wanted = huggingface.activations(reference, tokens)
    theirs = compare_sites(wanted, huggingface.activations(model, tokens), np.inf)
    strict = {row.kind: row.relative for row in theirs}
    assert not failures(compare_sites(wanted, our_activations(config, params, tokens), strict))
    # Negative control: norm weights rounded to bfloat16 after the + 1.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
    assert failures(compare_bfloat16(reference, model, config, rounded, tokens))


def shift_layers(params):
    """Layer i gets the weights of layer i + 1."""
    n = sum(key.startswith("blocks_") for key in params)
    return {**params, **{f"blocks_{i}": params[f"blocks_{(i + 1) % n}"] for i in range(n)}}


def drop_one(path):
    """The norm at `path` without its + 1."""

    def change(params):
        def edit(where, leaf):
            name = "/".join(key.key for key in where)
            return leaf - 1 if name.endswith(path) else leaf

        return jax.tree_util.tree_map_with_path(edit, params)

    return change


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
    model = hf_model()
    config, params = converted(model)
    wanted = huggingface.activations(model, TOKENS)
    assert failures(compare_sites(wanted, our_activations(config, change(params), TOKENS), SMALL_BAR))


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


@pytest.mark.parametrize("change", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_wrong_configs_fail(change):
    """Negative control: each constant of the architecture is seen."""
    model = hf_model(rope_parameters=LINEAR)
    config, params = converted(model)
    if "swap_ropes" in change:
        change = {"rope_full": config.rope_sliding, "rope_sliding": config.rope_full}
    if "rope_full" in change and change["rope_full"] == "theta only":
        change = {"rope_full": dataclasses.replace(config.rope_full, factor=1.0)}
    wanted = huggingface.activations(model, TOKENS)
    assert not failures(compare_sites(wanted, our_activations(config, params, TOKENS), SMALL_BAR))
    wrong = dataclasses.replace(config, **change)
    assert failures(compare_sites(wanted, our_activations(wrong, params, TOKENS), SMALL_BAR))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_of_a_directory(tmp_path, dtype):
    """`parity` reads the directory on both sides, names its platform, and its report is plain data."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "query_pre_attn_scalar": 32}
    hf_model(torch.bfloat16, **wide).save_pretrained(tmp_path)
    report = parity(tmp_path, dtype, tokens=40)
    assert report.passed
    assert report.platform.startswith(jax.devices()[0].platform)
    assert len(report.as_dict()["rows"]) == len(report.rows) > 60
