"""The precision in which Hugging Face's model computes.

In float64 throughout it is the truth that everything else is measured against. `model.double()` would not do: Hugging
Face computes norms, softmax and RoPE tables in float32 whatever the model's dtype, and a float64 copy of a model takes
twice its memory.

In bfloat16, matrix products are summed in float32 and rounded once. That is what torch does too, but where a CPU has no
instructions for bfloat16 it takes 5 to 10 times as long.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import transformers
from torch.overrides import TorchFunctionMode

from gemma3_jax.types import Method

# The arguments of a module or of a function of torch.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

_linear = torch.nn.functional.linear
# A weight is cast by pieces of so many elements: at most 64 MB, which malloc gives back at once.
_PIECE = 2**23


def text_and_head(model: transformers.PreTrainedModel) -> tuple[transformers.Gemma3TextModel, torch.nn.Module]:
    """The module that has the layers, and the unembedding, of a text or a multimodal model."""
    multimodal = model.config.model_type == "gemma3"
    return model.get_submodule("model.language_model" if multimodal else "model"), model.get_submodule("lm_head")


@contextlib.contextmanager
def computing_in(model: transformers.PreTrainedModel, *, exact: bool) -> Iterator[None]:
    """Have a float32 model compute in float64, where `exact`: norms, softmax and RoPE's angles too.

    Its parameters stay as they are, and each is cast where it is used, which changes no value. A bfloat16 model has its
    products summed in float32.
    """
    if not exact:
        with _Calls(_with_float32_sums) if model.dtype == torch.bfloat16 else contextlib.nullcontext():
            yield
        return
    text, _ = text_and_head(model)
    with _Calls(_in_float64):
        rotary = type(text.rotary_emb)(text.config)
    # Both are rounded to float32 when a model is built.
    factor = torch.tensor(text.config.hidden_size**0.5, dtype=torch.float64)
    in_float64 = _Calls(_in_float64)
    with _replaced(text, "rotary_emb", rotary), _replaced(text.embed_tokens, "embed_scale", factor), in_float64:
        yield


@contextlib.contextmanager
def _replaced(module: torch.nn.Module, name: str, value: object) -> Iterator[None]:
    """Have a module hold another submodule or buffer under that name."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


class _Calls(TorchFunctionMode):
    """Hands each call of a torch function to `call(func, args, kwargs)`."""

    def __init__(self, call: Callable[[Method, Args, Kwargs], object]):
        super().__init__()
        self._call = call

    def __torch_function__(
        self,
        func: Method,
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        return self._call(func, args, kwargs or {})


def _in_float64(func: Method, args: Args, kwargs: Kwargs) -> object:
    """Gives float64 where float32 is asked for, and float64 results of float32 weights."""
    kwargs = {name: _float64_for_float32(value) for name, value in kwargs.items()}
    if func is torch.Tensor.float:
        return args[0].double()
    if func is _linear:
        return _product(torch.float64, *args, **kwargs)
    if func is torch.nn.functional.embedding:
        return func(*args, **kwargs).double()
    return func(*map(_float64_for_float32, args), **kwargs)


def _float64_for_float32(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _with_float32_sums(func: Method, args: Args, kwargs: Kwargs) -> object:
    """Sums the products of bfloat16 matrices in float32, and rounds once."""
    if func is _linear:
        return _product(torch.float32, *args, **kwargs)
    if func is torch.matmul and args[0].dtype == torch.bfloat16:
        return torch.matmul(*(x.float() for x in args)).to(torch.bfloat16)
    return func(*args, **kwargs)


def _product(
    dtype: torch.dtype, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`, whose arguments these are, summed in `dtype`."""
    return _Linear.apply(dtype, input, weight, bias)


class _Linear(torch.autograd.Function):
    """x [..., i] by a weight [o, i], which is cast by pieces, forward and backward, and kept as it is.

    Products are summed in `dtype`. Results have the dtype of x, as have the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        wide = x.to(dtype)
        out = torch.cat([_linear(wide, piece.to(dtype)) for piece in _pieces(weight)], dim=-1)
        return (out if bias is None else out + bias.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = gradient.to(ctx.dtype)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[1]:
            pieces = _pieces(weight)
            parts = wide.split([len(piece) for piece in pieces], dim=-1)
            by_x = sum(part @ piece.to(ctx.dtype) for part, piece in zip(parts, pieces, strict=True)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            # [..., o] x [..., i] -> [o, i]
            by_weight = (wide.flatten(0, -2).T @ x.to(ctx.dtype).flatten(0, -2)).to(x.dtype)
        if ctx.needs_input_grad[3]:
            by_bias = wide.flatten(0, -2).sum(0).to(x.dtype)
        return None, by_x, by_weight, by_bias


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, _PIECE // weight.shape[1]))
