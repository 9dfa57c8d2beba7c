"""Exact decompositions of the residual stream by sublayer, head and neuron, and the logit attribution of each part.

Gemma 3 norms the output of every sublayer before it is added to the stream. For a fixed scale, that norm is linear. So
each head and each neuron contributes its output times the frozen gain `weight / hook_scale` of ln1_post or ln2_post.
These contributions sum to the stream; without the gain they do not.

The functions take a cache, and are also methods of `ActivationCache`, with TransformerLens' names and labels. All
results are computed in float32, whatever the model's dtype, from captured values and frozen norms. They work on a cache
with or without a batch axis, on a sliced cache, and inside `jit`, `vmap` and `grad`. Common arguments:

    cache: the activations of a run, with the model's parameters where a function needs weights.
    layer: decompose the stream that enters this layer, 0 to L. L, None or -1: the stream that enters the final norm.
    mlp_input: use the stream that enters the layer's MLP, not its attention.
    pos_slice: positions to use, sliced before the computation. An int drops the axis, as in NumPy.
    apply_ln: norm the components like the layer's input, with its cached scale: see `apply_ln_to_stack`.
    incl_remainder: add a last component "remainder", the stream minus the other components. In bfloat16 it includes
        rounding errors; in an edited run it includes edits after the components.
    return_labels: return (stack, labels).

All functions raise a KeyError that lists the activations that were not captured, and a ValueError for an argument that
is out of range, or if the cache does not have the weights.

Axes: b batch, p position, h query heads, d hidden_size, f intermediate_size, L layers, n components of a stack. "..."
are the remaining axes of the cache: b and p, or fewer.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from gemma3_jax.cache.components import (
    Captured,
    Index,
    Part,
    as_list,
    bias_part,
    captured_part,
    check_stack,
    directions,
    drops_axis,
    end_layer,
    head_results,
    heads_part,
    neuron_attrs_part,
    neuron_names,
    neurons_part,
    norm_of,
    require,
    result_name,
    stream_site,
    value_at,
    weight_of,
    z_name,
)
from gemma3_jax.compute.matmul import matmul
from gemma3_jax.elsewhere import knows_arguments_from_elsewhere
from gemma3_jax.inputs import as_array
from gemma3_jax.model.layers import RMSNorm
from gemma3_jax.sites.names import block, get_act_name
from gemma3_jax.types import IntegersLike

# The captures (`names_filter`) that the functions need. They can be added: RESIDUAL + HEADS.
# The stream, the output of each sublayer, and the scales of the norms that read the stream: (4 L + 2) values [b, p, d].
# Enough for accumulated_resid, decompose_resid, apply_ln_to_stack and logit_attrs, and for every `incl_remainder`.
RESIDUAL = (
    "embed.hook_out",
    block("*", "hook_in"),
    block("*", "ln1.hook_scale"),
    block("*", "ln1_post.hook_out"),
    block("*", "hook_resid_mid"),
    block("*", "ln2.hook_scale"),
    block("*", "ln2_post.hook_out"),
    "ln_final.hook_in",
    "ln_final.hook_scale",
)
# For compute_head_results and stack_head_results: L values [b, p, h, e].
HEADS = (block("*", "attn.o.hook_in"), block("*", "ln1_post.hook_scale"))
# For get_neuron_results, stack_neuron_results and neuron_logit_attrs: L values [b, p, f].
NEURONS = (block("*", "mlp.out.hook_in"), block("*", "ln2_post.hook_scale"))

# A stack [n, ..., d] float32; with return_labels, (stack, labels).
Stack = Any


def accumulated_resid(
    cache: Captured,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: Index | None = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Stack:
    """The residual stream entering every layer up to `layer`: [n, ..., d], labels "0_pre", "0_mid", "final_post".

    Args:
        incl_mid: also include the stream between attention and MLP of each layer before `layer`.
        apply_ln: as in TransformerLens, the final norm uses each entry's own scale, which gives the logit lens;
            the norm of another layer uses the cached scale of that layer.

    The top of this module describes the other arguments. Needs RESIDUAL. Peak memory: twice the result, which has 4 n b
    p d bytes.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> logits, cache = model.run_with_cache("ba ke lo ba", names_filter=RESIDUAL)
    >>> stack, labels = cache.accumulated_resid(layer=1, incl_mid=True, return_labels=True)
    >>> labels, stack.shape == (3, 1, 5, model.config.hidden_size)
    (['0_pre', '0_mid', '1_pre'], True)
    """
    end, layers = end_layer(cache, layer, mlp_input), cache.config.num_hidden_layers
    parts = []
    for i in range(end + 1):
        parts.append(
            captured_part(cache, "final_post" if i == layers else f"{i}_pre", stream_site(cache, i), pos_slice)
        )
        if (incl_mid and i < end) or (mlp_input and i == end):
            parts.append(captured_part(cache, f"{i}_mid", stream_site(cache, i, mlp_input=True), pos_slice))
    lens = apply_ln and end == layers
    stack, labels = _stacked(cache, parts, end, mlp_input, pos_slice, apply_ln and not lens, return_labels=True)
    stack = apply_ln_to_stack(cache, stack, recompute_ln=True) if lens else stack
    return (stack, labels) if return_labels else stack


def decompose_resid(
    cache: Captured,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: Literal["all", "mlp", "attn"] = "all",
    apply_ln: bool = False,
    pos_slice: Index | None = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
    incl_remainder: bool = False,
) -> Stack:
    """The contributions of the embedding and each sublayer: [n, ..., d], labels "embed", "0_attn_out", ...

    A sublayer contributes the output of its post-norm. In mode "all", with the embedding, the sum is the stream.

    Args:
        mode: "attn" or "mlp" for only these sublayers, or "all".
        incl_embeds: begin with the embedding.

    The top of this module describes the other arguments. Needs RESIDUAL. Peak memory: twice the result, which has 4 n b
    p d bytes.
    """
    if mode not in ("all", "mlp", "attn"):
        raise ValueError(f"mode is {mode!r}; it must be 'all', 'mlp' or 'attn'")
    end = end_layer(cache, layer, mlp_input)
    sites = {"embed": "embed.hook_out"} if incl_embeds else {}
    for i in range(end + mlp_input):
        if mode != "mlp":
            sites[f"{i}_attn_out"] = block(i, "ln1_post.hook_out")
        if mode != "attn" and i < end:
            sites[f"{i}_mlp_out"] = block(i, "ln2_post.hook_out")
    parts = [captured_part(cache, label, name, pos_slice) for label, name in sites.items()]
    return _stacked(cache, parts, end, mlp_input, pos_slice, apply_ln, incl_remainder, return_labels)


def missing_head_results(cache: Captured) -> dict[str, jax.Array]:
    """`hook_result` [b, p, h, d] float32 of every layer that has `hook_z` and was captured without it.

    Raises:
        KeyError: no layer has `hook_z` or `hook_result`.
    """
    layers = range(cache.config.num_hidden_layers)
    if not any(name in cache for i in layers for name in (z_name(i), result_name(i))):
        require(cache, (z_name(i) for i in layers))
    missing = [i for i in layers if z_name(i) in cache and result_name(i) not in cache]
    return {result_name(i): head_results(cache, i, None) for i in missing}


def stack_head_results(
    cache: Captured,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Index | None = None,
    apply_ln: bool = False,
) -> Stack:
    """The contribution of each head of the layers before `layer`: [layer * h, ..., d], labels "L0H0", ...

    This is the head's result times the frozen gain of ln1_post. A bias of o (`attention_bias`) does not belong to a
    head: it is in the remainder, and in `get_full_resid_decomposition`. The top of this module describes the arguments.
    Needs HEADS; for apply_ln and incl_remainder RESIDUAL too. Peak memory: twice the result, which has 4 n b p d bytes.
    """
    end = end_layer(cache, layer)
    parts = [heads_part(cache, i, pos_slice) for i in range(end)]
    return _stacked(cache, parts, end, False, pos_slice, apply_ln, incl_remainder, return_labels)


def get_neuron_results(
    cache: Captured, layer: int, neuron_slice: Index | None = None, pos_slice: Index | None = None
) -> jax.Array:
    """The contribution of each neuron of one layer: [..., n, d] float32, its row of W_out through ln2_post.

    Args:
        layer: block index; negative ones count from the end.
        neuron_slice: neurons to use, sliced before the computation. An int drops the axis, as in NumPy.
        pos_slice: positions, likewise.

    Needs NEURONS. Peak memory: twice the result, which has 4 b p n d bytes: 32 MB for each position of the 1b.
    """
    layers = cache.config.num_hidden_layers
    if not -layers <= layer < layers:
        raise ValueError(f"there is no layer {layer} in this model of {layers} layers")
    part = neurons_part(cache, layer % layers, as_list(neuron_slice), pos_slice)
    # [n, ..., d] -> [..., n, d]
    results = jnp.moveaxis(_stacked(cache, [part], layer % layers, False, pos_slice), 0, -2)
    return results[..., 0, :] if drops_axis(neuron_slice) else results


def stack_neuron_results(
    cache: Captured,
    layer: int | None = -1,
    pos_slice: Index | None = None,
    neuron_slice: Index | None = None,
    return_labels: bool = False,
    incl_remainder: bool = False,
    apply_ln: bool = False,
) -> Stack:
    """The contribution of each neuron of the layers before `layer`: [layer * f, ..., d], labels "L0N0", ...

    Args:
        neuron_slice: neurons of every layer to use, sliced before the computation.

    The top of this module describes the other arguments. Needs NEURONS; for apply_ln and incl_remainder RESIDUAL too.
    Peak memory: twice the result, which has 4 n b p d bytes: 0.8 GB for each position of the 1b. Use slices, or
    `neuron_logit_attrs`.
    """
    end = end_layer(cache, layer)
    parts = [neurons_part(cache, i, as_list(neuron_slice), pos_slice) for i in range(end)]
    return _stacked(cache, parts, end, False, pos_slice, apply_ln, incl_remainder, return_labels)


def get_full_resid_decomposition(
    cache: Captured,
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
        expand_neurons: each neuron is a component; there are many, see `stack_neuron_results`. If False, each MLP
            is a component, "0_mlp_out".

    The biases, "0_attn_bias", are included if the model has them (`attention_bias`). The top of this module describes
    the other arguments. Needs RESIDUAL + HEADS, and NEURONS for `expand_neurons`. Peak memory: twice the result, which
    has 4 n b p d bytes.
    """
    end = end_layer(cache, layer, mlp_input)
    parts = [heads_part(cache, i, pos_slice) for i in range(end + mlp_input)]
    for i in range(end):
        mlp = captured_part(cache, f"{i}_mlp_out", block(i, "ln2_post.hook_out"), pos_slice)
        parts.append(neurons_part(cache, i, None, pos_slice) if expand_neurons else mlp)
    parts.append(captured_part(cache, "embed", "embed.hook_out", pos_slice))
    if cache.config.attention_bias:
        parts += [bias_part(cache, i, pos_slice) for i in range(end + mlp_input)]
    return _stacked(cache, parts, end, mlp_input, pos_slice, apply_ln, incl_remainder, return_labels)


