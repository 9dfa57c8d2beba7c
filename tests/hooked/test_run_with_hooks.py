"""`run_with_hooks`: pairs of names and functions, applied in order, in the layout of the name."""

import numpy as np
import pytest
import torch
from jax.tree_util import Partial

from gemma3_jax import next_token_loss
from tests.helpers.random_models import SMALL
from tests.hooked.word_model import IDS, LONG, assert_close, differ, everything, hf, hf_values, hooked


def double(value, hook):
    return value * 2


def add(vector, value, hook):
    return value + vector


def test_run_with_hooks():
    """Pairs take names, globs, lists and predicates, and do what a hook on Hugging Face's module does."""
    model = hooked()
    handles = [
        layer.post_feedforward_layernorm.register_forward_hook(lambda module, args, out: out * 2)
        for layer in hf().model.layers
    ]
    with torch.no_grad():
        expected = hf()(torch.as_tensor(IDS)).logits
    for handle in handles:
        handle.remove()
    names = ["blocks.0.ln2_post.hook_out", "blocks.1.hook_mlp_out"]
    for wanted in ("blocks.*.hook_mlp_out", names, lambda name: name.endswith("hook_mlp_out")):
        assert_close(model.run_with_hooks(IDS, [(wanted, double)]), expected)
    assert differ(expected, hf_values()[0])
    assert_close(model.run_with_hooks(IDS), hf_values()[0])  # without any, and after some, it is the plain model


def test_pairs_on_one_site_run_in_order():
    """Two pairs under two names of one site are applied in the order given, and the kept value is the edited one."""
    model = hooked()
    vector = np.arange(48, dtype=np.float32)
    plus = Partial(add, vector)
    before = np.asarray(everything()["blocks.0.hook_in"])
    names = ("blocks.0.hook_in", "blocks.0.hook_resid_pre")
    for edits, expected in (((double, plus), before * 2 + vector), ((plus, double), (before + vector) * 2)):
        pairs = list(zip(names, edits, strict=True))
        out, cache = model.run_with_hooks(IDS, pairs, names_filter=names[0], stop_at_layer=1)
        assert out.shape == (2, 9, 48)
        assert_close(cache["model.layers.0.input"], expected)


def test_edits_under_hf_paths_see_hf_layout():
    """A pair under a Hugging Face path sees flattened heads, whatever kind of edit it holds."""
    model = hooked()
    path, name = "model.layers.0.self_attn.o_proj.input", "blocks.0.attn.hook_z"
    vector = np.arange(80, dtype=np.float32)
    _, cache = model.run_with_hooks(IDS, [(path, Partial(add, vector))], names_filter=name, return_type=None)
    assert_close(cache[name], everything()[name] + vector.reshape(8, 10))
    assert_close(cache[path], everything()[path] + vector)


def test_run_with_hooks_takes_the_arguments_of_run_with_cache():
    """Text, return types, positions and batches are handled as without edits."""
    model = hooked()
    hooks_ = [("blocks.0.hook_resid_mid", double)]
    options = {"return_type": "both", "remove_batch_dim": True, "pos_slice": -1}
    (logits, loss), cache = model.run_with_hooks(LONG, hooks_, names_filter="blocks.0.hook_resid_mid", **options)
    assert logits.shape == (1, 9, SMALL["vocab_size"])
    assert differ(logits, model(LONG))
    tokens = np.asarray(model.to_tokens(LONG))
    assert loss == pytest.approx(float(next_token_loss(logits, tokens)), rel=1e-5)
    assert cache["blocks.0.hook_resid_mid"].shape == (1, 48)
