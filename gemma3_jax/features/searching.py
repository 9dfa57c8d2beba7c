"""Search: where in a corpus the features of a dictionary are largest, and how often they are active.

Axes: n tokens of a batch, d features of a site, f features of the dictionary, k largest values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gemma3_jax.features.corpora import source_of
from gemma3_jax.features.dictionaries import Transcoder, on_mesh_of
from gemma3_jax.features.found import Found, Layer
from gemma3_jax.features.parts import LAYERED, Feature, reader_of
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.tallies import Chunk, Reader, Tally, added, chunks, empty, kept_of, totals
from gemma3_jax.features.unchecked import warn_if_unchecked
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.sites.names import layer_of


def search(
    model: HookedGemma3,
    sae: Dictionary,
    corpus: object,
    k: int = 20,
    features: Sequence[Feature] | np.ndarray | None = None,
    *,
    rows: int = 16,
    length: int = 1024,
    progress: bool | None = None,
) -> Found:
    """Find the tokens of a corpus where features are largest, how often they are active, and what they write.

    BOS and padding are left out; documents that share a row do not see each other. The model runs up to the last site
    that is read. Memory does not grow with the corpus: on the device are, beside the model and the dictionary, one
    batch of the site's values, 2**24 values of features, and 12 k + 260 bytes for each feature (for 262,144 features
    and k = 20, 131 MB); the host has two batches. The corpus is read again where examples are looked at.

    Args:
        model: the model.
        sae: a dictionary of any kind; of several layers, features are (layer, index).
        corpus: as in `gemma3_jax.harvest.harvest`: a file, a folder, a list of texts, a data set, ...; or an
            `ActivationStore` that has the dictionary's site, whose tokens are searched without a run.
        k: how many examples of each feature to keep.
        features: which to search; None for all of them.
        rows: rows that run together.
        length: tokens of a row; a longer document is cut.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        A `Found`: `found[1234]` has .examples, .frequency, .histogram, .top_logits, .bottom_logits; and
        `found.frequency` is that of all features.

    Raises:
        ValueError: k is below 1; a feature is not in the dictionary; the site has another size; the corpus is not one,
            or has only BOS and padding (`StoreError`).
        UnknownSite: the model does not have a site of the dictionary.
        KeyError: the store does not have it.

    >>> import jax.numpy as jnp
    >>> from gemma3_jax import TINY, HookedGemma3, features
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> one = jnp.eye(model.config.hidden_size)
    >>> sae = features.SparseAutoencoder(
    ...     W_enc=one, b_enc=-one[0], W_dec=one, b_dec=0 * one[0], activation=features.Relu(),
    ...     site_in="blocks.1.hook_out",
    ... )
    >>> found = features.search(model, sae, ["ba ke lo mu", "ti so"], k=2)
    >>> found.tokens, len(found[7].examples), len(found[7].top_logits)
    (6, 2, 2)
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if jax.process_count() > 1:
        raise ValueError("search runs in one process; leave jax.distributed out")
    warn_if_unchecked(sae)
    readers = _readers(sae)
    chosen = _chosen(sae, readers, features)
    names = [readers[layer].site_in for layer in chosen]
    source = source_of(model, corpus, names, rows, length)
    tallies = {layer: _Tallies(readers[layer], indices, k, source.tokens) for layer, indices in chosen.items()}
    tokens = 0
    with tqdm(disable=None if progress is None else not progress, unit=" tokens", unit_scale=True) as bar:
        for batch in source.batches():
            for each in tallies.values():
                each.add(batch.values[each.reader.site_in], batch.real, batch.number)
            tokens += batch.real
            bar.update(batch.real)
    if not tokens:
        raise ValueError("the corpus has no tokens but BOS and padding")
    return Found(model, sae, source, {layer: each.result() for layer, each in tallies.items()}, tokens)


class _Tallies:
    """The tallies of features [f] of one reader, in chunks."""

    def __init__(self, reader: Reader, indices: np.ndarray, k: int, tokens: int):
        self.reader, self._indices = reader, indices
        self._chunks: list[Chunk] = chunks(reader, indices, tokens)
        self._tallies: list[Tally] = [empty(len(chunk.columns), k) for chunk in self._chunks]

    def add(self, values: np.ndarray, real: int, number: int) -> None:
        """Add the values [n, ...] of the site, of which the first `real` count."""
        x = self.reader.flat(values)
        with on_mesh_of(self.reader.W_enc, x):
            kept = kept_of(self.reader, x)
            for i, chunk in enumerate(self._chunks):
                tally = self._tallies[i]
                self._tallies[i] = added(tally, self.reader, x, kept, chunk, jnp.int32(real), jnp.int32(number))

    def result(self) -> Layer:
        """What is known, on the host."""
        host: list[Any] = jax.device_get(self._tallies)
        values, batches, places, exponents = (
            np.concatenate([getattr(tally, name) for tally in host])
            for name in ("values", "batches", "places", "exponents")
        )
        counts = np.concatenate([totals(tally.counts) for tally in host])
        return Layer(self.reader, self._indices, values, batches, places, counts, exponents)


def _readers(sae: Dictionary) -> dict[int | None, Reader]:
    """What encodes each layer that is read, by the layer of the model; None in a `Dictionary` of one site."""
    if not isinstance(sae, LAYERED):
        return {None: sae}
    return {
        layer_of(name): Transcoder(
            W_enc=sae.W_enc[i],
            b_enc=sae.b_enc[i],
            W_dec=jnp.zeros((sae.width, 0)),  # decoders may be in a file
            b_dec=jnp.zeros(0),
            activation=sae.activation[i],
            site_in=name,
            site_out=name,
        )
        for i, name in enumerate(sae.site_in)
    }


def _chosen(
    sae: Dictionary, readers: dict[int | None, Reader], features: Sequence[Feature] | np.ndarray | None
) -> dict[int | None, np.ndarray]:
    """The indices of the features to search, in order, by the layer that they read."""
    if features is None:
        return {layer: np.arange(sae.width) for layer in readers}
    if not len(features):
        raise ValueError("features is empty; name some, or leave it out for all")
    pairs = [reader_of(sae, tuple(np.ravel(each).tolist()) if np.ndim(each) else each) for each in features]
    by_layer = {layer: [int(index) for own, index in pairs if own == layer] for layer in readers}
    return {layer: np.unique(indices) for layer, indices in by_layer.items() if indices}
