"""The QK and OV circuits of every head as low-rank [d, d] matrices, and how strongly heads compose.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Gemma 3's norms are part of the
circuits as far as they are linear: their gains are, and their division by a root mean square, a positive number that
depends on the data, is not. Vectors are rows: `resid @ circuit`. Biases, of a model with `attention_bias`, are no
part of a circuit.

Axes: L layers, h query heads, g key/value heads, d hidden_size, e head_dim.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from gemma3_jax.analysis.factored import FactoredMatrix
from gemma3_jax.config import Gemma3Config
from gemma3_jax.layers import rope_tables, rotate
from gemma3_jax.products import matmul
from gemma3_jax.stacking import layer_params

Mode = Literal["Q", "K", "V"]


def qk_circuit(config: Gemma3Config, params: Mapping[str, Any], distance: jax.Array | int = 0) -> FactoredMatrix:
    """What the residual streams of a query and a key must hold for a head to attend: [L, h, d, d] float32.

    The score before softmax is `query @ circuit @ key * query_pre_attn_scalar**-0.5` over four scales, those of ln1 at
    the query and at the key, of q_norm and of k_norm, which are left out. The gains of all of them are in it, and
    the layer's own rotary embedding: rotations by the positions of query and key differ by one rotation by their
    distance. The head's keys are those of its group.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        distance: position of the query minus position of the key; may be traced.

    Memory: 8 * L * h * d * e bytes for the result (1b: 245 MB), and as much again while it is built.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import qk_circuit
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> qk_circuit(model.config, model.params, distance=1).shape
    (4, 4, 96, 96)
    """

    def layer(i: int) -> tuple[jax.Array, jax.Array]:
        block = layer_params(config, params, i)
        attn, gain = block["attn"], block["ln1"]["weight"]
        # [d, 1] * [n, d, e] * [e]
        query = gain[:, None] * _weight(attn, "q") * attn["q_norm"]["weight"]
        key = gain[:, None] * _weight(attn, "k") * attn["k_norm"]["weight"]
        turned = _rotated(query, distance, config, config.layer_types[i])
        return turned, _for_each_query_head(key, config).mT

    return _stacked(layer, config)


def ov_circuit(config: Gemma3Config, params: Mapping[str, Any]) -> FactoredMatrix:
    """What a head adds to the residual stream of a query that attends to a key, [L, h, d, d] float32.

    `pattern * (key @ circuit)` over two scales, that of ln1 at the key and that of ln1_post at the query, which are
    left out; the gains of both are in it. The head's values are those of its group.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.

    Memory: 8 * L * h * d * e bytes for the result (1b: 245 MB), and as much again while it is built.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import ov_circuit
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> ov_circuit(model.config, model.params)[1, 2].eigenvalues.shape
    (24,)
    """

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
    """`norm(left @ right) / (norm(left) * norm(right))` of every pair, Frobenius norms: [*left, *right] float32.

    Between 0 and 1; NaN where a matrix is zero. Two random matrices [d, d] of rank e score near sqrt(1 / d), whatever
    e is; compare with that, not with 0. Source: Elhage et al. 2021.

    Args:
        left: [*left, m, n], batch axes first.
        right: [*right, n, o].

    Memory: both factors again, and 4 * r * r bytes for each entry of `left`, r being the inner size: right's entries
    are taken one after the other.
    """
    # [*left, r, n], [*right, n, s]: products of these have the norms of the products of the whole matrices
    rows, columns = (_normalized(x) for x in (left.collapse_l(), right.collapse_r()))

    def with_all(column: jax.Array) -> jax.Array:
        # [*left, r, n] x [n, s] -> [*left, r, s] -> [*left]
        return jnp.linalg.norm(matmul("...rn,ns->...rs", rows, column), axis=(-2, -1))

    scores = jax.lax.map(with_all, columns.reshape(-1, *columns.shape[-2:]))
    return jnp.moveaxis(scores, 0, -1).reshape(*rows.shape[:-2], *columns.shape[:-2])


def all_composition_scores(
    config: Gemma3Config, params: Mapping[str, Any], mode: Mode, distance: jax.Array | int = 0
) -> jax.Array:
    """How much the queries, keys or values of each head read of what each earlier head writes: [L, h, L, h] float32.

    `[i, j, k, l]` is the composition score of the OV circuit of head j in layer i with the QK circuit ("Q"), the
    transposed QK circuit ("K") or the OV circuit ("V") of head l in layer k; 0 where k is not after i. See
    `composition_scores` for the range and for what chance gives.

    Args:
        config: shape of the model.
        params: parameter pytree, as `conversion.convert_checkpoint` returns it.
        mode: "Q", "K" or "V".
        distance: position of the query minus position of the key, for "Q" and "K": see `qk_circuit`.

    Memory: both circuits and as much again, and 4 * L * h * e * e bytes (1b: 27 MB, and about 1 GB in all).

    Raises:
        ValueError: `mode` is none of the three.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.analysis import all_composition_scores
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> scores = all_composition_scores(model.config, model.params, "K")
    >>> scores.shape, float(scores[2, :, 1].max())
    ((4, 4, 4, 4), 0.0)
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it takes 'Q', 'K' and 'V'")
    writer = ov_circuit(config, params)
    reader = writer if mode == "V" else qk_circuit(config, params, distance)
    scores = composition_scores(writer, reader.T if mode == "K" else reader)
    layers = jnp.arange(config.num_hidden_layers)
    # [L, 1, L, 1]
    later = layers[:, None, None, None] < layers[:, None]
    return jnp.where(later, scores, 0.0)


def _weight(attn: Mapping[str, Any], name: str) -> jax.Array:
    return attn[name]["weight"].astype(jnp.float32)


def _for_each_query_head(weight: jax.Array, config: Gemma3Config) -> jax.Array:
    # [g, d, e] -> [h, d, e]: query head j uses key/value head j // (h / g)
    return jnp.repeat(weight, config.num_attention_heads // config.num_key_value_heads, axis=0)


def _rotated(weight: jax.Array, distance: jax.Array | int, config: Gemma3Config, layer_type: Any) -> jax.Array:
    """[h, d, e]: the rotary embedding of a vector that is `distance` away, applied to every row."""
    tables = rope_tables(config.rope(layer_type), jnp.full((1, 1), distance), config.head_dim)
    return rotate(weight.reshape(1, 1, -1, config.head_dim), *tables).reshape(weight.shape)


def _stacked(layer: Any, config: Gemma3Config) -> FactoredMatrix:
    A, B = zip(*map(layer, range(config.num_hidden_layers)), strict=True)
    # [L, h, d, e], [L, h, e, d]
    return FactoredMatrix(jnp.stack(A), jnp.stack(B))


def _normalized(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
