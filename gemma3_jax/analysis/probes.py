"""Directions in stored activations that tell tokens apart, by site, with controls.

Axes: n tokens, d features, L sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma3_jax.cache.activations import Name
from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.inputs import positive
from gemma3_jax.sites.names import get_act_name, layer_of, resolve
from gemma3_jax.types import ArrayLike

Method: TypeAlias = Literal["logistic", "ridge", "difference"]
_STEPS = 200  # of the solver; most problems end sooner
_CONTROLS = 5  # one direction by chance may have a high score


class Values(Protocol):
    """The values of one site."""

    def take(self, rows: np.ndarray, /) -> ArrayLike: ...


class Store(Protocol):
    """What this module reads of a `gemma3_jax.harvest.ActivationStore`; any object with these will do."""

    config: Gemma3Config

    @property
    def sites(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, name: str, /) -> Values: ...

    def documents(self, start: int, stop: int, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Probes(Described):
    """A direction for each site, and how well it tells other documents' tokens apart.

    Attributes:
        config: shape of the model.
        names: canonical name of each site.
        directions: [L, d] float32, of length 1; `edits.Add`, `edits.ProjectOut` and `reductions.Project` take them.
        scores: [L] float32, on documents that were held out: the area under the ROC curve for two classes (0.5 by
            chance), else the share of the variance that is explained.
        controls: [L] float32, the mean score of five probes that were fitted to shuffled labels.
        method: how they were fitted.
    """

    config: Gemma3Config
    names: tuple[str, ...]
    directions: np.ndarray
    scores: np.ndarray
    controls: np.ndarray
    method: Method

    def __getitem__(self, name: Name) -> np.ndarray:
        """The direction [d] of a site, by any of its names."""
        full = name if isinstance(name, str) else get_act_name(*name, config=self.config)
        found = resolve(full, self.config).name
        if found not in self.names:
            raise KeyError(f"{found} has no probe; there are {', '.join(self.names)}")
        return self.directions[self.names.index(found)]

    @property
    def layers(self) -> list[int | None]:
        """The layer of each site, None outside the blocks."""
        return [layer_of(name) for name in self.names]

    @property
    def best(self) -> str:
        """The site whose probe has the highest score."""
        return self.names[int(np.argmax(self.scores))]

    def _description(self) -> Description:
        title = f"Probes of {len(self.names)} sites, {self.method}; score on held-out documents, with shuffled labels"
        lines = zip(self.names, self.scores, self.controls, strict=True)
        return Description(title, tuple((name, f"{score:.3f}", f"{control:.3f}") for name, score, control in lines))


def probe(
    store: Store,
    labels: ArrayLike,
    sites: Sequence[Name] | None = None,
    *,
    rows: ArrayLike | None = None,
    method: Method = "logistic",
    penalty: float = 1.0,
    held_out: float = 0.2,
    most: int = 20_000,
    seed: int = 0,
) -> Probes:
    """Fit a linear probe to the activations of each site.

    A fifth of the documents is held out, so that no document is on both sides. Each probe is also fitted to labels that
    are shuffled, five times: a control, which shows what the fit finds by chance.

    Args:
        store: an `ActivationStore`, or an object with its `sites`, `documents`, length, `config` and
            `store[site].take(rows)`.
        labels: [n] for each token of the store, or for each of `rows`: booleans or two integers, or numbers for ridge.
        sites: names of sites, with one vector for each token; None means all of the store.
        rows: [n] indices of tokens, to probe these alone; or booleans for all tokens.
        method: "logistic" regression, "ridge" regression, or the "difference" of the means of the two classes.
        penalty: weight of the sum of squares of ridge coefficients, for features of variance 1, and of half the sum for
            logistic ones; in scikit-learn, `alpha` and 1 / `C`.
        held_out: the share of documents for the score.
        most: at most so many tokens are used, chosen by chance; their activations are in memory, a site at a time.
        seed: of all choices.

    Raises:
        ValueError: labels do not match the tokens, have one class or NaN, or suit another method; one side of the split
            has no document, or one class; or `penalty` is negative.

    >>> import tempfile
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.harvest import ActivationStore, harvest
    >>> model, out = HookedGemma3.from_pretrained(TINY), tempfile.mkdtemp()
    >>> harvest(model, ["ba ke lo mu", "ti so ba ke re"] * 9, "blocks.*.hook_resid_post", out, rows=4, length=32)
    >>> store = ActivationStore(out)
    >>> probes = probe(store, store.tokens(0, len(store)) == model.to_single_token("ke"))
    >>> float(probes.scores.min()), probes["resid_post", 3].shape
    (1.0, (96,))
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    most = positive("most", most)
    if not penalty >= 0:
        raise ValueError(f"penalty is {penalty}; it must be at least 0")
    chosen = np.arange(len(store)) if rows is None else np.asarray(rows)
    if chosen.dtype == bool and chosen.shape == (len(store),):
        chosen = np.flatnonzero(chosen)
    y = np.asarray(labels)
    if y.shape != chosen.shape:
        raise ValueError(f"labels have shape {list(y.shape)}; there are {len(chosen):,} tokens, and each needs one")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("labels have NaN or infinity; leave these tokens out with rows")
    generator = np.random.default_rng(seed)
    kept = np.sort(generator.permutation(len(chosen))[:most])
    chosen, y = chosen[kept], _numbers(y[kept], method)
    test = _held_out(store.documents(0, len(store))[chosen], held_out, generator)
    two = len(np.unique(y)) == 2
    if two and min(len(np.unique(y[test])), len(np.unique(y[~test]))) < 2:
        raise ValueError("one side of the split has one class; give more documents, or another seed or held_out")
    several = [y]
    for _ in range(_CONTROLS):
        several.append(y.copy())
        several[-1][~test] = generator.permutation(y[~test])
    names = [resolve(n if isinstance(n, str) else get_act_name(*n, config=store.config), store.config).name
             for n in (store.sites if sites is None else sites)]  # fmt: skip
    found = [_probed(store, name, chosen, several, test, method, penalty, two) for name in names]
    directions, scores, controls = (np.asarray(each, np.float32) for each in zip(*found, strict=True))
    return Probes(store.config, tuple(names), directions, scores, controls, method)


