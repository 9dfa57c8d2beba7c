"""The QK and OV circuits of every head as low-rank [d, d] matrices, and how strongly heads compose.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". The circuits include
the linear part of Gemma 3's norms, which is their gains. They leave out the division by the root mean square, a
positive number that depends on the data. Vectors are rows: `resid @ circuit`. A circuit does not include biases, which
a model with `attention_bias` has.

Axes: L layers, h query heads, g key/value heads, d hidden_size, e head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from gemma3_jax.analysis.factored import FactoredMatrix
from gemma3_jax.compute.matmul import matmul
from gemma3_jax.config import Gemma3Config, LayerType
from gemma3_jax.model.layout import check_model, layer_params
from gemma3_jax.model.rope import rope_tables, rotate
from gemma3_jax.types import Params

Mode = Literal["Q", "K", "V"]


def qk_circuit(config: Gemma3Config, params: Params, distance: jax.Array | int = 0) -> FactoredMatrix:
    """The bilinear form of each head's score in the residual streams of query and key: [L, h, d, d] float32.

    The score before softmax is `query @ circuit @ key * query_pre_attn_scalar**-0.5`, divided by four scales that the
    circuit leaves out: those of ln1 at the query, of ln1 at the key, of q_norm and of k_norm. The circuit includes the
    gains of these norms and the layer's rotary embedding. Rotating query and key by their positions is the same as one
    rotation by their distance. A head uses the keys of its group.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        distance: position of the query minus position of the key; may be traced.

    Memory: 8 * L * h * d * e bytes for the result (1b: 245 MB), and the same again while it is built.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import qk_circuit
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> qk_circuit(model.config, model.params, distance=1).shape
    (4, 4, 96, 96)
    """
    check_model(config, params)

    def layer(i: int) -> tuple[jax.Array, jax.Array]:
        block = layer_params(config, params, i)
        attn, gain = block["attn"], block["ln1"]["weight"]
        # [d, 1] * [n, d, e] * [e]
        query = gain[:, None] * _weight(attn, "q") * attn["q_norm"]["weight"]
        key = gain[:, None] * _weight(attn, "k") * attn["k_norm"]["weight"]
        turned = _rotated(query, distance, config, config.layer_types[i])
        return turned, _for_each_query_head(key, config).mT

    return _stacked(layer, config)


def ov_circuit(config: Gemma3Config, params: Params) -> FactoredMatrix:
    """The map from a key's residual stream to what a head adds to a query's stream, [L, h, d, d] float32.

    The head adds `pattern * (key @ circuit)`, divided by two scales that the circuit leaves out: those of ln1 at the
    key and of ln1_post at the query. The circuit includes the gains of both norms. A head uses the values of its group.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.

    Memory: 8 * L * h * d * e bytes for the result (1b: 245 MB), and the same again while it is built.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import ov_circuit
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> ov_circuit(model.config, model.params)[1, 2].eigenvalues.shape
    (24,)
    """
    check_model(config, params)

    def layer(i: int) -> tuple[jax.Array, jax.Array]:
        block = layer_params(config, params, i)
        attn = block["attn"]
        # [d, 1] * [g, d, e]
        value = block["ln1"]["weight"][:, None] * _weight(attn, "v")
        # [h, e, d] * [d]
        return _for_each_query_head(value, config), _weight(attn, "o") * block["ln1_post"]["weight"]

    return _stacked(layer, config)


@jax.jit
def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> jax.Array:
    """`norm(left @ right) / (norm(left) * norm(right))` of every pair, with Frobenius norms: `[*left, *right]` float32.

    A score is between 0 and 1, or NaN where a matrix is zero. Two random matrices [d, d] of rank e score near
    sqrt(1 / d), whatever e is. Compare scores with that value, not with 0. Source: Elhage et al. 2021.

    Args:
        left: `[*left, m, n]`, batch axes first.
        right: `[*right, n, o]`.

    Memory: both factors again, and 4 * r * r bytes for each entry of `left`, where r is the inner size. The entries of
    `right` are processed one after the other.
    """
    # [*left, r, n], [*right, n, s]: their products have the same norms as the products of the whole matrices
    rows, columns = (_normalized(x) for x in (left.collapse_l(), right.collapse_r()))

    def with_all(column: jax.Array) -> jax.Array:
        # [*left, r, n] x [n, s] -> [*left, r, s] -> [*left]
        return jnp.linalg.norm(matmul("...rn,ns->...rs", rows, column), axis=(-2, -1))

    scores = jax.lax.map(with_all, columns.reshape(-1, *columns.shape[-2:]))
    return jnp.moveaxis(scores, 0, -1).reshape(*rows.shape[:-2], *columns.shape[:-2])


def all_composition_scores(
    config: Gemma3Config, params: Params, mode: Mode, distance: jax.Array | int = 0
) -> jax.Array:
    """How strongly the queries, keys or values of each head read the output of each earlier head: [L, h, L, h] float32.

    `[i, j, k, l]` is the composition score of the OV circuit of head j in layer i with the QK circuit ("Q"), the
    transposed QK circuit ("K") or the OV circuit ("V") of head l in layer k; 0 where k is not after i. See
    `composition_scores` for the range and for the score of random matrices.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        mode: "Q", "K" or "V".
        distance: position of the query minus position of the key, for "Q" and "K": see `qk_circuit`.

    Memory: twice both circuits, and 4 * L * h * e * e bytes (1b: 27 MB, and about 1 GB in all).

    Raises:
        ValueError: `mode` is not one of the three.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import all_composition_scores
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> scores = all_composition_scores(model.config, model.params, "K")
    >>> scores.shape, float(scores[2, :, 1].max())
    ((4, 4, 4, 4), 0.0)
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it must be 'Q', 'K' or 'V'")
    writer = ov_circuit(config, params)
    reader = writer if mode == "V" else qk_circuit(config, params, distance)
    scores = composition_scores(writer, reader.T if mode == "K" else reader)
    layers = jnp.arange(config.num_hidden_layers)
    # [L, 1, L, 1]
    later = layers[:, None, None, None] < layers[:, None]
    return jnp.where(later, scores, 0.0)


def _weight(attn: Params, name: str) -> jax.Array:
    return attn[name]["weight"].astype(jnp.float32)


def _for_each_query_head(weight: jax.Array, config: Gemma3Config) -> jax.Array:
    # [g, d, e] -> [h, d, e]: query head j uses key/value head j // (h / g)
    return jnp.repeat(weight, config.num_attention_heads // config.num_key_value_heads, axis=0)


def _rotated(weight: jax.Array, distance: jax.Array | int, config: Gemma3Config, layer_type: LayerType) -> jax.Array:
    """[h, d, e]: the rotation by `distance` positions, applied to every row."""
    tables = rope_tables(config.rope(layer_type), jnp.full((1, 1), distance), config.head_dim)
    return rotate(weight.reshape(1, 1, -1, config.head_dim), *tables).reshape(weight.shape)


def _stacked(layer: Callable[[int], tuple[jax.Array, jax.Array]], config: Gemma3Config) -> FactoredMatrix:
    A, B = zip(*map(layer, range(config.num_hidden_layers)), strict=True)
    # [L, h, d, e], [L, h, e, d]
    return FactoredMatrix(jnp.stack(A), jnp.stack(B))


def _normalized(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
