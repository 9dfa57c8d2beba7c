"""NaN in the logits is never a token, a rank or a mean."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import TINY, HookedGemma3, analysis, edits, pictures
from gemma3_jax.config import EmbeddingHead

TEXT = "ba ke lo"


@functools.cache
def models():
    good = HookedGemma3.from_pretrained(TINY, dtype="float32")
    norm = {"weight": good.params["ln_final"]["weight"] * jnp.nan}
    return good, HookedGemma3(good.config, {**good.params, "ln_final": norm}, good.tokenizer)


def test_the_logit_lens_of_nan_has_no_tokens_and_no_ranks():
    """Tokens 0, 1, 2 and rank 0, "the most likely", used to come back."""
    good, bad = models()
    lens = analysis.logit_lens(bad, TEXT, k=2, targets="lo")
    assert (lens.tokens == -1).all()
    assert (lens.target_ranks == -1).all()
    strings, probabilities = analysis.lens_table(bad, lens)
    assert strings[0][0] == ["NaN", "NaN"]
    pictures.logit_lens_table(strings, probabilities, good.to_str_tokens(TEXT), good.config)
    control = analysis.logit_lens(good, TEXT, k=2, targets="lo")
    assert (control.tokens >= 0).all()
    assert (control.target_ranks >= 0).all()


def test_a_prompt_with_nan_logits_is_an_error():
    """It printed "rank 0, nan%"."""
    with pytest.raises(ValueError, match=r"token 0 of the answer.*NaN"):
        analysis.test_prompt(models()[1], TEXT, "ti")


def test_the_losses_of_nan_logits_are_infinite():
    """NaN marks padding, which `nanmean` leaves out: it would leave out failed tokens, too."""
    good, bad = models()
    losses = analysis.loss_per_token(bad, [TEXT, "ba"])
    assert np.isnan(losses[1, 0])  # padding
    assert jnp.nanmean(losses) == jnp.inf
    assert np.isfinite(analysis.loss_per_token(good, TEXT)).all()


def test_targets_for_each_row_are_refused():
    """With as many rows as positions, one target for each row was taken as one for each position."""
    good, _ = models()
    tokens = np.repeat(np.asarray(good.to_tokens(TEXT)), 4, axis=0)
    with pytest.raises(ValueError, match="targets have shape"):
        analysis.logit_lens(good, tokens, targets=[3, 4, 5, 6])
    alone, listed = (analysis.logit_lens(good, tokens, targets=target).target_ranks for target in (3, [3]))
    np.testing.assert_array_equal(alone, listed)
    one = analysis.logit_lens(good, tokens[0], targets=[3, 4, 5, 6])
    each = analysis.logit_lens(good, tokens, targets=[[3, 4, 5, 6]] * 4)
    np.testing.assert_allclose(one.target_log_probs[:, 0], each.target_log_probs[:, 1], rtol=1e-5, atol=1e-6)


def test_a_complex_metric_is_refused():
    """Its imaginary part was dropped."""

    def measured(metric):
        return analysis.sweep(
            models()[0], TEXT, lambda item: {"blocks.0.hook_out": edits.Scale(item)}, np.ones(2), metric, progress=False
        )

    with pytest.raises(ValueError, match="complex64"):
        measured(lambda logits: logits[0, -1, 5] + 1j)
    measured(lambda logits: logits[0, -1, 5])  # control


def test_a_model_with_an_embedding_head_is_not_folded():
    """The head reads the final norm, whose gain folding moves into the unembedding: embeddings changed silently."""
    good, _ = models()
    config = dataclasses.replace(good.config, embedding_head=EmbeddingHead(dense=()))
    with pytest.raises(ValueError, match="embedding head"):
        analysis.fold_ln(config, good.params)


def test_a_vector_of_one_feature_is_not_broadcast_to_a_circuit():
    """`einsum` broadcasts axes of size 1."""
    good, _ = models()
    circuit = analysis.ov_circuit(good.config, good.params)
    with pytest.raises(ValueError, match="do not match"):
        circuit @ jnp.ones(1)
