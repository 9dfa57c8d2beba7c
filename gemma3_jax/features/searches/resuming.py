"""A search that can be continued: what it knows so far, and what makes it that search.

Axes: f features, in the order of the search.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax import atomic
from gemma3_jax.features.searches.corpora import Source
from gemma3_jax.features.searches.tallies import Reader, Tally
from gemma3_jax.features.state_files import read_state, write_state
from gemma3_jax.harvest.manifest import digest_of_parameters
from gemma3_jax.hooked.hooked import HookedGemma3

SECONDS = 60.0  # from one writing to the next

# By layer, what is known of its features [f]: a `Tally` of NumPy arrays, of all chunks together.
Tallies = Mapping[int | None, Tally]


class Progress(NamedTuple):
    """How far a search is.

    Attributes:
        batches: how many are done.
        tokens: how many tokens they have.
        tallies: what is known.
    """

    batches: int
    tokens: int
    tallies: Tallies


class StateFile:
    """The file of a search; `identity` has by name what must be the same for another run to continue it."""

    def __init__(self, file: str | os.PathLike[str], identity: Mapping[str, str]):
        self._file, self._identity = atomic.check_new_file(file), identity
        self._written = time.monotonic()

    def read(self) -> Progress | None:
        """What an earlier run has written; None if it has written nothing. Errors as in `read_state`."""
        known = read_state(self._file, "search", self._identity)
        if known is None:
            return None
        layers: dict[int | None, dict[str, Any]] = {}
        for key, array in known[0].items():
            layer, name = key.split(".")
            layers.setdefault(int(layer) if layer else None, {})[name] = array
        return Progress(**known[1], tallies={layer: Tally(**each) for layer, each in layers.items()})

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= SECONDS

    def write(self, progress: Progress) -> None:
        """Replace the file."""
        arrays: dict[str, jax.Array] = {
            f"{'' if layer is None else layer}.{name}": array
            for layer, tally in progress.tallies.items()
            for name, array in tally._asdict().items()
        }
        write_state(self._file, arrays, self._identity, {"batches": progress.batches, "tokens": progress.tokens})
        self._written = time.monotonic()


def identity_of(
    model: HookedGemma3, readers: Mapping[int | None, Reader], source: Source, settings: Mapping[str, object]
) -> dict[str, str]:
    """What must be the same for a search to be continued, by name: short digests and settings."""
    config = json.dumps(model.config.to_hf(), sort_keys=True)
    return {
        "the model": _short(digest_of_parameters(model.params) + config),
        "the dictionary": _short("".join(_digest(layer, reader) for layer, reader in readers.items())),
        "the corpus": _short(source.digest()),
        **{name: str(value) for name, value in settings.items()},
    }


def digest_of_indices(chosen: Mapping[int | None, np.ndarray]) -> str:
    """How many features there are, and which."""
    which = "".join(f"{layer} {indices.tolist()}" for layer, indices in chosen.items())
    return f"{sum(map(len, chosen.values())):,} ({_short(which)})"


def joined(tallies: list[Tally]) -> Tally:
    """The tally of all chunks."""
    arrays: list[Any] = [np.concatenate(parts, _axis(parts[0])) for parts in zip(*tallies, strict=True)]
    return Tally(*arrays)


def split(tally: Tally, sizes: list[int]) -> list[Tally]:
    """The tallies of chunks with so many features, on the device."""
    ends = np.cumsum(sizes)[:-1]
    parts = [np.split(array, ends, _axis(array)) for array in tally]
    return [Tally(*map(jnp.asarray, each)) for each in zip(*parts, strict=True)]


def _axis(array: np.ndarray | jax.Array) -> int:
    """The axis of the features: counts have two parts before it."""
    return 1 if array.ndim == 3 else 0


def _digest(layer: int | None, reader: Reader) -> str:
    """The digest of what decides the values of features: all but the decoder."""
    kept = reader.b_dec if reader.subtracts_b_dec else jnp.zeros(0)
    encoder = dataclasses.replace(reader, W_dec=jnp.zeros((0, 0)), b_dec=kept)
    # The structure has the names of sites and the settings of activations, such as k.
    return f"{layer} {jax.tree.structure(encoder)} {digest_of_parameters(encoder)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
