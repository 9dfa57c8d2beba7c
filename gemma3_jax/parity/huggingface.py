"""The reference: what Hugging Face's modules and functions compute, under the port's names and in its layouts.

Values come from hooks on Hugging Face's own modules (in eager attention) and from its own functions; what neither
exposes is computed in torch from what they do. The port takes no part. Nothing else in the packages runs torch, but
`precision`.

Axes: b batch, p position, n heads, e head_dim, d hidden_size, V vocabulary.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self, TypeAlias
from unittest import mock

import einops
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers.models.gemma3 import modeling_gemma3

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.gemma3 import Entry, find_prefixes
from gemma3_jax.conversion.transforms import AddOne
from gemma3_jax.parity.precision import Args, Kwargs, computing_in, text_and_head
from gemma3_jax.sites.names import layer_of, site_names
from gemma3_jax.sites.table import site
from gemma3_jax.types import Method

Visit = Callable[[str, str | None, int, torch.Tensor], torch.Tensor | None]
Values = dict[str, torch.Tensor]
See = Callable[[torch.Tensor], torch.Tensor | None]
# The result of a module.
Output: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


def load(directory: str | os.PathLike[str], dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The Hugging Face model of a checkpoint, in eager attention."""
    multimodal = transformers.AutoConfig.from_pretrained(directory).model_type == "gemma3"
    kind = transformers.Gemma3ForConditionalGeneration if multimodal else transformers.Gemma3ForCausalLM
    return kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


class Run:
    """One forward pass of the whole model, of which any block can be run again with every value recorded.

    Values are [b, p, ...] by canonical name, in the port's layouts.

    Args:
        model: in eager attention; a text model or a multimodal one.
        tokens: [b, p] integer ids.
        attention_mask: [b, p], 1 at real tokens.
        logits_at: [n] columns that get logits; None is all of them.
        exact: compute in float64; `model` is in float32 then.

    Attributes:
        text: the module that has the blocks.
        names: of every site, in the port's order.
        outside: every site outside the blocks, and "logits".
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokens: np.ndarray,
        attention_mask: np.ndarray | None = None,
        logits_at: np.ndarray | None = None,
        *,
        exact: bool = False,
    ):
        self.outside: Values = {}
        self._model, self._exact = model, exact
        self.text, head = text_and_head(model)
        self.names = site_names(Gemma3Config.from_hf(self.text.config))
        self._calls: list[tuple[Args, Kwargs]] = []

        def keep_call(block: torch.nn.Module, args: Args, kwargs: Kwargs) -> None:
            self._calls.append((args, kwargs))

        hooks = [block.register_forward_pre_hook(keep_call, with_kwargs=True) for block in self.text.layers]
        hooks += hook_boundaries(self.text, head, _keep_in(self.outside), self._sites_of(None))
        with self._running(hooks):
            self.outside["logits"] = logits_of(model, tokens, attention_mask, logits_at)
            self._add_norms(self.outside, None)

    def block(self, i: int) -> Values:
        """Every site of block i."""
        values: Values = {}
        block, (args, kwargs) = self.text.layers[i], self._calls[i]
        hooks = hook_boundaries(self.text, None, _keep_in(values), self._sites_of(i))
        with self._running(hooks), _AttentionValues(block, f"blocks.{i}.attn", values):
            block(*args, **kwargs)
            self._add_norms(values, i)
            self._add_copies(values, i)
            self._add_results(values, i)
            cos, sin = kwargs["position_embeddings"]
            values |= {f"blocks.{i}.attn.hook_cos": cos, f"blocks.{i}.attn.hook_sin": sin}
        return values

    @contextlib.contextmanager
    def _running(self, hooks: Sequence[RemovableHandle]) -> Iterator[None]:
        try:
            with computing_in(self._model, exact=self._exact), torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _sites_of(self, block: int | None) -> list[str]:
        return [name for name in self.names if layer_of(name) == block]

    def _add_norms(self, values: Values, block: int | None) -> None:
        for name in self._sites_of(block):
            if name.endswith(".hook_scale"):
                norm = name.removesuffix(".hook_scale")
                x = values[f"{norm}.hook_in"].float()
                values[name] = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.text.config.rms_norm_eps)
                values[f"{norm}.hook_normalized"] = self.text.norm._norm(x)

    def _add_copies(self, values: Values, i: int) -> None:
        """What Hugging Face has once, and the port under several names."""
        heads, groups = self.text.config.num_attention_heads, self.text.config.num_key_value_heads
        for name, n in (("attn_in", heads), ("q_input", heads), ("k_input", groups), ("v_input", groups)):
            copies = einops.repeat(values[f"blocks.{i}.hook_in"], "b p d -> b p n d", n=n)
            values[f"blocks.{i}.hook_{name}"] = copies
        values[f"blocks.{i}.hook_resid_mid"] = values[f"blocks.{i}.ln2.hook_in"]

    def _add_results(self, values: Values, i: int) -> None:
        z = values[f"blocks.{i}.attn.o.hook_in"]
        weight = self.text.layers[i].self_attn.o_proj.weight.to(z.dtype)
        by_head = einops.rearrange(weight, "d (n e) -> n e d", n=z.shape[2])
        values[f"blocks.{i}.attn.hook_result"] = torch.einsum("bpne,ned->bpnd", z, by_head)


def activations(
    model: transformers.PreTrainedModel,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    exact: bool = False,
) -> dict[str, np.ndarray]:
    """Every site by canonical name, in the port's order, and "logits": in float64 where `exact`, else in float32.

    All of them at once: for small models.
    """
    run = Run(model, tokens, attention_mask, exact=exact)
    values = dict(run.outside)
    for i in range(len(run.text.layers)):
        values |= run.block(i)
    dtype = torch.float64 if exact else torch.float32
    return {name: values[name].to(dtype).numpy() for name in (*run.names, "logits")}


def gradients(
    model: transformers.PreTrainedModel,
    chosen: Sequence[Entry],
    rows: np.ndarray,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    *,
    exact: bool,
) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss for the chosen tensors, by adapter key, in the port's layout.

    `model` is in float32; where `exact`, it computes them in float64. Of the embedding, those of `rows` alone, sorted,
    with every token of the prompt among them.
    """
    named = dict(model.named_parameters())
    (prefix,) = find_prefixes(named)
    model.requires_grad_(False)
    with _shifted_embedding(model, rows, tokens) as shift:
        leaves = [shift if entry.ours == "embed.weight" else named[f"{prefix}{entry.hf}"] for entry in chosen]
        with computing_in(model, exact=exact), _differentiable(leaves, exact):
            loss = next_token_loss(logits_of(model, tokens, attention_mask), tokens, attention_mask)
            found = torch.autograd.grad(loss, leaves)
    return {entry.ours: _in_our_layout(entry, as_numpy(leaf)) for entry, leaf in zip(chosen, found, strict=True)}


