"""What is captured is what was computed, under every transform, and is never served from old code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from gemma3_jax import Gemma3, HookedGemma3, forward
from tests.helpers.small_model import (
    COPIES,
    LAYERS,
    SITES,
    SOME,
    TOKENS,
    assert_same,
    captures,
    jitted,
    plain,
    run,
    same,
    small,
    zero,
)


def test_what_the_table_says_of_each_value_holds():
    """Captured values obey the equations and the equalities that the table states between sites."""
    config, params = small()
    logits, cache = plain()
    cache = {name: np.asarray(value) for name, value in cache.items()}
    for i in range(LAYERS):
        at = {name.removeprefix(f"blocks.{i}."): v for name, v in cache.items() if name.startswith(f"blocks.{i}.")}
        assert_same(at["hook_resid_mid"], at["hook_in"] + at["ln1_post.hook_out"])
        assert_same(at["hook_out"], at["hook_resid_mid"] + at["ln2_post.hook_out"])
        powers = np.exp(at["attn.hook_attn_scores"] - at["attn.hook_attn_scores"].max(axis=-1, keepdims=True))
        assert_same(at["attn.hook_pattern"], powers / powers.sum(axis=-1, keepdims=True))
        values = np.repeat(at["attn.v.hook_out"], 4, axis=2)
        assert_same(at["attn.o.hook_in"], np.einsum("bhpk,bkhe->bphe", at["attn.hook_pattern"], values))
        w_o = np.asarray(params[f"blocks_{i}"]["attn"]["o"]["weight"])
        assert_same(at["attn.hook_result"], np.einsum("bphe,hed->bphd", at["attn.o.hook_in"], w_o))
        assert_same(at["attn.o.hook_out"], at["attn.hook_result"].sum(axis=2))
        gate = at["mlp.gate.hook_out"]
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        assert_same(at["mlp.out.hook_in"], gelu * at["mlp.in.hook_out"])
        for norm in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm"):
            x, scale = at[f"{norm}.hook_in"], at[f"{norm}.hook_scale"]
            assert_same(scale, np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps))
            assert_same(at[f"{norm}.hook_normalized"], x / scale)
        equal = {
            "ln1.hook_in": "hook_in",
            "ln2.hook_in": "hook_resid_mid",
            "mlp.hook_in": "ln2.hook_out",
            "attn.hook_in": "ln1.hook_out",
            "attn.hook_out": "attn.o.hook_out",
            "mlp.hook_out": "mlp.out.hook_out",
            "attn.q_norm.hook_in": "attn.q.hook_out",
            "attn.k_norm.hook_in": "attn.k.hook_out",
        }
        for one, other in equal.items():
            np.testing.assert_array_equal(at[one], at[other])
        assert not same(at["attn.o.hook_out"], at["ln1_post.hook_out"])  # control: before and after a norm
        for name in COPIES:
            np.testing.assert_array_equal(at[name], np.broadcast_to(at["hook_in"][:, :, None], at[name].shape))
    np.testing.assert_array_equal(cache["unembed.hook_out"], logits)
    np.testing.assert_array_equal(cache["unembed.hook_in"], cache["ln_final.hook_out"])


def test_equal_sites_share_one_array():
    """Sites that hold one value leave the compiled function of `run_with_cache` once, with the right value."""
    logits, cache = HookedGemma3(*small()).run_with_cache(TOKENS)
    for name in SITES:
        assert_same(cache[name], plain()[1][name])
    copies = ["blocks.0.hook_attn_in", "blocks.0.hook_q_input"]
    stream, normed = ["blocks.0.hook_out", "blocks.1.hook_in"], ["blocks.0.attn.hook_in", "blocks.0.ln1.hook_out"]
    for one, other in (stream, normed, copies):
        assert cache[one] is cache[other]
    assert cache["unembed.hook_out"] is logits
    assert cache["blocks.0.hook_in"] is not cache["blocks.1.hook_in"]  # control


def test_capture_inside_jit():
    """Under jit the same values come out as without, in the model's order, under all their names."""
    logits, cache = jitted()(*small(), TOKENS, SOME)
    assert [name for name in SITES if name in cache] == list(cache)
    assert len(cache) == 2 * LAYERS + 2
    expected_logits, expected = plain()
    assert_same(logits, expected_logits)
    for name, value in cache.items():
        assert_same(value, expected[name])


@pytest.mark.parametrize("entry", ["jit", "HookedGemma3"])
def test_a_second_call_is_not_served_by_the_code_of_the_first(entry):
    """Another capture or another edited site gives its own result, however the calls alternate."""
    call, model = jitted(), HookedGemma3(*small())

    def result(capture, edited):
        if entry == "jit":
            edits = {edited: Partial(zero)} if edited else {}
            return call(*small(), TOKENS, capture, edits, stop_at_layer=1)
        hooks = [(edited, zero)] if edited else []
        return model.run_with_hooks(TOKENS, hooks, names_filter=capture, stop_at_layer=1)

    # Each call: what it captures, and the site that it zeroes.
    calls = [
        ("blocks.0.attn.hook_z", None),
        ("blocks.0.hook_resid_mid", None),
        ("blocks.0.hook_resid_mid", "blocks.0.attn.hook_out"),
    ]
    expected = [run(capture, {edited: zero} if edited else {}, stop_at_layer=1) for capture, edited in calls]
    for (capture, edited), (own_out, own) in [*zip(calls, expected, strict=True)] * 2:
        out, cache = result(capture, edited)
        assert list(cache) == list(own)
        assert_same(out, own_out)
        assert_same(cache[capture], own[capture])
    outs = [out for out, _ in expected]
    assert same(outs[0], outs[1])
    assert not same(outs[1], outs[2])
    if entry == "jit":
        assert call._cache_size() == len(calls)


def test_an_interceptor_around_a_jitted_function_is_ignored():
    """Control: the trap that `forward` avoids is real, and entering inside is what makes the difference."""
    config, params = small()
    apply = jax.jit(lambda params: Gemma3(config).apply({"params": params}, TOKENS, stop_at_layer=0))
    seen = []

    def record(next_fun, args, kwargs, context):
        seen.append(context.module.path)
        return next_fun(*args, **kwargs)

    apply(params)
    with nn.intercept_methods(record):
        apply(params)
    assert not seen
    _, cache = jax.jit(lambda params: forward(config, params, TOKENS, "embed.hook_out", stop_at_layer=0))(params)
    assert list(cache) == ["embed.hook_out"]


class Probe(nn.Module):
    """`forward` inside another Linen module, for `nn.remat`."""

    @nn.compact
    def __call__(self, params):
        return captures(params)


def vmapped(params):
    out = jax.vmap(lambda row: captures(params, row[None]))(TOKENS)
    return jax.tree.map(lambda value: value[:, 0], out)


def through_the_gradient(params):
    def loss(params):
        logits, cache = jax.checkpoint(captures)(params)
        return jnp.sum(logits**2), (logits, cache)

    return jax.grad(loss, has_aux=True)(params)[1]


@pytest.mark.parametrize(
    "transform",
    [vmapped, lambda params: nn.remat(Probe)().apply({}, params), through_the_gradient],
    ids=["vmap", "nn.remat", "grad of checkpoint"],
)
def test_captures_survive_transforms(transform):
    """vmap, remat, and checkpoint under grad around `forward` return the captures of a plain call."""
    logits, cache = jax.jit(transform)(small(1)[1])
    expected_logits, expected = captures(small(1)[1])
    assert_same(logits, expected_logits)
    assert list(cache) == list(expected)
    for name, value in expected.items():
        assert_same(cache[name], value)
