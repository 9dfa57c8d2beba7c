"""Dictionaries that read one site and write one: sparse autoencoders and transcoders.

Both are pytrees: arrays are leaves, and names and flags are static, so a dictionary can be passed to `jit` and `grad`,
and placed by `jax.device_put`. Everything is computed in float32, whatever the dtypes of the input and the weights.

Axes: d features of the site, f features of the dictionary, k largest ones, h heads, e head_dim; `...` tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.features.activations import Activation
from gemma3_jax.features.largest import largest
from gemma3_jax.features.normalizations import Normalization
from gemma3_jax.inputs import as_array, integer
from gemma3_jax.meshes import set_mesh_of
from gemma3_jax.types import PyTree


@flax.struct.dataclass(kw_only=True, repr=False)
class _Dictionary(Described):
    """What both kinds have; attributes as in `Transcoder`."""

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    activation: Activation
    site_in: str = flax.struct.field(pytree_node=False)
    normalization: Normalization | None = None
    subtracts_b_dec: bool = flax.struct.field(pytree_node=False, default=False)
    # An activation has arrays [f] and [].
    array_axes: ClassVar[Mapping[str, str]] = {
        "W_enc": "d f",
        "b_enc": "f",
        "W_dec": "f d",
        "b_dec": "d",
        "skip": "d d",
        "activation": "f",
    }
    check: ClassVar[Callable[..., Any]]  # set where all files of this room are known, in its __init__

    @property
    def width(self) -> int:
        """The number of features."""
        return int(self.W_enc.shape[-1])

    @property
    def decoder(self) -> jax.Array:
        """[f, d]: `W_dec`, under the name that the parts of layered dictionaries have it."""
        return self.W_dec

    def encode(self, x: ArrayLike) -> jax.Array:
        """The features of each token: [..., f] float32 of [..., d].

        At a site with a value for every head, x is [..., h, e], or [..., h e].

        Raises:
            ValueError: the last axes of x do not have the d features.
        """
        return _encode(self, self.flat(x))

    def encode_topk(self, x: ArrayLike, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest features of each token, the largest first: values [..., k] float32, indices [..., k] int32.

        The width goes by in chunks, so [..., f] is never in memory. Where fewer than k features are active, the last
        values are 0, and their indices are those of inactive features.

        Raises:
            ValueError: as for `encode`; or k is not between 1 and the width.
        """
        check_k(k, self.width)
        x = self.flat(x)
        with on_mesh_of(self.W_enc, x):
            return _encode_topk(self, x, k)

    def decode(self, f: ArrayLike, x: ArrayLike | None = None) -> jax.Array:
        """The output that features write: [..., d] float32 of [..., f].

        Args:
            f: [..., f].
            x: the input of which these are the features. A transcoder's skip connection reads it, and an autoencoder
                undoes its normalization by it; if x has heads, [..., h, e], so has the output of an autoencoder.

        Raises:
            ValueError: f does not have the width; or an autoencoder has a normalization, and there is no x.
        """
        f = jnp.asarray(as_array(f))
        if f.shape[-1:] != (self.width,):
            raise ValueError(f"the features have shape {f.shape}; the last axis must be the width, {self.width}")
        if x is not None:
            return self._shaped(_decode(self, f, self.flat(x)), np.shape(x))
        self._check_without_input()
        return _decode(self, f, None)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """The output for an input: `decode(encode(x), x)`."""
        return self._shaped(_reconstruct(self, self.flat(x)), np.shape(x))

    def _description(self) -> Description:
        reads, writes = ((name, f"{d:,}") for name, d in zip(self._sites, self._sizes, strict=True))
        title = f"{type(self).__name__}: {self.width:,} features, {type(self.activation).__name__}"
        return Description(title, (("reads", *reads), ("writes", *writes)))

    @property
    def _sites(self) -> tuple[str, str]:
        """The names of the sites that are read and written."""
        return self.site_in, self.site_in

    @property
    def _sizes(self) -> tuple[int, int]:
        """The numbers of features of these sites."""
        return self.W_enc.shape[0], self.W_dec.shape[-1]

    def flat(self, x: ArrayLike) -> jax.Array:
        """[..., d], of that or of [..., h, e]."""
        x, d = jnp.asarray(as_array(x)), self.W_enc.shape[0]
        if x.shape[-1:] == (d,):
            return x
        if x.ndim > 1 and x.shape[-2] * x.shape[-1] == d:
            return x.reshape(*x.shape[:-2], d)
        raise ValueError(f"the input has shape {x.shape}; at {self.site_in} this dictionary reads {d} features")

    def _shaped(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The output for an input of this shape."""
        return y

    def _check_without_input(self) -> None:
        """Raise a ValueError if the output cannot be computed from features alone."""

    def _finished(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The output, of what the features write and of the input; both [..., d] float32."""
        raise NotImplementedError


@flax.struct.dataclass(kw_only=True, repr=False)
class SparseAutoencoder(_Dictionary):
    """Reconstructs the value of a site from sparse features.

    Attributes as in `Transcoder`, without `skip`. A normalization of the input is undone on the output.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import features
    >>> identity, zero = jnp.eye(3), jnp.zeros(3)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=identity, b_enc=zero, W_dec=identity, b_dec=zero, activation=features.Relu(),
    ...     site_in="blocks.0.hook_out",
    ... )
    >>> x = jnp.asarray([-1.0, 2.0, 5.0])
    >>> values, indices = sae.encode_topk(x, k=2)
    >>> values.tolist(), indices.tolist(), sae(x).tolist()
    ([5.0, 2.0], [2, 1], [0.0, 2.0, 5.0])
    >>> sae
    SparseAutoencoder: 3 features, Relu
      reads   blocks.0.hook_out  3
      writes  blocks.0.hook_out  3
    """

    @property
    def site_out(self) -> str:
        """The canonical name of the site that is reconstructed: the same."""
        return self.site_in

    def _shaped(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return y.reshape(shape)

    def _check_without_input(self) -> None:
        if self.normalization is not None:
            kind = type(self.normalization).__name__
            raise ValueError(f"the input was normalized ({kind}), which decode must undo: call decode(f, x)")

    def _finished(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return y if self.normalization is None else self.normalization.undone(y, x)


@flax.struct.dataclass(kw_only=True, repr=False)
class Transcoder(_Dictionary):
    """Predicts the value of one site from that of another, such as the output of an MLP from its input.

    Attributes:
        W_enc: [d, f].
        b_enc: [f].
        W_dec: [f, d], with the features of the output.
        b_dec: [d].
        activation: from the encoder's products to features.
        site_in: canonical name of the site whose value is encoded.
        site_out: canonical name of the site whose value is predicted.
        normalization: of the input, before the encoder; or None.
        subtracts_b_dec: whether `b_dec` is subtracted from the normalized input before the encoder.
        skip: [d, d], from the input to the output, or None: `x @ skip` is added to the output.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import features
    >>> one = features.Transcoder(
    ...     W_enc=jnp.ones((2, 1)), b_enc=jnp.zeros(1), W_dec=jnp.ones((1, 2)), b_dec=jnp.zeros(2), skip=jnp.eye(2),
    ...     activation=features.JumpRelu(jnp.asarray(1.0)),
    ...     site_in="blocks.0.ln2.hook_out", site_out="blocks.0.ln2_post.hook_out",
    ... )
    >>> one(jnp.asarray([[1.0, 2.0], [0.5, 0.5]])).tolist()  # the second token's feature is at the threshold: inactive
    [[4.0, 5.0], [0.5, 0.5]]
    """

    site_out: str = flax.struct.field(pytree_node=False)
    skip: jax.Array | None = None

    @property
    def _sites(self) -> tuple[str, str]:
        return self.site_in, self.site_out

    def _finished(self, y: jax.Array, x: jax.Array) -> jax.Array:
        # [..., d] x [d, d] -> [..., d]
        return y if self.skip is None else y + matmul("...i,io->...o", x, self.skip.astype(jnp.float32))


def on_mesh_of(W_enc: PyTree, x: PyTree) -> contextlib.AbstractContextManager[object]:
    """`jax.set_mesh` with the mesh of the weights; nothing while a function is traced, where the caller sets it."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((W_enc, x)))
    return contextlib.nullcontext() if traced else set_mesh_of(W_enc)


def check_k(k: int, width: int) -> None:
    """Raise a ValueError if a token does not have k features."""
    if not 1 <= integer("k", k) <= width:
        raise ValueError(f"k is {k}; it must be at least 1, and at most the width, {width}")


@jax.jit
def _encode(dictionary: _Dictionary, x: jax.Array) -> jax.Array:
    # [..., d] x [d, f] -> [..., f]
    z = matmul("...d,df->...f", _entering(dictionary, x), dictionary.W_enc.astype(jnp.float32))
    return dictionary.activation(z + dictionary.b_enc.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="k")
def _encode_topk(dictionary: _Dictionary, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return largest(_entering(dictionary, x), dictionary.W_enc, dictionary.b_enc, dictionary.activation, k)


@jax.jit
def _decode(dictionary: _Dictionary, f: jax.Array, x: jax.Array | None) -> jax.Array:
    # [..., f] x [f, d] -> [..., d]
    y = matmul("...f,fd->...d", f.astype(jnp.float32), dictionary.W_dec.astype(jnp.float32))
    y += dictionary.b_dec.astype(jnp.float32)
    return y if x is None else dictionary._finished(y, x.astype(jnp.float32))


@jax.jit
def _reconstruct(dictionary: _Dictionary, x: jax.Array) -> jax.Array:
    return _decode(dictionary, _encode(dictionary, x), x)


def _entering(dictionary: _Dictionary, x: jax.Array) -> jax.Array:
    """The input as the encoder's matrix multiplies it: [..., d] float32."""
    x = x.astype(jnp.float32)
    if dictionary.normalization is not None:
        x = dictionary.normalization(x)
    return x - dictionary.b_dec.astype(jnp.float32) if dictionary.subtracts_b_dec else x
