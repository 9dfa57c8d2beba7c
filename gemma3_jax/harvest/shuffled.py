"""Tokens of a store by chance: each once an epoch, from a bounded buffer.

The rows of the store are cut into short runs, which are shuffled over the whole store. A buffer of runs that follow
each other in that order is read and shuffled, and gives batches. So each batch has tokens from all over the store, and
the disk is read in runs. Where a batch comes from depends on seed, epoch and its number alone.

Axes: m tokens of a batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.manifest import Array
from gemma3_jax.sites.names import Name, get_act_name, resolve
from gemma3_jax.types import PyTree

_RUN = 64  # rows that are read together
_BESIDE = ("tokens", "documents", "offsets", "positions")


class Site(Protocol):
    """What a `Shuffled` reads of a site."""

    name: str
    arrays: list[Array]

    def normalized(self, *, center: bool, scale: str | None) -> Site: ...

    def take(self, rows: np.ndarray) -> PyTree: ...


class Store(Protocol):
    """What a `Shuffled` reads of an `ActivationStore`."""

    config: Gemma3Config

    @property
    def sites(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, name: Name) -> Site: ...

    def take(self, key: str, rows: np.ndarray) -> np.ndarray: ...


class Batch(Mapping[str, PyTree]):
    """Values of some tokens by site, with any name as a cache.

    Attributes:
        rows: [m] int64, the rows of the store.
        tokens: [m] int32 ids.
        documents: [m] int64, the number of each token's document.
        offsets: [m] int32, its place in the document.
        positions: [m] int32, the position that the model saw.
    """

    def __init__(self, config: Gemma3Config, values: Mapping[str, PyTree], beside: Mapping[str, PyTree]):
        self._config, self._values = config, values
        self.rows, self.tokens, self.documents = beside["store_rows"], beside["tokens"], beside["documents"]
        self.offsets, self.positions = beside["offsets"], beside["positions"]

    def __getitem__(self, name: Name) -> PyTree:
        full = name if isinstance(name, str) else get_act_name(*name, config=self._config)
        return self._values[resolve(full, self._config).name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Shuffled:
    """An iterable over the batches of one epoch, which reads the next buffer while one is used.

    `len` is the number of batches. `from_batch(n)` begins at a batch, as after a crash: with the same arguments, the
    batches are the same. Keep `state` in a checkpoint, and give it to `restored`.

    Args:
        store: the store.
        batch: tokens of a batch; the last one of an epoch may have fewer.
        seed: of the order.
        sites: names of sites to read; None reads all that have a value for each token.
        part: (number, count): the part of the epoch that this process gets; the parts have all tokens, each once.
        epoch: its number: another order.
        buffer: tokens that are shuffled together, in memory twice: those in use, and those that are read ahead.
        to: "numpy", "jax" or "torch": the arrays of a batch.
        center: subtract the mean of each entry over the store; values are then float32.
        scale: "std" or "norm", as in `Site.normalized`.

    Raises:
        StoreError: an argument is wrong.
    """

    def __init__(
        self,
        store: Store,
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
    ):
        if batch < 1 or not 0 <= part[0] < part[1] or to not in ("numpy", "jax", "torch"):
            raise StoreError(
                f"batch is {batch}, part {part} and to {to!r}; a batch has at least one token, part is (number, "
                "count), and to is 'numpy', 'jax' or 'torch'"
            )
        self.store, self.batch, self.seed, self.part, self.epoch, self.to = store, batch, seed, part, epoch, to
        chosen = [store[name] for name in (store.sites if sites is None else sites)]
        self.sites = [site for site in chosen if site.arrays[0].axis is not None]
        if sites is not None and len(self.sites) < len(chosen):
            raise StoreError("shuffled gives tokens; a site with one value for each document is read by rows and take")
        if center or scale is not None:
            self.sites = [site.normalized(center=center, scale=scale) for site in self.sites]
        # Whole batches, so that a batch lies in one buffer.
        self.buffer = max(1, buffer // batch) * batch
        runs = -(-len(store) // _RUN)
        order = np.random.default_rng((seed, epoch)).permutation(runs)[part[0] :: part[1]]
        sizes = np.minimum(len(store) - order * _RUN, _RUN)
        self._order, self._ends = order, np.cumsum([0, *sizes])
        self.position = 0

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        return -(-int(self._ends[-1]) // self.batch)

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the seed, the epoch, and the number of the next batch."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self.position}

    def from_batch(self, number: int) -> Shuffled:
        """This iterable, which begins at that batch.

        Raises:
            StoreError: the epoch has no such batch.
        """
        if not 0 <= number <= len(self):
            raise StoreError(f"there is no batch {number}; the epoch has {len(self)}")
        self.position = number
        return self

    def restored(self, state: Mapping[str, int]) -> Shuffled:
        """This iterable, which begins where another stopped, whose `state` was kept.

        Raises:
            StoreError: it had another seed or epoch.
        """
        if (state["seed"], state["epoch"]) != (self.seed, self.epoch):
            raise StoreError(f"the state is of seed {state['seed']}, epoch {state['epoch']}; give shuffled the same")
        return self.from_batch(state["batch"])

    def __iter__(self) -> Iterator[Batch]:
        """The batches from `position` on; after the last one, the next iteration begins at the first."""
        per_buffer = self.buffer // self.batch
        with ThreadPoolExecutor(1) as reader:
            buffers = -(-int(self._ends[-1]) // self.buffer)
            first = self.position // per_buffer
            reading = reader.submit(self._read, first) if first < buffers else None
            for number in range(first, buffers):
                assert reading is not None
                rows, arrays = reading.result()
                reading = reader.submit(self._read, number + 1) if number + 1 < buffers else None
                for at in range((self.position - number * per_buffer) * self.batch, len(rows), self.batch):
                    self.position += 1
                    yield self._batch(rows, arrays, slice(at, at + self.batch))
        self.position = 0

    def _read(self, number: int) -> tuple[np.ndarray, dict[str, PyTree]]:
        """The rows of a buffer, in their new order, and all of their values."""
        start, stop = number * self.buffer, min((number + 1) * self.buffer, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, start, "right") - 1, np.searchsorted(self._ends, stop, "left")
        runs = [
            run * _RUN + np.arange(size)
            for run, size in zip(self._order[first:last], np.diff(self._ends[first : last + 1]), strict=True)
        ]
        rows = np.concatenate(runs)[start - self._ends[first] :][: stop - start]
        mixed = np.random.default_rng((self.seed, self.epoch, *self.part, number)).permutation(len(rows))
        back = np.argsort(rows)  # in the order of the files
        place = np.empty_like(back)
        place[back] = np.arange(len(rows))
        arrays = {site.name: site.take(rows[back]) for site in self.sites}
        arrays |= {name: self.store.take(name, rows[back]) for name in _BESIDE}
        return rows[mixed], jax.tree.map(lambda x: x[place[mixed]], arrays)

    def _batch(self, rows: np.ndarray, arrays: dict[str, PyTree], at: slice) -> Batch:
        cut = jax.tree.map(lambda x: self._as_wanted(x[at]), arrays)
        beside = {name: cut.pop(name) for name in _BESIDE}
        return Batch(self.store.config, cut, {**beside, "store_rows": rows[at]})

    def _as_wanted(self, x: np.ndarray) -> Any:
        if self.to == "numpy":
            return x
        if self.to == "jax":
            return jnp.asarray(x)
        torch = importlib.import_module("torch")
        # torch does not know ml_dtypes: the same bits by another name.
        if x.dtype == jnp.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(x))
