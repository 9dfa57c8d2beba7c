"""A dictionary as parts, each of which reads one site and writes to one; and parts with some of their features.

Axes: d features of a site, f features of the dictionary, n chosen ones, l and m layers that are read and written;
`...` tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, TypeAlias, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.features.activations import Activation
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.layered import Crosscoder, CrossLayerTranscoder
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.hooks.restrictions import as_index
from gemma3_jax.sites.names import layer_of

LAYERED = CrossLayerTranscoder | Crosscoder
# A feature: its index; in a dictionary of several layers, the layer of the model that it reads, and its index there.
Feature: TypeAlias = int | tuple[int, int]


@flax.struct.dataclass(kw_only=True)
class LayerPart:
    """The features of one layer of a layered dictionary, as they write to one layer; attributes as in `Transcoder`.

    Attributes:
        W_dec: [f, m, d], which the parts of all written layers share.
        column: the index of the written layer in it (static).
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array | np.ndarray
    b_dec: jax.Array | None
    activation: Activation
    skip: jax.Array | None
    site_in: str = flax.struct.field(pytree_node=False)
    column: int = flax.struct.field(pytree_node=False)
    normalization: None = None
    array_axes: ClassVar[Mapping[str, str]] = CrossLayerTranscoder.array_axes

    @property
    def decoder(self) -> jax.Array:
        """[f, d]."""
        return jnp.asarray(self.W_dec[:, self.column])

    def encode(self, x: jax.Array) -> jax.Array:
        """[..., f] float32 of [..., d]."""
        return self._transcoder().encode(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] float32 of [..., d]."""
        return self._transcoder()(x)

    def flat(self, x: jax.Array) -> jax.Array:
        """[..., d]."""
        return self._transcoder().flat(x)

    def _transcoder(self) -> Transcoder:
        W_dec = self.decoder
        b_dec = jnp.zeros(W_dec.shape[-1]) if self.b_dec is None else self.b_dec
        return Transcoder(
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            W_dec=W_dec,
            b_dec=b_dec,
            activation=self.activation,
            skip=self.skip,
            site_in=self.site_in,
            site_out=self.site_in,
        )


Part = SparseAutoencoder | Transcoder | LayerPart
_AnyPart = TypeVar("_AnyPart", bound=Part)


def parts_of(sae: Dictionary) -> dict[str, dict[int | None, Part]]:
    """By written site, the parts that write there, by the layer of the model that they read; None in a `Dictionary`
    of one site."""
    if not isinstance(sae, LAYERED):
        return {sae.site_out: {None: sae}}
    return {
        name: {layer_of(read): _part(sae, i, m) for i, read in enumerate(sae.site_in) if _column(sae, i, m) >= 0}
        for m, name in enumerate(sae.site_out)
    }


def reader_of(sae: Dictionary, feature: object) -> tuple[int | None, np.ndarray | jax.Array]:
    """The layer that a feature reads, None in a dictionary of one site, and its index [] int32 there.

    A feature of several layers may also be a list or an array [2], as the rows of `Found.features` are.

    Raises:
        ValueError: it is not a feature of the dictionary.
    """
    layers = [layer_of(name) for name in sae.site_in] if isinstance(sae, LAYERED) else [None]
    layer: int | None = None
    if isinstance(sae, LAYERED):
        if isinstance(feature, list | np.ndarray):
            feature = tuple(np.ravel(feature).tolist())
        if not isinstance(feature, tuple) or len(feature) != 2 or feature[0] not in layers:
            raise ValueError(
                f"the feature is {feature!r}; in a dictionary of several layers it is (layer, index), with a layer of "
                f"{layers}"
            )
        layer, feature = feature
    index = as_index("the feature", feature, booleans=False)
    if index.ndim:
        raise ValueError(f"the feature is {feature!r}; give one index")
    if not isinstance(index, jax.core.Tracer) and not -sae.width <= index < sae.width:
        raise ValueError(f"the feature is {feature!r}; the dictionary has {sae.width:,} features, counted from 0")
    return layer, index


def restricted_to(part: _AnyPart, indices: jax.Array) -> _AnyPart:
    """A part with the features `indices` [n] alone."""
    activation = jax.tree.map(lambda leaf: leaf[indices] if jnp.ndim(leaf) else leaf, part.activation)
    W_dec = part.W_dec
    return dataclasses.replace(
        part,
        W_enc=part.W_enc[:, indices],
        b_enc=part.b_enc[indices],
        W_dec=jnp.asarray(W_dec[np.asarray(indices)] if isinstance(W_dec, np.ndarray) else W_dec[indices]),
        activation=activation,
    )


def written(part: Part, f: jax.Array, x: jax.Array) -> jax.Array:
    """What features add to the output: [..., d] float32 of [..., n], for the input x [..., d]; without biases."""
    # [..., n] x [n, d] -> [..., d]
    y = matmul("...n,nd->...d", f, part.decoder.astype(jnp.float32))
    if not isinstance(part, SparseAutoencoder) or part.normalization is None:
        return y
    undone = part.normalization.undone
    x = x.astype(jnp.float32)
    return undone(y, x) - undone(jnp.zeros_like(y), x)


def _column(sae: CrossLayerTranscoder | Crosscoder, i: int, m: int) -> int:
    """The index of the written layer m in the decoder of layer i; negative if that does not write there."""
    return m - (len(sae.W_dec) - sae.W_dec[i].shape[1])


def _part(sae: CrossLayerTranscoder | Crosscoder, i: int, m: int) -> LayerPart:
    skip = getattr(sae, "skip", None)
    return LayerPart(
        W_enc=sae.W_enc[i],
        b_enc=sae.b_enc[i],
        W_dec=sae.W_dec[i],
        b_dec=sae.b_dec[m] if i == m else None,
        activation=sae.activation[i],
        skip=skip[m] if skip is not None and i == m else None,
        site_in=sae.site_in[i],
        column=_column(sae, i, m),
    )
