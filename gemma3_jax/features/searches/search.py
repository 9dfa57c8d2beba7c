"""Search: where in a corpus the features of a dictionary are largest, and how often they are active.

Axes: n tokens of a batch, d features of a site, f features of the dictionary, k largest values, a features that are
counted together with others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gemma3_jax.features.dictionaries import Transcoder, on_mesh_of
from gemma3_jax.features.parts import LAYERED, Feature, reader_of
from gemma3_jax.features.placement import Dictionary
from gemma3_jax.features.searches.corpora import Source, source_of
from gemma3_jax.features.searches.found import Found, Layer
from gemma3_jax.features.searches.resuming import Progress, StateFile, digest_of_indices, identity_of, joined, split
from gemma3_jax.features.searches.tallies import Chunk, Reader, Tally, active, added, chunks, empty, kept_of, totals
from gemma3_jax.features.unchecked import warn_if_unchecked
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.sites.names import layer_of

_PAIRS = 1024  # features that are all counted together with each other, unless others are named


def search(
    model: HookedGemma3,
    sae: Dictionary,
    corpus: object,
    k: int = 20,
    features: Sequence[Feature] | np.ndarray | None = None,
    *,
    coactive: Sequence[Feature] | np.ndarray | None = None,
    state: str | os.PathLike[str] | None = None,
    rows: int = 16,
    length: int = 1024,
    progress: bool | None = None,
) -> Found:
    """Find the tokens of a corpus where features are largest, how often they are active, and what they write.

    BOS and padding are left out; documents that share a row do not see each other. The model runs up to the last site
    that is read. Memory does not grow with the corpus: on the device are, beside the model and the dictionary, one
    batch of the site's values, 2**24 values of features, and 12 k + 260 bytes for each feature (for 262,144 features
    and k = 20, 131 MB), with 8 more for each of the `coactive` ones; the host has two batches. The corpus is read again
    where examples are looked at.

    Args:
        model: the model.
        sae: a dictionary of any kind; of several layers, features are (layer, index).
        corpus: as in `gemma3_jax.harvest.harvest`: a file, a folder, a list of texts, a data set, ...; or an
            `ActivationStore` that has the dictionary's site, whose tokens are searched without a run.
        k: how many examples of each feature to keep.
        features: which to search; None for all of them.
        coactive: for which of these to count with which others they are active together, for `Found.coactive`. None
            takes all that are searched if they are at most 1,024. It costs 8 bytes of the device for each pair.
        state: a file to which the search writes every minute how far it is, and from which the same call goes on after
            it was interrupted, however it was. Of another search, it is refused.
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
        CheckpointError: `state` has another search, with another model, dictionary, corpus or arguments; or is damaged.

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
    pairs = _coactive(sae, chosen, coactive)
    source = source_of(model, corpus, names, rows, length)
    a = sum(map(len, pairs.values()))
    tallies = {
        layer: _Tallies(readers[layer], indices, pairs[layer], k, a, source.tokens) for layer, indices in chosen.items()
    }
    file = None
    if state is not None:
        settings: dict[str, object] = {"k": k, "rows": rows, "length": length, "tokens": source.tokens}
        settings |= {"features": digest_of_indices(chosen), "coactive": digest_of_indices(pairs)}
        file = StateFile(state, identity_of(model, readers, source, settings))
    tokens = _run(source, tallies, file, progress)
    if not tokens:
        raise ValueError("the corpus has no tokens but BOS and padding")
    return Found(model, sae, source, {layer: each.result() for layer, each in tallies.items()}, tokens, pairs)


def _run(source: Source, tallies: Mapping[int | None, _Tallies], file: StateFile | None, progress: bool | None) -> int:
    """Go through the batches, those that the file does not have; the number of tokens of all of them."""
    known = None if file is None else file.read()
    done, tokens = (0, 0) if known is None else known[:2]
    if known is not None:
        for layer, each in tallies.items():
            each.restore(known.tallies[layer])
    first, hidden = done, None if progress is None else not progress
    with tqdm(initial=tokens, disable=hidden, unit=" tokens", unit_scale=True) as bar:
        for batch in source.batches(first):
            parts = [each.active(batch.values[each.reader.site_in]) for each in tallies.values()]
            # [n, a]
            together = jnp.concatenate(parts, axis=1) if any(part.size for part in parts) else None
            for each in tallies.values():
                each.add(batch.values[each.reader.site_in], together, batch.real, batch.number)
            done, tokens = batch.number + 1, tokens + batch.real
            if file is not None and file.is_due:
                file.write(_progress(done, tokens, tallies))
            bar.update(batch.real)
    if file is not None and done > first:
        file.write(_progress(done, tokens, tallies))
    return tokens


