"""One step of training: what is minimized, and how weights change. Jitted once for each shape, kind and k.

Everything happens on scaled values: inputs and targets minus their centre, times what makes their mean norm sqrt(d).

- "topk" keeps the k largest positive products of each token (https://arxiv.org/abs/2406.04093).
- "batchtopk" keeps the n k largest of a batch of n tokens (https://arxiv.org/abs/2412.06410).
- "jumprelu" keeps what is above a threshold of each feature, which learns by straight-through estimators; the penalty
  (L0 / k - 1)^2 holds the mean number of active features near k (https://arxiv.org/abs/2407.14435).

Axes: n tokens of a batch, i features of the input, o of the output, f features of the dictionary.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma3_jax.compute.matmul import matmul

Kind = Literal["batchtopk", "jumprelu", "topk"]
Weights = dict[str, jax.Array]

_AUXILIARY = 1 / 32  # weight of the auxiliary loss
_HASTE = 10  # by how much faster thresholds learn than other weights
_BANDWIDTH = 0.2  # of the estimators of thresholds' gradients; products with a new encoder have a deviation of 1
_MEMORY = 0.99  # of the running mean of the smallest kept value
_HALVINGS = 20
# The rate is an argument of the step, so that other rates and numbers of steps do not compile anything.
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@flax.struct.dataclass
class Scaling:
    """From raw values to those that are trained on: (value - centre) * scale.

    Attributes:
        centre: [d].
        scale: [].
    """

    centre: jax.Array
    scale: jax.Array

    def __call__(self, values: jax.Array) -> jax.Array:
        """[n, d] float32."""
        return (values.astype(jnp.float32) - self.centre) * self.scale


@flax.struct.dataclass
class State:
    """What a step changes.

    Attributes:
        weights: W_enc [i, f], b_enc [f], W_dec [f, o] with rows of length 1, b_dec [o]; log_threshold [f] in
            "jumprelu", divided by _HASTE.
        optimizer: Adam's.
        idle: [f] int32, for how many steps each feature has not been active.
        kept: [] the running mean of the smallest kept value, which began at 0.
        step: [] int32, the number of steps done.
    """

    weights: Weights
    optimizer: Any
    idle: jax.Array
    kept: jax.Array
    step: jax.Array

    @property
    def threshold(self) -> jax.Array:
        """[]: the mean of the smallest kept value over the last steps, about a hundred."""
        return self.kept / (1 - _MEMORY**self.step)


class Figures(NamedTuple):
    """How a step went, on its batch and before its change.

    Attributes:
        step: the number of the step, from 1.
        loss: what is minimized.
        l0: active features of a token, on average.
        fvu: fraction of variance unexplained.
        dead: fraction of features that have not been active for many steps.
    """

    step: Any
    loss: Any
    l0: Any
    fvu: Any
    dead: Any


def new_state(values: tuple[jax.Array, ...], width: int, kind: Kind, k: int, seed: int) -> State:
    """The state before the first step, for scaled values: inputs [n, i], and targets [n, o] if these are others."""
    key_enc, key_dec = jax.random.split(jax.random.key(seed))
    x, y = values[0], values[-1]
    W_dec = _unit_rows(jax.random.normal(key_dec, (width, y.shape[1])))
    W_enc = (W_dec if len(values) == 1 else _unit_rows(jax.random.normal(key_enc, (width, x.shape[1])))).T
    weights = {"W_enc": W_enc, "b_enc": jnp.zeros(width), "W_dec": W_dec, "b_dec": jnp.zeros(W_dec.shape[1])}
    if kind == "jumprelu":  # as many active features as wanted, from the start
        first = smallest_kept(_products(weights, x), k * len(x), axis=None)
        weights["log_threshold"] = jnp.full(width, jnp.log(jnp.maximum(first, _BANDWIDTH)).squeeze() / _HASTE)
    idle, zero = jnp.zeros(width, jnp.int32), jnp.zeros(())
    return State(weights, _OPTIMIZER.init(weights), idle, zero, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("kind", "k"), donate_argnames="state")
def train_step(
    state: State,
    values: tuple[jax.Array, ...],
    scalings: tuple[Scaling, ...],
    rate: jax.Array,
    patience: jax.Array,
    *,
    kind: Kind,
    k: int,
) -> tuple[State, Figures]:
    """One step on a batch.

    Args:
        state: donated.
        values: raw inputs [n, i], and targets [n, o] if these are others.
        scalings: one for each.
        rate: [] learning rate.
        patience: [] int32, after how many idle steps a feature counts as dead.
        kind: see above.
        k: active features of a token.
    """
    x, y = scalings[0](values[0]), scalings[-1](values[-1])
    dead = state.idle >= patience
    (loss, (f, error)), gradients = jax.value_and_grad(_loss, has_aux=True)(state.weights, x, y, dead, kind, k)
    # [f, o]: what would only change the length of a row
    W_dec, slope = state.weights["W_dec"], gradients["W_dec"]
    gradients["W_dec"] = slope - jnp.sum(slope * W_dec, axis=1, keepdims=True) * W_dec
    updates, optimizer = _OPTIMIZER.update(gradients, state.optimizer)
    weights = jax.tree.map(lambda weight, update: weight - rate * update, state.weights, updates)
    weights["W_dec"] = _unit_rows(weights["W_dec"])
    active = f > 0
    smallest = jnp.min(f, where=active, initial=jnp.inf)
    after = State(
        weights=weights,
        optimizer=optimizer,
        idle=jnp.where(jnp.any(active, axis=0), 0, state.idle + 1),
        kept=_MEMORY * state.kept + (1 - _MEMORY) * jnp.where(jnp.isfinite(smallest), smallest, 0.0),
        step=state.step + 1,
    )
    variance = jnp.sum((y - jnp.mean(y, axis=0)) ** 2)
    fvu = jnp.sum(error**2) / variance
    return after, Figures(after.step, loss, jnp.sum(active) / len(x), fvu, jnp.mean(dead))


def _loss(
    weights: Weights, x: jax.Array, y: jax.Array, dead: jax.Array, kind: Kind, k: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, and the features [n, f] and errors [n, o]."""
    z = _products(weights, x)
    f, penalty = _features(weights, z, dead, kind, k)
    # [n, f] x [f, o] -> [n, o]
    error = y - matmul("nf,fo->no", f, weights["W_dec"]) - weights["b_dec"]
    missing = jax.lax.stop_gradient(error)
    auxiliary = jax.lax.cond(jnp.any(dead), _auxiliary, lambda *_: 0.0, weights["W_dec"], z, missing, dead)
    loss = jnp.sum(error**2) / error.size + penalty + _AUXILIARY * auxiliary
    return loss, (f, error)


