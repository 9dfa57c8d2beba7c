"""The parts of a residual stream, each computed from captured activations and frozen norms, in float32.

Axes: b batch, p position, h query heads, e head_dim, d hidden_size, f intermediate_size, V vocabulary, n components of
a stack. "..." are the remaining axes of the cache: b and p, or fewer.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.config import Gemma3Config
from gemma3_jax.inputs import integer
from gemma3_jax.model.layout import layer_params
from gemma3_jax.sites.names import block
from gemma3_jax.sites.table import site
from gemma3_jax.types import Integers, IntegersLike, Params

Value = TypeVar("Value", np.ndarray, jax.Array)
Index = int | slice | Sequence[int] | np.ndarray | jax.Array


class Part(NamedTuple):
    """Some components of a stack: their labels, their sites, and a function that computes them, [n, ..., d]."""

    labels: list[str]
    names: list[str]
    compute: Callable[[], jax.Array]


class Captured(Protocol):
    """What the functions of this room read of an `ActivationCache`."""

    config: Gemma3Config
    params: Params | None
    batched: bool
    reduced: dict[str, str]

    def __getitem__(self, name: str, /) -> jax.Array: ...

    def __contains__(self, name: object, /) -> bool: ...


def captured_part(cache: Captured, label: str, name: str, pos_slice: Index | None) -> Part:
    """A captured value, unchanged."""
    return Part([label], [name], lambda: value_at(cache, name, pos_slice)[None])


def heads_part(cache: Captured, layer: int, pos_slice: Index | None) -> Part:
    """The heads of a layer, through ln1_post."""
    norm = block(layer, "ln1_post")

    def compute() -> jax.Array:
        # [..., h, d] * [..., 1, d] -> [h, ..., d]
        gain = gain_of(cache, norm, pos_slice)[..., None, :]
        return jnp.moveaxis(head_results(cache, layer, pos_slice) * gain, -2, 0)

    source = result_name(layer) if result_name(layer) in cache else z_name(layer)
    labels = [f"L{layer}H{head}" for head in range(cache.config.num_attention_heads)]
    return Part(labels, [source, f"{norm}.hook_scale"], compute)


def bias_part(cache: Captured, layer: int, pos_slice: Index | None) -> Part:
    """The bias of o, through ln1_post."""
    norm = block(layer, "ln1_post")

    def compute() -> jax.Array:
        # [d] * [..., d] -> [1, ..., d]
        return (weight_of(cache, block(layer, "attn.o"), "bias") * gain_of(cache, norm, pos_slice))[None]

    return Part([f"{layer}_attn_bias"], [f"{norm}.hook_scale"], compute)


def neurons_part(cache: Captured, layer: int, neuron_slice: Index | None, pos_slice: Index | None) -> Part:
    """The neurons of a layer, through ln2_post."""

    def compute() -> jax.Array:
        post, weight, gain = neuron_factors(cache, layer, neuron_slice, pos_slice)
        # [n, ..., 1] * ([n, 1, 1, d] * [..., d]) -> [n, ..., d]
        rows = weight.reshape(len(weight), *[1] * (gain.ndim - 1), -1)
        return jnp.moveaxis(post, -1, 0)[..., None] * rows * gain

    return Part(neuron_labels(cache, layer, neuron_slice), neuron_names(layer), compute)


def neuron_attrs_part(
    cache: Captured, layer: int, direction: jax.Array, neuron_slice: Index | None, pos_slice: Index | None
) -> Part:
    """The products of a layer's neurons, through ln2_post, with a direction [..., d]: to [n, ...]."""

    def compute() -> jax.Array:
        post, weight, gain = neuron_factors(cache, layer, neuron_slice, pos_slice)
        # [..., d] x [n, d] -> [..., n]
        through = matmul("...d,nd->...n", direction * gain, weight)
        return jnp.moveaxis(post * through, -1, 0)

    return Part(neuron_labels(cache, layer, neuron_slice), neuron_names(layer), compute)


def head_results(cache: Captured, layer: int, pos_slice: Index | None) -> jax.Array:
    """z W_O of every head, [..., h, d], before ln1_post: captured, or computed from z."""
    if result_name(layer) in cache:
        return value_at(cache, result_name(layer), pos_slice)
    # [..., h, e] x [h, e, d] -> [..., h, d]
    return matmul(
        "...he,hed->...hd", value_at(cache, z_name(layer), pos_slice), weight_of(cache, block(layer, "attn.o"))
    )


