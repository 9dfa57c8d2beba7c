"""`HookedGemma3`: parameters, tokenizer and compiled functions in one object, for people at a prompt.

With the command line and `conversion.parity`, one of the rooms that see both the model and `conversion`.
"""

import functools
import os
from typing import Any

import jax
from jax.typing import DTypeLike

from gemma3_jax.cache import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.forward import (
    Hooks,
    ReducedCapture,
    ReturnType,
    captured_names,
    checked_logits_at,
    edits_of,
    forward,
    placed_captures,
)
from gemma3_jax.generation.writing import Writing
from gemma3_jax.gradients import Metric, grad_at
from gemma3_jax.hooks import as_pytree
from gemma3_jax.sharing import shared, unshared
from gemma3_jax.stacking import stack_layers
from gemma3_jax.streaming import Streaming
from gemma3_jax.text import Input
from gemma3_jax.weights import Weights


@jax.tree_util.register_pytree_with_keys_class
class HookedGemma3(Writing, Streaming, Weights):
    """A Gemma 3 with its parameters and tokenizer. Holds no hooks: every call says what it captures and edits.

    Inputs are text, a list of texts (padded on the right, with the mask that belongs to it), or token ids [p] or
    [b, p]. Each set of captures, hook sites and input shape compiles once, and so do `return_type`, `stop_at_layer`,
    `pos_slice` and a mask's presence; other values compile nothing. The model is a pytree of its parameters: pass it to
    a function of your own under `jit`, `grad` or `vmap` like an array, to do anything but generate.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout, as `conversion.convert_checkpoint` or `stack_layers` returns it.
        tokenizer: a Hugging Face tokenizer, or None.
        scan_layers: bring the parameters into the layout of `stack_layers`, from which every run scans over layers: a
            deep model compiles as fast as a shallow one, with the same results. Else they stay as they are.

    Attributes:
        config: shape of the model.
        params: parameter pytree.
        tokenizer: the tokenizer, or None.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> logits, cache = model.run_with_cache("ba ke lo ba ke", names_filter="blocks.*.hook_resid_post")
    >>> list(cache)[0], cache["blocks.0.hook_resid_post"].shape == (1, 6, model.config.hidden_size)
    ('blocks.0.hook_out', True)
    """

    def __init__(self, config: Gemma3Config, params: Any, tokenizer: Any = None, *, scan_layers: bool = False):
        self.config = config
        self.params = stack_layers(config, params) if scan_layers else params
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        revision: str | None = None,
        *,
        scan_layers: bool = False,
    ) -> "HookedGemma3":
        """Convert a checkpoint (see `conversion.convert_checkpoint`) and load its tokenizer where it has one.

        Args:
            source: directory or hub id; a directory that `gemma3-jax convert` wrote is read as it is.
            dtype: "float32", "bfloat16", "float16", or None for what is stored.
            revision: branch, tag or commit on the hub.
            scan_layers: stack the parameters, see `HookedGemma3`; takes twice their memory while it is done.
        """
        # Here and not above: conversion imports gemma3_jax.config, and may be the first of the two to be imported.
        from conversion import convert_checkpoint, load_params
        from conversion.files import load_tokenizer, locate
        from conversion.store import is_converted

        directory = locate(source, revision)
        config, params = (
            load_params(directory, dtype) if is_converted(directory) else convert_checkpoint(directory, dtype)
        )
        return cls(config, params, load_tokenizer(directory), scan_layers=scan_layers)

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("params"), self.params)], (self.config, self.tokenizer)

    @classmethod
    def tree_unflatten(cls, aux, children):
        config, tokenizer = aux
        return cls(config, *children, tokenizer)

    def __call__(
        self,
        input: Input,
        return_type: ReturnType = "logits",
        *,
        stop_at_layer: int | None = None,
        attention_mask: Any = None,
        logits_at: Any = None,
    ) -> Any:
        """Run the model: logits [b, p, V] float32, or what `return_type` asks for. Arguments as in `run_with_cache`."""
        return self._run(input, (), (), return_type, stop_at_layer, attention_mask, logits_at)[0]

    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = None,
        *,
        return_type: ReturnType = "logits",
        stop_at_layer: int | None = None,
        attention_mask: Any = None,
        logits_at: Any = None,
        remove_batch_dim: bool = False,
        pos_slice: int | slice | None = None,
        incl_bwd: bool = False,
        loss_fn: Metric | None = None,
    ) -> tuple[Any, ActivationCache]:
        """Run the model and keep activations, and with `incl_bwd` their gradients.

        Args:
            input: text, texts, or token ids.
            names_filter: sites to keep: a name, a glob, a list of them, or a predicate on names. None keeps every
                site, the per-head copies of the residual among them: on a large model, name what you need. A mapping
                from names or globs to functions of `gemma3_jax.reductions`, or your own, keeps what they return.
            return_type: "logits", "loss" (mean next-token cross-entropy in nats), "both", or None, which runs no
                further than the last kept site needs.
            stop_at_layer: run only the blocks before this one and return the residual stream entering it.
            attention_mask: [b, p], 1 at real tokens; made for you when the input is text.
            logits_at: positions at which to compute logits, and nowhere else, [], [n] or [b, n]: counted over each
                row's real tokens, -1 its last.
            remove_batch_dim: drop the batch axis of the kept activations; the batch must be 1.
            pos_slice: keep only these positions of every site that has them (an int keeps its axis, of length 1).
                Sliced on the device, before anything leaves it.
            incl_bwd: also keep the gradient of `loss_fn` at every kept site: `cache.grads[name]`. The first result is
                then the value of `loss_fn`. See `grad_at`, which is the pure function below this.
            loss_fn: `loss_fn(logits) -> []`, any scalar; by default the mean next-token cross-entropy. Like an edit a
                plain function is compiled in; values that change go in a `jax.tree_util.Partial`.

        Returns:
            (what `return_type` asks for, `ActivationCache`).
        """
        keep = names_filter if names_filter is not None else "**"
        options = remove_batch_dim, _as_tuple(pos_slice)
        if incl_bwd:
            if return_type != "logits":
                raise ValueError(f"return_type is {return_type!r}; with incl_bwd the result is the value of loss_fn")
            return self._run_backward(input, keep, loss_fn, stop_at_layer, attention_mask, logits_at, *options)
        if loss_fn is not None:
            raise ValueError("loss_fn is used with incl_bwd=True only")
        return self._run(input, keep, (), return_type, stop_at_layer, attention_mask, logits_at, *options)

    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Hooks = (),
        *,
        names_filter: ReducedCapture | None = None,
        return_type: ReturnType = "logits",
        stop_at_layer: int | None = None,
        attention_mask: Any = None,
        logits_at: Any = None,
        remove_batch_dim: bool = False,
        pos_slice: int | slice | None = None,
    ) -> Any:
        """Run the model with edits.

        Args:
            input: text, texts, or token ids.
            fwd_hooks: (name, edit) pairs; the name may be a glob, a list or a predicate, and `edit(value, hook)`
                returns the new value. Pairs on one site run in the order given. A plain function is compiled in, by
                identity: pass values that change as leaves of a `jax.tree_util.Partial` or `flax.struct.dataclass`.
            names_filter: sites to keep from the edited run.

        The other arguments are those of `run_with_cache`.

        Returns:
            What `return_type` asks for; with `names_filter`, (that, `ActivationCache`).
        """
        options = remove_batch_dim, _as_tuple(pos_slice)
        keep = () if names_filter is None else names_filter
        out, cache = self._run(input, keep, fwd_hooks, return_type, stop_at_layer, attention_mask, logits_at, *options)
        return out if names_filter is None else (out, cache)

    def _run(
        self,
        input,
        keep,
        hooks,
        return_type,
        stop_at_layer,
        attention_mask,
        logits_at,
        remove_batch_dim=False,
        pos_slice=None,
    ) -> tuple[Any, ActivationCache]:
        tokens, mask = self.encode(input, attention_mask)
        _check_slices(tokens, remove_batch_dim, pos_slice, logits_at)
        run = _compiled(
            self.config,
            self.params,
            tokens,
            placed_captures(self.config, keep, tokens.shape, stop_at_layer=stop_at_layer),
            edits_of(self.config, hooks, tokens.shape, stop_at_layer),
            mask,
            checked_logits_at(logits_at, tokens.shape, stop_at_layer),
            return_type=return_type,
            stop_at_layer=stop_at_layer,
            remove_batch_dim=remove_batch_dim,
            pos_slice=pos_slice,
        )
        out, cache = unshared(run)
        return out, cache.with_params(self.params)

    def _run_backward(
        self, input, keep, loss_fn, stop_at_layer, attention_mask, logits_at, remove_batch_dim, pos_slice
    ) -> tuple[jax.Array, ActivationCache]:
        tokens, mask = self.encode(input, attention_mask)
        _check_slices(tokens, remove_batch_dim, pos_slice, logits_at)
        value, cache = _compiled_backward(
            self.config,
            self.params,
            tokens,
            as_pytree(loss_fn),
            mask,
            checked_logits_at(logits_at, tokens.shape, stop_at_layer),
            capture=captured_names(self.config, keep, stop_at_layer=stop_at_layer),
            stop_at_layer=stop_at_layer,
            remove_batch_dim=remove_batch_dim,
            pos_slice=pos_slice,
        )
        return value, cache.with_params(self.params)


