"""The arithmetic of adapters: each function changes one weight, in the order and dtypes of PEFT's `merge`.

Products and sums are float32; only the result is rounded to the dtype of the weight. Axes: o out_features, i
in_features, r rank, V vocabulary, d hidden_size, t trained tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def lora_delta(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """What LoRA adds to a weight [o, i]: `scale * b @ a`, for a [r, i] and b [o, r] in float32.

    Source: `peft.tuners.lora.layer.Linear.get_delta_weight`.

    >>> lora_delta(np.float32([[1, 2]]), np.float32([[3], [4]]), 0.5).tolist()
    [[1.5, 3.0], [2.0, 4.0]]
    """
    return _product(b, a) * np.float32(scale)


def loha_delta(w1_a: np.ndarray, w1_b: np.ndarray, w2_a: np.ndarray, w2_b: np.ndarray, *, scale: float) -> np.ndarray:
    """What LoHa adds to a weight [o, i]: the elementwise product of two low-rank products, `[o, r] @ [r, i]` each.

    Source: `peft.tuners.loha.layer.HadaWeight`.
    """
    return (_product(w1_a, w1_b) * _product(w2_a, w2_b)) * np.float32(scale)


def add(weight: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The sum of a weight and a float32 delta of its shape, rounded once to the dtype of the weight."""
    total = weight.astype(np.float32)
    total += delta
    return total.astype(weight.dtype, copy=False)


def add_dora(weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
    """DoRA: the sum of weight and delta, rescaled to norm `magnitude` along `axis`.

    The norm is summed in float64. PEFT sums it in float32, so the results differ in the last bits.
    Source: `peft.tuners.lora.variants.DoraLinearVariant` (axis 1, magnitude [o]) and `DoraEmbeddingVariant` (axis 0,
    magnitude [d]); arXiv 2402.09353, equation 5.

    >>> add_dora(np.float32([[3, 0]]), np.float32([[0, 4]]), np.float32([10]), axis=1).tolist()
    [[6.0, 8.0]]
    """
    total = weight.astype(np.float32)
    total += delta
    square = np.einsum("ij,ij->i" if axis == 1 else "ij,ij->j", total, total, dtype=np.float64)
    factor = magnitude / np.sqrt(square).astype(np.float32)
    # PEFT multiplies before it rounds.
    total *= np.expand_dims(factor, axis)
    return total.astype(weight.dtype, copy=False)


def scale_by(weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """IA3: the weight times a vector [o, 1], or [1, i] of a feed-forward layer. Source: `peft.tuners.ia3.layer`."""
    return (weight.astype(np.float32) * factor).astype(weight.dtype, copy=False)


def replace_rows(weight: np.ndarray, rows: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Trained tokens: the weight [V, d] with these rows replaced by values [t, d].

    Source: `peft.tuners.trainable_tokens.layer`.
    """
    replaced = np.array(weight)
    replaced[list(rows)] = values.astype(weight.dtype)
    return replaced


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A float32 product, on the CPU if JAX has it.

    XLA adds the r terms of each element in order, with fused multiply-adds, and so does torch on most CPUs: the results
    have equal bits. NumPy's BLAS adds them in another order from a rank of 8 on.
    """
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves out the CPU
        devices = jax.local_devices()
    with jax.default_device(devices[0]):
        return np.asarray(jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST))
