"""One step of training: what is minimized, and how weights change. Jitted once for each shape and `Plan`.

Everything happens on scaled values: inputs and targets minus their centre, times what makes their mean norm sqrt(d).
Weights are those of l layers: of one, in an autoencoder and a transcoder. Each layer has an encoder of its own, and
writes to itself and to the layers after it. Values of all layers are side by side: [n, l d].

- "topk" keeps the k largest positive products of each token (https://arxiv.org/abs/2406.04093).
- "batchtopk" keeps the n k largest of a batch of n tokens (https://arxiv.org/abs/2412.06410).
- "jumprelu" keeps what is above a threshold of each feature, which learns by straight-through estimators; the penalty
  (L0 / k - 1)^2 holds the mean number of active features near k (https://arxiv.org/abs/2407.14435).

With several prefixes of the width, the error is the mean of those that the first features alone leave, for each of
these prefixes (Matryoshka, https://arxiv.org/abs/2503.17547).

Axes: n tokens of a batch, i features of an input, o of an output, f features of a layer of the dictionary, l layers
that are read, m layers that one of them writes to.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma3_jax.compute.matmul import matmul

Kind = Literal["batchtopk", "jumprelu", "topk"]
Layer = dict[str, jax.Array]
Weights = tuple[Layer, ...]

_AUXILIARY = 1 / 32  # weight of the auxiliary loss
_HASTE = 10  # by how much faster thresholds learn than other weights
_BANDWIDTH = 0.2  # of the estimators of thresholds' gradients; products with a new encoder have a deviation of 1
_MEMORY = 0.99  # of the running mean of the smallest kept value
_HALVINGS = 20
# The rate is an argument of the step, so that other rates and numbers of steps do not compile anything.
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


class Plan(NamedTuple):
    """What a step compiles for, beside shapes.

    Attributes:
        kind: see above.
        k: active features of a token, in each layer.
        prefixes: ascending numbers of features, of which the last one is the width.
    """

    kind: Kind
    k: int
    prefixes: tuple[int, ...]


@flax.struct.dataclass
class Scaling:
    """From raw values to those that are trained on: (value - centre) * scale.

    Attributes:
        centre: [d], or [l d].
        scale: [], or [l d].
    """

    centre: jax.Array
    scale: jax.Array

    def __call__(self, values: jax.Array) -> jax.Array:
        """[n, l d] float32."""
        return (values.astype(jnp.float32) - self.centre) * self.scale


@flax.struct.dataclass
class State:
    """What a step changes.

    Attributes:
        weights: of each layer W_enc [i, f], b_enc [f], W_dec [f, m, o] with rows [m, o] of length 1, b_dec [o] of what
            is written there; log_threshold [f] in "jumprelu", divided by _HASTE.
        optimizer: Adam's.
        idle: [l, f] int32, for how many steps each feature has not been active.
        kept: [l] the running mean of the smallest kept value, which began at 0.
        step: [] int32, the number of steps done.
    """

    weights: Weights
    optimizer: optax.OptState
    idle: jax.Array
    kept: jax.Array
    step: jax.Array

    @property
    def threshold(self) -> jax.Array:
        """[l]: the mean of the smallest kept value over the last steps, about a hundred."""
        return self.kept / (1 - _MEMORY**self.step)


class Figures(NamedTuple):
    """How a step went, on its batch and before its change.

    Attributes:
        step: the number of the step, from 1.
        loss: what is minimized.
        l0: active features of a token, on average; of all layers together.
        fvu: fraction of variance unexplained, of scaled values.
        dead: fraction of features that have not been active for many steps.
    """

    step: jax.Array | int
    loss: jax.Array | float
    l0: jax.Array | float
    fvu: jax.Array | float
    dead: jax.Array | float


def new_state(values: tuple[jax.Array, ...], layers: int, plan: Plan, seed: int) -> State:
    """The state before the first step, for scaled values: inputs [n, l i], and targets [n, l o] if these are others."""
    width, weights = plan.prefixes[-1], []
    xs, ys = (_by_layer(each, layers) for each in (values[0], values[-1]))
    keys = jax.random.split(jax.random.key(seed), 2 * layers).reshape(layers, 2)
    for layer, (x, (key_enc, key_dec)) in enumerate(zip(xs, keys, strict=True)):
        W_dec = _unit_rows(jax.random.normal(key_dec, (width, layers - layer, ys[0].shape[1]), jnp.float32))
        drawn = W_dec[:, 0] if len(values) == 1 else jax.random.normal(key_enc, (width, x.shape[1]), jnp.float32)
        W_enc = _unit_rows(drawn).T
        made = {
            "W_enc": W_enc,
            "b_enc": jnp.zeros(width, jnp.float32),
            "W_dec": W_dec,
            "b_dec": jnp.zeros(W_dec.shape[-1], jnp.float32),
        }
        if plan.kind == "jumprelu":  # as many active features as wanted, from the start
            first = smallest_kept(_products(made, x), plan.k * len(x), axis=None)
            made["log_threshold"] = jnp.full(
                width, jnp.log(jnp.maximum(first, _BANDWIDTH)).squeeze() / _HASTE, jnp.float32
            )
        weights.append(made)
    optimizer = _OPTIMIZER.init(tuple(weights))
    idle, kept = jnp.zeros((layers, width), jnp.int32), jnp.zeros(layers, jnp.float32)
    return State(tuple(weights), optimizer, idle, kept, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train_step(
    state: State,
    values: tuple[jax.Array, ...],
    scalings: tuple[Scaling, ...],
    rate: jax.Array,
    patience: jax.Array,
    *,
    plan: Plan,
) -> tuple[State, Figures]:
    """One step on a batch.

    Args:
        state: donated.
        values: raw inputs [n, l i], and targets [n, l o] if these are others.
        scalings: one for each.
        rate: [] learning rate.
        patience: [] int32, after how many idle steps a feature counts as dead.
        plan: see there.
    """
    layers = len(state.weights)
    x, y = (_by_layer(scalings[i](values[i]), layers) for i in (0, -1))
    dead = state.idle >= patience
    (loss, (f, error)), gradients = jax.value_and_grad(_loss, has_aux=True)(state.weights, x, y, dead, plan)
    for layer, slopes in zip(state.weights, gradients, strict=True):
        # [f, m, o]: what would only change the length of a row
        along = jnp.sum(slopes["W_dec"] * layer["W_dec"], axis=(1, 2), keepdims=True)
        slopes["W_dec"] -= along * layer["W_dec"]
    updates, optimizer = _OPTIMIZER.update(gradients, state.optimizer)
    weights = jax.tree.map(lambda weight, update: weight - rate * update, state.weights, updates)
    for layer in weights:
        layer["W_dec"] = _unit_rows(layer["W_dec"])
    # [l, n, f]
    f = jnp.stack(f)
    active = f > 0
    smallest = jnp.min(f, axis=(1, 2), where=active, initial=jnp.inf)
    after = State(
        weights=weights,
        optimizer=optimizer,
        idle=jnp.where(jnp.any(active, axis=1), 0, state.idle + 1),
        kept=_MEMORY * state.kept + (1 - _MEMORY) * jnp.where(jnp.isfinite(smallest), smallest, 0.0),
        step=state.step + 1,
    )
    variance = sum(jnp.sum((target - jnp.mean(target, axis=0)) ** 2) for target in y)
    fvu = sum(jnp.sum(each**2) for each in error) / variance
    return after, Figures(after.step, loss, jnp.sum(active) / f.shape[1], fvu, jnp.mean(dead))


def _loss(
    weights: Weights, x: Sequence[jax.Array], y: Sequence[jax.Array], dead: jax.Array, plan: Plan
) -> tuple[jax.Array, tuple[list[jax.Array], list[jax.Array]]]:
    """The loss, and of each layer the features [n, f] and the errors [n, o]."""
    z = [_products(*each) for each in zip(weights, x, strict=True)]
    f, penalties = zip(*(_features(*each, plan) for each in zip(weights, z, dead, strict=True)), strict=True)
    error = [target - layer["b_dec"] for target, layer in zip(y, weights, strict=True)]
    squares: jax.Array | float = 0.0
    for start, stop in itertools.pairwise((0, *plan.prefixes)):
        error = _less(error, [each[:, start:stop] for each in f], [layer["W_dec"][start:stop] for layer in weights])
        squares += sum(jnp.mean(each**2) for each in error) / len(error)
    auxiliary = jax.lax.cond(
        jnp.any(dead), _auxiliary, lambda *_: jnp.float32(0.0), weights, z, jax.lax.stop_gradient(error), dead
    )
    loss = squares / len(plan.prefixes) + sum(penalties) / len(penalties) + _AUXILIARY * auxiliary
    return loss, (list(f), error)


def _by_layer(values: jax.Array, layers: int) -> list[jax.Array]:
    """[n, d] of each layer, of [n, l d]."""
    return jnp.split(values, layers, axis=1)


def _products(layer: Layer, x: jax.Array) -> jax.Array:
    # [n, i] x [i, f] -> [n, f]
    return matmul("ni,if->nf", x, layer["W_enc"]) + layer["b_enc"]


def _less(y: Sequence[jax.Array], f: Sequence[jax.Array], W_dec: Sequence[jax.Array]) -> list[jax.Array]:
    """Values [n, o] of each layer, minus what the features [n, f] of each layer write."""
    left = list(y)
    for layer, (features, W) in enumerate(zip(f, W_dec, strict=True)):
        # [n, f] x [f, m, o] -> [m, n, o]
        written = matmul("nf,fmo->mno", features, W)
        left[layer:] = [each - part for each, part in zip(left[layer:], written, strict=True)]
    return left


def _features(layer: Layer, z: jax.Array, dead: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array | float]:
    """The features [n, f] of a layer, and a penalty on their number."""
    if plan.kind != "jumprelu":
        many, axis = (plan.k, 1) if plan.kind == "topk" else (plan.k * len(z), None)
        return jnp.where(z > smallest_kept(z, many, axis), z, 0.0), 0.0
    threshold = threshold_of(layer)
    fixed = jax.lax.stop_gradient(threshold)
    change = threshold - fixed  # 0, with a gradient
    # [n, f]: an estimate of the density of products at the threshold, by which a change of it changes what is kept
    near = jax.lax.stop_gradient(jnp.abs(z - threshold) < _BANDWIDTH / 2) / _BANDWIDTH
    active = z > fixed
    f = jnp.where(active, z, 0.0) - near * fixed * change
    l0 = jnp.sum(active - near * change) / len(z)
    # The threshold of a dead feature is far from any product, and would stay there
    gap = jnp.mean(jnp.where(dead, jax.nn.relu(threshold - jax.lax.stop_gradient(z)), 0.0))
    return f, (l0 / plan.k - 1) ** 2 + gap


def _auxiliary(weights: Weights, z: Sequence[jax.Array], missing: Sequence[jax.Array], dead: jax.Array) -> jax.Array:
    """How little dead features, the d / 2 largest of each token and layer, explain of what is missing: AuxK."""
    many = missing[0].shape[1] // 2
    of_dead = [jnp.where(each, products, 0.0) for each, products in zip(dead, z, strict=True)]
    f = [jnp.where(each > smallest_kept(each, many, axis=1), each, 0.0) for each in of_dead]
    left = _less(missing, f, [layer["W_dec"] for layer in weights])
    shares = [jnp.sum(a**2) / jnp.maximum(jnp.sum(b**2), 1e-12) for a, b in zip(left, missing, strict=True)]
    return sum(shares, jnp.float32(0.0)) / len(shares)


def threshold_of(layer: Layer) -> jax.Array:
    """The thresholds [f] that are learned."""
    return jnp.exp(_HASTE * layer["log_threshold"])


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
    """W [f, ...], of which each row has length 1."""
    return W / jnp.sqrt(jnp.sum(W**2, axis=tuple(range(1, W.ndim)), keepdims=True))
