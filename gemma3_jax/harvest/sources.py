"""Corpora: anything with a length whose items are documents. Files are read as they are needed, whatever their size.

An item is a text (bytes are UTF-8), token ids, or a mapping with `text`, `input_ids` or `messages` (a conversation for
the tokenizer's chat template). So lists, Hugging Face `datasets`, and the sources and data sets of `grain`, such as
ArrayRecord's, are corpora as they are.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from gemma3_jax.extras import needs_extra
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.inputs import as_array
from gemma3_jax.types import Settings

Item = str | bytes | Sequence[int] | np.ndarray | Settings
FIELDS = "text", "input_ids", "messages"  # of a document that is a mapping; it is read from the first that it has
_EVERY = 1024  # lines between two known offsets: 8 bytes for each of these
_IDS = 2**16  # ids of a document in an array without document boundaries


@runtime_checkable
class Corpus(Protocol):
    """Documents by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Item: ...


class TextLines:
    """Each line of a text file is a document; lines of white space are skipped.

    One pass over the file finds where every 1,024th document begins, and the digest of the content.

    Raises:
        StoreError: the file is missing, or a line is not UTF-8 (when it is read).

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "corpus.txt"
    >>> _ = file.write_text("ba ke lo\\n\\nmu ti\\n")
    >>> lines = TextLines(file)
    >>> len(lines), lines[1]
    (2, 'mu ti')
    """

    def __init__(self, file: str | os.PathLike[str]):
        self.file = Path(file)
        digest, marks, at, count = hashlib.sha256(), [], 0, 0
        with _opened(self.file) as lines:
            for line in lines:
                digest.update(line)
                if line.strip():
                    if count % _EVERY == 0:
                        marks.append(at)
                    count += 1
                at += len(line)
        self.digest = digest.hexdigest()
        self._marks, self._count = np.asarray(marks, np.int64), count
        self._block = functools.lru_cache(maxsize=2)(self._read)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int, /) -> Item:
        block, place = divmod(range(self._count)[number], _EVERY)
        line = self._block(block)[place]
        try:
            return self.parsed(line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n"))
        except ValueError as error:
            raise StoreError(f"{self.file}: document {number} cannot be read: {error}") from error

    def parsed(self, line: str) -> Item:
        """The document of a line."""
        return line

    def _read(self, block: int) -> list[bytes]:
        with _opened(self.file) as lines:
            lines.seek(int(self._marks[block]))
            return list(itertools.islice((line for line in lines if line.strip()), _EVERY))


class JsonLines(TextLines):
    """Each line of a JSONL file is a document: a text, a list of ids, or an object.

    Args:
        file: the file.
        field: the entry of an object with the text, the ids or the messages; by default the first of `text`,
            `input_ids` and `messages` that it has.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "corpus.jsonl"
    >>> _ = file.write_text('{"body": "ba ke"}\\n{"body": [2, 10, 11]}\\n')
    >>> list(JsonLines(file, "body"))
    ['ba ke', [2, 10, 11]]
    """

    def __init__(self, file: str | os.PathLike[str], field: str | None = None):
        super().__init__(file)
        self.field = field

    def parsed(self, line: str) -> Item:
        """The document of a line; a ValueError if it is not JSON, or does not have the field."""
        return _entry(json.loads(line), self.field)


class Parquet:
    """Each row of a Parquet file is a document. Needs the extra `parquet`. Arguments as for `JsonLines`."""

    def __init__(self, file: str | os.PathLike[str], field: str | None = None):
        with needs_extra("parquet", "Parquet files need"):
            import pyarrow.parquet
        _check_exists(Path(file))
        self._file = pyarrow.parquet.ParquetFile(file)
        names = self._file.schema_arrow.names
        wanted = FIELDS if field is None else (field,)
        self._column = next((name for name in wanted if name in names), None)
        if self._column is None:
            raise StoreError(f"{file} has the columns {', '.join(names)}, not {' or '.join(wanted)}; name one as field")
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum([0, *groups])
        self._group = functools.lru_cache(maxsize=2)(self._read)

    @functools.cached_property
    def digest(self) -> str:
        """The digest of its documents."""
        return digest_of(list(self._group(i)) for i in range(len(self._ends) - 1))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int, /) -> Item:
        number = range(len(self))[number]
        group = int(np.searchsorted(self._ends, number, "right")) - 1
        value = self._group(group)[number - int(self._ends[group])]
        return {"messages": value} if self._column == "messages" else value

    def _read(self, group: int) -> list[Item]:
        values: list[Item] = self._file.read_row_group(group, [self._column]).column(0).to_pylist()
        return values


class Folder:
    """Each file below a folder is a document, in the order of their paths; hidden ones are skipped."""

    def __init__(self, folder: str | os.PathLike[str]):
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        self.files = [file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int, /) -> Item:
        try:
            return self.files[number].read_text("utf-8")
        except ValueError as error:
            raise StoreError(f"{self.files[number]} is not UTF-8: {error}") from error


