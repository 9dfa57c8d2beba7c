"""Dictionaries over several layers: cross-layer transcoders (CLTs) and crosscoders.

Each layer l has an encoder of its own, which reads its site; its features write to several layers. So an input is one
value for each layer, features are [l, ..., f], and an output is one value for each layer.

Decoders are large: those of 18 layers take nine times as much memory as the encoders. `features.load` leaves them in
the file, as mapped NumPy arrays, and `decode` reads the rows of those features that are active. `jax.device_put`
brings a dictionary onto a device, or onto a mesh, for use inside `jit`.

Axes: l layers that are read, m layers that are written, d features of the sites, f features of a layer, k largest
ones; `...` tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma3_jax.compute.matmul import matmul
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.features.activations import Activation
from gemma3_jax.features.dictionaries import Transcoder, check_k, on_mesh_of
from gemma3_jax.features.largest import largest
from gemma3_jax.inputs import as_array
from gemma3_jax.reading import release

# Bytes of decoder rows that are in memory at once when they are read from a file.
ROWS_BYTES = 2**26

Layers = tuple[jax.Array, ...]
Inputs = Mapping[str, ArrayLike] | Sequence[ArrayLike] | ArrayLike


@flax.struct.dataclass(kw_only=True, repr=False)
class _Layered(Described):
    """What both kinds have; attributes as in `CrossLayerTranscoder`."""

    W_enc: tuple[jax.Array, ...]
    b_enc: tuple[jax.Array, ...]
    W_dec: tuple[jax.Array | np.ndarray, ...]
    b_dec: tuple[jax.Array, ...]
    activation: tuple[Activation, ...]
    site_in: tuple[str, ...] = flax.struct.field(pytree_node=False)
    array_axes: ClassVar[Mapping[str, str]] = {**Transcoder.array_axes, "W_dec": "f m d"}  # those of each layer
    check: ClassVar[Callable[..., Any]]  # set where all files of this room are known, in its __init__

    @property
    def width(self) -> int:
        """The number of features of each layer."""
        return int(self.W_enc[0].shape[-1])

    def encode(self, x: Inputs) -> jax.Array:
        """The features of each layer: [l, ..., f] float32.

        Args:
            x: [l, ..., d]; or one value [..., d] for each layer; or a mapping from names of sites, such as a cache.

        Raises:
            ValueError: there is not one value for each layer, or one does not have the d features.
        """
        layers = zip(self._inputs(x), self.W_enc, self.b_enc, self.activation, strict=True)
        return jnp.stack([_encode(*layer) for layer in layers])

    def encode_topk(self, x: Inputs, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest features of each layer: values [l, ..., k] float32, indices [l, ..., k] int32.

        As for a dictionary of one layer, [l, ..., f] is never in memory.

        Raises:
            ValueError: as for `encode`; or k is not between 1 and the width.
        """
        check_k(k, self.width)
        inputs = self._inputs(x)
        with on_mesh_of(self.W_enc, inputs):
            layers = zip(inputs, self.W_enc, self.b_enc, self.activation, strict=True)
            values, indices = zip(*(_encode_topk(*layer, k) for layer in layers), strict=True)
            return jnp.stack(values), jnp.stack(indices)

    def decode(self, f: ArrayLike, x: Inputs | None = None) -> jax.Array:
        """The outputs that features write: [m, ..., d] float32 of [l, ..., f].

        Decoders that are still in their file are read in slices, and only the rows of active features.

        Args:
            f: [l, ..., f].
            x: the input of which these are the features, which skip connections read; as for `encode`.

        Raises:
            ValueError: f does not have the layers or the width.
        """
        f = jnp.asarray(as_array(f))
        if f.ndim < 2 or f.shape[0] != len(self.W_enc) or f.shape[-1] != self.width:
            raise ValueError(f"the features have shape {f.shape}; they must be [{len(self.W_enc)}, ..., {self.width}]")
        mapped = [W for W in self.W_dec if isinstance(W, np.ndarray)]
        in_file = len(mapped) == len(self.W_dec) and not isinstance(f, jax.core.Tracer)
        y = _decode_from_file(mapped, f) if in_file else _decode(self.W_dec, f)
        skipped = 0.0 if x is None else self._skipped(self._inputs(x))
        return _added(y, self.b_dec, skipped)

    def __call__(self, x: Inputs) -> jax.Array:
        """The outputs for an input: `decode(encode(x), x)`."""
        x = self._inputs(x)
        return self.decode(self.encode(x), x)

    def _description(self) -> Description:
        layers = len(self.W_enc)
        title = (
            f"{type(self).__name__}: {layers} layers of {self.width:,} features, {type(self.activation[0]).__name__}"
        )
        ends = (("reads", self.site_in, self.W_enc[0].shape[0]), ("writes", self._written, self.W_dec[0].shape[-1]))
        return Description(title, tuple((verb, f"{names[0]} to {names[-1]}", f"{d:,}") for verb, names, d in ends))

    @property
    def _written(self) -> tuple[str, ...]:
        """The names of the sites that are written."""
        return self.site_in

    def _inputs(self, x: Inputs) -> Layers:
        """The values of the layers, each [..., d]."""
        values: Any = [x[name] for name in self.site_in] if isinstance(x, Mapping) else x
        inputs = tuple(jnp.asarray(as_array(value)) for value in values)
        layers, d = len(self.W_enc), self.W_enc[0].shape[0]
        if len(inputs) != layers or {value.shape[-1:] for value in inputs} != {(d,)}:
            shapes = [value.shape for value in inputs]
            raise ValueError(
                f"the inputs have shapes {shapes}; this dictionary reads {layers} layers of {d} features: give "
                f"[{layers}, ..., {d}], a list of {layers} values, or a cache with the sites {self.site_in[0]}, ..."
            )
        return inputs

    def _skipped(self, x: Layers) -> jax.Array | float:
        """The part of the outputs that does not come from features."""
        return 0.0


