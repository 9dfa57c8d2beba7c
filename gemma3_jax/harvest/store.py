"""What a harvest has written, by site and by token.

Axes: n tokens in the corpus' order, of all units; m some of them.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import logging
import os
from collections.abc import Iterator, Mapping

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description, size_text
from gemma3_jax.harvest import files
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.exports import Buffer
from gemma3_jax.harvest.manifest import arrays_in, bytes_of_token, read_manifest
from gemma3_jax.harvest.places import place_of
from gemma3_jax.harvest.shuffled import Shuffled
from gemma3_jax.harvest.site import Site
from gemma3_jax.harvest.statistics import Moments, Statistics, keys_of, statistics_of
from gemma3_jax.harvest.units import KEPT
from gemma3_jax.sites.names import Name, get_act_name, resolve, spellings
from gemma3_jax.types import Tokenizer

_log = logging.getLogger(__name__)
_OPEN = 2**12  # units whose headers are kept


class ActivationStore(Described):
    """The activations that `harvest` wrote to a folder: real tokens only, in the order of the corpus.

    Index it by any name of a site, as a cache: `store["resid_post", 9].rows(0, 4096)`. Arrays are read from mapped
    files, so that a store may be larger than memory. While a harvest is not finished, the store has the units that are;
    a log message says so.

    Args:
        out: the folder, or a name such as "s3://bucket/folder". Rows of an object store are read when they are asked
            for, and only these.

    Attributes:
        manifest: what the store has, as `manifest.json` says.
        config: shape of the model.
        missing: numbers of the units that are not there.

    Raises:
        StoreError: the folder is not a store, or a unit is damaged (its length is checked here, its content by
            `gemma3_jax.harvest.verify`).

    >>> import tempfile
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.harvest import harvest
    >>> out = tempfile.mkdtemp()
    >>> model = HookedGemma3.from_pretrained(TINY)
    >>> harvest(model, ["ba ke lo"] * 9, "blocks.*.hook_resid_post", out, rows=2, length=16)
    >>> store = ActivationStore(out)
    >>> store
    ActivationStore: 36 tokens of 9 documents, 2 of 2 units, 796 bytes a token
      blocks.0.hook_out  [36, 96] bfloat16
      blocks.1.hook_out  [36, 96] bfloat16
      blocks.2.hook_out  [36, 96] bfloat16
      blocks.3.hook_out  [36, 96] bfloat16
    >>> next(iter(store.shuffled(5)))["resid_post", 3].shape
    (5, 96)
    """

    def __init__(self, out: str | os.PathLike[str]):
        self.place = place_of(out)
        self.manifest = read_manifest(self.place)
        self.config = Gemma3Config.from_hf(self.manifest["config"])
        there = files.present(self.place, self.manifest["units"])
        self.missing = np.flatnonzero(~there)
        self._units = np.flatnonzero(there)
        self._arrays = arrays_in(self.manifest)
        self._unit = functools.lru_cache(maxsize=_OPEN)(self._read)
        self._ends = functools.cache(self._find_ends)
        self.find_statistics = functools.cache(self._find_statistics)
        if self.missing.size:
            _log.warning(
                "%s: %s of %s units are not there yet; rows are numbered without them",
                self.place, f"{self.missing.size:,}", f"{there.size:,}",
            )  # fmt: skip

    def __len__(self) -> int:
        """The number of tokens."""
        return self._ends("tokens")[-1]

    def __getitem__(self, name: Name) -> Site:
        full = name if isinstance(name, str) else get_act_name(*name, config=self.config)
        site = resolve(full, self.config).name
        arrays = [array for array in self._arrays if array.site == site]
        if not arrays:
            raise KeyError(f"{site} was not harvested; this store has {', '.join(self.sites)}")
        return Site(self, site, arrays)

    @property
    def sites(self) -> tuple[str, ...]:
        """The canonical names of the sites, in the model's order."""
        return tuple(self.manifest["sites"])

    @property
    def statistics(self) -> Mapping[Name, Statistics]:
        """Count, mean, variance and norm of the values of a site, by any of its names: see `Statistics`.

        They are those of all units that are there, from sums that each unit keeps.
        """
        return _OfSites(self)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [m] int32 of the tokens from `start` to `stop`."""
        return self.read("tokens", start, stop)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """The number [m] int64 of the document of each token."""
        return self.read("documents", start, stop)

    def offsets(self, start: int, stop: int) -> np.ndarray:
        """The place [m] int32 of each token in its document, from 0; -1 for a BOS in front of a later piece of it."""
        return self.read("offsets", start, stop)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """The position [m] int32 at which the model saw each token."""
        return self.read("positions", start, stop)

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Rows of the array of that name in the files, [m, ...]; a view of a mapped file if they are in one unit.

        As in a slice, rows beyond the last are left out.

        Raises:
            IndexError: `start` is negative or above `stop`.
        """
        ends = self._ends(key)
        if not 0 <= start <= stop:
            raise IndexError(
                f"rows {start} to {stop} of {key}: they are counted from 0, and the store has {ends[-1]:,}"
            )
        self._first_unit()
        start, stop = min(start, ends[-1]), min(stop, ends[-1])
        first = min(bisect.bisect_right(ends, start), len(self._units)) - 1
        parts: list[np.ndarray] = []
        for i in range(first, len(self._units)):
            if ends[i] >= stop and parts:
                break
            unit = self._unit(int(self._units[i]))
            parts.append(unit.rows(key, max(start - ends[i], 0), max(stop - ends[i], 0)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Any rows of the array of that name, [m, ...]: by their numbers [m], or by booleans for all rows.

        Raises:
            StoreError: `rows` are neither.
            IndexError: the store does not have a row.
        """
        ends = np.asarray(self._ends(key))
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape == ends[-1:]:
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise StoreError(
                f"rows are {rows.dtype} of shape {list(rows.shape)}; they must be integers [m] or booleans [{ends[-1]}]"
            )
        if rows.size and not (rows.min() >= 0 and rows.max() < ends[-1]):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {key}: the store has {ends[-1]:,}")
        stored = self._first_unit().arrays[key]
        order = np.argsort(rows, kind="stable")
        known = rows[order]
        units = np.searchsorted(ends, known, "right") - 1
        # Rows that are near each other in one file are read together.
        far = (np.diff(known) - 1) * stored.row > self.place.gap
        cuts = np.flatnonzero((np.diff(units) > 0) | far) + 1
        spans = np.split(np.arange(len(known)), cuts) if len(known) else []

        def read(span: np.ndarray) -> np.ndarray:
            some, unit = known[span], units[span[0]]
            first, last = some[0] - ends[unit], some[-1] - ends[unit]
            return self._unit(int(self._units[unit])).rows(key, int(first), int(last) + 1)[some - some[0]]

        found = np.empty((len(rows), *stored.shape[1:]), stored.dtype)
        for span, part in zip(spans, files.in_threads(self.place, read, spans), strict=True):
            found[order[span]] = part
        return found

    def shuffled(
        self,
        batch: int,
        seed: int = 0,
        *,
        sites: list[Name] | None = None,
        part: tuple[int, int] = (0, 1),
        epoch: int = 0,
        buffer: int = 2**16,
        to: str = "numpy",
        center: bool = False,
        scale: str | None = None,
    ) -> Shuffled:
        """Batches of tokens by chance, each token once an epoch: see `Shuffled`."""
        return Shuffled(
            self, batch, seed, sites=sites, part=part, epoch=epoch, buffer=buffer, to=to, center=center, scale=scale
        )

    def buffer(
        self, sites: Name | list[Name], batch: int, seed: int = 0, *, center: bool = False, scale: str | None = None
    ) -> Buffer:
        """Torch tensors [batch, d] float32 without end, for dictionary_learning's `trainSAE(data=...)`.

        Several sites give [batch, sites, d], as its crosscoders take. `center` and `scale` as in `Site.normalized`.
        """
        names = sites if isinstance(sites, list) else [sites]
        if not len(self):
            raise StoreError(f"{self.place} has no token yet")

        def epoch(number: int) -> Shuffled:
            return self.shuffled(batch, seed, sites=names, epoch=number, center=center, scale=scale)

        config = {"sites": [self[name].name for name in names], "out_batch_size": batch, "seed": seed}
        return Buffer(epoch, names, {**config, "center": center, "scale": scale})

    def context(self, row: int, tokenizer: Tokenizer, before: int = 16, after: int = 8) -> tuple[str, str, str]:
        """The text before a token, its own, and the text after it, from the tokens of its document in the store."""
        start, stop = max(0, row - before), min(len(self), row + after + 1)
        tokens, documents = self.tokens(start, stop), self.documents(start, stop)
        same = documents == documents[row - start]
        parts = (slice(0, row - start), slice(row - start, row - start + 1), slice(row - start + 1, None))
        left, own, right = (tokenizer.decode(tokens[part][same[part]].tolist()) for part in parts)
        return left, own, right

    def bounds(self, key: str) -> np.ndarray:
        """Where the rows of each unit begin, and the end of the last, [units + 1]."""
        return np.asarray(self._ends(key))

    def _find_ends(self, key: str) -> list[int]:
        """Where the rows of each unit begin, and the end of the last."""
        known = "tokens" if key in KEPT or self._is_of_tokens(key) else key
        if known != key:
            return self._ends(known)
        units = files.in_threads(self.place, self._unit, self._units.tolist())
        return [0, *itertools.accumulate(unit.arrays[key].shape[0] for unit in units)]

    def _first_unit(self) -> files.UnitFile:
        if not self._units.size:
            raise StoreError(f"{self.place} has no unit yet")
        return self._unit(int(self._units[0]))

    def _find_statistics(self, site: str) -> Statistics:
        both, norms = keys_of(site)

        def of_unit(number: int) -> tuple[int, Moments]:
            unit = self._unit(number)
            if both not in unit.arrays:
                raise KeyError(f"{site} has no statistics: it has integers, or its reduction leaves several arrays")
            return unit.arrays[keys[0]].shape[0], Moments(unit.rows(both), unit.rows(norms))

        self._first_unit()
        keys = [array.key for array in self._arrays if array.site == site]
        return statistics_of(files.in_threads(self.place, of_unit, self._units.tolist()))

    def _is_of_tokens(self, key: str) -> bool:
        return any(array.key == key and array.axis is not None for array in self._arrays)

    def _read(self, number: int) -> files.UnitFile:
        return files.read_unit(self.place, number)

    def _ipython_key_completions_(self) -> list[str]:
        return spellings(self.sites, self.config)

    def _description(self) -> Description:
        there, units = len(self._units), self.manifest["units"]
        title = (
            f"ActivationStore: {len(self):,} tokens of {self.manifest['corpus']['documents']:,} documents, {there:,} "
            f"of {units:,} units, {size_text(bytes_of_token(self._arrays))} a token"
        )
        rows = [(array.key, f"{[self._ends(array.key)[-1], *array.shape]} {array.dtype}") for array in self._arrays]
        return Description(title, tuple(rows))


class _OfSites(Mapping[Name, Statistics]):
    """The statistics of the sites of a store, which are read when they are asked for."""

    def __init__(self, store: ActivationStore):
        self._store = store

    def __getitem__(self, name: Name) -> Statistics:
        return self._store.find_statistics(self._store[name].name)

    def __iter__(self) -> Iterator[Name]:
        return iter(self._store.sites)

    def __len__(self) -> int:
        return len(self._store.sites)


def damaged(out: str | os.PathLike[str]) -> dict[int, str]:
    """Units of a store whose content is not what was written, and what is wrong, by number. Reads all of the store."""
    place = place_of(out)
    there = np.flatnonzero(files.present(place, read_manifest(place)["units"]))
    return files.damaged(place, there.tolist(), whole=True)


def verify(out: str | os.PathLike[str]) -> None:
    """Read all of a store, and compare the content of each unit with its checksum.

    Raises:
        StoreError: a unit is damaged or missing.

    >>> import tempfile
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.harvest import harvest
    >>> out = tempfile.mkdtemp()
    >>> harvest(HookedGemma3.from_pretrained(TINY), ["ba ke lo"], "blocks.1.hook_out", out, rows=2, length=8)
    >>> verify(out)
    """
    wrong = damaged(out)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise StoreError(f"{next(iter(wrong.values()))}{more}")
    missing = len(ActivationStore(out).missing)
    if missing:
        raise StoreError(f"{out} lacks {missing:,} units; run the harvest again, and they are done")