def neuron_factors(
    cache: Captured, layer: int, neuron_slice: Index | None, pos_slice: Index | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Activations [..., n], rows of W_out [n, d], and the gain of ln2_post [..., d]."""
    post = take(value_at(cache, block(layer, "mlp.out.hook_in"), pos_slice), neuron_slice, -1, "neuron_slice")
    weight = take(weight_of(cache, block(layer, "mlp.out")), neuron_slice, -2, "neuron_slice")
    return post, weight, gain_of(cache, block(layer, "ln2_post"), pos_slice)


def neuron_labels(cache: Captured, layer: int, neuron_slice: Index | None) -> list[str]:
    neurons = take(np.arange(cache.config.intermediate_size), neuron_slice, -1, "neuron_slice")
    return [f"L{layer}N{neuron}" for neuron in neurons]


def gain_of(cache: Captured, norm: str, pos_slice: Index | None) -> jax.Array:
    """[..., d], the factor by which that norm multiplied its input."""
    # [d] / [..., 1] -> [..., d]
    return weight_of(cache, norm) / value_at(cache, f"{norm}.hook_scale", pos_slice)


def directions(
    cache: Captured, tokens: IntegersLike, incorrect_tokens: IntegersLike | None, pos_slice: Index | None
) -> jax.Array:
    """[..., d]: its product with a component of the final stream is the contribution to the tokens' logits."""
    gain = gain_of(cache, "ln_final", pos_slice)
    columns = unembedding_of(cache, tokens, gain.shape[:-1], pos_slice)
    if incorrect_tokens is not None:
        columns = columns - unembedding_of(cache, incorrect_tokens, gain.shape[:-1], pos_slice)
    return columns * gain


def unembedding_of(cache: Captured, tokens: IntegersLike, axes: tuple[int, ...], pos_slice: Index | None) -> jax.Array:
    """The tokens' columns of the unembedding, broadcastable to [..., d], where `axes` are the sizes of "..."."""
    ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    check_ids(ids, cache.config.vocab_size)
    if ids.ndim == 1 and cache.batched and not drops_axis(pos_slice):
        ids = ids[:, None]
    if not _broadcasts(ids.shape, axes):
        raise ValueError(
            f"tokens have shape {np.shape(tokens)}, but the stack has {axes} before its last axis; give one id, "
            "one for each row [b], or one for each row and position [b, p] ([1, p]: the same in every row)"
        )
    if cache.config.tie_word_embeddings:
        # [V, d] at [...] -> [..., d]
        columns = entries(parameter_of(cache, "embed", "weight"), ids)
    else:
        # [d, V] at [...] -> [..., d]
        columns = jnp.moveaxis(entries(parameter_of(cache, "unembed", "weight"), (slice(None), ids)), 0, -1)
    return columns.astype(jnp.float32)


def entries(weight: jax.Array, index: Integers | tuple[slice, Integers]) -> jax.Array:
    """`weight[index]`, with NaN for a token id outside the vocabulary."""
    return jnp.asarray(weight).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def require(cache: Captured, names: Iterable[str]) -> None:
    """Raise one error that lists all names that were not captured, or that names a site that was reduced."""
    names = list(names)
    require_whole(cache, names)
    globs = {name: re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names if name not in cache}
    if not globs:
        return
    lacking = collections.Counter(globs.values())
    # One glob for a site that is missing in several layers.
    names_to_capture = dict.fromkeys(glob if lacking[glob] > 1 else name for name, glob in globs.items())
    raise KeyError(
        f"not captured: {', '.join(names_to_capture)}; name them in names_filter (RESIDUAL, HEADS and NEURONS of "
        "gemma3_jax.cache.residual list the sites that each method needs)"
    )


def require_whole(cache: Captured, names: Iterable[str]) -> None:
    """Raise an error if one of these sites was reduced; it names the site and the reduction."""
    for name in names:
        if name in cache.reduced:
            raise ValueError(
                f"this needs whole values, but {name} was reduced by {cache.reduced[name]}: capture it without a "
                "reduction, or use the reduced value cache[name]"
            )


def value_at(cache: Captured, name: str, pos_slice: Index | None) -> jax.Array:
    """A captured value in float32, at these positions."""
    require_whole(cache, [name])
    axes = site(name).axes.split()
    return jnp.asarray(take(cache[name], pos_slice, axes.index("p") - len(axes), "pos_slice"), jnp.float32)


def weight_of(cache: Captured, component: str, leaf: str = "weight") -> jax.Array:
    """A parameter in float32."""
    return jnp.asarray(parameter_of(cache, component, leaf), jnp.float32)


def parameter_of(cache: Captured, component: str, leaf: str) -> jax.Array:
    if cache.params is None:
        raise ValueError(
            "this needs the model's weights, but the cache has none (jit, vmap, tree.map and files drop them): "
            "call cache.with_params(params)"
        )
    *block, part = component.split(".", 2)
    if block:
        return layer_params(cache.config, cache.params, int(block[1]), *part.split("."), leaf)
    return cache.params[part][leaf]


def stream_site(cache: Captured, layer: int, mlp_input: bool = False) -> str:
    """The site of the stream that enters the layer, or its MLP."""
    if mlp_input:
        return block(layer, "hook_resid_mid")
    if layer < cache.config.num_hidden_layers:
        return block(layer, "hook_in")
    last = block(layer - 1, "hook_out")
    return last if last in cache and "ln_final.hook_in" not in cache else "ln_final.hook_in"


def norm_of(cache: Captured, layer: int, mlp_input: bool) -> str:
    """The norm that reads this stream."""
    return block(layer, f"ln{1 + mlp_input}") if layer < cache.config.num_hidden_layers else "ln_final"


def end_layer(cache: Captured, layer: int | None, mlp_input: bool = False) -> int:
    """The layer that a stream enters, 0 to L; None and -1 mean L, the final norm."""
    layers = cache.config.num_hidden_layers
    end = layers if layer is None or layer == -1 else integer("layer", layer)
    if not 0 <= end <= layers:
        raise ValueError(f"layer is {layer}; it must be 0 to {layers} (None, -1: {layers}, before the final norm)")
    if mlp_input and end == layers:
        raise ValueError(f"mlp_input needs a layer with an MLP, 0 to {layers - 1}; layer {layer} is the final norm")
    return end


def z_name(layer: int) -> str:
    return block(layer, "attn.o.hook_in")


def result_name(layer: int) -> str:
    return block(layer, "attn.hook_result")


def neuron_names(layer: int) -> list[str]:
    """The sites that the neurons of a layer are computed from."""
    return [block(layer, "mlp.out.hook_in"), block(layer, "ln2_post.hook_scale")]


def take(value: Value, index: Index | None, axis: int, what: str) -> Value:
    """Index one axis, counted from the right, as NumPy does: an int drops the axis. Unlike JAX, it checks the bounds.

    >>> import numpy as np
    >>> take(np.arange(6).reshape(2, 3), -1, -1, "pos_slice").tolist()
    [2, 5]
    """
    if index is None:
        return value
    if not isinstance(index, (int, slice, jax.core.Tracer)):
        index = np.asarray(index)
    if not isinstance(index, jax.core.Tracer):
        size = value.shape[axis]
        try:
            chosen = np.arange(size)[index]
        except IndexError as error:
            raise ValueError(f"{what} {index} is out of range for {size} entries") from error
        if not np.size(chosen):
            raise ValueError(f"{what} {index} selects none of the {size} entries")
    return value[(..., index, *[slice(None)] * (-axis - 1))]


def as_list(index: Index | None) -> Index | None:
    """An int as a list with one entry, which keeps the axis."""
    return np.atleast_1d(np.asarray(index)) if drops_axis(index) else index


def drops_axis(index: Index | None) -> bool:
    return index is not None and not isinstance(index, slice) and np.ndim(index) == 0


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def check_stack(cache: Captured, stack: jax.Array, scale: jax.Array | None = None) -> None:
    """Raise ValueError for a stack that would broadcast: of other features, or of other positions than the scale's."""
    d = cache.config.hidden_size
    if stack.ndim < 2 or stack.shape[-1] != d:
        raise ValueError(f"the stack has shape {stack.shape}; its components must be vectors, [n, ..., {d}]")
    if scale is not None and stack.shape[1:-1] != scale.shape[:-1]:
        raise ValueError(
            f"the stack has axes {stack.shape[1:-1]} between its first and last, but the cache has {scale.shape[:-1]}; "
            "pass the pos_slice of the stack"
        )


def check_ids(ids: np.ndarray | jax.Array, vocab_size: int) -> None:
    """Check token ids; the range of traced ids is not checked.

    Raises:
        ValueError: the dtype is not an integer, or an id is outside the vocabulary.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens are {ids.dtype}; give ids (model.to_single_token gives the id of a string)")
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return  # unknown values; ids outside the vocabulary give NaN
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
