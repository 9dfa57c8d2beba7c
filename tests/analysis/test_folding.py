"""Folded norms and a centred unembedding: the same function of the tokens, in other weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, forward
from gemma3_jax.analysis import center_unembed, fold_ln
from tests.helpers.random_models import hf_model
from tests.helpers.small_model import KINDS, LAYERS, TOKENS, assert_same, difference

VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True},
    "softcapped": {"final_logit_softcapping": 3.0},
}
# Folding rounds one product for each weight and spares one for each activation, by up to 2**-24 of its size each.
# Moving each weight by 2**-23 of itself, or not, moves these logits by `one_rounding`; folding by 0.45 to 0.7 of it.
ROUNDINGS = 2


@functools.cache
def model(variant: str = "tied"):
    """(config, params), every parameter random."""
    hf = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], **VARIANTS[variant])
    config = Gemma3Config.from_hf(hf.config)
    return config, convert_state_dict(hf.state_dict(), config)


@functools.partial(jax.jit, static_argnames="config")
def logits(config, params):
    return forward(config, params, TOKENS)[0]


@functools.cache
def one_rounding(variant: str) -> float:
    """By how much the logits move when each weight is moved by its last bit, up, down or not."""
    config, params = model(variant)
    leaves, tree = jax.tree.flatten(params)
    generator = np.random.default_rng(0)
    moved = [leaf * (1 + 2.0**-23 * generator.integers(-1, 2, leaf.shape).astype(np.float32)) for leaf in leaves]
    return difference(logits(config, jax.tree.unflatten(tree, moved)), logits(config, params))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_leaves_the_logits(variant):
    """To rounding; and no gain is left in the norms that weights read."""
    config, params = model(variant)
    folded_config, folded = fold_ln(config, params)
    apart = difference(logits(folded_config, folded), logits(config, params))
    assert 0 < apart < ROUNDINGS * one_rounding(variant) < 1e-5
    assert not folded_config.tie_word_embeddings
    for i in range(LAYERS):
        old, new = params[f"blocks_{i}"], folded[f"blocks_{i}"]
        for norm in ("ln1", "ln2"):
            assert (new[norm]["weight"] == 1).all()
            assert (old[norm]["weight"] != 1).any()
        for norm in ("ln1_post", "ln2_post"):
            assert new[norm] is old[norm]
    assert (folded["ln_final"]["weight"] == 1).all()
    assert folded["embed"] is params["embed"]


PIECES = [
    ("blocks_0", "attn", "q"),
    ("blocks_1", "attn", "k"),
    ("blocks_0", "attn", "v"),
    ("blocks_0", "mlp", "gate"),
    ("blocks_1", "mlp", "in"),
    ("unembed",),
    ("blocks_0", "ln1"),
    ("blocks_1", "ln2"),
    ("ln_final",),
]


@pytest.mark.parametrize("piece", PIECES, ids="/".join)
def test_negative_control_each_fold_is_needed(piece):
    """With one piece left as it was, the logits are others: the comparison sees every fold."""
    config, params = model("untied")
    folded_config, folded = fold_ln(config, params)

    def restored(new, old, path):
        if not path:
            return old
        return {**new, path[0]: restored(new[path[0]], old[path[0]], path[1:])}

    mixed = restored(folded, params, piece)
    assert difference(logits(folded_config, mixed), logits(config, params)) > 1e-3


@pytest.mark.parametrize("variant", ["tied", "untied", "biased"])
def test_centring_leaves_the_log_probabilities(variant):
    """To rounding of the logits; the logits of each position have mean 0, which they had not."""
    config, params = model(variant)
    centred_config, centred = center_unembed(config, params)
    before, after = logits(config, params), logits(centred_config, centred)
    log_probs = [jax.nn.log_softmax(x) for x in (before, after)]
    assert difference(*log_probs) < ROUNDINGS * one_rounding(variant)
    size = np.abs(before).max()
    assert np.abs(after.mean(-1)).max() < 1e-5 * size
    assert np.abs(before.mean(-1)).max() > 1e-3 * size  # control: there was something to centre
    assert centred["embed"] is params["embed"]
    assert not centred_config.tie_word_embeddings
    # control: centring over d, the other axis, is another model
    weight = centred["unembed"]["weight"]
    other = {**centred, "unembed": {"weight": weight - weight.mean(0, keepdims=True)}}
    assert difference(jax.nn.log_softmax(logits(centred_config, other)), log_probs[0]) > 1e-3


def test_both_in_either_order():
    """Folding and centring commute, up to a shift of all logits and rounding."""
    one = logits(*center_unembed(*fold_ln(*model())))
    other = logits(*fold_ln(*center_unembed(*model())))
    assert_same(one, other, 5e-6)
    assert_same(jax.nn.log_softmax(one), jax.nn.log_softmax(logits(*model())), 5e-6)


def test_a_second_fold_changes_nothing():
    """The gains are 1, so that every product is exact."""
    once = fold_ln(*model())
    twice = fold_ln(*once)
    assert twice[0] == once[0]
    jax.tree.map(np.testing.assert_array_equal, twice[1], once[1])


@pytest.mark.parametrize("change", [fold_ln, center_unembed])
def test_pure(change):
    """The input is untouched, and under jit the result is the same."""
    config, params = model()
    before = jax.tree.map(np.array, params)
    result = change(config, params)[1]
    jitted = jax.jit(lambda params: change(config, params)[1])(params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jitted, result)
    gradient = jax.grad(lambda params: logits(*change(config, params)).std())(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("change", [fold_ln, center_unembed])
def test_bfloat16_is_rounded_once(change):
    """Computed in float32 and cast to the weight's dtype; the norms' gains stay float32."""
    config, params = model("untied")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    changed = change(config, low)[1]
    exact = change(config, jax.tree.map(lambda x: x.astype(jnp.float32), low))[1]
    jax.tree.map(lambda ours, was: np.testing.assert_equal(ours.dtype, was.dtype), changed, low)
    jax.tree.map(lambda ours, x: np.testing.assert_array_equal(ours, x.astype(ours.dtype)), changed, exact)


def test_softcapped_logits_cannot_be_centred():
    """The error says why; and it is right: the probabilities would be others."""
    config, params = model("softcapped")
    with pytest.raises(ValueError, match=r"final_logit_softcapping 3\.0"):
        center_unembed(config, params)
    shift = jax.nn.log_softmax(3 * jnp.tanh((jnp.arange(5.0) + 1) / 3)) - jax.nn.log_softmax(
        3 * jnp.tanh(jnp.arange(5.0) / 3)
    )
    assert np.abs(shift).max() > 0.1
