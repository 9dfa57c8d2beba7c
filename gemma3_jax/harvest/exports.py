"""A store in the forms that other tools read: the data set that SAELens caches, and dictionary_learning's buffer.

Axes: n contexts of a file, c tokens of a context, d features, m tokens of a batch, s sites.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemma3_jax import atomic
from gemma3_jax.config import Gemma3Config
from gemma3_jax.extras import needs_extra
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.shuffled import Batch, Shuffled
from gemma3_jax.sites.names import Name, searchable_names
from gemma3_jax.types import JsonObject, PyTree, Settings

if TYPE_CHECKING:
    import pyarrow

_A_FILE, _AT_ONCE = 2**29, 2**24  # bytes


class Store(Protocol):
    """What is read of an `ActivationStore`."""

    config: Gemma3Config

    def tokens(self, start: int, stop: int) -> np.ndarray: ...


class Site(Protocol):
    """What is read of the values of a site."""

    name: str

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> PyTree: ...


def write_npy(site: Site, blocks: Iterator[np.ndarray], file: str | os.PathLike[str], dtype: str) -> None:
    """Write the values of a site to one `.npy` file, block by block."""
    with atomic.new_file(file) as temporary:
        mapped = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), site.shape)
        at = 0
        for values in blocks:
            mapped[at : at + len(values)] = _held(values, mapped.dtype, site.name)
            at += len(values)
        mapped.flush()


def write_saelens(
    store: Store, site: Site, folder: str | os.PathLike[str], context: int, hook_name: str | None, dtype: str
) -> None:
    """Write a site as the data set of Hugging Face's `datasets` that SAELens caches: see `Site.save_for_saelens`."""
    with needs_extra("parquet", "Arrow files need"):
        import pyarrow
    contexts = len(site) // context
    if len(site.shape) != 2 or not contexts or dtype not in ("float32", "float16"):
        raise StoreError(
            f"{site.name} has the shape {list(site.shape)}, context is {context} and dtype {dtype!r}; SAELens reads "
            "vectors [d] of at least `context` tokens, in 'float32' or 'float16'"
        )
    name = hook_name or searchable_names(store.config)[site.name].legacy
    d = site.shape[1]
    schema, features = _schema(name, context, d, dtype)
    a_file = max(1, _A_FILE // (context * d * np.dtype(dtype).itemsize))
    starts = range(0, contexts, a_file)
    names = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
    with atomic.new_directory(folder) as temporary:
        for file, start in zip(names, starts, strict=True):
            with pyarrow.OSFile(str(temporary / file), "wb") as opened, pyarrow.ipc.new_stream(opened, schema) as out:
                _write_contexts(out, schema, store, site, range(start, min(start + a_file, contexts)), context)
        _write_json(temporary / "dataset_info.json", {"citation": "", "description": "", "features": features})
        state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
        files = [{"filename": file} for file in names]
        more = {"_fingerprint": os.urandom(8).hex(), "_format_kwargs": {}, "_output_all_columns": False}
        _write_json(temporary / "state.json", {"_data_files": files, **state, **more})


def _schema(name: str, context: int, d: int, dtype: str) -> tuple[pyarrow.Schema, JsonObject]:
    """The Arrow schema of a data set with an array [c, d] and ids [c] in each row; and its features in JSON."""
    import pyarrow

    features = {
        name: {"shape": [context, d], "dtype": dtype, "_type": "Array2D"},
        "token_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "length": context, "_type": "Sequence"},
    }
    kind = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[context, d], dtype]),
    }
    values = pyarrow.list_(pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(dtype))))
    fields = [pyarrow.field(name, values, metadata=kind), ("token_ids", pyarrow.list_(pyarrow.int32(), context))]
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})}), features


def _write_contexts(
    out: pyarrow.RecordBatchStreamWriter,
    schema: pyarrow.Schema,
    store: Store,
    site: Site,
    contexts: range,
    context: int,
) -> None:
    """Write some contexts, a few at once."""
    import pyarrow

    d, dtype = site.shape[1], schema.field(0).type.value_type.value_type.to_pandas_dtype()
    several = max(1, _AT_ONCE // (context * d * 4))
    for first in contexts[::several]:
        count = min(several, contexts.stop - first)
        start, stop = first * context, (first + count) * context
        # [n c, d] -> [n c d]
        values = _held(site.rows(start, stop), dtype, site.name).reshape(-1)
        rows = pyarrow.ListArray.from_arrays(np.arange(0, values.size + 1, d, dtype=np.int32), values)
        arrays = pyarrow.ListArray.from_arrays(np.arange(0, len(rows) + 1, context, dtype=np.int32), rows)
        ids = pyarrow.FixedSizeListArray.from_arrays(np.ascontiguousarray(store.tokens(start, stop)), context)
        out.write_batch(pyarrow.record_batch([arrays, ids], schema=schema))


def _held(values: np.ndarray, dtype: np.dtype | type, name: str) -> np.ndarray:
    """The values in another dtype, rounded.

    Raises:
        StoreError: it does not hold them: some would become infinite, or other integers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(values).astype(dtype)
    if cast.dtype.kind in "iu":
        held = np.array_equal(cast, np.asarray(values, np.float64))
    else:
        held = not (np.isinf(cast) & np.isfinite(values)).any()
    if not held:
        raise StoreError(f"{cast.dtype} does not hold the values of {name}; nothing was written, and float32 does")
    return cast


def _write_json(file: Path, content: Settings) -> None:
    file.write_text(json.dumps(content, indent=2))


class Buffer:
    """Batches of tokens without end, epoch after epoch, as dictionary_learning's `trainSAE(data=...)` takes them.

    A batch is a torch tensor [m, d] float32; of several sites, as for a crosscoder or a transcoder, [m, s, d].

    Args:
        epoch: the batches of an epoch, by its number.
        sites: the names of the sites.
        config: see `config`.

    Attributes:
        config: what dictionary_learning writes beside a dictionary.
    """

    def __init__(self, epoch: Callable[[int], Shuffled], sites: list[Name], config: Settings):
        self._batches, self._sites = _endless(epoch), sites
        self.config = dict(config)
        self._torch = importlib.import_module("torch")

    def __iter__(self) -> Buffer:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        values = [np.asarray(batch[site], np.float32) for site in self._sites]
        return self._torch.from_numpy(values[0] if len(values) == 1 else np.stack(values, axis=1))


def _endless(epoch: Callable[[int], Shuffled]) -> Iterator[Batch]:
    """The batches of one epoch after another, without the last of each if it is short, unless it is the only one."""
    for number in itertools.count():
        shuffled = epoch(number)
        for i, batch in enumerate(shuffled):
            if i == 0 or len(batch.rows) == shuffled.batch:
                yield batch