def stack_activation(
    cache: Captured, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
) -> jax.Array:
    """One site in every layer before `layer` (None or -1: in all layers), [layer, ...], in the site's dtype.

    Args:
        activation_name: "q", "resid_pre", "scale": the shorthand that `get_act_name` takes.
        sublayer_type: the component, if the shorthand needs one: "ln1".
    """
    names = [
        get_act_name(activation_name, i, sublayer_type, config=cache.config) for i in range(end_layer(cache, layer))
    ]
    if not names:
        raise ValueError("there is no layer before layer 0")
    require(cache, names)
    return jnp.stack([jnp.asarray(cache[name]) for name in names])


@knows_arguments_from_elsewhere
def apply_ln_to_stack(
    cache: Captured,
    residual_stack: jax.Array,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Index | None = None,
    recompute_ln: bool = False,
) -> jax.Array:
    """Components [n, ..., d] of a stream after the norm that reads it: x / scale * weight, in float32.

    The scale is the cached scale of the whole stream, so the results sum to the norm's output.

    Args:
        residual_stack: the components.
        layer, mlp_input: the norm: the layer's ln1, or its ln2 with `mlp_input`; ln_final for L, None or -1.
        pos_slice: the positions of the stack.
        recompute_ln: norm each component by its own scale, for states of the stream that are not parts of a sum.

    Peak memory: twice the result.
    """
    norm = norm_of(cache, end_layer(cache, layer, mlp_input), mlp_input)
    stack = jnp.asarray(as_array(residual_stack), jnp.float32)
    check_stack(cache, stack)
    if recompute_ln:
        module = RMSNorm(cache.config.hidden_size, cache.config.rms_norm_eps)
        return jnp.asarray(module.apply({"params": {"weight": weight_of(cache, norm)}}, stack))
    require(cache, [f"{norm}.hook_scale"])
    scale = value_at(cache, f"{norm}.hook_scale", pos_slice)
    check_stack(cache, stack, scale)
    # [n, ..., d] / [..., 1] * [d]
    return stack / scale * weight_of(cache, norm)


