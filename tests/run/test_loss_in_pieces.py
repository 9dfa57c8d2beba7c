"""A loss whose logits would be large goes through the head in pieces, and is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import Gemma3, HookedGemma3, edits, forward, grad_at, stack_layers
from gemma3_jax.placing import make_mesh
from gemma3_jax.run import pieces
from gemma3_jax.run.request import new_request
from tests.helpers.small_model import small

B, P = 2, 7
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 60, (B, P)), jnp.int32)
MASK = jnp.asarray([[1] * P, [0, 0, *[1] * (P - 2)]])
CASES = {
    "a mask": {"attention_mask": MASK},
    "labels": {"labels": jnp.where(jnp.arange(P) % 3 > 0, TOKENS + 1, -100)},
    "documents": {"segment_ids": jnp.asarray([[0, 0, 0, 1, 1, 1, 2]] * B)},
    "documents by position": {"positions": jnp.asarray([[0, 1, 2, 0, 1, 2, 3]] * B)},
    "an edit": {"edits": {"blocks.0.hook_out": edits.Scale(1.5)}},
}


@pytest.fixture(params=[2, 5, P - 1])
def in_pieces(request, monkeypatch):
    """Losses in pieces of so many positions."""
    config, _ = small(1)
    monkeypatch.setattr(pieces, "LOGITS", 4 * B * config.vocab_size * request.param)
    return request.param


def both_ways(function, monkeypatch):
    """The results with all logits in memory, and in pieces."""
    few = pieces.LOGITS
    monkeypatch.setattr(pieces, "LOGITS", 2**40)
    whole = jax.jit(lambda: function())()
    monkeypatch.setattr(pieces, "LOGITS", few)
    return whole, jax.jit(lambda: function())()


def assert_close(pair):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *pair)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same(case, in_pieces, monkeypatch):
    """The loss of each row and the captures, with and without padding, labels and documents."""
    config, params = small(1)

    def run():
        loss, cache = forward(config, params, TOKENS, "blocks.*.hook_out", return_type="loss_per_row", **CASES[case])
        return loss, {name: cache[name] for name in cache}

    assert_close(both_ways(run, monkeypatch))


@pytest.mark.parametrize("stacked", [False, True], ids=["layers apart", "scanned"])
def test_gradients_are_the_same(stacked, in_pieces, monkeypatch):
    """Of the parameters and at sites, also at one in the head, which needs all logits."""
    config, params = small(1)
    params = stack_layers(config, params) if stacked else params

    def run():
        of_params = jax.grad(lambda p: forward(config, p, TOKENS, attention_mask=MASK, return_type="loss")[0])(params)
        names = ["blocks.0.hook_out", "ln_final.hook_out"]
        grads = [grad_at(config, params, TOKENS, name, attention_mask=MASK)[1].grads[name] for name in names]
        return of_params, grads

    assert_close(both_ways(run, monkeypatch))


def test_only_what_needs_them_has_all_logits(in_pieces):
    """Captures and edits in the head, and logits beside the loss, keep the logits whole; a short text has no pieces."""
    config, _ = small(1)
    longer = jnp.concatenate([TOKENS, TOKENS], axis=1)

    def of(tokens=longer, **options):
        return pieces.positions_of_piece(new_request(config, tokens, **{"return_type": "loss", **options}))

    assert (
        of()
        == of(return_type="loss_per_row")
        == of(capture="blocks.*.hook_out")
        == of(capture="hook_embed")
        == in_pieces
    )
    assert of(TOKENS[:, :2]) is None
    assert of(return_type="both") is of(return_type="logits") is None
    assert of(capture="unembed.hook_out") is of(capture="ln_final.hook_scale") is None
    assert of(edits={"unembed.hook_in": edits.Scale(2.0)}) is None


@pytest.mark.parametrize("case", ["forward", "gradients"])
def test_the_logits_are_not_in_memory(case, monkeypatch):
    """What the compiled program holds beside its arguments shrinks by more than half of the logits."""
    config = dataclasses.replace(small(1)[0], vocab_size=30_000)
    params = jax.eval_shape(lambda: Gemma3(config).init(jax.random.key(0), TOKENS)["params"])
    tokens = jnp.tile(TOKENS, (1, 8))

    def temporary():
        def loss(params):
            return forward(config, params, tokens, return_type="loss")[0]

        function = loss if case == "forward" else jax.grad(loss)
        return jax.jit(lambda params: function(params)).lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * tokens.size * config.vocab_size
    before = temporary()
    monkeypatch.setattr(pieces, "LOGITS", logits // 8)
    assert before - temporary() > logits / 2


def test_on_a_mesh(in_pieces):
    """Rows over two devices and the vocabulary over two: the loss of one device."""
    config, params = small(1)
    model = HookedGemma3(config, params, mesh=make_mesh(model=2, devices=jax.devices()[:4]))
    expected, _ = forward(config, params, TOKENS, attention_mask=MASK, return_type="loss_per_row")
    np.testing.assert_allclose(model(TOKENS, "loss_per_row", attention_mask=MASK), expected, rtol=2e-5)