@contextlib.contextmanager
def _shifted_embedding(
    model: transformers.PreTrainedModel, rows: np.ndarray, tokens: np.ndarray
) -> Iterator[torch.Tensor]:
    """Zeros [rows, d] that are added to rows of the embedding, and have their gradient.

    To differentiate with respect to the whole embedding takes several copies of it.
    """
    text, head = text_and_head(model)
    weight = text.embed_tokens.weight
    shift = torch.zeros(len(rows), weight.shape[1], dtype=weight.dtype)
    looked_up, columns = torch.from_numpy(np.searchsorted(rows, tokens)), torch.from_numpy(rows)

    def shift_lookup(module: torch.nn.Module, args: Args, output: torch.Tensor) -> torch.Tensor:
        return output + shift[looked_up] * text.embed_tokens.embed_scale.to(shift.dtype)

    def shift_logits(module: torch.nn.Module, args: Args, output: torch.Tensor) -> torch.Tensor:
        return output.index_add(-1, columns, args[0] @ shift.T)

    hooks = [text.embed_tokens.register_forward_hook(shift_lookup)]
    if head.weight is weight:
        hooks.append(head.register_forward_hook(shift_logits))
    try:
        yield shift
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _differentiable(leaves: Collection[torch.Tensor], exact: bool) -> Iterator[None]:
    """Have gradients of these tensors taken, and where `exact` have them in float64, lest gradients be rounded."""
    own = [leaf.data for leaf in leaves]
    for leaf in leaves:
        leaf.data = leaf.data.double() if exact else leaf.data
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for leaf, data in zip(leaves, own, strict=True):
            leaf.data = data
            leaf.requires_grad_(False)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor itself, or in float32 where numpy lacks its dtype."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _in_our_layout(entry: Entry, gradient: np.ndarray) -> np.ndarray:
    # The derivative with respect to w of f(1 + w) is f'(1 + w): the step that adds one leaves a gradient as it is.
    return gradient if isinstance(entry.step, AddOne) else np.asarray(entry.step.convert(gradient))


