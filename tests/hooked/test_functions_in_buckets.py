"""Users' functions run at the length of a bucket where that is exact, and share programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import edits, forward, grad_at, reductions
from gemma3_jax.hooks import longer
from tests.helpers.programs import programs
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import assert_same, at_once, direction, small
from tests.hooked.bucketed import NEXT, RESIDUAL, assert_same_caches, ids, model

FUNCTIONS = {
    "steering": (RESIDUAL, lambda value, hook: value + 2.0 * direction()),
    "last token": (RESIDUAL, lambda value, hook: value.at[:, -1].set(0.0)),
    "all but the first": (RESIDUAL, lambda value, hook: value.at[:, 1:].multiply(0.5)),
    "its length": (RESIDUAL, lambda value, hook: value * value.shape[1]),
    "position": (RESIDUAL, lambda value, hook: jnp.where((hook.positions == 3)[..., None], 0.0, value)),
    "infinite": (RESIDUAL, lambda value, hook: value / (hook.positions < value.shape[1])[..., None]),
    "head": ("blocks.0.attn.hook_z", lambda value, hook: value.at[:, :, 1].set(0.0)),
    "head in another layout": ("model.layers.0.self_attn.q_norm.output", lambda value, hook: value.at[:, 1].set(0.0)),
    "merged heads": ("model.layers.0.self_attn.o_proj.input", lambda value, hook: value * 0.3),
    "pattern": ("blocks.0.attn.hook_pattern", lambda value, hook: value.at[:, 1, :, 0].set(1.0) + 0.1),
    "scores": ("blocks.0.attn.hook_attn_scores", lambda value, hook: 0.5 * value),
    "keys": ("blocks.0.attn.hook_rot_k", lambda value, hook: value + 1.0),
    "copies": ("blocks.0.hook_attn_in", lambda value, hook: value.at[:, :, 1].set(0.0)),
    "ids": ("embed.hook_in", lambda value, hook: value.at[:, 2].set(7)),
    "logits": ("unembed.hook_out", lambda value, hook: 2.0 * value),
    "restricted": (RESIDUAL, edits.only(lambda value, hook: 0.2 * value, positions=[1, -1])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_and_share_a_program(name):
    """Also where the function gives infinite numbers, or weight to keys, after the prompt."""
    hooked, (where, edit), before = model(), FUNCTIONS[name], programs()
    for p in (14, 13):
        out = hooked.run_with_hooks(ids(p), [(where, edit)], names_filter=NEXT, return_type="both")
    assert programs() - before <= 1  # other cases may have the same program
    expected = forward(*small(), ids(13), NEXT, {where: edit}, return_type="both")
    jax.tree.map(assert_same, out[0], expected[0])
    assert_same_caches(out[1], expected[1])


def test_infinite_numbers_after_the_prompt_would_be_wrong(monkeypatch):
    """Negative control: a weight of 0 times infinity is NaN."""
    monkeypatch.setattr(longer, "only_present", lambda present, axes, x, other: x)
    assert np.isnan(model().run_with_hooks(ids(13), [FUNCTIONS["infinite"]])).any()


REDUCTIONS = {
    "last": lambda value, hook: value[:, -1],
    "norm": lambda value, hook: {"norm": jnp.linalg.norm(value, axis=-1), "step": value[:, 1:] - value[:, :-1]},
    "features": [lambda value, hook: jax.nn.relu(value @ np.eye(SMALL["hidden_size"], 7)), reductions.TopK(2)],
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_functions_that_reduce_share_a_program(name):
    hooked, keep, before = model(), {RESIDUAL: REDUCTIONS[name]}, programs()
    for p in (14, 13):
        _, cache = hooked.run_with_cache(ids(p), keep)
    assert programs() - before == 1
    jax.tree.map(assert_same, cache[RESIDUAL], forward(*small(), ids(13), keep)[1][RESIDUAL])


def test_metrics_share_a_program():
    """The usual metric, of the last logits without `logits_at`, and its gradients."""
    hooked, before = model(), programs()

    def metric(logits):
        return jax.nn.log_softmax(logits)[0, -1, 5] - logits[1, -2, 7]

    for p in (14, 13):
        value, cache = hooked.run_with_cache(ids(p), RESIDUAL, incl_bwd=True, loss_fn=metric)
    assert programs() - before == 1
    expected, theirs = at_once(grad_at, *small(), jnp.asarray(ids(13)), RESIDUAL, metric)
    assert_same(value, expected)
    assert_same_caches(cache, theirs)


def test_a_note_says_once_what_needs_the_length(caplog):
    """At the third length, with the site, the line of the function and the remedy."""
    hooked = model()

    def centre(value, hook):
        return value - value.mean(axis=1, keepdims=True)

    for p in (5, 5, 6, 5):
        hooked.run_with_hooks(ids(p, 1), [(RESIDUAL, centre)])
    assert not caplog.messages
    for p in (7, 8):
        hooked.run_with_hooks(ids(p, 1), [(RESIDUAL, centre)])
    [note] = caplog.messages
    assert "blocks.0.hook_out" in note
    assert "test_functions_in_buckets.py" in note
    assert "in centre" in note
    assert "hook.positions" in note


def test_functions_see_the_shape_of_the_prompt():
    seen = []

    def look(value, hook):
        seen.append((value.shape[1], hook.positions.shape[1], hook.attention_mask))
        return value

    model().run_with_hooks(ids(13), [(RESIDUAL, look)])
    model().run_with_cache(ids(13), {RESIDUAL: look})
    assert set(seen) == {(13, 13, None)}
