"""`HookedGemma3`: parameters, tokenizer and compiled functions in one object, for interactive use.

Axes of the weights: L layers, d hidden_size, V vocabulary, h query heads, g key/value heads, e head_dim, f
intermediate_size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gemma3_jax.config import Gemma3Config, check_config
from gemma3_jax.conversion.in_memory import convert_model
from gemma3_jax.conversion.tokenizers import TokenizerSource
from gemma3_jax.descriptions import Described
from gemma3_jax.elsewhere import knows_arguments_from_elsewhere, missing
from gemma3_jax.hooked import embedding, runs, streaming, text_generation, weights
from gemma3_jax.hooked import tokenizer as text
from gemma3_jax.hooked.description import describe
from gemma3_jax.hooked.loading import load
from gemma3_jax.hooked.requests import RunOptions
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.meshes import mesh_of
from gemma3_jax.model.layout import is_stacked, stack_and_empty, stack_layers
from gemma3_jax.placing.parameters import param_shardings, place
from gemma3_jax.run.request import Output
from gemma3_jax.run.selection import OneArray, ReturnType
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

    _description = describe

    if not TYPE_CHECKING:  # a type checker is to report missing attributes itself

        def __getattr__(self, name):
            raise missing(self, name)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of devices that the parameters are on; None for one device."""
        return mesh_of(self.params)

    run_with_cache = runs.run_with_cache
    run_with_hooks = runs.run_with_hooks
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