_STATIC = ("config", "stop_at_layer", "remove_batch_dim", "pos_slice")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "return_type"))
def _compiled(
    config,
    params,
    tokens,
    capture,
    edits,
    attention_mask,
    logits_at,
    *,
    return_type,
    stop_at_layer,
    remove_batch_dim,
    pos_slice,
):
    """`forward` under jit, shared by all models: which sites are captured, and which are edited, is part of its key."""
    out, cache = forward(
        config,
        params,
        tokens,
        capture,
        edits,
        attention_mask,
        logits_at=logits_at,
        stop_at_layer=stop_at_layer,
        return_type=return_type,
    )
    return shared((out, _cut_all(cache, pos_slice, remove_batch_dim)))


@functools.partial(jax.jit, static_argnames=(*_STATIC, "capture"))
def _compiled_backward(
    config,
    params,
    tokens,
    loss_fn,
    attention_mask,
    logits_at,
    *,
    capture,
    stop_at_layer,
    remove_batch_dim,
    pos_slice,
):
    """`grad_at` under jit."""
    value, cache = grad_at(
        config,
        params,
        tokens,
        capture,
        loss_fn,
        attention_mask=attention_mask,
        logits_at=logits_at,
        stop_at_layer=stop_at_layer,
    )
    return value, _cut_all(cache, pos_slice, remove_batch_dim)


