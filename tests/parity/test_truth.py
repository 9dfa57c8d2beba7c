"""The truth, Hugging Face's model in float64, is held to a float64 forward pass in numpy, and changes no model."""

import contextlib
import copy

import numpy as np
import pytest
import torch

from gemma3_jax import Gemma3Config
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.parity import compare, huggingface, precision
from gemma3_jax.sites.names import site_names
from tests.helpers.random_models import hf_model, random_tokens
from tests.parity.checks import LINEAR, TOKENS, converted, truth_of


def test_the_truth_is_an_independent_float64_forward_pass():
    """Logits in numpy from the equations of the paper and the checkpoint's tensors, to float64's rounding.

    Positions are large, where angles in float32 are wrong in the sixth digit: Hugging Face in float32 is that far off,
    and so is what `model.double()` computes.
    """
    model = hf_model(rope_parameters=LINEAR, final_logit_softcapping=3.0)
    tokens = random_tokens((1, 40))
    wanted = numpy_logits(model, tokens[0])
    assert relative(truth_of(model, tokens)["logits"][0], wanted) < 1e-13
    assert 1e-7 < relative(huggingface.activations(model, tokens)["logits"][0], wanted) < 1e-5
    with torch.no_grad():
        doubled = copy.deepcopy(model).double()(torch.from_numpy(tokens)).logits[0].numpy()
    assert relative(doubled, wanted) > 1e-8


def relative(value, truth):
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


