"""The reference: what Hugging Face's modules and functions compute, under the port's names and in its layouts.

Values come from hooks on Hugging Face's own modules (in eager attention) and from its own functions; what neither
exposes is computed in torch from what they do. The port takes no part. Nothing else in the packages runs torch.

Axes: b batch, p position, n heads, e head_dim, d hidden_size.
"""

import contextlib
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import einops
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.models.gemma3 import modeling_gemma3

from conversion.gemma3 import Entry, find_prefix
from conversion.steps import AddOne
from gemma3_jax.config import Gemma3Config
from gemma3_jax.sites import SITES, site_names


def load(directory: str | os.PathLike[str], dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The Hugging Face model of a checkpoint, in eager attention."""
    multimodal = transformers.AutoConfig.from_pretrained(directory).model_type == "gemma3"
    kind = transformers.Gemma3ForConditionalGeneration if multimodal else transformers.Gemma3ForCausalLM
    return kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def activations(
    model: transformers.PreTrainedModel, tokens: np.ndarray, attention_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every site in float32 by canonical name, in the port's order, and "logits"."""
    recorder = _Recorder(model)
    with torch.no_grad(), recorder.recording():
        recorder.values["logits"] = _logits(model, tokens, attention_mask)
    recorder.derive()
    names = [*site_names(Gemma3Config.from_hf(recorder.config)), "logits"]
    return {name: recorder.values[name].float().numpy() for name in names}


def gradients(
    model: transformers.PreTrainedModel,
    chosen: Sequence[Entry],
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    exact: bool,
) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss for the chosen tensors, by adapter key, in the port's layout.

    `model` is in float32; where `exact`, it computes them in float64.
    """
    named = dict(model.named_parameters())
    prefix = find_prefix(named)
    leaves = [named[f"{prefix}{entry.hf}"] for entry in chosen]
    model.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_(True)
    if exact:
        model.double()
    try:
        with _InFloat64() if exact else contextlib.nullcontext():
            logits = _logits(model, tokens, attention_mask)
        targets = torch.from_numpy(tokens)[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
        mask = np.ones_like(tokens) if attention_mask is None else attention_mask
        counted = torch.from_numpy(mask[:, :-1] * mask[:, 1:]).flatten()
        found = torch.autograd.grad((losses * counted).sum() / counted.sum(), leaves)
    finally:
        model.float()
    return {entry.ours: _in_our_layout(entry, leaf.numpy()) for entry, leaf in zip(chosen, found, strict=True)}


def _in_our_layout(entry: Entry, gradient: np.ndarray) -> np.ndarray:
    # The derivative with respect to w of f(1 + w) is f'(1 + w): the step that adds one leaves a gradient as it is.
    return gradient if isinstance(entry.step, AddOne) else np.asarray(entry.step.convert(gradient))


def _logits(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None) -> torch.Tensor:
    """[b, p, V]; positions count the real tokens, as the port's do."""
    ones = np.ones_like(tokens) if mask is None else mask
    positions = np.maximum(np.cumsum(ones, axis=-1) - 1, 0)
    return model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        use_cache=False,
    ).logits


