"""Weights by their TransformerLens names, and directions of the unembedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3
from tests.helpers.random_models import SMALL, hf_model
from tests.hooked.word_model import LAYERS, differ, hf, hooked


def test_weights_are_hugging_faces():
    """Every W_ has its documented shape and, head by head, the values of Hugging Face's matrices."""
    model, tensors = hooked(), {name: value.numpy() for name, value in hf().state_dict().items()}
    h, g, e, d = (SMALL[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))
    f, vocabulary = SMALL["intermediate_size"], SMALL["vocab_size"]
    shapes = {
        "W_E": (vocabulary, d),
        "W_U": (d, vocabulary),
        "W_Q": (LAYERS, h, d, e),
        "W_K": (LAYERS, g, d, e),
        "W_V": (LAYERS, g, d, e),
        "W_O": (LAYERS, h, e, d),
        "W_gate": (LAYERS, d, f),
        "W_in": (LAYERS, d, f),
        "W_out": (LAYERS, f, d),
    }
    assert {name: getattr(model, name).shape for name in shapes} == shapes
    np.testing.assert_array_equal(model.W_E, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.W_U, tensors["model.embed_tokens.weight"].T)
    for i in range(LAYERS):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, proj in (("W_Q", "q_proj"), ("W_K", "k_proj"), ("W_V", "v_proj")):
            ours = getattr(model, name)[i]
            for head in range(len(ours)):
                rows = slice(head * e, (head + 1) * e)
                np.testing.assert_array_equal(ours[head].T, tensors[f"{attn}.{proj}.weight"][rows])
        for head in range(h):
            columns = tensors[f"{attn}.o_proj.weight"][:, head * e : (head + 1) * e]
            np.testing.assert_array_equal(model.W_O[i, head].T, columns)
        for name, proj in (("W_gate", "gate_proj"), ("W_in", "up_proj"), ("W_out", "down_proj")):
            np.testing.assert_array_equal(getattr(model, name)[i].T, tensors[f"{mlp}.{proj}.weight"])
    assert differ(model.W_gate, model.W_in)  # control


def test_w_u_of_an_untied_model():
    """An untied unembedding is the checkpoint's own, and no longer the embedding's transpose."""
    untied = hf_model(num_hidden_layers=1, layer_types=["full_attention"], tie_word_embeddings=False)
    config = Gemma3Config.from_hf(untied.config)
    model = HookedGemma3(config, convert_state_dict(untied.state_dict(), config))
    np.testing.assert_array_equal(model.W_U, untied.lm_head.weight.detach().numpy().T)
    assert differ(model.W_U, model.W_E.T)


@pytest.mark.parametrize("tied", [True, False])
def test_directions_are_columns_of_the_unembedding(tied):
    """Of one id, of several in any shape, and of ids that are traced."""
    own = hf_model(num_hidden_layers=1, layer_types=["full_attention"], tie_word_embeddings=tied)
    config = Gemma3Config.from_hf(own.config)
    model = HookedGemma3(config, convert_state_dict(own.state_dict(), config))
    columns = own.lm_head.weight.detach().numpy()
    for ids in (3, np.int64(5), [[1, 2, 100]], np.array([[4], [0]]), jnp.array([7, 8])):
        np.testing.assert_array_equal(model.tokens_to_residual_directions(ids), columns[np.asarray(ids)])
        traced = jax.jit(model.tokens_to_residual_directions)(jnp.asarray(ids))
        np.testing.assert_array_equal(traced, columns[np.asarray(ids)])


@pytest.mark.parametrize("wrong", [-1, SMALL["vocab_size"], 2**32 + 5, -(2**40)])
def test_directions_of_ids_outside_the_vocabulary(wrong):
    """An error with the id where it is known, whatever the ids came as; NaN where it is traced: no neighbour's."""
    model = hooked()
    given = [wrong, [3, wrong], np.array([[3], [wrong]])]
    if abs(wrong) < 2**31:
        given.append(jnp.array([wrong]))
        found = jax.jit(model.tokens_to_residual_directions)(jnp.array([wrong, 3]))
        assert np.isnan(found[0]).all()
        assert not np.isnan(found[1]).any()
    for ids in given:
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {SMALL['vocab_size']}"):
            model.tokens_to_residual_directions(ids)
    for no_ids in ("red", 1.5, True):
        with pytest.raises(ValueError, match="give ids"):
            model.tokens_to_residual_directions(no_ids)
