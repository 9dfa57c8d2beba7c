"""Parity at the published 270m shape: 18 layers, 262144 tokens of vocabulary, a prompt longer than the window."""

import numpy as np
import pytest
import torch
import transformers
from random_models import random_tokens, randomize

from conversion import convert_state_dict
from conversion.parity import REAL_BAR, compare_sites, huggingface, our_activations
from gemma3_jax import Gemma3Config


@pytest.mark.real_shape
def test_every_site_of_the_270m_shape():
    """Every site, with every parameter random; and the layers shifted by one fail."""
    config = Gemma3Config.preset("270m")
    fields = {key: value for key, value in config.to_hf().items() if key not in ("model_type", "architectures")}
    hf_config = transformers.Gemma3TextConfig(**fields, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(hf_config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(hf_config)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    model.tie_weights()
    model = randomize(model)
    tokens = random_tokens((1, config.sliding_window + 8), config.vocab_size)
    wanted = huggingface.activations(model, tokens)
    params = convert_state_dict(model.state_dict(), config)
    del model

    rows = compare_sites(wanted, our_activations(config, params, tokens), REAL_BAR)
    print(f"largest relative error {max(row.relative for row in rows):.1e}")
    assert not [row for row in rows if not row.passed]

    # Negative control, on a prompt of the same model cut short so that it costs little.
    shifted = {**params, **{f"blocks_{i}": params[f"blocks_{(i + 1) % 18}"] for i in range(18)}}
    short = {"embed.hook_out": wanted["embed.hook_out"][:, :8], "blocks.5.hook_out": wanted["blocks.5.hook_out"][:, :8]}
    got = our_activations(config, shifted, tokens[:, :8])
    assert [row.passed for row in compare_sites(short, got, REAL_BAR)] == [True, False]
    assert np.isfinite(wanted["logits"]).all()
