"""`HookedGemma3`: parameters, tokenizer and compiled functions in one object, for interactive use.

Axes of the weights: L layers, d hidden_size, V vocabulary, h query heads, g key/value heads, e head_dim, f
intermediate_size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.in_memory import convert_model
from gemma3_jax.conversion.tokenizers import TokenizerSource
from gemma3_jax.descriptions import Described
from gemma3_jax.elsewhere import knows_arguments_from_elsewhere, missing
from gemma3_jax.hooked import embedding, streaming, text_generation, weights
from gemma3_jax.hooked import tokenizer as text
from gemma3_jax.hooked.cut import Cut, checked_cut, cut_inputs, gradients_and_cut, in_bucket_or_exact, run_and_cut
from gemma3_jax.hooked.description import describe
from gemma3_jax.hooked.loading import load
from gemma3_jax.hooked.requests import CaptureOptions, RunOptions, request_of, traced_metric
from gemma3_jax.hooked.rows import rows_on_mesh, with_more_rows
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.inputs import Inputs, check_config
from gemma3_jax.meshes import mesh_of
from gemma3_jax.model.layout import is_stacked, stack_and_empty, stack_layers
from gemma3_jax.placing.parameters import param_shardings, place
from gemma3_jax.run.compiled import run_compiled
from gemma3_jax.run.gradients import Metric, differentiable, scalar
from gemma3_jax.run.request import Output, Request
from gemma3_jax.run.selection import Edits, OneArray, ReducedCapture, ReturnType
from gemma3_jax.types import IntegersLike, Params, Tokenizer


@jax.tree_util.register_pytree_with_keys_class
class HookedGemma3(Described):
    """A Gemma 3 with its parameters and tokenizer. It does not store hooks: each call names its captures and edits.

    An input is a text, a list of texts (padded on the tokenizer's side), token ids [p] or [b, p] of any array library,
    or the mapping that a Hugging Face tokenizer returns. Ids are checked against the vocabulary. Without a mask, the
    padding tokens at the ends of rows are masked. Edits, metrics and reductions are traced at every call: see
    `gemma3_jax.hooks.tracing`.

    A run recompiles for:

    - a new shape of an argument, or an argument where there was none; but prompts run at one of a few lengths if their
      results do not depend on it (see `gemma3_jax.hooked.buckets`),
    - a new set of captures or edited sites,
    - a function that computes something else, or another static field of an edit or a reduction, as k of `TopK(k)`,
    - another value of `return_type`, `stop_at_layer`, `remove_batch_dim` or `incl_bwd`.

    It does not recompile for other values of arguments, or of arrays that a function reads.

    The model is a pytree of its parameters. Except for generation, you can pass it like an array to your own functions
    under `jit`, `grad` or `vmap`.

    Args:
        config: shape of the model.
        params: parameter pytree in either layout, as `conversion.convert_checkpoint` or `stack_layers` returns it.
        tokenizer: a Hugging Face tokenizer, or None.
        scan_layers: stack the parameters with `stack_layers`, so that every run scans over layers. Compile time then
            does not grow with depth, and the results are the same. By default the layout does not change.
        mesh: place the parameters on this mesh, as `gemma3_jax.placing.make_mesh` returns it. Every run is then cut
            over its devices: rows of the batch over "data", heads, neurons and vocabulary over "model".

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

    def __init__(
        self,
        config: Gemma3Config,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        scan_layers: bool = False,
        mesh: Mesh | None = None,
    ):
        check_config(config)
        self.config = config
        self.params = stack_layers(config, params) if scan_layers else params
        if mesh is not None:
            self.params = place(self.params, param_shardings(config, mesh, is_stacked(self.params)))
        self.tokenizer = tokenizer

    @classmethod
    @knows_arguments_from_elsewhere
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        revision: str | None = None,
        *,
        scan_layers: bool = False,
        mesh: Mesh | None = None,
        tokenizer: TokenizerSource | None = None,
        first_n_layers: int | None = None,
        allow_truncated_logits: bool = False,
        adapter: str | os.PathLike[str] | None = None,
        tie_word_embeddings: bool | None = None,
    ) -> HookedGemma3:
        """Load the tokenizer of a checkpoint, if it has one, and convert it (see `conversion.convert_checkpoint`).

        A tokenizer that does not decode what it encodes is left out, with a log message: the model then takes ids.

        Args:
            source: directory, GGUF file or hub id, also of a PEFT adapter whose config names its base; a directory that
                `gemma3-jax convert` wrote is loaded without conversion.
            dtype: "float32", "bfloat16", or None for the stored dtype; float16 is loaded in float32, and quantised
                weights in bfloat16.
            revision: branch, tag or commit on the hub.
            scan_layers: stack the parameters, see `HookedGemma3`; this takes one weight of all layers more memory.
            mesh: place the parameters on this mesh, see `HookedGemma3`.
            tokenizer: a tokenizer to use in place of the checkpoint's, or the directory or hub id of one.
            first_n_layers: load only these layers. Captures, edits and gradients in them are those of the whole model.
                Its logits are not: pass `return_type=None`, or `stop_at_layer`.
            allow_truncated_logits: with `first_n_layers`, compute logits from the last loaded layer all the same.
            adapter: directory or hub id of a PEFT adapter to merge into the source. Its tokenizer is used if it has
                one.
            tie_word_embeddings: as in `convert_checkpoint`; not for converted parameters, which are as they were saved.

        Raises:
            CheckpointError: as in `convert_checkpoint`; or a file of the tokenizer is damaged, or `tokenizer` names
                none that works.
            ModuleNotFoundError: the tokenizer needs an optional package; the message has the command to install it.

        >>> from gemma3_jax import TINY, HookedGemma3
        >>> HookedGemma3.from_pretrained(TINY, tokenizer=TINY).to_tokens("ba ke").shape
        (1, 3)
        >>> model = HookedGemma3.from_pretrained(TINY, first_n_layers=2)
        >>> _, cache = model.run_with_cache("ba ke lo", "blocks.*.hook_resid_post", return_type=None)
        >>> list(cache), model.config.truncated_from
        (['blocks.0.hook_out', 'blocks.1.hook_out'], 4)
        """
        config, params, text_tokenizer = load(
            source,
            dtype,
            revision,
            mesh=mesh,
            tokenizer=tokenizer,
            first_n_layers=first_n_layers,
            adapter=adapter,
            tie_word_embeddings=tie_word_embeddings,
        )
        config = dataclasses.replace(config, allow_truncated_logits=allow_truncated_logits)
        # The parameters are on the mesh already; only stacked ones are placed again.
        params = dict(params)  # of our own, which stacking may empty
        params = stack_and_empty(config, params) if scan_layers else params
        return cls(config, params, text_tokenizer, mesh=mesh if scan_layers else None)

    @classmethod
    def from_hf(
        cls,
        model: object,
        tokenizer: Tokenizer | None = None,
        dtype: DTypeLike | None = None,
        *,
        scan_layers: bool = False,
        mesh: Mesh | None = None,
    ) -> HookedGemma3:
        """A copy of a model in memory.

        Args:
            model: a `Gemma3ForCausalLM`, `Gemma3ForConditionalGeneration`, `Gemma3Model` or `Gemma3TextModel` of
                `transformers`, or a PEFT model around one. Its active adapters are merged in a copy, which takes the
                model's memory a second time; the model does not change.
            tokenizer: its Hugging Face tokenizer, or None.
            dtype: as in `from_pretrained`.
            scan_layers: as in `from_pretrained`.
            mesh: as in `from_pretrained`.

        Raises:
            ConfigError, CheckpointError: the model is not a Gemma 3, or its weights cannot be converted.
        """
        config, params = convert_model(model, dtype)
        params = dict(params)  # as above
        return cls(config, stack_and_empty(config, params) if scan_layers else params, tokenizer, mesh=mesh)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Hashable, Params]], tuple[Gemma3Config, Tokenizer | None]]:
        return [(jax.tree_util.GetAttrKey("params"), self.params)], (self.config, self.tokenizer)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Gemma3Config, Tokenizer | None], children: Iterable[Params]) -> Self:
        [params] = children
        return cls(aux[0], params, aux[1])

    @overload
    def __call__(self, input: Input, return_type: OneArray = ..., **options: Unpack[RunOptions]) -> jax.Array: ...
    @overload
    def __call__(
        self, input: Input, return_type: Literal["both"], **options: Unpack[RunOptions]
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def __call__(self, input: Input, return_type: None, **options: Unpack[RunOptions]) -> None: ...
    @overload
    def __call__(self, input: Input, return_type: ReturnType, **options: Unpack[RunOptions]) -> Output: ...
    @knows_arguments_from_elsewhere
    def __call__(
        self,
        input: Input,
        return_type: ReturnType = "logits",
        *,
        stop_at_layer: int | None = None,
        attention_mask: IntegersLike | None = None,
        positions: IntegersLike | None = None,
        segment_ids: IntegersLike | None = None,
        labels: IntegersLike | None = None,
        logits_at: IntegersLike | None = None,
    ) -> Output:
        """Run the model: logits [b, p, V] float32, or the result of `return_type`. Arguments as in `run_with_cache`."""
        return self.run_with_hooks(
            input,
            return_type=return_type,
            stop_at_layer=stop_at_layer,
            attention_mask=attention_mask,
            positions=positions,
            segment_ids=segment_ids,
            labels=labels,
            logits_at=logits_at,
        )

    @overload
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = ...,
        *,
        return_type: Literal["logits"] = ...,
        incl_bwd: bool = ...,
        loss_fn: Metric | None = ...,
        **options: Unpack[CaptureOptions],
    ) -> tuple[jax.Array, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = ...,
        *,
        return_type: OneArray,
        **options: Unpack[CaptureOptions],
    ) -> tuple[jax.Array, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = ...,
        *,
        return_type: Literal["both"],
        **options: Unpack[CaptureOptions],
    ) -> tuple[tuple[jax.Array, jax.Array], ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = ...,
        *,
        return_type: None,
        **options: Unpack[CaptureOptions],
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = ...,
        *,
        return_type: ReturnType,
        **options: Unpack[CaptureOptions],
    ) -> tuple[Output, ActivationCache]: ...
    @knows_arguments_from_elsewhere
    def run_with_cache(
        self,
        input: Input,
        names_filter: ReducedCapture | None = None,
        *,
        return_type: ReturnType = "logits",
        stop_at_layer: int | None = None,
        attention_mask: IntegersLike | None = None,
        positions: IntegersLike | None = None,
        segment_ids: IntegersLike | None = None,
        labels: IntegersLike | None = None,
        logits_at: IntegersLike | None = None,
        remove_batch_dim: bool = False,
        pos_slice: int | slice | None = None,
        incl_bwd: bool = False,
        loss_fn: Metric | None = None,
    ) -> tuple[Output, ActivationCache]:
        """Run the model and capture activations, and with `incl_bwd` also their gradients.

        Args:
            input: text, texts, token ids, or what a tokenizer returns: see `HookedGemma3`.
            names_filter: sites to capture: a name, a glob, a list of them, or a predicate on names. None captures every
                site, including the per-head copies of the residual stream; for a large model, name the sites that you
                need. A mapping from names or globs to functions, of `gemma3_jax.reductions` or your own, captures the
                results of the functions.
            return_type: "logits", "loss" (mean next-token cross-entropy in nats), "loss_per_row" (the mean of each
                row, [b]), "both" (logits and "loss"), "embedding" (of a model with an embedding head, [b, n] float32:
                see `embed`), or None, which stops the run after the last captured site.
            stop_at_layer: run only the blocks before this one and return the residual stream entering it.
            attention_mask: [b, p], 1 at real tokens and 0 at padding; by default 0 at padding tokens at the
                ends of rows.
            positions: [b, p] integer positions for the rotary embedding, as in `forward`.
            segment_ids: [b, p] integers, the document of each token; documents do not attend to each other, as in
                `forward`.
            labels: [b, p] the tokens that a loss predicts, as in `forward`; -100 does not count.
            logits_at: compute logits only at these positions, [], [n] or [b, n]. They count from each row's first real
                token, and -1 is its last, as in `forward`.
            remove_batch_dim: drop the batch axis of the captured activations; the batch must be 1.
            pos_slice: capture only these columns of every site with positions (an int keeps an axis of length 1).
                They are taken on the device, and other columns do not recompile. In rows that are padded on the right,
                -1 may be padding: `reductions.At(-1)` takes each row's last token.
            incl_bwd: also return the gradient of `loss_fn` at every captured site: `cache.grads[name]`. The first
                result is then the value of `loss_fn`. `grad_at` is the pure function for this.
            loss_fn: `loss_fn(logits) -> []`, any scalar; by default the mean next-token cross-entropy. With
                return_type="embedding" it takes the embeddings [b, n].

        Returns:
            (the result of `return_type`, `ActivationCache`).

        Raises:
            UnknownSite: a name in `names_filter` is not a site.
            ValueError: arguments do not match, this call never runs a site, or ids are outside the vocabulary.
            TypeError: a reduction is not callable.

        >>> from gemma3_jax import TINY
        >>> model = HookedGemma3.from_pretrained(TINY)
        >>> _, cache = model.run_with_cache("ba ke lo", ["blocks.*.hook_resid_post"])
        >>> cache["resid_post", -1].shape
        (1, 4, 96)
        """
        keep = names_filter if names_filter is not None else "**"
        result = "loss" if incl_bwd and loss_fn is None else return_type
        inputs = self.inputs(input, attention_mask, positions, segment_ids, result, labels)
        cut = checked_cut(inputs, remove_batch_dim, pos_slice, logits_at)
        if not incl_bwd:
            if loss_fn is not None:
                raise ValueError("loss_fn needs incl_bwd=True")
            if not isinstance(keep, Mapping):
                inputs, cut = self._filled(inputs, cut, logits_at)
            request = request_of(
                self, inputs, keep, stop_at_layer=stop_at_layer, logits_at=logits_at, return_type=return_type
            )
            return self._run(request, cut)
        if return_type not in ("logits", "embedding"):
            raise ValueError(
                f"return_type is {return_type!r}; with incl_bwd the result is the value of loss_fn (the loss): "
                "leave return_type out"
            )
        if return_type == "embedding" and loss_fn is None:
            raise ValueError("the gradient of an embedding needs a loss_fn(embedding) -> []")
        request = request_of(
            self,
            inputs,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
            return_type=result,
        )
        metric = None if loss_fn is None else traced_metric(self, request, loss_fn, "loss_fn", scalar)
        named = differentiable(self.config, keep, stop_at_layer, return_type)

        def compiled(request: Request, cut: Cut, metric: Metric | None) -> tuple[jax.Array, ActivationCache]:
            return run_compiled(gradients_and_cut, self.params, request, cut, metric, replicate=False, named=named)

        value, cache = in_bucket_or_exact(compiled, self.params, request, cut, metric)
        return value, self._completed(cache, request, cut)

    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: None = ...,
        return_type: OneArray = ...,
        **options: Unpack[CaptureOptions],
    ) -> jax.Array: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: None = ...,
        return_type: Literal["both"],
        **options: Unpack[CaptureOptions],
    ) -> tuple[jax.Array, jax.Array]: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: None = ...,
        return_type: None,
        **options: Unpack[CaptureOptions],
    ) -> None: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: None = ...,
        return_type: ReturnType,
        **options: Unpack[CaptureOptions],
    ) -> Output: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: ReducedCapture,
        return_type: OneArray = ...,
        **options: Unpack[CaptureOptions],
    ) -> tuple[jax.Array, ActivationCache]: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: ReducedCapture,
        return_type: Literal["both"],
        **options: Unpack[CaptureOptions],
    ) -> tuple[tuple[jax.Array, jax.Array], ActivationCache]: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: ReducedCapture,
        return_type: None,
        **options: Unpack[CaptureOptions],
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = ...,
        *,
        names_filter: ReducedCapture,
        return_type: ReturnType,
        **options: Unpack[CaptureOptions],
    ) -> tuple[Output, ActivationCache]: ...
    @knows_arguments_from_elsewhere
    def run_with_hooks(
        self,
        input: Input,
        fwd_hooks: Edits = (),
        *,
        names_filter: ReducedCapture | None = None,
        return_type: ReturnType = "logits",
        stop_at_layer: int | None = None,
        attention_mask: IntegersLike | None = None,
        positions: IntegersLike | None = None,
        segment_ids: IntegersLike | None = None,
        labels: IntegersLike | None = None,
        logits_at: IntegersLike | None = None,
        remove_batch_dim: bool = False,
        pos_slice: int | slice | None = None,
    ) -> Output | tuple[Output, ActivationCache]:
        """Run the model with edits.

        Args:
            input: text, texts, token ids, or what a tokenizer returns: see `HookedGemma3`.
            fwd_hooks: (name, edit) pairs, one such pair, or {name: edit}; the name of a pair may be a glob, a list or
                a predicate, and `edit(value, hook)` returns the new value. Pairs on one site run in their order.
            names_filter: sites to capture from the edited run. None captures nothing here, and everything in
                `run_with_cache`.

        The other arguments are those of `run_with_cache`.

        Returns:
            The result of `return_type`; with `names_filter`, a pair of it and the `ActivationCache`.

        Raises:
            UnknownSite, ValueError, TypeError: as in `run_with_cache`, for hooks too; or a hook returns a value of
                another shape, stores values or needs concrete numbers.

        >>> from gemma3_jax import TINY
        >>> model = HookedGemma3.from_pretrained(TINY)
        >>> logits = model.run_with_hooks("ba ke lo", [("blocks.1.hook_resid_post", lambda value, hook: 0 * value)])
        >>> logits.shape
        (1, 4, 104)
        """
        inputs = self.inputs(input, attention_mask, positions, segment_ids, return_type, labels)
        cut = checked_cut(inputs, remove_batch_dim, pos_slice, logits_at)
        if not fwd_hooks and not isinstance(names_filter, Mapping):
            inputs, cut = self._filled(inputs, cut, logits_at)
        request = request_of(
            self,
            inputs,
            () if names_filter is None else names_filter,
            fwd_hooks,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
            return_type=return_type,
        )
        out, cache = self._run(request, cut)
        return out if names_filter is None else (out, cache)

    _description = describe

    if not TYPE_CHECKING:  # a type checker is to report missing attributes itself

        def __getattr__(self, name):
            raise missing(self, name)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices that the parameters are on; None for one device."""
        return mesh_of(self.params)

    encode = text.encode
    inputs = text.inputs
    to_tokens = text.to_tokens
    attention_mask = text.attention_mask
    to_string = text.to_string
    to_str_tokens = text.to_str_tokens
    to_single_token = text.to_single_token
    to_single_str_token = text.to_single_str_token
    get_token_position = text.get_token_position
    embed = embedding.embed
    generate = text_generation.generate
    generate_stream = text_generation.generate_stream
    activations = streaming.activations
    tokens_to_residual_directions = weights.tokens_to_residual_directions

    @property
    def W_E(self) -> jax.Array:
        """[V, d] embedding as stored: the model multiplies its rows by sqrt(d)."""
        return weights.embedding(self)

    @property
    def W_U(self) -> jax.Array:
        """[d, V] unembedding; the transposed embedding if they are tied."""
        return weights.unembedding(self)

    @property
    def W_Q(self) -> jax.Array:
        """[L, h, d, e]. This and the weights below are stacked over layers at each access."""
        return weights.stacked(self, "attn", "q")

    @property
    def W_K(self) -> jax.Array:
        """[L, g, d, e]: one per key/value head."""
        return weights.stacked(self, "attn", "k")

    @property
    def W_V(self) -> jax.Array:
        """[L, g, d, e]: one per key/value head."""
        return weights.stacked(self, "attn", "v")

    @property
    def W_O(self) -> jax.Array:
        """[L, h, e, d]."""
        return weights.stacked(self, "attn", "o")

    @property
    def W_gate(self) -> jax.Array:
        """[L, d, f]."""
        return weights.stacked(self, "mlp", "gate")

    @property
    def W_in(self) -> jax.Array:
        """[L, d, f]: the up projection."""
        return weights.stacked(self, "mlp", "in")

    @property
    def W_out(self) -> jax.Array:
        """[L, f, d]."""
        return weights.stacked(self, "mlp", "out")

    def _filled(self, inputs: Inputs, cut: Cut, logits_at: IntegersLike | None) -> tuple[Inputs, Cut]:
        """The inputs with as many rows as the mesh divides, and the cut that drops those that were added.

        Not for runs with functions, which would see these rows.
        """
        b = inputs.tokens.shape[0]
        rows = rows_on_mesh(self.params, b)
        if rows == b or (logits_at is not None and np.ndim(logits_at) == 2):
            return inputs, cut
        return with_more_rows(inputs, rows - b), dataclasses.replace(cut, rows=b)

    def _run(self, request: Request, cut: Cut) -> tuple[Output, ActivationCache]:
        def compiled(request: Request, cut: Cut, metric: Metric | None) -> tuple[Output, ActivationCache]:
            return run_compiled(run_and_cut, self.params, request, cut, replicate=False)

        out, cache = in_bucket_or_exact(compiled, self.params, request, cut)
        return out, self._completed(cache, request, cut)

    def _completed(self, cache: ActivationCache, request: Request, cut: Cut) -> ActivationCache:
        """The cache with parameters, tokens and their mask, which do not pass through the compiled function."""
        tokens, mask = request.source, request.attention_mask
        mask = None if mask is None else cut_inputs(mask, cut)
        return cache.with_params(self.params).with_inputs(cut_inputs(tokens, cut), mask)
