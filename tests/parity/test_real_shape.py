"""Parity at the published 270m shape: 18 layers, 262144 tokens of vocabulary, a prompt longer than the window."""

import pytest
import torch
import transformers

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config
from gemma3_jax.parity.measure import at_sites
from gemma3_jax.parity.report import judge
from tests.helpers.random_models import random_tokens, randomize


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
    params = convert_state_dict(model.state_dict(), config)

    def rows(params, tokens):
        return judge([at_sites(model, model, config, params, tokens)], tokens.shape[1], "float32")

    ours = rows(params, tokens)
    print(f"at most {max(row.ratio for row in ours):.2f} times as far from float64 as Hugging Face")
    assert not [row for row in ours if not row.passed]

    # Negative control, on a short prompt, which costs little.
    shifted = {**params, **{f"blocks_{i}": params[f"blocks_{(i + 1) % 18}"] for i in range(18)}}
    control = {row.kind: row.passed for row in rows(shifted, tokens[:, :8])}
    assert control["embed.hook_out"]
    assert not control["blocks.{i}.hook_out"]
    assert not control["logits"]
