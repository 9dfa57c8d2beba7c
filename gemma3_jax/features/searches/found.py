"""What a search has found: all features together, and each with the texts where it is largest.

Axes: f features that were searched, k largest values, s bins of a histogram, w tokens of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np

from gemma3_jax.descriptions import Described, Description
from gemma3_jax.features.direct import direct_logits
from gemma3_jax.features.pages.neuronpedia import url_of
from gemma3_jax.features.parts import Feature, reader_of
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.searches.corpora import Source
from gemma3_jax.features.searches.tallies import BINS, Reader, chunks, kept_of, values_of
from gemma3_jax.hooked.hooked import HookedGemma3

_SHOWN = 5  # examples and tokens of a description


class Histogram(NamedTuple):
    """How many values are between two edges, as `numpy.histogram` has it; values of 0 are left out.

    Attributes:
        counts: [s] int64.
        edges: [s + 1] float64, from 0 to a power of two above the largest value; each bin has its lower edge.
    """

    counts: np.ndarray
    edges: np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """A token where a feature is large, among those around it.

    Attributes:
        value: of the feature.
        document: number of the document in the corpus.
        offset: place of the token in the document, from 0.
        ids: [w] int32, the tokens from 16 before it to 8 after it, of those that the model saw with it.
        at: which of them is the token.
    """

    value: float
    document: int
    offset: int
    ids: np.ndarray = dataclasses.field(repr=False)
    at: int = dataclasses.field(repr=False)
    _model: HookedGemma3 = dataclasses.field(repr=False)

    @property
    def tokens(self) -> list[str]:
        """[w], each token as a string; its id if the model has no tokenizer."""
        return spelled(self._model, self.ids)

    @property
    def token(self) -> str:
        """The token as a string."""
        return self.tokens[self.at]

    @property
    def before(self) -> str:
        """The text before the token."""
        return _text(self._model, self.ids[: self.at])

    @property
    def after(self) -> str:
        """The text after the token."""
        return _text(self._model, self.ids[self.at + 1 :])

    @property
    def text(self) -> str:
        """The text of the window."""
        return _text(self._model, self.ids)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known of the features of one dictionary, or of one layer of it.

    Attributes:
        reader: what encodes.
        indices: [f], in order.
        values: [f, k] float32, the largest first; 0 where there are fewer.
        batches, places: [f, k] int32, the tokens; -1 where there are fewer.
        counts: [f, s] int64.
        exponents: [f] int32: bins end at 2**exponent.
        together: [f, a] int64, on how many tokens each is active with each of those features that were counted.
    """

    reader: Reader
    indices: np.ndarray
    values: np.ndarray
    batches: np.ndarray
    places: np.ndarray
    counts: np.ndarray
    exponents: np.ndarray
    together: np.ndarray


class Coactive(NamedTuple):
    """A feature that is active on the same tokens as another.

    Attributes:
        feature: its index; in a dictionary of several layers, its layer and its index.
        tokens: on how many tokens both are active.
        jaccard: that, divided by the number of tokens on which one of them is: 1 if they are always active together.
    """

    feature: Feature
    tokens: int
    jaccard: float


