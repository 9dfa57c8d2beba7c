"""The sites of the embedding head can be captured, edited and differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import (
    ActivationCache,
    edits,
    forward,
    grad_at,
)
from tests.hooked.embedding.folders import BAR, OUT, TEXTS, WIDE, D, apart


def test_sites_of_the_head(model):
    """Every site of the head has its shape; the last is the result; the unembedding does not run."""
    embedding, cache = model.run_with_cache(TEXTS[:2], return_type="embedding")
    assert not any(name.startswith("unembed.") for name in cache)
    n = {"pooled.hook_out": D, "dense_1.hook_in": D, "dense_1.hook_out": WIDE, "dense_2.hook_in": WIDE}
    n |= {"dense_2.hook_out": OUT, "embedding.hook_in": OUT, "embedding.hook_out": OUT}
    assert {name: cache[name].shape for name in n} == {name: (2, size) for name, size in n.items()}
    assert cache["pooled.hook_in"].shape == cache["ln_final.hook_out"].shape
    np.testing.assert_array_equal(cache["embedding"], embedding)
    pooled = np.asarray(cache["pooled"], np.float64)
    by_hand = pooled @ model.params["dense_1"]["weight"] @ model.params["dense_2"]["weight"]
    np.testing.assert_allclose(cache["dense_2"], by_hand, atol=1e-5 * np.abs(by_hand).max())
    mean = np.stack(
        [
            rows[real].mean(axis=0)
            for rows, real in zip(
                *map(np.asarray, (cache["pooled.hook_in"], cache.attention_mask.astype(bool))), strict=True
            )
        ]
    )
    np.testing.assert_allclose(pooled, mean, atol=1e-5)


def test_an_edit_of_the_head(model):
    """An edit at a site of the head reaches the embedding, and nothing of the text model."""
    plain, before = model.run_with_cache(TEXTS[:2], ["ln_final.hook_out", "dense_1"], return_type="embedding")
    hook = ("dense_1.hook_out", edits.only(edits.Replace(0.0), rows=1, features=[0, 3]))
    edited, after = model.run_with_hooks(
        TEXTS[:2], [hook], names_filter=["ln_final.hook_out", "dense_1"], return_type="embedding"
    )
    np.testing.assert_array_equal(before["ln_final.hook_out"], after["ln_final.hook_out"])
    assert (np.asarray(before["dense_1"] != after["dense_1"]).nonzero()[1].tolist()) == [0, 3]
    np.testing.assert_array_equal(plain[0], edited[0])
    assert apart(plain[1], np.asarray(edited[1])) > 100 * BAR


def test_gradient_of_a_similarity(model):
    """The gradient at the tokens' embeddings is that of finite differences along any direction."""
    inputs = model.inputs(TEXTS[1:3], return_type="embedding")

    def similarity(embedding):
        return embedding[0] @ embedding[1]

    value, cache = model.run_with_cache(
        inputs, ["hook_embed", "pooled"], return_type="embedding", incl_bwd=True, loss_fn=similarity
    )
    embedding = model.embed(TEXTS[1:3])
    np.testing.assert_allclose(value, embedding[0] @ embedding[1], atol=BAR)
    assert not np.asarray(cache.grads["hook_embed"])[~inputs.attention_mask.astype(bool)].any()
    for name in ("hook_embed", "pooled"):
        direction = jax.random.normal(jax.random.key(0), cache[name].shape)
        step = 1e-2

        def moved(by, name=name, direction=direction):
            shift = [(name, lambda z, hook: z + by * direction)]
            return similarity(model.run_with_hooks(inputs, shift, return_type="embedding"))

        slope = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(cache.grads[name], direction), slope, rtol=2e-2, atol=1e-4)
    pure, _ = grad_at(
        model.config,
        model.params,
        inputs.tokens,
        "hook_embed",
        similarity,
        attention_mask=inputs.attention_mask,
        return_type="embedding",
    )
    np.testing.assert_allclose(pure, value, atol=BAR)


def test_the_head_is_trainable(model):
    """Gradients with respect to all its parameters are finite and not zero, also through `embed`."""
    inputs = model.inputs(TEXTS[1:3], return_type="embedding")

    def similarity(params):
        embedding = forward(
            model.config, params, inputs.tokens, attention_mask=inputs.attention_mask, return_type="embedding"
        )[0]
        return embedding[0] @ embedding[1]

    grads = jax.jit(jax.grad(similarity))(model.params)
    assert all(
        np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads["dense_1"] | grads["dense_2"])
    )
    zero = [("pooled", edits.Replace(0.0))]
    _, cache = model.run_with_cache(
        inputs, "dense_1.hook_in", return_type="embedding", incl_bwd=True, loss_fn=lambda e: (0 * e).sum()
    )
    assert not np.any(cache.grads["dense_1.hook_in"])
    assert not np.any(model.run_with_hooks(inputs, zero, return_type="embedding"))


def test_caches_of_the_head(model, tmp_path):
    """Positions are cut where there are some; a saved cache comes back, head and all."""
    _, cache = model.run_with_cache(TEXTS[:2], ["hook_embed", "pooled"], return_type="embedding", pos_slice=0)
    assert (cache["hook_embed"].shape, cache["pooled"].shape) == ((2, 1, D), (2, D))
    cache.save(tmp_path / "cache.safetensors")
    again = ActivationCache.load(tmp_path / "cache.safetensors")
    assert again.config == model.config
    np.testing.assert_array_equal(again["pooled"], cache["pooled"])
    with pytest.raises(ValueError, match="no axis of tokens"):
        cache.real("pooled")
