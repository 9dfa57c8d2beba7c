"""The reference: what Hugging Face's modules and functions compute, under the port's names and in its layouts.

Values come from hooks on Hugging Face's own modules (in eager attention) and from its own functions; what neither
exposes is computed in torch from what they do. The port takes no part. Nothing else in the packages runs torch, but
`site_gradients`.

Axes: b batch, p position, n heads, e head_dim, d hidden_size.
"""

import contextlib
import functools
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

Visit = Callable[[str, str | None, int, torch.Tensor], torch.Tensor | None]


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
        recorder.values["logits"] = logits_of(model, tokens, attention_mask)
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
    with computing_in(model, exact=exact):
        loss = next_token_loss(logits_of(model, tokens, attention_mask), tokens, attention_mask)
        found = torch.autograd.grad(loss, leaves)
    return {entry.ours: _in_our_layout(entry, leaf.numpy()) for entry, leaf in zip(chosen, found, strict=True)}


def _in_our_layout(entry: Entry, gradient: np.ndarray) -> np.ndarray:
    # The derivative with respect to w of f(1 + w) is f'(1 + w): the step that adds one leaves a gradient as it is.
    return gradient if isinstance(entry.step, AddOne) else np.asarray(entry.step.convert(gradient))


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> torch.Tensor:
    """[b, p, V]; positions count the real tokens, as the port's do."""
    ones = np.ones_like(tokens) if mask is None else mask
    positions = np.maximum(np.cumsum(ones, axis=-1) - 1, 0)
    return model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        use_cache=False,
    ).logits


def next_token_loss(logits: torch.Tensor, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> torch.Tensor:
    """Mean cross-entropy [], in nats, over the pairs of neighbours that are both real."""
    targets = torch.from_numpy(tokens)[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    mask = np.ones_like(tokens) if attention_mask is None else attention_mask
    counted = torch.from_numpy(mask[:, :-1] * mask[:, 1:]).flatten()
    return (losses * counted).sum() / counted.sum()


@contextlib.contextmanager
def computing_in(model: transformers.PreTrainedModel, *, exact: bool) -> Iterator[None]:
    """Have a float32 model compute in float64, where `exact`; afterwards it is in float32 again."""
    if not exact:
        yield
        return
    model.double()
    try:
        with _InFloat64():
            yield
    finally:
        model.float()


def text_and_head(model: transformers.PreTrainedModel) -> tuple[Any, torch.nn.Module]:
    """The module that has the layers, and the unembedding, of a text or a multimodal model."""
    multimodal = model.config.model_type == "gemma3"
    return model.get_submodule("model.language_model" if multimodal else "model"), model.get_submodule("lm_head")


def hook_boundaries(text: Any, head: torch.nn.Module, visit: Visit) -> list[Any]:
    """Hook every module boundary that the table of sites names, and return the handles that undo it.

    `visit(name, layout, heads, value)` is shown each value in Hugging Face's layout, with the einops pattern from the
    port's layout to that one (None: they agree) and the number of heads. If it returns a tensor, the model goes on with
    that one.
    """
    handles = []
    for row in SITES:
        if row.hf is None:
            continue
        path, end = row.hf.rsplit(".", 1)
        heads = text.config.num_attention_heads if "h" in row.axes.split() else text.config.num_key_value_heads
        for i in range(text.config.num_hidden_layers if "{i}" in path else 1):
            where = path.replace("{i}", str(i))
            module = head if where == "lm_head" else text.get_submodule(where.removeprefix("model."))
            see = functools.partial(visit, row.name.replace("{i}", str(i)), row.hf_layout, heads)
            if end == "input":
                handles.append(module.register_forward_pre_hook(_on_input(see), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_on_output(see)))
    return handles


def in_our_layout(value: torch.Tensor, layout: str | None, heads: int) -> torch.Tensor:
    """A value as the port has it; `layout` is the einops pattern from there to Hugging Face's."""
    if layout is None:
        return value
    ours, theirs = layout.split(" -> ")
    return einops.rearrange(value, f"{theirs} -> {ours}", n=heads)


class _Recorder:
    """Takes every value that Hugging Face's modules and functions expose during one forward pass."""

    def __init__(self, model: transformers.PreTrainedModel):
        self.text, self.head = text_and_head(model)
        self.config = self.text.config
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

        handles = hook_boundaries(self.text, self.head, self._keep)
        handles.append(self.text.rotary_emb.register_forward_hook(record_tables, with_kwargs=True))
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

    def _keep(self, name: str, layout: str | None, heads: int, value: torch.Tensor) -> None:
        self.values[name] = in_our_layout(value.detach(), layout, heads).clone()

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


def _on_input(see):
    def hook(module, args, kwargs):
        new = see(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(see):
    def hook(module, args, output):
        several = isinstance(output, tuple)
        new = see(output[0] if several else output)
        return (new, *output[1:]) if several and new is not None else new

    return hook