def logits_of(
    model: transformers.PreTrainedModel,
    tokens: np.ndarray,
    mask: np.ndarray | None = None,
    logits_at: np.ndarray | None = None,
) -> torch.Tensor:
    """[b, p, V], or [b, n, V] at the columns `logits_at` [n].

    Positions are columns, counted from the first real token of a row. By itself Hugging Face's forward pass counts them
    from the row's start, which shifts every position of a row by the same number, and changes its rotated queries and
    keys alone.
    """
    first = 0 if mask is None else np.argmax(mask, axis=-1)[:, None]
    positions = np.broadcast_to(np.maximum(np.arange(tokens.shape[1]) - first, 0), tokens.shape)
    return model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        position_ids=torch.tensor(positions),
        use_cache=False,
        logits_to_keep=0 if logits_at is None else torch.from_numpy(logits_at),
    ).logits


def next_token_loss(logits: torch.Tensor, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> torch.Tensor:
    """Mean cross-entropy [], in nats, over the pairs of neighbours that are both real."""
    targets = torch.from_numpy(tokens)[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    mask = np.ones_like(tokens) if attention_mask is None else attention_mask
    counted = torch.from_numpy(mask[:, :-1] * mask[:, 1:]).flatten()
    return (losses * counted).sum() / counted.sum()


def hook_boundaries(
    text: transformers.Gemma3TextModel, head: torch.nn.Module | None, visit: Visit, names: Sequence[str] | None = None
) -> list[RemovableHandle]:
    """Hook every module boundary that the table of sites names, and return the handles that undo it.

    `visit(name, layout, heads, value)` is shown each value in Hugging Face's layout, with the einops pattern from the
    port's layout to that one (None: they agree) and the number of heads. If it returns a tensor, the model goes on with
    that one. `names` are the sites to hook; None is all of them.
    """
    handles = []
    names = site_names(Gemma3Config.from_hf(text.config)) if names is None else names
    for name in names:
        row = site(name)
        if row.hf is None:
            continue
        path, end = row.hf.format(i=layer_of(name)).rsplit(".", 1)
        heads = text.config.num_attention_heads if "h" in row.axes.split() else text.config.num_key_value_heads
        module: Any = head if path == "lm_head" else text.get_submodule(path.removeprefix("model."))
        see = functools.partial(visit, name, row.hf_layout, heads)
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


def _keep_in(values: Values) -> Visit:
    def keep(name: str, layout: str | None, heads: int, value: torch.Tensor) -> None:
        values[name] = in_our_layout(value, layout, heads)

    return keep


class _AttentionValues(TorchFunctionMode):
    """Keeps what the attention of one block passes between functions: rotated q and k, scores and pattern.

    Scores are the argument of its softmax, which Gemma 3 has one of in each block.
    """

    def __init__(self, block: torch.nn.Module, name: str, values: Values):
        super().__init__()
        self._attention = block.get_submodule("self_attn")
        self._name, self._values = name, values

    def __enter__(self) -> Self:
        rotate = modeling_gemma3.apply_rotary_pos_emb

        def kept_rotation(*args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
            rotated = rotate(*args, **kwargs)
            for name, value in zip(("q", "k"), rotated, strict=True):
                self._values[f"{self._name}.hook_rot_{name}"] = einops.rearrange(value, "b n p e -> b p n e")
            return rotated

        def keep_pattern(module: torch.nn.Module, args: Args, output: tuple[torch.Tensor, ...]) -> None:
            self._values[f"{self._name}.hook_pattern"] = output[1]

        self._stack = contextlib.ExitStack()
        self._stack.enter_context(mock.patch.object(modeling_gemma3, "apply_rotary_pos_emb", kept_rotation))
        self._stack.callback(self._attention.register_forward_hook(keep_pattern).remove)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Method,
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        if func is torch.nn.functional.softmax:
            self._values[f"{self._name}.hook_attn_scores"] = args[0]
        return func(*args, **(kwargs or {}))


def _on_input(see: See) -> Callable[[torch.nn.Module, Args, Kwargs], tuple[Args, Kwargs] | None]:
    def hook(module: torch.nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        new = see(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(see: See) -> Callable[[torch.nn.Module, Args, Output], Output | None]:
    def hook(module: torch.nn.Module, args: Args, output: Output) -> Output | None:
        if not isinstance(output, tuple):
            return see(output)
        new = see(output[0])
        return None if new is None else (new, *output[1:])

    return hook