@knows_arguments_from_elsewhere
def logit_attrs(
    cache: Captured,
    residual_stack: jax.Array,
    tokens: IntegersLike,
    incorrect_tokens: IntegersLike | None = None,
    pos_slice: Index | None = None,
) -> jax.Array:
    """The contribution of each component [n, ..., d] of the final stream to a token's logit: [n, ...] float32.

    For a full decomposition, the contributions sum to the logit at `unembed.hook_out`, before
    final_logit_softcapping; in a bfloat16 model, up to the rounding of the final norm. That norm is frozen at its
    cached scale.

    Args:
        residual_stack: the components, computed without apply_ln.
        tokens: one id, one for each row [b], or one for each row and position [b, p] ([1, p]: the same in all
            rows); [p] if the cache has no batch axis. For texts, see `HookedGemma3.to_single_token`.
        incorrect_tokens: attribute the difference to the logits of these tokens.
        pos_slice: the positions of the stack, and of tokens given for each position.

    Peak memory: the stack in float32, and 16 b p d bytes.
    """
    require(cache, ["ln_final.hook_scale"])
    stack = jnp.asarray(as_array(residual_stack), jnp.float32)
    check_stack(cache, stack, value_at(cache, "ln_final.hook_scale", pos_slice))
    # [n, ..., d] x [..., d] -> [n, ...]
    return matmul("n...d,...d->n...", stack, directions(cache, tokens, incorrect_tokens, pos_slice))