def _numbers(y: np.ndarray, method: Method) -> np.ndarray:
    """Labels as float32: 0 and 1 for two classes."""
    values = np.unique(y)
    if len(values) < 2:
        raise ValueError("all labels are the same; a probe needs two classes")
    if len(values) == 2:
        return (y == values[1]).astype(np.float32)
    if method != "ridge":
        raise ValueError(f"there are {len(values)} different labels; {method!r} takes two, and 'ridge' any numbers")
    return y.astype(np.float32)


def _held_out(documents: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """[n] bool: which tokens are of documents that are held out."""
    known = np.unique(documents)
    count = round(share * len(known))
    if not 0 < count < len(known):
        raise ValueError(
            f"held_out is {share}, which is {count} of {len(known)} documents; each side needs at least one"
        )
    return np.isin(documents, generator.permutation(known)[:count])


def _probed(
    store: Store,
    name: str,
    rows: np.ndarray,
    labels: Sequence[np.ndarray],
    test: np.ndarray,
    method: Method,
    penalty: float,
    two: bool,
) -> tuple[np.ndarray, float, float]:
    """The direction [d] at a site, its score, and the mean one of the other labels."""
    x = np.asarray(store[name].take(rows), np.float32)
    if x.ndim != 2:
        raise ValueError(f"{name} has values of shape {list(x.shape[1:])} for a token; a probe needs one vector")
    mean, spread = x[~test].mean(axis=0), x[~test].std(axis=0)
    z = (x - mean) / np.where(spread > 0, spread, 1)
    fit = _fits[method]
    weights = [np.asarray(fit(z[~test], y[~test], np.float32(penalty))) for y in labels]
    scores = [_score(z[test] @ w[:-1] + w[-1], labels[0][test], two) for w in weights]
    direction = weights[0][:-1] * (spread if method == "difference" else 1 / np.where(spread > 0, spread, 1))
    return direction / max(float(np.linalg.norm(direction)), 1e-30), scores[0], float(np.mean(scores[1:]))


@jax.jit
def _ridge(z: jax.Array, y: jax.Array, penalty: jax.Array) -> jax.Array:
    """[d + 1]: coefficients and intercept; z [n, d] has mean 0."""
    gram = z.T @ z + penalty * jnp.eye(z.shape[1])
    weights = jnp.linalg.solve(gram, z.T @ (y - y.mean()))
    return jnp.append(weights, y.mean())


@jax.jit
def _difference(z: jax.Array, y: jax.Array, penalty: jax.Array) -> jax.Array:
    """[d + 1]: the difference of the means of the classes, and minus its product with what lies between them."""
    one, zero = (jnp.average(z, axis=0, weights=each) for each in (y, 1 - y))
    return jnp.append(one - zero, -(one - zero) @ (one + zero) / 2)


@jax.jit
def _logistic(z: jax.Array, y: jax.Array, penalty: jax.Array) -> jax.Array:
    """[d + 1]: coefficients and intercept, by L-BFGS."""

    def loss(weights: jax.Array) -> jax.Array:
        logits = z @ weights[:-1] + weights[-1]
        return optax.sigmoid_binary_cross_entropy(logits, y).sum() + penalty / 2 * jnp.sum(weights[:-1] ** 2)

    solver = optax.lbfgs()
    step = optax.value_and_grad_from_state(loss)

    def improved(carry: tuple[jax.Array, optax.OptState, jax.Array]) -> tuple[jax.Array, optax.OptState, jax.Array]:
        weights, state, count = carry
        value, gradient = step(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, updates), state, count + 1

    def goes_on(carry: tuple[jax.Array, optax.OptState, jax.Array]) -> jax.Array:
        gradient = optax.tree.get(carry[1], "grad")
        return (carry[2] == 0) | ((carry[2] < _STEPS) & (jnp.linalg.norm(gradient) > 1e-3))

    start = jnp.zeros(z.shape[1] + 1)
    return jax.lax.while_loop(goes_on, improved, (start, solver.init(start), jnp.int32(0)))[0]


_fits: dict[Method, Callable[..., jax.Array]] = {"logistic": _logistic, "ridge": _ridge, "difference": _difference}


def _score(predicted: np.ndarray, y: np.ndarray, two: bool) -> float:
    """The area under the ROC curve; for other labels than two classes, the share of the variance that is explained."""
    if not two:
        return float(1 - np.mean((predicted - y) ** 2) / np.var(y))
    _, places, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; equal values share the mean of theirs
    ones = int(y.sum())
    return float((ranks[y == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(y) - ones)))