def _products(weights: Weights, x: jax.Array) -> jax.Array:
    # [n, i] x [i, f] -> [n, f]
    return matmul("ni,if->nf", x, weights["W_enc"]) + weights["b_enc"]


def _features(
    weights: Weights, z: jax.Array, dead: jax.Array, kind: Kind, k: int
) -> tuple[jax.Array, jax.Array | float]:
    """The features [n, f], and a penalty on their number."""
    if kind != "jumprelu":
        many, axis = (k, 1) if kind == "topk" else (k * len(z), None)
        return jnp.where(z > smallest_kept(z, many, axis), z, 0.0), 0.0
    threshold = threshold_of(weights)
    fixed = jax.lax.stop_gradient(threshold)
    change = threshold - fixed  # 0, with a gradient
    # [n, f]: an estimate of the density of products at the threshold, by which a change of it changes what is kept
    near = jax.lax.stop_gradient(jnp.abs(z - threshold) < _BANDWIDTH / 2) / _BANDWIDTH
    active = z > fixed
    f = jnp.where(active, z, 0.0) - near * fixed * change
    l0 = jnp.sum(active - near * change) / len(z)
    # The threshold of a dead feature is far from any product, and would stay there
    gap = jnp.mean(jnp.where(dead, jax.nn.relu(threshold - jax.lax.stop_gradient(z)), 0.0))
    return f, (l0 / k - 1) ** 2 + gap


def _auxiliary(W_dec: jax.Array, z: jax.Array, missing: jax.Array, dead: jax.Array) -> jax.Array:
    """How little dead features, the d / 2 largest of each token, explain of what is missing [n, o]: AuxK."""
    z = jnp.where(dead, z, 0.0)
    f = jnp.where(z > smallest_kept(z, missing.shape[1] // 2, axis=1), z, 0.0)
    # [n, f] x [f, o] -> [n, o]
    left = missing - matmul("nf,fo->no", f, W_dec)
    return jnp.sum(left**2) / jnp.maximum(jnp.sum(missing**2), 1e-12)


def threshold_of(weights: Weights) -> jax.Array:
    """The thresholds [f] that are learned."""
    return jnp.exp(_HASTE * weights["log_threshold"])


def smallest_kept(z: jax.Array, many: int, axis: int | None) -> jax.Array:
    """A value that at most `many` z exceed, along an axis or in all, and just that many unless they are nearly equal.

    It is at least 0. Found by halving an interval: sorting takes thirty times as long on a CPU.
    """
    z = jax.lax.stop_gradient(z)
    high = jnp.maximum(jnp.max(z, axis=axis, keepdims=True), 0.0)

    def halved(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        too_many = jnp.sum(z > middle, axis=axis, keepdims=True) > many
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    low = jnp.zeros_like(high)
    few = jnp.sum(z > 0, axis=axis, keepdims=True) <= many
    return jnp.where(few, 0.0, jax.lax.fori_loop(0, _HALVINGS, halved, (low, high))[1])


def _unit_rows(W: jax.Array) -> jax.Array:
    return W / jnp.linalg.norm(W, axis=1, keepdims=True)
