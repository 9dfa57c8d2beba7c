"""The scale of training: found from the first tokens, and folded into the weights in the end.

Axes: n tokens, d features of a site (i of the input, o of the output), f features of a layer of the dictionary, l
layers that are read, m layers that one of them writes to.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma3_jax.features.activations import Activation, JumpRelu, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.layered import CrossLayerTranscoder
from gemma3_jax.features.training.batches import Sites
from gemma3_jax.features.training.step import Plan, Scaling, State, threshold_of


def scaling_of(values: np.ndarray, layers: int) -> Scaling:
    """For each layer's part of values [n, l d]: the geometric median, and what makes the mean distance from it sqrt(d).

    Raises:
        ValueError: the values of a layer are all equal.
    """
    centres, scales = zip(*map(_of_layer, np.split(values, layers, axis=1)), strict=True)
    scale = np.repeat(np.asarray(scales, np.float32), len(centres[0]))
    return Scaling(jnp.asarray(np.concatenate(centres), jnp.float32), jnp.asarray(scale))


def _of_layer(values: np.ndarray) -> tuple[np.ndarray, float]:
    centre = values.mean(axis=0)
    for _ in range(10):  # Weiszfeld's iteration
        distances = np.linalg.norm(values - centre, axis=1)
        pull = 1 / np.maximum(distances, max(1e-6 * float(distances.mean()), 1e-30))
        # [n] x [n, d] -> [d]
        centre = pull @ values / pull.sum()
    distance = float(np.linalg.norm(values - centre, axis=1).mean())
    if distance == 0:
        raise ValueError("all activations are equal; there is nothing to learn")
    return centre, values.shape[1] ** 0.5 / distance


def dictionary_of(
    state: State, scalings: tuple[Scaling, ...], plan: Plan, sites: Sites
) -> SparseAutoencoder | Transcoder | CrossLayerTranscoder:
    """The dictionary for raw values, in float32. Features have the scale of their layer's output, so that the rows with
    which they write there keep their length."""
    layers = len(state.weights)
    (centres_in, scales_in), (centres_out, scales_out) = (
        _by_layer(each, layers) for each in (scalings[0], scalings[-1])
    )
    made: list[dict[str, Any]] = []
    for i, layer in enumerate(state.weights):
        weights = {name: np.asarray(weight, np.float64) for name, weight in layer.items()}
        scale_in, scale_out = scales_in[i], scales_out[i]
        W_enc = weights["W_enc"] * (scale_in / scale_out)
        threshold = np.asarray(threshold_of(layer) if plan.kind == "jumprelu" else state.threshold[i]) / scale_out
        arrays = {
            "W_enc": W_enc,
            "b_enc": weights["b_enc"] / scale_out - centres_in[i] @ W_enc,
            # [f, m, o] x [m, 1]
            "W_dec": weights["W_dec"] * (scale_out / scales_out[i:, None]),
            "b_dec": weights["b_dec"] / scale_out + centres_out[i],
        }
        activation: Activation = TopK(plan.k) if plan.kind == "topk" else JumpRelu(jnp.asarray(threshold, jnp.float32))
        made.append({name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})
        made[-1]["activation"] = activation
    if layers > 1:
        columns = {name: tuple(each[name] for each in made) for name in made[0]}
        return CrossLayerTranscoder(**columns, site_in=sites[0], site_out=sites[1])
    one = made[0] | {"W_dec": made[0]["W_dec"][:, 0]}
    if len(sites) == 2:
        return Transcoder(**one, site_in=sites[0][0], site_out=sites[1][0])
    return SparseAutoencoder(**one, site_in=sites[0][0])


def _by_layer(scaling: Scaling, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [l, d] and scales [l], float64."""
    centre, scale = (np.asarray(each, np.float64) for each in (scaling.centre, scaling.scale))
    return centre.reshape(layers, -1), scale.reshape(layers, -1)[:, 0]
