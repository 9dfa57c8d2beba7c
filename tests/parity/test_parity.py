"""The port is as near to the truth as Hugging Face is at every site, for every kind of Gemma 3.

The truth is Hugging Face's model in float64; `test_truth` checks that model.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from conversion import convert_checkpoint
from gemma3_jax import forward
from gemma3_jax.compute.attention import SHORT
from gemma3_jax.parity import SMALL_BAR, compare, compare_sites, our_activations
from gemma3_jax.sites.names import site_names
from gemma3_jax.sites.table import SITES
from tests.helpers.random_models import hf_model, hf_multimodal, random_tokens
from tests.helpers.small_model import at_once
from tests.parity.checks import LINEAR, TOKENS, WIDE, converted, failures, shift_layers, truth_of

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


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_every_site_and_gradient_is_as_near_to_the_truth(overrides):
    """Each variant of the architecture, several windows long, in float32; with its layers shifted by one it fails."""
    model = hf_model(**overrides)
    config, params = converted(model)
    rows = compare(model, config, params, TOKENS)
    assert not failures(rows)
    assert max(row.port for row in rows if not row.kind.endswith("(gradient)")) <= SMALL_BAR
    assert {row.kind for row in rows} >= {row.name for row in SITES} | {"logits", "embed.weight (gradient)"}
    assert failures(compare(model, config, shift_layers(params), TOKENS))


@pytest.mark.parametrize("length", [1, 6, 7, 8, 15])
def test_at_the_edges_of_the_window(length):
    """A window of 7 counts the query itself: one token less and one more must both be right."""
    model = hf_model()
    truth = truth_of(model, TOKENS[:, :length])
    assert not failures(compare_sites(truth, our_activations(*converted(model), TOKENS[:, :length]), SMALL_BAR))


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

    padded, _ = at_once(forward, config, params, jnp.asarray(tokens), attention_mask=jnp.asarray(mask))
    for row in range(2):
        real = np.flatnonzero(mask[row])
        alone, _ = at_once(forward, config, params, jnp.asarray(tokens[row : row + 1, real]))
        np.testing.assert_allclose(padded[row, real], alone[0], rtol=0, atol=2e-5)
    # Negative control: without the mask, left padding does change the row; right padding lies behind it.
    unmasked, _ = at_once(forward, config, params, jnp.asarray(tokens))
    moved = float(jnp.max(jnp.abs(unmasked - padded)[1, mask[1].astype(bool)]))
    assert (moved > 1e-2) == (side == "left")


LONG = SHORT + 88
# RoPE's angles in float32 are 5e-6 off at position 600, in Hugging Face too.
LONG_BAR = 2 * SMALL_BAR
LONG_MODELS = {
    "causal": ({}, "left"),
    "both ways": ({"use_bidirectional_attention": True, "sliding_window": 9}, "right"),
}


@pytest.mark.parametrize(("overrides", "side"), LONG_MODELS.values(), ids=LONG_MODELS.keys())
def test_long_prompts(overrides, side):
    """Long prompts whose scores and patterns are not watched use kernels that never store all scores, with other sums.

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
    truth = {name: value for name, value in truth_of(model, tokens, mask).items() if name in ours}
    assert not failures(compare_sites(truth, ours, LONG_BAR, mask))
    assert failures(compare_sites(truth, unwatched(shift_layers(params)), LONG_BAR, mask))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_a_multimodal_checkpoint(tmp_path, prefix):
    """Both prefixes that multimodal checkpoints have been published under."""
    model = hf_multimodal()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    written = next(k.removesuffix("embed_tokens.weight") for k in tensors if k.endswith("embed_tokens.weight"))
    save_file({k.replace(written, prefix): v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    config, params = convert_checkpoint(tmp_path)
    truth = truth_of(model, TOKENS)
    assert not failures(compare_sites(truth, our_activations(config, params, TOKENS), SMALL_BAR))
    assert failures(compare_sites(truth, our_activations(config, shift_layers(params), TOKENS), SMALL_BAR))


def test_bfloat16_is_no_further_from_the_truth_than_hugging_face_is():
    """At a width where rounding averages out, at every site and in every gradient."""
    model = hf_model(torch.bfloat16, **WIDE)
    config, params = converted(model)
    assert params["blocks_0"]["attn"]["q"]["weight"].dtype == jnp.bfloat16
    reference = copy.deepcopy(model).float()
    tokens = random_tokens((8, 256))
    rows = compare(reference, config, params, tokens, rounded=model)
    # Enough of them that the design's bar itself holds, without the allowance that `judge` makes for few.
    assert max(row.ratio for row in rows) <= 1
    # Negative control: norm weights rounded to bfloat16 after the + 1.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
    assert failures(compare(reference, config, rounded, tokens, rounded=model))