def _progress(batches: int, tokens: int, tallies: Mapping[int | None, _Tallies]) -> Progress:
    return Progress(batches, tokens, {layer: each.known() for layer, each in tallies.items()})


class _Tallies:
    """The tallies of features [f] of one reader, in chunks.

    Args:
        reader: what encodes.
        indices: [f].
        coactive: which of these are counted together with others.
        k: how many of the largest values are kept.
        a: how many features of all readers are counted together with others.
        tokens: n of a batch.
    """

    def __init__(self, reader: Reader, indices: np.ndarray, coactive: np.ndarray, k: int, a: int, tokens: int):
        self.reader, self._indices = reader, indices
        self._chunks: list[Chunk] = chunks(reader, indices, tokens)
        self._coactive: list[Chunk] = chunks(reader, coactive, tokens)
        self._tallies: list[Tally] = [empty(len(chunk.columns), k, a) for chunk in self._chunks]

    def active(self, values: np.ndarray) -> jax.Array:
        """[n, a of this reader] float32: 1 where those features are active that are counted together with others."""
        if not self._coactive:
            return jnp.zeros((len(values), 0))
        x = self.reader.flat(values)
        with on_mesh_of(self.reader.W_enc, x):
            return jnp.concatenate([active(self.reader, x, chunk) for chunk in self._coactive], axis=1)

    def add(self, values: np.ndarray, together: jax.Array | None, real: int, number: int) -> None:
        """Add the values [n, ...] of the site, of which the first `real` count, beside features [n, a] of all sites."""
        x = self.reader.flat(values)
        with on_mesh_of(self.reader.W_enc, x):
            kept = kept_of(self.reader, x)
            for i, chunk in enumerate(self._chunks):
                self._tallies[i] = added(
                    self._tallies[i], self.reader, x, kept, chunk, jnp.int32(real), jnp.int32(number), together
                )

    def known(self) -> Tally:
        """What is known so far, of all chunks together, on the host."""
        return joined(jax.device_get(self._tallies))

    def restore(self, known: Tally) -> None:
        """Go on from there."""
        self._tallies = split(known, [len(chunk.columns) for chunk in self._chunks])

    def result(self) -> Layer:
        """What is known, for `Found`."""
        values, batches, places, counts, exponents, together = (np.asarray(each) for each in self.known())
        return Layer(self.reader, self._indices, values, batches, places, totals(counts), exponents, totals(together))


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


def _coactive(
    sae: Dictionary, chosen: dict[int | None, np.ndarray], coactive: Sequence[Feature] | np.ndarray | None
) -> dict[int | None, np.ndarray]:
    """By layer, the indices of the features that are counted together with others, in order."""
    if coactive is None:
        all_of_them = sum(map(len, chosen.values())) <= _PAIRS
        return {layer: indices if all_of_them else indices[:0] for layer, indices in chosen.items()}
    named = _by_layer(sae, chosen, coactive)
    for layer, indices in named.items():
        if missing := set(indices.tolist()) - set(chosen.get(layer, np.zeros(0, int)).tolist()):
            raise ValueError(f"coactive has {min(missing)}, which is not among the features that are searched")
    return {layer: named.get(layer, indices[:0]) for layer, indices in chosen.items()}


def _chosen(
    sae: Dictionary, readers: dict[int | None, Reader], features: Sequence[Feature] | np.ndarray | None
) -> dict[int | None, np.ndarray]:
    """The indices of the features to search, in order, by the layer that they read."""
    if features is None:
        return {layer: np.arange(sae.width) for layer in readers}
    if not len(features):
        raise ValueError("features is empty; name some, or leave it out for all")
    return {layer: indices for layer, indices in _by_layer(sae, readers, features).items() if len(indices)}


def _by_layer(
    sae: Dictionary, layers: Iterable[int | None], features: Sequence[Feature] | np.ndarray
) -> dict[int | None, np.ndarray]:
    """The indices of features, in order, by the layer that they read, for these layers and those of the features."""
    pairs = [reader_of(sae, each) for each in features]
    known = dict.fromkeys([*layers, *(own for own, _ in pairs)])
    return {layer: np.unique([int(index) for own, index in pairs if own == layer]).astype(int) for layer in known}