@flax.struct.dataclass(kw_only=True, repr=False)
class CrossLayerTranscoder(_Layered):
    """Predicts the output of every MLP from the inputs of its own layer and of those before it.

    Attributes:
        W_enc: [d, f] of each layer.
        b_enc: [f] of each layer.
        W_dec: of each layer l, [f, m, d] for the layers from l to the last. Those of a NumPy array are read from it
            when they are needed.
        b_dec: [d] of each layer that is written.
        activation: of each layer.
        site_in: canonical names of the sites that are read, in the order of layers.
        site_out: canonical names of the sites that are predicted.
        skip: None, or [d, d] of each layer, from the input to the output: `x @ skip` is added to the output there.
    """

    site_out: tuple[str, ...] = flax.struct.field(pytree_node=False)
    skip: tuple[jax.Array, ...] | None = None

    @property
    def _written(self) -> tuple[str, ...]:
        return self.site_out

    def _skipped(self, x: Layers) -> jax.Array | float:
        return 0.0 if self.skip is None else _products(x, self.skip)


@flax.struct.dataclass(kw_only=True, repr=False)
class Crosscoder(_Layered):
    """Reconstructs several layers of one kind of site at once. Each feature reads one layer, and may write to all.

    Attributes:
        W_enc: [d, f] of each layer.
        b_enc: [f] of each layer.
        W_dec: of each layer l, [f, m, d]: for all layers, or for those from l to the last.
        b_dec: [d] of each layer.
        activation: of each layer.
        site_in: canonical names of the sites, in the order of layers.
    """

    @property
    def site_out(self) -> tuple[str, ...]:
        """The canonical names of the sites that are reconstructed: the same."""
        return self.site_in


# For each layer: the layers share one compiled program, which has the temporary arrays of one of them.
@jax.jit
def _encode(x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation) -> jax.Array:
    # [..., d] x [d, f] -> [..., f]
    z = matmul("...d,df->...f", x.astype(jnp.float32), W_enc.astype(jnp.float32))
    return activation(z + b_enc.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="k")
def _encode_topk(
    x: jax.Array, W_enc: jax.Array, b_enc: jax.Array, activation: Activation, k: int
) -> tuple[jax.Array, jax.Array]:
    return largest(x.astype(jnp.float32), W_enc, b_enc, activation, k)


def encode_layer(
    dictionary: CrossLayerTranscoder | Crosscoder, index: int, x: jax.Array, k: int | None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The features [..., f] of one layer for its value [..., d]; with k, its k largest, as `encode_topk` does.

    `index` counts the layers of the dictionary.
    """
    layer = (dictionary.W_enc[index], dictionary.b_enc[index], dictionary.activation[index])
    return _encode(x, *layer) if k is None else _encode_topk(x, *layer, k)


@jax.jit
def _products(x: Layers, W: Layers) -> jax.Array:
    """[l, ..., o] of [..., i] and [i, o] for each layer."""
    pairs = zip(x, W, strict=True)
    return jnp.stack([matmul("...i,io->...o", value.astype(jnp.float32), w.astype(jnp.float32)) for value, w in pairs])


@jax.jit
def _decode(W_dec: Layers, f: jax.Array) -> jax.Array:
    """[m, ..., d] of [l, ..., f], without biases."""
    y: list[jax.Array | float] = [0.0] * len(W_dec)
    for W, features in zip(W_dec, f.astype(jnp.float32), strict=True):
        # [..., f] x [f, m, d] -> [m, ..., d]
        written = matmul("...f,fmd->m...d", features, W.astype(jnp.float32))
        for m, part in enumerate(written, start=len(W_dec) - len(written)):
            y[m] += part
    return jnp.stack(y)


def _decode_from_file(W_dec: Sequence[np.ndarray], f: jax.Array) -> np.ndarray:
    """`_decode` of the active features alone, on the host, with ROWS_BYTES of the decoders in memory at once."""
    layers, d = len(W_dec), W_dec[0].shape[-1]
    y = np.zeros((layers, *f.shape[1:-1], d), np.float32)
    for W, features in zip(W_dec, np.asarray(f, np.float32), strict=True):
        active = np.flatnonzero(features.reshape(-1, features.shape[-1]).any(axis=0))
        step = max(ROWS_BYTES // (4 * W[0].size), 1)
        for rows in np.split(active, range(step, len(active), step)):
            # [..., f] x [f, m, d] -> [..., m, d]
            written = np.tensordot(features[..., rows], W[rows].astype(np.float32), axes=1)
            y[layers - W.shape[1] :] += np.moveaxis(written, -2, 0)
            release(W)
    return y


@jax.jit
def _added(y: jax.Array, b_dec: Layers, skipped: jax.Array | float) -> jax.Array:
    bias = jnp.stack([b.astype(jnp.float32) for b in b_dec])
    return y + bias.reshape(len(bias), *[1] * (y.ndim - 2), -1) + skipped