def numpy_logits(model, tokens):
    """[p, V] of tokens [p], in float64."""
    c, w = model.config, {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    h, g, e, p = c.num_attention_heads, c.num_key_value_heads, c.head_dim, len(tokens)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.rms_norm_eps) * (1 + w[f"model.{name}.weight"])

    def rotate(x, angles):
        first, second = np.split(x, 2, -1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["model.embed_tokens.weight"][tokens] * np.sqrt(c.hidden_size)
    distance = np.arange(p)[:, None] - np.arange(p)
    for i, kind in enumerate(c.layer_types):
        rope, b = c.rope_parameters[kind], f"layers.{i}"
        # [p, e / 2]
        angles = np.arange(p)[:, None] / rope.get("factor", 1) * rope["rope_theta"] ** -(np.arange(0, e, 2) / e)
        normed = norm(x, f"{b}.input_layernorm")
        q, k, v = (
            # [n, p, e]
            (normed @ w[f"model.{b}.self_attn.{name}_proj.weight"].T).reshape(p, n, e).swapaxes(0, 1)
            for name, n in (("q", h), ("k", g), ("v", g))
        )
        q, k = (rotate(norm(y, f"{b}.self_attn.{name}_norm"), angles) for name, y in (("q", q), ("k", k)))
        k, v = (np.repeat(y, h // g, axis=0) for y in (k, v))
        seen = (distance >= 0) & (distance < (c.sliding_window if kind == "sliding_attention" else p))
        scores = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(c.query_pre_attn_scalar), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        z = (pattern / pattern.sum(-1, keepdims=True)) @ v
        out = z.swapaxes(0, 1).reshape(p, h * e) @ w[f"model.{b}.self_attn.o_proj.weight"].T
        x = x + norm(out, f"{b}.post_attention_layernorm")
        normed = norm(x, f"{b}.pre_feedforward_layernorm")
        gate, up = (normed @ w[f"model.{b}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm(gelu * up @ w[f"model.{b}.mlp.down_proj.weight"].T, f"{b}.post_feedforward_layernorm")
    logits = norm(x, "norm") @ w["lm_head.weight"].T
    return c.final_logit_softcapping * np.tanh(logits / c.final_logit_softcapping)


def test_the_truth_leaves_the_model_as_it_was():
    """Its tensors, its buffers and what it computes in float32, to the last bit, also where the run fails."""
    model = hf_model()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    computed = huggingface.activations(model, TOKENS)
    config = Gemma3Config.from_hf(model.config)
    exact = huggingface.Run(model, TOKENS, exact=True)
    assert {value.dtype for name, value in exact.block(1).items()} == {torch.float64}
    compare(model, *converted(model), TOKENS)
    with pytest.raises(IndexError):
        huggingface.Run(model, TOKENS + config.vocab_size, exact=True)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    again = huggingface.activations(model, TOKENS)
    assert all(np.array_equal(again[name], computed[name]) for name in computed)


def test_blocks_that_are_run_again_are_those_of_the_run():
    """What a block gives when it is run by itself enters the next one, on both sides, to the last bit."""
    model = hf_model()
    theirs = huggingface.Run(model, TOKENS)
    blocks = [theirs.block(i) for i in range(3)]
    for i in range(2):
        assert torch.equal(blocks[i][f"blocks.{i}.hook_out"], blocks[i + 1][f"blocks.{i + 1}.hook_in"])
    assert torch.equal(blocks[2]["blocks.2.hook_out"], theirs.outside["ln_final.hook_in"])
    assert set().union(*blocks, theirs.outside) == {*site_names(converted(model)[0]), "logits"}


def test_embedding_rows_have_the_gradient_of_the_embedding():
    """Of some rows, in float64, it is what autograd gives for the whole: by the lookup and by the unembedding."""
    model = hf_model()
    config, _ = converted(model)
    rows = np.union1d(TOKENS, [0, 1, 100])
    entry = next(entry for entry in entries(config) if entry.ours == "embed.weight")
    found = huggingface.gradients(model, [entry], rows, TOKENS, exact=True)["embed.weight"]
    model.requires_grad_(True)
    with huggingface.computing_in(model, exact=True):
        loss = huggingface.next_token_loss(huggingface.logits_of(model, TOKENS), TOKENS)
        whole = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0].numpy()
    assert relative(found, whole[rows]) < 1e-6
    assert relative(found, whole[rows - 1]) > 0.1  # control


def products(model, tokens, *, plain):
    """What a bfloat16 model computes and the gradients of its weights, with torch's own products if `plain`."""
    model.zero_grad()
    with contextlib.nullcontext() if plain else huggingface.computing_in(model, exact=False):
        logits = huggingface.logits_of(model, tokens, None, None)
        huggingface.next_token_loss(logits, tokens).backward()
    return {"logits": logits.detach(), **{name: weight.grad.clone() for name, weight in model.named_parameters()}}


def test_products_of_bfloat16_are_torchs_own():
    """Summed in float32 and rounded once: nearly all logits to the last bit; gradients differ by less than rounding."""
    torch.manual_seed(0)
    model, tokens = hf_model(torch.bfloat16), random_tokens((1, 24))
    fast, own = products(model, tokens, plain=False), products(model, tokens, plain=True)
    truth = products(hf_model(), tokens, plain=True)
    assert fast["logits"].dtype == torch.bfloat16
    for name, value in fast.items():
        assert value.dtype == own[name].dtype
        between = relative(value.double().numpy(), own[name].double().numpy())
        assert between <= relative(own[name].double().numpy(), truth[name].double().numpy())


@pytest.mark.parametrize("bias", [None, 3])
def test_a_linear_layer_in_float32(bias):
    """Forward and backward of one layer equal float64, rounded once, except where two sums round apart."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 5, 7), (3, 7), *([] if bias is None else [(3,)])
    leaves = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    gradient = torch.randn((4, 5, 3), generator=generator).bfloat16()
    out = torch.nn.functional.linear(*(leaf.double() for leaf in leaves))
    wanted = [out, *torch.autograd.grad(out, leaves, gradient.double())]
    with precision._Calls(precision._with_float32_sums):
        out = torch.nn.functional.linear(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, gradient)]
    assert torch.equal(out, wanted[0].bfloat16())
    for value, exact in zip(found, wanted, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value == exact.bfloat16()).float().mean() > 0.95
        torch.testing.assert_close(value, exact.bfloat16(), rtol=2**-7, atol=0)
