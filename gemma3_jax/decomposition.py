"""The residual stream taken apart: by sublayer, head and neuron, exactly, and what each part adds to a logit.

Gemma 3 norms the output of every sublayer before it joins the stream. That norm is linear once its scale is given, so
each head and each neuron contributes its own output times the frozen gain `weight / hook_scale` of ln1_post or
ln2_post, and these contributions sum to the stream, which without the gain they do not.

Axes: b batch, p position, h query heads, d hidden_size, f intermediate_size, L layers, n components of a stack. "..."
stands for the axes that the cache has left: b and p, or fewer.
"""

import copy
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from gemma3_jax.components import (
    Components,
    Index,
    Part,
    Tokens,
    as_list,
    drops_axis,
    neuron_names,
    result_name,
    z_name,
)
from gemma3_jax.layers import RMSNorm
from gemma3_jax.products import matmul
from gemma3_jax.sites import get_act_name

# What to capture (`names_filter`) for which methods. They add: RESIDUAL + HEADS.
# The stream, what each sublayer adds to it, and the scales of the norms that read it: (4 L + 2) values [b, p, d].
# Enough for accumulated_resid, decompose_resid, apply_ln_to_stack and logit_attrs, and for every `incl_remainder`.
RESIDUAL = (
    "embed.hook_out",
    "blocks.*.hook_in",
    "blocks.*.ln1.hook_scale",
    "blocks.*.ln1_post.hook_out",
    "blocks.*.hook_resid_mid",
    "blocks.*.ln2.hook_scale",
    "blocks.*.ln2_post.hook_out",
    "ln_final.hook_in",
    "ln_final.hook_scale",
)
# For compute_head_results and stack_head_results: L values [b, p, h, e].
HEADS = ("blocks.*.attn.o.hook_in", "blocks.*.ln1_post.hook_scale")
# For get_neuron_results, stack_neuron_results and neuron_logit_attrs: L values [b, p, f].
NEURONS = ("blocks.*.mlp.out.hook_in", "blocks.*.ln2_post.hook_scale")

# A stack [n, ..., d] float32; with return_labels, (stack, labels).
Stack = Any