class TokenArray:
    """Documents in an array of ids, such as a memory-mapped one: a row each of [n, p]; or of [n], from BOS to BOS.

    An array [n] without BOS is cut into documents of 65,536 ids.
    """

    def __init__(self, ids: np.ndarray, bos: int | None):
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise StoreError(
                f"the array is {ids.dtype} of shape {list(ids.shape)}; ids are integers [n] or [n, p], and texts a list"
            )
        self.ids = ids
        if ids.ndim == 1:
            blocks = (ids[at : at + 2**24] for at in range(0, len(ids), 2**24))
            found = (
                [np.flatnonzero(block == bos) + i * 2**24 for i, block in enumerate(blocks)] if bos is not None else []
            )
            starts = np.concatenate(found) if found else np.zeros(0, np.int64)
            if not starts.size:
                starts = np.arange(0, len(ids), _IDS)
            self._bounds = np.unique(np.concatenate([[0], starts, [len(ids)]]))

    @functools.cached_property
    def digest(self) -> str:
        """The digest of its content."""
        digest = hashlib.sha256(f"{self.ids.dtype} {self.ids.shape}".encode())
        step = max(1, 2**24 // max(1, self.ids[:1].size))
        for at in range(0, len(self.ids), step):
            digest.update(np.ascontiguousarray(self.ids[at : at + step]).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids) if self.ids.ndim == 2 else len(self._bounds) - 1

    def __getitem__(self, number: int, /) -> Item:
        if self.ids.ndim == 2:
            return np.asarray(self.ids[number])
        first, end = self._bounds[range(len(self))[number] :][:2]
        return np.asarray(self.ids[first:end])


# What reads the files that have fields. `Dataset.to_json` writes lines of JSON, too, and pandas with `lines=True`.
READERS: dict[str, type[JsonLines | Parquet]] = {
    ".json": JsonLines,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": Parquet,
}
_COMPRESSED = "uncompress it first"
_TABLE = 'give its texts: pandas.read_csv(file)["text"].tolist()'
# Files whose lines are not documents, and what to do with them.
_REFUSED = {
    **dict.fromkeys([".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip", ".zst"], _COMPRESSED),
    **dict.fromkeys([".csv", ".tsv"], _TABLE),
    ".arrow": "give datasets.load_from_disk(folder) or datasets.Dataset.from_file(file)",
}


def as_corpus(corpus: object, bos: int | None) -> Corpus:
    """The corpus of a file, a folder, an array of ids, or anything with a length and items.

    Raises:
        StoreError: it is none of these, or it has no documents.
    """
    if isinstance(corpus, str | os.PathLike):
        corpus = _read(Path(corpus))
    if isinstance(corpus, np.ndarray):
        corpus = TokenArray(corpus, bos)
    if isinstance(corpus, Mapping) and corpus and not any(isinstance(part, str) for part in corpus.values()):  # splits
        raise StoreError(f"the corpus has the parts {', '.join(map(str, corpus))}; give one of them: corpus[name]")
    if hasattr(corpus, "iloc"):  # of pandas: its items go by label, not by number
        raise StoreError(f'the corpus is {type(corpus).__name__}; give a list: table["text"].tolist()')
    if isinstance(corpus, Iterable) and not isinstance(corpus, Sized):
        kind = type(corpus).__name__
        raise StoreError(f"the corpus is {kind}, which has no length; take a part: list(itertools.islice(corpus, n))")
    if not isinstance(corpus, Corpus) or isinstance(corpus, Mapping | set):
        raise StoreError(
            f"the corpus is {type(corpus).__name__}; it must be a file (.txt, .jsonl, .parquet, .npy), a folder, an "
            "array of ids, or have a length and items, like a list of texts or a Hugging Face dataset"
        )
    if not len(corpus):
        raise StoreError("the corpus has no documents")
    return corpus


def digest_of(corpus: Corpus | Iterator[list[Item]]) -> str:
    """The digest of a corpus: that of its content."""
    known = getattr(corpus, "digest", None)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    items = (corpus[i] for i in range(len(corpus))) if isinstance(corpus, Corpus) else itertools.chain(*corpus)
    for item in items:
        content = item if isinstance(item, str) else repr(_plain(item))
        digest.update(f"{type(item).__name__} {len(content)} ".encode())
        digest.update(content.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _plain(item: object) -> object:
    """What a document is read from, without arrays: their `repr` leaves out the middle of long ones."""
    if isinstance(item, Mapping):
        return {name: _as_list(item[name]) for name in FIELDS if item.get(name) is not None}
    return _as_list(item)


def _as_list(value: object) -> object:
    return np.asarray(as_array(value)).tolist() if hasattr(value, "__array__") else value


def _read(path: Path) -> Corpus | np.ndarray:
    """The corpus of a file or a folder."""
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            raise StoreError(f"{path} is a saved data set; give datasets.load_from_disk(folder)")
        return Folder(path)
    _check_exists(path)
    suffix = path.suffix.lower()
    if suffix in _REFUSED:
        raise StoreError(f"{path} is not read: {_REFUSED[suffix]}")
    if suffix == ".npy":
        ids: np.ndarray = np.load(path, mmap_mode="r")
        return ids
    return READERS.get(suffix, TextLines)(path)


def _entry(value: Any, field: str | None) -> Item:
    """The document of a parsed line."""
    if field is None or not isinstance(value, Mapping):
        return value  # checked when it becomes ids
    if field not in value:
        raise ValueError(f"it has {', '.join(value)}, not {field}")
    found = value[field]
    is_chat = isinstance(found, list) and bool(found) and isinstance(found[0], Mapping)
    return {"messages": found} if is_chat else found


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise StoreError(f"the corpus {file} is not a file")


def _opened(file: Path) -> BinaryIO:
    _check_exists(file)
    return file.open("rb")