class Found(Described):
    """The result of `features.search`: `found[1234]` is a feature, and `found[layer, 1234]` one of several layers.

    Texts are read again as features are looked at, so the corpus must stay as it is.

    Attributes:
        tokens: how many tokens were searched.
        documents: how many documents the corpus has.
        features: [f] the features that were searched; of a dictionary of several layers [f, 2], layer and index.
        frequency: [f] float64, the fraction of the tokens on which each is active.
        largest: [f] float32, the largest value of each.
        dictionary: whose features they are.
    """

    def __init__(
        self,
        model: HookedGemma3,
        sae: Dictionary,
        source: Source,
        layers: Mapping[int | None, Layer],
        tokens: int,
        pairs: Mapping[int | None, np.ndarray],
    ):
        self._model, self.dictionary, self._source, self._layers = model, sae, source, layers
        self.tokens, self.documents = tokens, source.documents
        indices = [each.indices if layer is None else _pairs(layer, each.indices) for layer, each in layers.items()]
        self.features = np.concatenate(indices)
        self._counts = np.concatenate([each.counts.sum(axis=1) for each in layers.values()])
        self._pairs = [(layer, index) for layer, own in pairs.items() for index in own.tolist()]
        self.frequency = self._counts / tokens
        self.largest = np.concatenate([each.values[:, 0] for each in layers.values()])

    def __len__(self) -> int:
        """The number of features."""
        return len(self.features)

    def __getitem__(self, feature: Feature) -> FoundFeature:
        """A feature.

        Raises:
            ValueError: it is not a feature of the dictionary.
            KeyError: it is not among the features that were searched.
        """
        layer, index = reader_of(self.dictionary, feature)
        number = int(index)
        known = self._layers.get(layer)
        row = -1 if known is None else int(np.searchsorted(known.indices, number))
        if known is None or row == len(known.indices) or known.indices[row] != number:
            raise KeyError(f"feature {feature} was not searched; name it in features, or leave that out")
        name = number if layer is None else (layer, number)
        return FoundFeature(name, known, row, self.tokens, self._model, self.dictionary, self._source)

    def __iter__(self) -> Iterator[FoundFeature]:
        """Each feature, in order."""
        return (self[self._name(row)] for row in range(len(self)))

    def coactivation(self, feature: Feature) -> np.ndarray:
        """[f] int64: on how many tokens this feature and each of `features` are both active.

        Raises:
            ValueError: it is not a feature of the dictionary.
            KeyError: it was not counted together with others.
        """
        layer, index = reader_of(self.dictionary, feature)
        if (layer, int(index)) not in self._pairs:
            raise KeyError(f"feature {feature} was not counted together with others; name it in coactive of the search")
        column = self._pairs.index((layer, int(index)))
        return np.concatenate([each.together[:, column] for each in self._layers.values()])

    def coactive(self, feature: Feature, k: int = 10) -> list[Coactive]:
        """The k features that are most often active on the same tokens as this one, by the Jaccard index.

        Raises:
            ValueError: it is not a feature of the dictionary.
            KeyError: it was not counted together with others.
        """
        both = self.coactivation(feature)
        own = self[feature].count
        jaccard = both / np.maximum(self._counts + own - both, 1)
        order = [row for row in np.argsort(-jaccard, kind="stable")[: k + 1].tolist() if both[row]]
        found = [Coactive(self._name(row), int(both[row]), float(jaccard[row])) for row in order]
        return [each for each in found if each.feature != self[feature].feature][:k]

    def _name(self, row: int) -> Feature:
        """The feature of a row of `features`."""
        name = self.features[row].tolist()
        return tuple(name) if isinstance(name, list) else name

    def _description(self) -> Description:
        dead = int(np.sum(self.frequency == 0))
        title = f"Found: {len(self):,} features on {self.tokens:,} tokens of {self.documents:,} documents"
        active = self.frequency[self.frequency > 0]
        rows = [("never active", f"{dead:,}"), ("active on a token", f"{self.frequency.sum():.1f} on average")]
        if active.size:
            rows.append(("frequency", f"{np.median(active):.3%} in the median of the others"))
        return Description(title, tuple(rows))


