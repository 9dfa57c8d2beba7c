"""The values of one site of a store: rows of them, their statistics, and files for other tools.

Axes: n tokens in the corpus' order, of all units; m some of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described, Description
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.exports import write_npy, write_saelens
from gemma3_jax.harvest.manifest import Array
from gemma3_jax.harvest.statistics import Scaling, Statistics, assembled, scaling_of
from gemma3_jax.harvest.storage import Place
from gemma3_jax.sites.names import Name
from gemma3_jax.types import PyTree


class Store(Protocol):
    """What is read of an `ActivationStore`."""

    place: Place
    config: Gemma3Config

    @property
    def statistics(self) -> Mapping[Name, Statistics]: ...

    def bounds(self, key: str) -> np.ndarray: ...

    def read(self, key: str, start: int, stop: int) -> np.ndarray: ...

    def take(self, key: str, rows: np.ndarray) -> np.ndarray: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


class Site(Described):
    """The values of one site of a store."""

    def __init__(self, store: Store, name: str, arrays: list[Array], scaling: Scaling | None = None):
        self.store, self.name, self.arrays, self.scaling = store, name, arrays, scaling

    def __len__(self) -> int:
        """The number of tokens; of documents, if the reduction left one value for each."""
        return int(self.store.bounds(self.arrays[0].key)[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows, if the site has one array."""
        return (len(self), *self.arrays[0].shape)

    @property
    def statistics(self) -> Statistics:
        """The mean, variance and norm of all values.

        Raises:
            KeyError: the site has integers, or its reduction leaves several arrays.
        """
        return self.store.statistics[self.name]

    def normalized(self, *, center: bool = True, scale: str | None = None) -> Site:
        """The same site, whose values are read as float32, centred and scaled by its statistics.

        Args:
            center: subtract the mean of each entry.
            scale: "std" divides each entry by its standard deviation; "norm" divides all by one number, after which the
                mean of the squared entries is 1, so that the root mean square of the norm is the square root of d.

        >>> import tempfile
        >>> from gemma3_jax import TINY, HookedGemma3
        >>> from gemma3_jax.harvest import ActivationStore, harvest
        >>> out = tempfile.mkdtemp()
        >>> harvest(HookedGemma3.from_pretrained(TINY), ["ba ke lo mu"] * 9, "blocks.1.hook_out", out, rows=2, length=8)
        >>> site = ActivationStore(out)["resid_post", 1].normalized(scale="norm")
        >>> bool(np.allclose(np.square(site).mean(), 1, atol=1e-3))
        True
        """
        if scale not in (None, "std", "norm"):
            raise StoreError(f"scale is {scale!r}; it must be 'std', 'norm' or None")
        return Site(self.store, self.name, self.arrays, scaling_of(self.statistics, center, scale))

    def rows(self, start: int, stop: int) -> PyTree:
        """The values from `start` to `stop`, [m, ...]; see `take` for the results of reductions."""
        return self._assembled({array.key: self.store.read(array.key, start, stop) for array in self.arrays})

    def take(self, rows: np.ndarray) -> PyTree:
        """The values of any rows, by their numbers [m] or by booleans for all rows: [m, ...].

        The result of a reduction with several arrays, as `TopK`, is a mapping from their names; that of
        `reductions.Int8` is float32 again.
        """
        return self._assembled({array.key: self.store.take(array.key, rows) for array in self.arrays})

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> PyTree:
        """The values of rows, as NumPy chooses them: `site[7]`, `site[:100]`, `site[[3, -1]]`, `site[mask]`."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self.rows(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
        chosen = np.asarray(rows)
        if np.issubdtype(chosen.dtype, np.integer):
            from_end = (chosen < 0) & (chosen >= -len(self))
            chosen = np.where(from_end, chosen + len(self), chosen)
        values = self.take(np.atleast_1d(chosen))
        if chosen.ndim:
            return values
        return values[0] if isinstance(values, np.ndarray) else {name: value[0] for name, value in values.items()}

    def documents(self, start: int, stop: int) -> np.ndarray:
        """The number [m] int64 of the document of each row."""
        return self.store.read("documents" if self.arrays[0].axis is not None else "row_documents", start, stop)

    def __iter__(self) -> Iterator[PyTree]:
        """The values of each unit, in order."""
        bounds = self.store.bounds(self.arrays[0].key)
        return (self.rows(int(start), int(stop)) for start, stop in itertools.pairwise(bounds))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.rows(0, len(self)), dtype)

    def save(self, file: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Write all rows to one `.npy` file, unit by unit, in a dtype that NumPy has.

        Raises:
            StoreError: the reduction of the site left several arrays; or the dtype does not hold a value, as float16
                does not hold 65,536.
        """
        self._check_one("`.npy`")
        write_npy(self, iter(self), file, dtype)

    def save_for_saelens(
        self,
        folder: str | os.PathLike[str],
        context: int = 128,
        hook_name: str | None = None,
        dtype: str = "float32",
    ) -> None:
        """Write all rows as SAELens caches activations, for `use_cached_activations=True`. Needs the extra `parquet`.

        That is a data set of Hugging Face's `datasets` with two columns: values [context, d] under the name of the
        hook, and `token_ids` [context]. SAELens takes tokens one by one, so a context is whatever follows each other in
        the corpus, and may have several documents. The rows behind the last whole context are left out.

        Args:
            folder: a new folder, the `cached_activations_path` of SAELens.
            context: its `context_size`.
            hook_name: its `hook_name`; None for TransformerLens' name of the site.
            dtype: "float32" or "float16".

        Raises:
            StoreError: the values are not vectors, or there are fewer than `context`; or float16 does not hold one.
        """
        self._check_one("SAELens")
        write_saelens(self.store, self, folder, context, hook_name, dtype)

    def _check_one(self, wanted: str) -> None:
        if not isinstance(self.rows(0, 0), np.ndarray):
            keys = ", ".join(array.key for array in self.arrays)
            raise StoreError(f"{wanted} has one array, and {self.name} has several: {keys}; read them with rows")

    def _assembled(self, parts: Mapping[str, np.ndarray]) -> PyTree:
        values = assembled(self.name, parts)
        return values if self.scaling is None else self.scaling(values)

    def _description(self) -> Description:
        shapes = [(array.key, f"{[len(self), *array.shape]} {array.dtype}") for array in self.arrays]
        return Description(f"{self.name} of {self.store.place}", tuple(shapes))