def _cut_all(cache: ActivationCache, pos_slice: tuple | None, remove_batch_dim: bool) -> ActivationCache:
    cut = cache if pos_slice is None else cache.sliced(positions=slice(*pos_slice))
    return cut.remove_batch_dim() if remove_batch_dim else cut


def _check_slices(tokens: jax.Array, remove_batch_dim: bool, pos_slice: tuple | None, logits_at: Any) -> None:
    if pos_slice is not None and logits_at is not None:
        raise ValueError("pos_slice and logits_at both choose positions of the logits' sites; give one of them")
    if remove_batch_dim and tokens.shape[0] != 1:
        raise ValueError(f"remove_batch_dim needs a batch of 1; this one has {tokens.shape[0]} rows")
    if pos_slice is not None and not range(tokens.shape[1])[slice(*pos_slice)]:
        raise ValueError(f"pos_slice selects no position of the {tokens.shape[1]} that the input has")


def _as_tuple(pos_slice: int | slice | None) -> tuple[int | None, int | None, int | None] | None:
    """A slice as a hashable (start, stop, step); an int as the slice of length 1 there."""
    if isinstance(pos_slice, slice):
        return pos_slice.start, pos_slice.stop, pos_slice.step
    return None if pos_slice is None else (pos_slice, pos_slice + 1 or None, None)
