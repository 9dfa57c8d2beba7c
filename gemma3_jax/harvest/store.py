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
from pathlib import Path
from typing import Any

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description, size_text
from gemma3_jax.harvest import files
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.manifest import Array, arrays_in, bytes_of_token, read_manifest
from gemma3_jax.harvest.shuffled import Shuffled
from gemma3_jax.harvest.units import KEPT
from gemma3_jax.hooks.reductions import Int8Values
from gemma3_jax.sites.names import get_act_name, resolve, spellings
from gemma3_jax.types import PyTree, Tokenizer

Name = str | tuple[str, int] | tuple[str, int, str]
_log = logging.getLogger(__name__)
_OPEN = 256  # units whose headers are kept


class ActivationStore(Described):
    """The activations that `harvest` wrote to a folder: real tokens only, in the order of the corpus.

    Index it by any name of a site, as a cache: `store["resid_post", 9].rows(0, 4096)`. Arrays are read from mapped
    files, so that a store may be larger than memory. While a harvest is not finished, the store has the units that are;
    a log message says so.

    Args:
        out: the folder.

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
        self.folder = Path(out)
        self.manifest = read_manifest(self.folder)
        self.config = Gemma3Config.from_hf(self.manifest["config"])
        there = files.present(self.folder, self.manifest["units"])
        self.missing = np.flatnonzero(~there)
        self._units = np.flatnonzero(there)
        self._arrays = arrays_in(self.manifest)
        self._unit = functools.lru_cache(maxsize=_OPEN)(self._read)
        self._ends = functools.cache(self._find_ends)
        if self.missing.size:
            _log.warning(
                "%s: %s of %s units are not there yet; rows are numbered without them",
                self.folder, f"{self.missing.size:,}", f"{there.size:,}",
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
        if not self._units.size:
            raise StoreError(f"{self.folder} has no unit yet")
        start, stop = min(start, ends[-1]), min(stop, ends[-1])
        first = min(bisect.bisect_right(ends, start), len(self._units)) - 1
        parts: list[np.ndarray] = []
        for i in range(first, len(self._units)):
            if ends[i] >= stop and parts:
                break
            parts.append(self._unit(int(self._units[i])).array(key)[max(start - ends[i], 0) : max(stop - ends[i], 0)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Any rows [m] of the array of that name, [m, ...]."""
        ends = np.asarray(self._ends(key))
        rows = np.asarray(rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < ends[-1]):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {key}: the store has {ends[-1]:,}")
        units = np.searchsorted(ends, rows, "right") - 1
        like = self.read(key, 0, min(1, int(ends[-1])))
        found = np.empty((len(rows), *like.shape[1:]), like.dtype)
        for unit in np.unique(units):
            chosen = units == unit
            found[chosen] = self._unit(int(self._units[unit])).array(key)[rows[chosen] - ends[unit]]
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
    ) -> Shuffled:
        """Batches of tokens by chance, each token once an epoch: see `Shuffled`."""
        return Shuffled(self, batch, seed, sites=sites, part=part, epoch=epoch, buffer=buffer, to=to)

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
        lengths = [self._read(int(unit)).arrays[key].shape[0] for unit in self._units]
        return [0, *itertools.accumulate(lengths)]

    def _is_of_tokens(self, key: str) -> bool:
        return any(array.key == key and array.axis is not None for array in self._arrays)

    def _read(self, number: int) -> files.UnitFile:
        return files.read_unit(files.unit_file(self.folder, number))

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


class Site(Described):
    """The values of one site of a store."""

    def __init__(self, store: ActivationStore, name: str, arrays: list[Array]):
        self.store, self.name, self.arrays = store, name, arrays

    def __len__(self) -> int:
        """The number of tokens; of documents, if the reduction left one value for each."""
        return int(self.store.bounds(self.arrays[0].key)[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows, if the site has one array."""
        return (len(self), *self.arrays[0].shape)

    def rows(self, start: int, stop: int) -> PyTree:
        """The values from `start` to `stop`, [m, ...]; see `take` for the results of reductions."""
        return self._assembled({array.key: self.store.read(array.key, start, stop) for array in self.arrays})

    def take(self, rows: np.ndarray) -> PyTree:
        """The values of any rows [m], [m, ...].

        The result of a reduction with several arrays, as `TopK`, is a mapping from their names; that of
        `reductions.Int8` is float32 again.
        """
        return self._assembled({array.key: self.store.take(array.key, rows) for array in self.arrays})

    def documents(self, start: int, stop: int) -> np.ndarray:
        """The number [m] int64 of the document of each row."""
        return self.store.read("documents" if self.arrays[0].axis is not None else "row_documents", start, stop)

    def __iter__(self) -> Iterator[PyTree]:
        """The values of each unit, in order."""
        bounds = self.store.bounds(self.arrays[0].key)
        return (self.rows(int(start), int(stop)) for start, stop in itertools.pairwise(bounds))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.rows(0, len(self)), dtype)

    def save(self, file: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Write all rows to one `.npy` file, unit by unit, in a dtype that NumPy has."""
        from gemma3_jax import atomic

        with atomic.new_file(file) as temporary:
            mapped = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), self.shape)
            at = 0
            for values in self:
                mapped[at : at + len(values)] = values
                at += len(values)
            mapped.flush()

    def _assembled(self, parts: Mapping[str, np.ndarray]) -> PyTree:
        if list(parts) == [self.name]:
            return parts[self.name]
        named = {key.removeprefix(f"{self.name}/"): value for key, value in parts.items()}
        if set(named) == set(Int8Values._fields) and named["int8"].dtype == np.int8:
            return named["int8"].astype(np.float32) * named["scales"]
        return named

    def _description(self) -> Description:
        shapes = [(array.key, f"{[len(self), *array.shape]} {array.dtype}") for array in self.arrays]
        return Description(f"{self.name} of {self.store.folder}", tuple(shapes))


def damaged(out: str | os.PathLike[str]) -> dict[int, str]:
    """Units of a store whose content is not what was written, and what is wrong, by number. Reads all of the store."""
    folder = Path(out)
    there = np.flatnonzero(files.present(folder, read_manifest(folder)["units"]))
    return files.damaged(folder, iter(there.tolist()), whole=True)


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