@dataclasses.dataclass(frozen=True, repr=False)
class FoundFeature(Described):
    """One feature of a search; its texts and logits are computed when they are first read.

    Attributes:
        feature: its index; in a dictionary of several layers, its layer and its index.
        tokens: how many tokens were searched.
    """

    feature: Feature
    _layer: Layer
    _row: int
    tokens: int
    _model: HookedGemma3
    _sae: Dictionary
    _source: Source

    @property
    def count(self) -> int:
        """On how many tokens it is active: above 0."""
        return int(self._layer.counts[self._row].sum())

    @property
    def frequency(self) -> float:
        """The fraction of the tokens on which it is active."""
        return self.count / self.tokens

    @property
    def largest(self) -> float:
        """Its largest value; 0 if it is never active."""
        return float(self._layer.values[self._row, 0])

    @property
    def histogram(self) -> Histogram:
        """Its values above 0: `counts, edges = found[7].histogram`."""
        end = 2.0 ** int(self._layer.exponents[self._row]) if self.count else 1.0
        return Histogram(self._layer.counts[self._row], np.linspace(0, end, BINS + 1))

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The tokens where it is largest, at most k, the largest first; of equal values the first in the corpus."""
        windows = [self._source.window(*place) for place in self._where]
        values = self._layer.values[self._row].tolist()
        return [
            Example(value, each.document, each.offset, each.tokens, each.at, self._model)
            for value, each in zip(values, windows, strict=False)  # there may be fewer than k
        ]

    @functools.cached_property
    def activations(self) -> list[np.ndarray]:
        """Its values [w] float32 on the tokens of each example, from another run; for `pictures.feature_on_texts`."""
        reader, index = self._layer.reader, int(self._layer.indices[self._row])
        found = self._source.values(reader.site_in, self._where)
        if not found:
            return []
        x = reader.flat(np.concatenate(found))
        (chunk,) = chunks(reader, np.asarray([index]), len(x))
        values = np.asarray(values_of(reader, x, kept_of(reader, x), chunk))[:, 0]
        return np.split(values, np.cumsum([len(each) for each in found])[:-1])

    @property
    def top_logits(self) -> list[tuple[str, float]]:
        """The k tokens whose logits it raises most, and by how much for a value of 1, the most first.

        The decoder row goes through the gain of the final norm and the unembedding, and the mean over the vocabulary
        is subtracted. The norm's scale, which depends on the token, is taken as 1: the order is right, and sizes are
        those where the root mean square of the residual stream is 1. Before a post-norm, its gain is applied too. The
        path through later layers is left out, and so is final_logit_softcapping.

        Raises:
            ValueError: the dictionary writes to a site that has no direct path to the logits.
        """
        return self._best(-1)

    @property
    def bottom_logits(self) -> list[tuple[str, float]]:
        """The k tokens whose logits it lowers most, the lowest first; see `top_logits`."""
        return self._best(1)

    @property
    def neuronpedia(self) -> str | None:
        """The address of its page on Neuronpedia; None if the dictionary was not loaded with an id there."""
        return url_of(self._sae, self.feature)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """[V] float32, what a value of 1 adds to each logit; see `top_logits`."""
        return direct_logits(self._model, self._sae, self.feature)

    @property
    def _where(self) -> list[tuple[int, int]]:
        """The batch and the place of each example."""
        batches, places = (each[self._row].tolist() for each in (self._layer.batches, self._layer.places))
        return [(batch, place) for batch, place in zip(batches, places, strict=True) if batch >= 0]

    def _best(self, sign: int) -> list[tuple[str, float]]:
        order = np.argsort(sign * self.logits, kind="stable")[: self._layer.values.shape[1]]
        return list(zip(spelled(self._model, order), self.logits[order].tolist(), strict=True))

    def _description(self) -> Description:
        often = f"active on {self.frequency:.3%} of {self.tokens:,} tokens"
        title = f"Feature {self.feature}: {often}, at most {self.largest:.4g}"
        rows: list[tuple[str, ...]] = [
            (f"{each.value:.4g}", f"{each.before!r} [{each.token!r}] {each.after!r}") for each in self.examples[:_SHOWN]
        ]
        try:
            for name, best in (("top logits", self.top_logits), ("bottom logits", self.bottom_logits)):
                rows.append((name, ", ".join(f"{token!r} {logit:+.2f}" for token, logit in best[:_SHOWN])))
        except ValueError:
            pass
        return Description(title, tuple(rows))


def spelled(model: HookedGemma3, ids: np.ndarray) -> list[str]:
    """Each token as a string."""
    if model.tokenizer is None:
        return [str(each) for each in ids.tolist()]
    return cast(list[str], model.to_str_tokens(ids))


def _text(model: HookedGemma3, ids: np.ndarray) -> str:
    """Tokens as one string."""
    return " ".join(spelled(model, ids)) if model.tokenizer is None else cast(str, model.to_string(ids))


def _pairs(layer: int, indices: np.ndarray) -> np.ndarray:
    """[f, 2]."""
    return np.stack([np.full(len(indices), layer), indices], axis=1)