class _Recorder:
    """Takes every value that Hugging Face's modules and functions expose during one forward pass."""

    def __init__(self, model: transformers.PreTrainedModel):
        multimodal = model.config.model_type == "gemma3"
        text: Any = model.get_submodule("model.language_model" if multimodal else "model")
        self.text, self.config = text, text.config
        self.head = model.get_submodule("lm_head")
        self.values: dict[str, torch.Tensor] = {}
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rotated: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.scores: list[torch.Tensor] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        rotate = modeling_gemma3.apply_rotary_pos_emb

        def recorded_rotate(*args, **kwargs):
            self.rotated.append(rotate(*args, **kwargs))
            return self.rotated[-1]

        def record_tables(module, args, kwargs, output):
            self.tables[kwargs.get("layer_type", args[-1])] = output

        handles = [self.text.rotary_emb.register_forward_hook(record_tables, with_kwargs=True), *self._hook_modules()]
        try:
            with (
                unittest.mock.patch.object(modeling_gemma3, "apply_rotary_pos_emb", recorded_rotate),
                _SoftmaxInputs(self.scores),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def derive(self) -> None:
        """Add what the modules do not expose, computed from what they do."""
        for name in site_names(Gemma3Config.from_hf(self.config)):
            if name.endswith(".hook_scale"):
                self._derive_norm(name.removesuffix(".hook_scale"))
        for i in range(self.config.num_hidden_layers):
            self._derive_block(i)

    def _hook_modules(self) -> list[Any]:
        """Hooks on every module boundary that the table of sites names."""
        handles = []
        for row in SITES:
            if row.hf is None:
                continue
            path, end = row.hf.rsplit(".", 1)
            for i in range(self.config.num_hidden_layers if "{i}" in path else 1):
                module = self._module(path.replace("{i}", str(i)))
                keep = self._keeper(row.name.replace("{i}", str(i)), row.hf_layout, self._heads(row.axes))
                if end == "input":
                    handles.append(module.register_forward_pre_hook(_on_input(keep), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_on_output(keep)))
        return handles

    def _module(self, path: str) -> torch.nn.Module:
        return self.head if path == "lm_head" else self.text.get_submodule(path.removeprefix("model."))

    def _heads(self, axes: str) -> int:
        return self.config.num_attention_heads if "h" in axes.split() else self.config.num_key_value_heads

    def _keeper(self, name: str, layout: str | None, heads: int) -> Callable[[torch.Tensor], None]:
        def keep(value: torch.Tensor) -> None:
            value = value.detach()
            if layout is not None:
                ours, theirs = layout.split(" -> ")
                value = einops.rearrange(value, f"{theirs} -> {ours}", n=heads)
            self.values[name] = value.clone()

        return keep

    def _derive_norm(self, norm: str) -> None:
        x = self.values[f"{norm}.hook_in"].float()
        self.values[f"{norm}.hook_scale"] = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        self.values[f"{norm}.hook_normalized"] = self.text.norm._norm(x)

    def _derive_block(self, i: int) -> None:
        attention, values, b = self.text.layers[i].self_attn, self.values, f"blocks.{i}"
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        for name, n in (("attn_in", heads), ("q_input", heads), ("k_input", groups), ("v_input", groups)):
            values[f"{b}.hook_{name}"] = einops.repeat(values[f"{b}.hook_in"], "b p d -> b p n d", n=n)
        values[f"{b}.hook_resid_mid"] = values[f"{b}.ln2.hook_in"]
        values[f"{b}.attn.hook_cos"], values[f"{b}.attn.hook_sin"] = self.tables[self.config.layer_types[i]]
        for name, value in zip(("q", "k"), self.rotated[i], strict=True):
            values[f"{b}.attn.hook_rot_{name}"] = einops.rearrange(value, "b n p e -> b p n e")
        values[f"{b}.attn.hook_attn_scores"] = self.scores[i]
        weight = attention.o_proj.weight.detach()
        pattern = torch.softmax(self.scores[i], dim=-1, dtype=torch.float32)
        values[f"{b}.attn.hook_pattern"] = pattern.to(weight.dtype)
        by_head = einops.rearrange(weight, "d (n e) -> n e d", n=heads)
        values[f"{b}.attn.hook_result"] = torch.einsum("bpne,ned->bpnd", values[f"{b}.attn.o.hook_in"], by_head)


class _SoftmaxInputs(TorchFunctionMode):
    """Keeps the argument of every softmax: Gemma 3 has one in each layer, over the masked scores."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.softmax:
            self.kept.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


class _InFloat64(TorchFunctionMode):
    """Lets a float64 model compute in float64 where Hugging Face asks for float32: in norms and softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.nn.functional.softmax:
            kwargs = {**(kwargs or {}), "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


def _on_input(keep):
    def hook(module, args, kwargs):
        keep(args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(keep):
    def hook(module, args, output):
        keep(output[0] if isinstance(output, tuple) else output)

    return hook
