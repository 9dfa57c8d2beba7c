"""The reference for gradients: torch's autograd at every site of Hugging Face's modules.

A site's gradient is the gradient of a scalar with respect to a shift of the value there. So zeros are added to every
value that Hugging Face's modules and functions pass on, and autograd differentiates with respect to them. The port is
not used.

Axes: b batch, p position, h query heads, g key/value heads, r = h / g, n either kind of heads, e head_dim,
d hidden_size.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import einops
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.models.gemma3 import modeling_gemma3

from gemma3_jax.config import Gemma3Config
from gemma3_jax.parity.huggingface import computing_in, hook_boundaries, in_our_layout, logits_of, text_and_head
from gemma3_jax.sites.names import layer_of, site_names
from gemma3_jax.sites.table import site

_HEADS_FIRST = "b p n e -> b n p e"


def site_gradients(
    model: transformers.PreTrainedModel,
    metric: Callable[[torch.Tensor], torch.Tensor],
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    exact: bool,
) -> dict[str, np.ndarray]:
    """The gradient of a scalar at every site but the token ids, by canonical name, in the port's order and layout.

    Args:
        model: in eager attention; a text model or a multimodal one.
        metric: `metric(logits) -> []`, of the logits [b, p, V].
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens.
        exact: compute in float64; `model` is in float32 then, before and after.
    """
    shifts = _Shifts(model)
    with computing_in(model, exact=exact):
        with shifts.added():
            logits = logits_of(model, tokens, attention_mask)
        found = torch.autograd.grad(metric(logits), list(shifts.leaves.values()))
        gradients = dict(zip(shifts.leaves, found, strict=True))
        for i in range(shifts.config.num_hidden_layers):
            gradients |= shifts.at_copies(i, gradients)
    dtype = torch.float64 if exact else torch.float32
    return {name: gradients[name].to(dtype).numpy() for name in shifts.names if site(name).dtype != "int32"}


class _Shifts:
    """Adds zeros to every value that Hugging Face's modules and functions hand on in one forward pass.

    `leaves` is what to differentiate with respect to, by canonical name: the zeros, in the port's layout, and the
    tensor of `hook_resid_mid` itself. "blocks.{i}.own_k" and "blocks.{i}.own_v" are not sites: they shift the keys and
    values [b, h, p, e] that one query head sees.
    """

    def __init__(self, model: transformers.PreTrainedModel):
        self.text, self.head = text_and_head(model)
        self.config = self.text.config
        self.names = site_names(Gemma3Config.from_hf(self.config))
        self.leaves: dict[str, torch.Tensor] = {}
        self.block = ""  # the one that is running
        self.entering: list[torch.Tensor] = []
        self.tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def added(self) -> Iterator[None]:
        """What the model computes inside, it computes with the shifts."""
        with contextlib.ExitStack() as stack:
            handles = [handle for i, layer in enumerate(self.text.layers) for handle in self._hook_layer(i, layer)]
            for handle in handles + hook_boundaries(self.text, self.head, self._at_boundary):
                stack.callback(handle.remove)
            for name in self.names:
                if name.endswith(".hook_scale"):
                    stack.enter_context(self._in_norm(name.removesuffix(".hook_scale")))
            for function, shifted in (("apply_rotary_pos_emb", self._rotate), ("repeat_kv", self._repeat)):
                own = getattr(modeling_gemma3, function)
                stack.enter_context(mock.patch.object(modeling_gemma3, function, functools.partial(shifted, own)))
            stack.enter_context(_Softmax(self))
            yield

    def shift(self, name: str, value: torch.Tensor, layout: str | None = None, heads: int = 0) -> torch.Tensor:
        """The value plus zeros; `layout` is the einops pattern from the port's layout to the value's."""
        zeros = in_our_layout(torch.zeros_like(value), layout, heads).requires_grad_()
        self.leaves[name] = zeros
        return value + (zeros if layout is None else einops.rearrange(zeros, layout))

    def at_copies(self, i: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients at the copies of the residual that each head of a layer has, from those at its q, k and v.

        The layer's own modules run on h copies; each serves the queries, the keys and the values of one query head.
        """
        b, layer, h = f"blocks.{i}", self.text.layers[i], self.config.num_attention_heads
        attention = layer.self_attn
        copies = einops.repeat(self.entering[i], "b p d -> b p h d", h=h).requires_grad_()
        normed = layer.input_layernorm(copies)

        def own(projection: torch.nn.Module) -> torch.Tensor:
            # [b, p, h, n, e] -> [b, h, p, e]: from each copy, the head of the projection that serves its query head
            out = einops.rearrange(projection(normed), "b p h (n e) -> b p h n e", e=attention.head_dim)
            head = torch.arange(h)
            return einops.rearrange(out[:, :, head, head // (h // out.shape[3])], "b p h e -> b h p e")

        q, k = attention.q_norm(own(attention.q_proj)), attention.k_norm(own(attention.k_proj))
        q, k = modeling_gemma3.apply_rotary_pos_emb(q, k, *self.tables[i])
        at_q = einops.rearrange(gradients[f"{b}.attn.hook_rot_q"], _HEADS_FIRST)
        by_q, by_k, by_v = (
            torch.autograd.grad(value, copies, gradient, retain_graph=True)[0]
            for value, gradient in (
                (q, at_q),
                (k, gradients[f"{b}.own_k"]),
                (own(attention.v_proj), gradients[f"{b}.own_v"]),
            )
        )
        # [b, p, h, d] -> [b, p, g, d]
        shared = functools.partial(
            einops.reduce, pattern="b p (g r) d -> b p g d", reduction="sum", g=self.config.num_key_value_heads
        )
        return {
            f"{b}.hook_attn_in": by_q + by_k + by_v,
            f"{b}.hook_q_input": by_q,
            f"{b}.hook_k_input": shared(by_k),
            f"{b}.hook_v_input": shared(by_v),
        }

    def _at_boundary(self, name: str, layout: str | None, heads: int, value: torch.Tensor) -> torch.Tensor | None:
        return self.shift(name, value, layout, heads) if value.is_floating_point() else None

    def _hook_layer(self, i: int, layer: Any) -> list[Any]:
        def enter(module, args, kwargs):
            self.block = f"blocks.{i}"
            self.entering.append(args[0].detach())
            self.tables.append(kwargs["position_embeddings"])

        def keep_middle(module, args):
            # The tensor that both ln2 and the skip connection read; a shift of ln2's input comes after.
            self.leaves[f"blocks.{i}.hook_resid_mid"] = args[0]

        def add_results(module, args, output):
            # [b, p, h, d] -> [b, p, d]: what is added to one head's result is added to their sum
            nothing = einops.repeat(torch.zeros_like(output), "b p d -> b p h d", h=self.config.num_attention_heads)
            return output + self.shift(f"blocks.{i}.attn.hook_result", nothing).sum(2)

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.pre_feedforward_layernorm.register_forward_pre_hook(keep_middle),
            layer.self_attn.o_proj.register_forward_hook(add_results),
        ]

    def _in_norm(self, norm: str) -> Any:
        row = site(f"{norm}.hook_in")
        assert row.hf is not None
        module = self.text.get_submodule(row.hf.removesuffix(".input").removeprefix("model.").format(i=layer_of(norm)))
        own = module._norm

        def shifted(x: torch.Tensor) -> torch.Tensor:
            heads = x.shape[1]
            scale = torch.sqrt(x.detach().pow(2).mean(-1, keepdim=True) + module.eps)
            factor = scale / self.shift(f"{norm}.hook_scale", scale, row.hf_layout, heads)
            return self.shift(f"{norm}.hook_normalized", own(x) * factor, row.hf_layout, heads)

        return mock.patch.object(module, "_norm", shifted)

    def _rotate(self, rotate, q, k, cos, sin):
        b = f"{self.block}.attn"
        q, k = rotate(q, k, self.shift(f"{b}.hook_cos", cos), self.shift(f"{b}.hook_sin", sin))
        return tuple(
            self.shift(f"{b}.hook_rot_{name}", value, _HEADS_FIRST, value.shape[1])
            for name, value in (("q", q), ("k", k))
        )

    def _repeat(self, repeat, shared, r):
        """Hugging Face repeats the keys of a layer first, then its values."""
        name = f"{self.block}.own_k"
        return self.shift(f"{self.block}.own_v" if name in self.leaves else name, repeat(shared, r))


class _Softmax(TorchFunctionMode):
    """Shifts the scores and the pattern of every layer, which has one softmax, over the masked scores."""

    def __init__(self, shifts: _Shifts):
        super().__init__()
        self.shifts = shifts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.softmax:
            return func(*args, **(kwargs or {}))
        b = f"{self.shifts.block}.attn"
        scores = self.shifts.shift(f"{b}.hook_attn_scores", args[0])
        return self.shifts.shift(f"{b}.hook_pattern", func(scores, *args[1:], **(kwargs or {})))
