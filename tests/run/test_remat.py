"""`remat=True` changes what a backward pass keeps, and no value: in both layouts, with captures, edits and padding."""

import jax
import jax.numpy as jnp
import pytest

from gemma3_jax import edits, forward, grad_at
from tests.helpers.small_model import TOKENS, difference
from tests.model.stacked_model import BOUND, both, worst

MASK = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9], jnp.int32)
SITES = ("blocks.*.hook_resid_post", "blocks.3.attn.hook_pattern", "blocks.*.attn.hook_result")


def edits_by(scale: float):
    """At layer 3 another value of a head, which takes this layer out of its scan."""
    scaled = edits.Scale(scale)
    return {"blocks.*.mlp.hook_out": scaled, "blocks.3.attn.hook_result": edits.only(scaled, heads=1)}


STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["by block", "stacked"])


@STACKED
def test_gradients_of_parameters(stacked):
    """The values, the loss and every gradient; the control has another edit."""
    config, *layouts = both()

    def of(remat: bool):
        def loss(params, edited):
            options = {"return_type": "loss", "remat": remat}
            loss, cache = forward(config, params, TOKENS, SITES, edited, MASK, **options)
            return loss, dict(cache)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    again = of(remat=True)
    plain = of(remat=False)(layouts[stacked], edits_by(0.5))
    assert worst(again(layouts[stacked], edits_by(0.5)), plain) <= BOUND
    assert worst(again(layouts[stacked], edits_by(0.4)), plain) > 100 * BOUND


@STACKED
def test_gradients_at_sites(stacked):
    """An edit and a gradient at one site inside a block that is computed again."""
    config, *layouts = both()

    @jax.jit
    def at(params):
        options = {"edits": edits_by(0.5), "attention_mask": MASK}
        return [grad_at(config, params, TOKENS, SITES, remat=remat, **options) for remat in (False, True)]

    (loss, cache), (loss_again, cache_again) = at(layouts[stacked])
    assert difference(loss, loss_again) <= BOUND
    assert list(cache) == list(cache_again)
    assert worst(dict(cache_again), dict(cache)) <= BOUND
    assert worst(dict(cache_again.grads), dict(cache.grads)) <= BOUND
    assert max(abs(value).max() for value in cache.grads.values()) > 100 * BOUND


def test_memory_of_a_backward_pass():
    """Of the values inside the blocks, only those of one block are held; the control is the same without `remat`.

    XLA:CPU finds equal computations and keeps their results, unless they are in a scan.
    """
    config, _, stacked = both()
    tokens = jax.ShapeDtypeStruct((4, 400), jnp.int32)

    def bytes_of(remat: bool) -> int:
        def loss(params, tokens):
            return forward(config, params, tokens, return_type="loss", remat=remat)[0]

        return jax.jit(jax.grad(loss)).lower(stacked, tokens).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(remat=True) < 0.5 * bytes_of(remat=False)