def neuron_logit_attrs(
    cache: Captured,
    tokens: IntegersLike,
    incorrect_tokens: IntegersLike | None = None,
    layer: int | None = -1,
    neuron_slice: Index | None = None,
    pos_slice: Index | None = None,
    return_labels: bool = False,
) -> Stack:
    """`logit_attrs` of `stack_neuron_results(layer)`, [layer * f, ...] float32, without forming that stack.

    It multiplies the tokens' directions by both norms and W_out instead. The arguments are those of the two
    functions. Needs NEURONS and ln_final.hook_scale. Peak memory: twice the result, which has 4 n b p bytes (0.7 MB
    for each position of the 1b), W_out of one layer in float32, and 20 b p d bytes.
    """
    end = end_layer(cache, layer)
    require(cache, ["ln_final.hook_scale", *(name for i in range(end) for name in neuron_names(i))])
    direction = directions(cache, tokens, incorrect_tokens, pos_slice)
    parts = [neuron_attrs_part(cache, i, direction, as_list(neuron_slice), pos_slice) for i in range(end)]
    return _stacked(cache, parts, end, False, pos_slice, return_labels=return_labels)


def _stacked(
    cache: Captured,
    parts: list[Part],
    end: int,
    mlp_input: bool,
    pos_slice: Index | None,
    apply_ln: bool = False,
    incl_remainder: bool = False,
    return_labels: bool = False,
) -> Stack:
    """The parts of the stream that enters layer `end`, as one stack."""
    if not parts and not incl_remainder:
        raise ValueError("the stack would be empty: there are no such components before layer 0")
    stream = stream_site(cache, end, mlp_input)
    needed = [name for part in parts for name in part.names] + [stream] * incl_remainder
    require(cache, needed + [f"{norm_of(cache, end, mlp_input)}.hook_scale"] * apply_ln)
    stacks = [part.compute() for part in parts]
    labels = [label for part in parts for label in part.labels]
    if incl_remainder:
        # [1, ..., d]
        stacks.append(
            value_at(cache, stream, pos_slice)[None] - sum(jnp.sum(stack, 0, keepdims=True) for stack in stacks)
        )
        labels.append("remainder")
    stack = jnp.concatenate(stacks)
    stack = apply_ln_to_stack(cache, stack, end, mlp_input, pos_slice) if apply_ln else stack
    return (stack, labels) if return_labels else stack
