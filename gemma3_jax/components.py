"""The parts of a residual stream, each computed from captured activations and frozen norms, in float32.

Axes: b batch, p position, h query heads, e head_dim, d hidden_size, f intermediate_size, V vocabulary, n components of
a stack. "..." stands for the axes that the cache has left: b and p, or fewer.
"""

import collections
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.products import matmul
from gemma3_jax.sites import site
from gemma3_jax.stacking import layer_params

Index = int | slice | Sequence[int] | np.ndarray | jax.Array
Tokens = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


class Part(NamedTuple):
    """Some components of a stack: their labels, the sites that they are computed from, and how, to [n, ..., d]."""

    labels: list[str]
    names: list[str]
    compute: Callable[[], jax.Array]


class Components:
    """Reads the parts of the stream out of a cache's values; `gemma3_jax.decomposition` stacks them."""

    config: Gemma3Config
    params: Any
    batched: bool
    reduced: dict[str, str]
    _values: dict[str, jax.Array]

    # --- parts ----------------------------------------------------------------------------------------------------

    def _captured(self, label: str, name: str, pos_slice: Index | None) -> Part:
        """A captured value, as it is."""
        return Part([label], [name], lambda: self._at(name, pos_slice)[None])

    def _heads(self, layer: int, pos_slice: Index | None) -> Part:
        """The heads of a layer, through ln1_post."""
        norm = f"blocks.{layer}.ln1_post"

        def compute() -> jax.Array:
            # [..., h, d] * [..., 1, d] -> [h, ..., d]
            gain = self._gain(norm, pos_slice)[..., None, :]
            return jnp.moveaxis(self._head_results(layer, pos_slice) * gain, -2, 0)

        source = result_name(layer) if result_name(layer) in self._values else z_name(layer)
        labels = [f"L{layer}H{head}" for head in range(self.config.num_attention_heads)]
        return Part(labels, [source, f"{norm}.hook_scale"], compute)

    def _bias(self, layer: int, pos_slice: Index | None) -> Part:
        """The bias of o, through ln1_post."""
        norm = f"blocks.{layer}.ln1_post"

        def compute() -> jax.Array:
            # [d] * [..., d] -> [1, ..., d]
            return (self._weight(f"blocks.{layer}.attn.o", "bias") * self._gain(norm, pos_slice))[None]

        return Part([f"{layer}_attn_bias"], [f"{norm}.hook_scale"], compute)

    def _neurons(self, layer: int, neuron_slice: Index | None, pos_slice: Index | None) -> Part:
        """The neurons of a layer, through ln2_post."""

        def compute() -> jax.Array:
            post, weight, gain = self._neuron_factors(layer, neuron_slice, pos_slice)
            # [n, ..., 1] * ([n, 1, 1, d] * [..., d]) -> [n, ..., d]
            rows = weight.reshape(len(weight), *[1] * (gain.ndim - 1), -1)
            return jnp.moveaxis(post, -1, 0)[..., None] * rows * gain

        return Part(self._neuron_labels(layer, neuron_slice), neuron_names(layer), compute)

    def _neuron_attrs(
        self, layer: int, direction: jax.Array, neuron_slice: Index | None, pos_slice: Index | None
    ) -> Part:
        """The products of a layer's neurons, through ln2_post, with a direction [..., d]: to [n, ...]."""

        def compute() -> jax.Array:
            post, weight, gain = self._neuron_factors(layer, neuron_slice, pos_slice)
            # [..., d] x [n, d] -> [..., n]
            through = matmul("...d,nd->...n", direction * gain, weight)
            return jnp.moveaxis(post * through, -1, 0)

        return Part(self._neuron_labels(layer, neuron_slice), neuron_names(layer), compute)

    # --- what the parts are made of ---------------------------------------------------------------------------------

    def _head_results(self, layer: int, pos_slice: Index | None) -> jax.Array:
        """z W_O of every head, [..., h, d], before ln1_post: as captured, else from z."""
        if result_name(layer) in self._values:
            return self._at(result_name(layer), pos_slice)
        # [..., h, e] x [h, e, d] -> [..., h, d]
        return matmul("...he,hed->...hd", self._at(z_name(layer), pos_slice), self._weight(f"blocks.{layer}.attn.o"))

    def _neuron_factors(
        self, layer: int, neuron_slice: Index | None, pos_slice: Index | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Activations [..., n], rows of W_out [n, d], and the gain of ln2_post [..., d]."""
        post = take(self._at(f"blocks.{layer}.mlp.out.hook_in", pos_slice), neuron_slice, -1, "neuron_slice")
        weight = take(self._weight(f"blocks.{layer}.mlp.out"), neuron_slice, -2, "neuron_slice")
        return post, weight, self._gain(f"blocks.{layer}.ln2_post", pos_slice)

    def _neuron_labels(self, layer: int, neuron_slice: Index | None) -> list[str]:
        neurons = take(np.arange(self.config.intermediate_size), neuron_slice, -1, "neuron_slice")
        return [f"L{layer}N{neuron}" for neuron in neurons]

    def _gain(self, norm: str, pos_slice: Index | None) -> jax.Array:
        """[..., d], by which that norm multiplied its input."""
        # [d] / [..., 1] -> [..., d]
        return self._weight(norm) / self._at(f"{norm}.hook_scale", pos_slice)

    def _directions(self, tokens: Tokens, incorrect_tokens: Tokens | None, pos_slice: Index | None) -> jax.Array:
        """[..., d], whose product with a component of the final stream is what that adds to the tokens' logits."""
        gain = self._gain("ln_final", pos_slice)
        columns = self._unembedding(tokens, gain.shape[:-1], pos_slice)
        if incorrect_tokens is not None:
            columns = columns - self._unembedding(incorrect_tokens, gain.shape[:-1], pos_slice)
        return columns * gain

    def _unembedding(self, tokens: Tokens, axes: tuple[int, ...], pos_slice: Index | None) -> jax.Array:
        """The tokens' columns of the unembedding, broadcastable to [..., d] where "..." has the lengths `axes`."""
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
        _check_ids(ids, self.config.vocab_size)
        if ids.ndim == 1 and self.batched and not drops_axis(pos_slice):
            ids = ids[:, None]
        if not _broadcasts(ids.shape, axes):
            raise ValueError(
                f"tokens have shape {np.shape(tokens)}, the stack {axes} before its last axis; give one id, one for "
                "each row [b], or one for each row and position [b, p] ([1, p]: the same in every row)"
            )
        how: dict[str, Any] = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        if self.config.tie_word_embeddings:
            # [V, d] at [...] -> [..., d]
            found = jnp.asarray(self._parameter("embed", "weight")).at[ids].get(**how)
        else:
            # [d, V] at [...] -> [..., d]
            found = jnp.moveaxis(jnp.asarray(self._parameter("unembed", "weight")).at[:, ids].get(**how), 0, -1)
        return found.astype(jnp.float32)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _require(self, names: Iterable[str]) -> None:
        """Raise one error that lists all of these that were not captured, or one that was reduced."""
        names = list(names)
        self._require_whole(names)
        globs = {name: re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names if name not in self._values}
        if not globs:
            return
        lacking = collections.Counter(globs.values())
        # One glob for a site that several layers lack.
        wanted = dict.fromkeys(glob if lacking[glob] > 1 else name for name, glob in globs.items())
        raise KeyError(
            f"not captured: {', '.join(wanted)}; name them in names_filter (RESIDUAL, HEADS and NEURONS of "
            "gemma3_jax.decomposition hold what each method needs)"
        )

    def _require_whole(self, names: Iterable[str]) -> None:
        """Raise an error that names a site of these that was reduced, and by what."""
        for name in names:
            if name in self.reduced:
                raise ValueError(
                    f"this needs whole values, and {name} was reduced by {self.reduced[name]}: capture it without a "
                    "function, or work on what the cache holds of it, cache[name]"
                )

    def _at(self, name: str, pos_slice: Index | None) -> jax.Array:
        """A captured value in float32, at these positions."""
        self._require_whole([name])
        axes = site(name).axes.split()
        return jnp.asarray(take(self._values[name], pos_slice, axes.index("p") - len(axes), "pos_slice"), jnp.float32)

    def _weight(self, component: str, leaf: str = "weight") -> jax.Array:
        """A parameter in float32."""
        return jnp.asarray(self._parameter(component, leaf), jnp.float32)

    def _parameter(self, component: str, leaf: str) -> Any:
        if self.params is None:
            raise ValueError(
                "this needs the model's weights, and the cache has none (it does not carry them through jit, vmap, "
                "tree.map or a file): call cache.with_params(params)"
            )
        *block, part = component.split(".", 2)
        if block:
            return layer_params(self.config, self.params, int(block[1]), *part.split("."), leaf)
        return self.params[part][leaf]

    def _stream(self, layer: int, mlp_input: bool = False) -> str:
        """The site that holds the stream entering that layer, or its MLP."""
        if mlp_input:
            return f"blocks.{layer}.hook_resid_mid"
        if layer < self.config.num_hidden_layers:
            return f"blocks.{layer}.hook_in"
        last = f"blocks.{layer - 1}.hook_out"
        return last if last in self._values and "ln_final.hook_in" not in self._values else "ln_final.hook_in"

    def _norm(self, layer: int, mlp_input: bool) -> str:
        """The norm that reads the stream there."""
        return f"blocks.{layer}.ln{1 + mlp_input}" if layer < self.config.num_hidden_layers else "ln_final"

    def _end(self, layer: int | None, mlp_input: bool = False) -> int:
        """The layer that a stream enters, 0 to L; None and -1 mean L, the final norm."""
        layers = self.config.num_hidden_layers
        end = layers if layer is None or layer == -1 else operator.index(layer)
        if not 0 <= end <= layers:
            raise ValueError(f"layer is {layer}; it takes 0 to {layers} (None or -1: {layers}, before the final norm)")
        if mlp_input and end == layers:
            raise ValueError(f"mlp_input needs a layer with an MLP, 0 to {layers - 1}; layer {layer} is the final norm")
        return end


def z_name(layer: int) -> str:
    return f"blocks.{layer}.attn.o.hook_in"


def result_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_result"


def neuron_names(layer: int) -> list[str]:
    """What the neurons of a layer are computed from."""
    return [f"blocks.{layer}.mlp.out.hook_in", f"blocks.{layer}.ln2_post.hook_scale"]


def take(value: Any, index: Index | None, axis: int, what: str) -> Any:
    """Index one axis, counted from the right, by numpy's rules: an int drops it. Unlike JAX, checks the bounds.

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
            raise ValueError(f"{what} {index} lies outside the {size} that there are") from error
        if not np.size(chosen):
            raise ValueError(f"{what} {index} selects none of the {size} that there are")
    return value[(..., index, *[slice(None)] * (-axis - 1))]


def as_list(index: Index | None) -> Index | None:
    """An int as a list of one, which keeps the axis."""
    return np.atleast_1d(np.asarray(index)) if drops_axis(index) else index


def drops_axis(index: Index | None) -> bool:
    return index is not None and not isinstance(index, slice) and np.ndim(index) == 0


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _check_ids(ids: np.ndarray | jax.Array, vocab_size: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens are {ids.dtype}; give ids (a cache has no tokenizer: use model.to_single_token)")
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return  # its values are not known yet; ids outside the vocabulary give NaN
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