class Decompositions(Components):
    """What `ActivationCache` knows of the residual stream, under TransformerLens' names and with its labels.

    Everything is computed in float32, whatever the model's dtype, from captured values and frozen norms; it works on
    a cache with or without its batch axis, sliced, and inside `jit`, `vmap` and `grad`. Arguments that recur:

        layer: the stream is the one that enters this layer, 0 to L. L, None or -1: the one that enters the final norm.
        mlp_input: the stream that enters the layer's MLP in place of its attention.
        pos_slice: positions to use, taken before anything is computed. An int drops the axis, as in numpy.
        apply_ln: norm the components as the layer does its input, by its cached scale: see `apply_ln_to_stack`.
        incl_remainder: end with what the stream holds beyond the other components, labelled "remainder". In bfloat16
            that includes what the model rounded off, in an edited run what edits changed behind the components.
        return_labels: return (stack, labels).

    All raise a KeyError that lists the activations that were not captured, and a ValueError for an argument that is
    out of range and for weights that the cache does not have.
    """

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Index | None = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream entering every layer up to `layer`: [n, ..., d], labels "0_pre", "0_mid", "final_post".

        Args:
            incl_mid: also the stream between attention and MLP of each layer before `layer`.
            apply_ln: as in TransformerLens, before the final norm every entry is normed by its own scale, which gives
                the logit lens; before another layer's norm, by the cached scale of that layer.

        The other arguments are the class's. Needs RESIDUAL. Peak memory: twice the result, which has 4 n b p d bytes.

        >>> from gemma3_jax import TINY, HookedGemma3
        >>> model = HookedGemma3.from_pretrained(TINY)
        >>> logits, cache = model.run_with_cache("ba ke lo ba", names_filter=RESIDUAL)
        >>> stack, labels = cache.accumulated_resid(layer=1, incl_mid=True, return_labels=True)
        >>> labels, stack.shape == (3, 1, 5, model.config.hidden_size)
        (['0_pre', '0_mid', '1_pre'], True)
        """
        end, layers = self._end(layer, mlp_input), self.config.num_hidden_layers
        parts = []
        for i in range(end + 1):
            parts.append(self._captured("final_post" if i == layers else f"{i}_pre", self._stream(i), pos_slice))
            if (incl_mid and i < end) or (mlp_input and i == end):
                parts.append(self._captured(f"{i}_mid", self._stream(i, mlp_input=True), pos_slice))
        lens = apply_ln and end == layers
        stack, labels = self._stacked(parts, end, mlp_input, pos_slice, apply_ln and not lens, return_labels=True)
        stack = self.apply_ln_to_stack(stack, recompute_ln=True) if lens else stack
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Index | None = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        incl_remainder: bool = False,
    ) -> Stack:
        """What the embedding and each sublayer add to the stream: [n, ..., d], labels "embed", "0_attn_out", ...

        A sublayer adds the output of its post-norm. In mode "all", with the embedding, the sum is the stream.

        Args:
            mode: "attn" or "mlp" for these sublayers only.
            incl_embeds: begin with the embedding.

        The other arguments are the class's. Needs RESIDUAL. Peak memory: twice the result, which has 4 n b p d bytes.
        """
        if mode not in ("all", "mlp", "attn"):
            raise ValueError(f"mode is {mode!r}; it takes 'all', 'mlp' and 'attn'")
        end = self._end(layer, mlp_input)
        sites = {"embed": "embed.hook_out"} if incl_embeds else {}
        for i in range(end + mlp_input):
            if mode != "mlp":
                sites[f"{i}_attn_out"] = f"blocks.{i}.ln1_post.hook_out"
            if mode != "attn" and i < end:
                sites[f"{i}_mlp_out"] = f"blocks.{i}.ln2_post.hook_out"
        parts = [self._captured(label, name, pos_slice) for label, name in sites.items()]
        return self._stacked(parts, end, mlp_input, pos_slice, apply_ln, incl_remainder, return_labels)

    def compute_head_results(self) -> Self:
        """A new cache that also holds `blocks.i.attn.hook_result` [b, p, h, d] float32 of every layer with `hook_z`.

        As at that site, this is z W_O before ln1_post; `stack_head_results` gives it as it reaches the stream. Results
        that were captured stay as they are. Needs HEADS. Memory: 4 L b p h d bytes.
        """
        layers = range(self.config.num_hidden_layers)
        if not any(name in self._values for i in layers for name in (z_name(i), result_name(i))):
            self._require(z_name(i) for i in layers)
        lacking = [i for i in layers if z_name(i) in self._values and result_name(i) not in self._values]
        new = copy.copy(self)
        new._values = self._values | {result_name(i): self._head_results(i, None) for i in lacking}
        return new

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Index | None = None,
        apply_ln: bool = False,
    ) -> Stack:
        """What each head of the layers before `layer` adds to the stream: [layer * h, ..., d], labels "L0H0", ...

        The head's result times the frozen gain of ln1_post. A bias of o (`attention_bias`) belongs to no head: it is
        in the remainder, and in `get_full_resid_decomposition`. The arguments are the class's. Needs HEADS; for
        apply_ln and incl_remainder RESIDUAL too. Peak memory: twice the result, which has 4 n b p d bytes.
        """
        end = self._end(layer)
        parts = [self._heads(i, pos_slice) for i in range(end)]
        return self._stacked(parts, end, False, pos_slice, apply_ln, incl_remainder, return_labels)

    def get_neuron_results(
        self, layer: int, neuron_slice: Index | None = None, pos_slice: Index | None = None
    ) -> jax.Array:
        """What each neuron of one layer adds to the stream: [..., n, d] float32, its row of W_out through ln2_post.

        Args:
            layer: block index; negative ones count from the end.
            neuron_slice: neurons to use, taken before anything is computed. An int drops the axis, as in numpy.
            pos_slice: positions, likewise.

        Needs NEURONS. Peak memory: twice the result, which has 4 b p n d bytes: 32 MB for each position of the 1b.
        """
        layers = self.config.num_hidden_layers
        if not -layers <= layer < layers:
            raise ValueError(f"there is no layer {layer} in this model of {layers} layers")
        part = self._neurons(layer % layers, as_list(neuron_slice), pos_slice)
        # [n, ..., d] -> [..., n, d]
        results = jnp.moveaxis(self._stacked([part], layer % layers, False, pos_slice), 0, -2)
        return results[..., 0, :] if drops_axis(neuron_slice) else results

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: Index | None = None,
        neuron_slice: Index | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
    ) -> Stack:
        """What each neuron of the layers before `layer` adds to the stream: [layer * f, ..., d], labels "L0N0", ...

        Args:
            neuron_slice: these neurons of every layer only, taken before anything is computed.

        The other arguments are the class's. Needs NEURONS; for apply_ln and incl_remainder RESIDUAL too. Peak memory:
        twice the result, which has 4 n b p d bytes: 0.8 GB for each position of the 1b. Take slices of it, or ask
        `neuron_logit_attrs`.
        """
        end = self._end(layer)
        parts = [self._neurons(i, as_list(neuron_slice), pos_slice) for i in range(end)]
        return self._stacked(parts, end, False, pos_slice, apply_ln, incl_remainder, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Index | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
    ) -> Stack:
        """The stream as a sum of heads, neurons (or MLP outputs), embedding, bias of o, in that order: [n, ..., d].

        Args:
            expand_neurons: each neuron is a component, of which there are many: see `stack_neuron_results`. If not,
                each MLP is one, "0_mlp_out".

        The biases, "0_attn_bias", are there where the model has them (`attention_bias`). The other arguments are the
        class's. Needs RESIDUAL + HEADS, and NEURONS to expand these. Peak memory: twice the result, which has
        4 n b p d bytes.
        """
        end = self._end(layer, mlp_input)
        parts = [self._heads(i, pos_slice) for i in range(end + mlp_input)]
        for i in range(end):
            mlp = self._captured(f"{i}_mlp_out", f"blocks.{i}.ln2_post.hook_out", pos_slice)
            parts.append(self._neurons(i, None, pos_slice) if expand_neurons else mlp)
        parts.append(self._captured("embed", "embed.hook_out", pos_slice))
        if self.config.attention_bias:
            parts += [self._bias(i, pos_slice) for i in range(end + mlp_input)]
        return self._stacked(parts, end, mlp_input, pos_slice, apply_ln, incl_remainder, return_labels)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> jax.Array:
        """One site of every layer before `layer` (None or -1: of all layers), [layer, ...], in the site's dtype.

        Args:
            activation_name: "q", "resid_pre", "scale": the shorthand that `get_act_name` takes.
            sublayer_type: the component, where the shorthand needs one: "ln1".
        """
        names = [get_act_name(activation_name, i, sublayer_type, config=self.config) for i in range(self._end(layer))]
        if not names:
            raise ValueError("there is no layer before layer 0")
        self._require(names)
        return jnp.stack([jnp.asarray(self._values[name]) for name in names])

    def apply_ln_to_stack(
        self,
        residual_stack: jax.Array,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Index | None = None,
        recompute_ln: bool = False,
    ) -> jax.Array:
        """Components [n, ..., d] of a stream, as the norm that reads it passes them on: x / scale * weight, in float32.

        The scale is the cached one, of the whole stream, so that the results sum to the norm's output.

        Args:
            residual_stack: the components.
            layer, mlp_input: whose input the stream is: of the layer's ln1, or ln2; of ln_final for L, None or -1.
            pos_slice: the positions that the stack was made with.
            recompute_ln: norm each component by its own scale: for states of the stream, which are no parts of it.

        Peak memory: twice the result.
        """
        norm = self._norm(self._end(layer, mlp_input), mlp_input)
        stack = jnp.asarray(residual_stack, jnp.float32)
        if recompute_ln:
            module = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
            return jnp.asarray(module.apply({"params": {"weight": self._weight(norm)}}, stack))
        self._require([f"{norm}.hook_scale"])
        scale = self._at(f"{norm}.hook_scale", pos_slice)
        _check_axes(stack, scale)
        # [n, ..., d] / [..., 1] * [d]
        return stack / scale * self._weight(norm)

    def logit_attrs(
        self,
        residual_stack: jax.Array,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        pos_slice: Index | None = None,
    ) -> jax.Array:
        """What each component [n, ..., d] of the final stream adds to a token's logit: [n, ...] float32.

        Over a full decomposition it sums to the logit at `unembed.hook_out`, which is before final_logit_softcapping;
        in a bfloat16 model up to its rounding of the final norm. That norm is frozen: its scale is the cached one.

        Args:
            residual_stack: the components, made without apply_ln.
            tokens: ids: one, one for each row [b], or one for each row and position [b, p] ([1, p]: the same in all
                rows); [p] where the cache has no batch axis. Texts: see `HookedGemma3.to_single_token`.
            incorrect_tokens: attribute the logit difference to these.
            pos_slice: the positions that the stack, and the tokens of each position, were made with.

        Peak memory: the stack in float32, and 16 b p d bytes.
        """
        self._require(["ln_final.hook_scale"])
        stack = jnp.asarray(residual_stack, jnp.float32)
        _check_axes(stack, self._at("ln_final.hook_scale", pos_slice))
        # [n, ..., d] x [..., d] -> [n, ...]
        return matmul("n...d,...d->n...", stack, self._directions(tokens, incorrect_tokens, pos_slice))

    def neuron_logit_attrs(
        self,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        layer: int | None = -1,
        neuron_slice: Index | None = None,
        pos_slice: Index | None = None,
        return_labels: bool = False,
    ) -> Stack:
        """`logit_attrs` of `stack_neuron_results(layer)`, [layer * f, ...] float32, without forming that stack.

        The tokens' directions go back through both norms and W_out instead. The arguments are those of the two
        methods. Needs NEURONS and ln_final.hook_scale. Peak memory: twice the result, which has 4 n b p bytes (0.7 MB
        for each position of the 1b), W_out of one layer in float32, and 20 b p d bytes.
        """
        end = self._end(layer)
        self._require(["ln_final.hook_scale", *(name for i in range(end) for name in neuron_names(i))])
        direction = self._directions(tokens, incorrect_tokens, pos_slice)
        parts = [self._neuron_attrs(i, direction, as_list(neuron_slice), pos_slice) for i in range(end)]
        return self._stacked(parts, end, False, pos_slice, return_labels=return_labels)

    def _stacked(
        self,
        parts: list[Part],
        end: int,
        mlp_input: bool,
        pos_slice: Index | None,
        apply_ln: bool = False,
        incl_remainder: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The parts of the stream that enters layer `end`, one after the other."""
        if not parts and not incl_remainder:
            raise ValueError("the stack would be empty: nothing of that kind lies before layer 0")
        stream = self._stream(end, mlp_input)
        needed = [name for part in parts for name in part.names] + [stream] * incl_remainder
        self._require(needed + [f"{self._norm(end, mlp_input)}.hook_scale"] * apply_ln)
        stacks = [part.compute() for part in parts]
        labels = [label for part in parts for label in part.labels]
        if incl_remainder:
            # [1, ..., d]
            stacks.append(self._at(stream, pos_slice)[None] - sum(jnp.sum(stack, 0, keepdims=True) for stack in stacks))
            labels.append("remainder")
        stack = jnp.concatenate(stacks)
        stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice) if apply_ln else stack
        return (stack, labels) if return_labels else stack


def _check_axes(stack: jax.Array, scale: jax.Array) -> None:
    """Broadcasting a stack of other positions would give numbers, and wrong ones."""
    if stack.shape[1:-1] != scale.shape[:-1]:
        raise ValueError(
            f"the stack has axes {stack.shape[1:-1]} between its first and last, and the cache {scale.shape[:-1]}; "
            "pass the pos_slice that the stack was made with"
        )
