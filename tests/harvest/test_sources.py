"""Every kind of corpus gives its documents, and says what it cannot read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import TINY, HookedGemma3
from gemma3_jax.harvest import JsonLines, Parquet, StoreError, TextLines
from gemma3_jax.harvest.documents import documents
from gemma3_jax.harvest.sources import as_corpus, digest_of

TEXTS = ["ba ke lo", "mu", "ti so re ba"]
BOS = 2


@pytest.fixture(scope="module")
def model():
    """The shipped model, for its tokenizer."""
    return HookedGemma3.from_pretrained(TINY)


def ids_of(model, corpus):
    """The ids of every document, as lists."""
    known = as_corpus(corpus, BOS)
    return [ids.tolist() for ids in documents(model, known, 0, len(known))]


class Items:
    """Like a Hugging Face dataset: a length, and rows by number."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


def written(folder, name, content):
    file = folder / name
    file.write_text(content, encoding="utf-8")
    return file


def test_texts_of_every_kind(model, tmp_path):
    """A list, a text file with empty lines and Windows' line ends, JSONL, a folder, a dataset: the same ids."""
    wanted = [model.to_tokens(text)[0].tolist() for text in TEXTS]
    (tmp_path / "folder" / "more").mkdir(parents=True)
    for name, text in zip(["a.txt", "b.md", "more/c"], TEXTS, strict=True):
        written(tmp_path / "folder", name, text)
    written(tmp_path / "folder", ".hidden", "so")
    lines = [json.dumps({"text": TEXTS[0]}), json.dumps(TEXTS[1]), json.dumps({"input_ids": wanted[2]})]
    corpora = {
        "list": TEXTS,
        "lines": written(tmp_path, "corpus.txt", "\n \n" + "\r\n\n".join(TEXTS)),
        "name": str(written(tmp_path, "other.txt", "\ufeff" + "\n".join(TEXTS) + "\n")),
        "jsonl": written(tmp_path, "corpus.jsonl", "\n".join(lines)),
        "folder": tmp_path / "folder",
        "dataset": Items([{"text": text, "label": 0} for text in TEXTS]),
        "ids": wanted,
        "arrays": [np.asarray(ids) for ids in wanted],
    }
    for kind, corpus in corpora.items():
        assert ids_of(model, corpus) == wanted, kind
    field = written(tmp_path, "field.jsonl", "\n".join(json.dumps({"body": text}) for text in TEXTS))
    assert ids_of(model, JsonLines(field, "body")) == wanted


def test_arrays_of_ids(model, tmp_path):
    """Two axes are documents; one is cut where BOS is, and without BOS in long pieces; a file is mapped."""
    rows = np.asarray([[2, 10, 11], [2, 12, 13]], np.uint16)
    np.save(tmp_path / "ids.npy", rows)
    assert ids_of(model, tmp_path / "ids.npy") == ids_of(model, rows) == rows.tolist()
    assert ids_of(model, np.asarray([9, 2, 10, 2, 11, 12])) == [[9], [2, 10], [2, 11, 12]]
    assert [len(ids) for ids in ids_of(model, np.full(70_000, 9))] == [65_536, 4_464]
    with pytest.raises(StoreError, match="integers"):
        as_corpus(np.zeros(3), BOS)


def test_many_lines(tmp_path):
    """Beyond the number of lines between two known offsets, in any order; the digest is that of the content."""
    lines = [f"line {i}" + "\n" * (1 + i % 3) for i in range(3000)]
    file = written(tmp_path, "many.txt", "".join(lines))
    corpus = TextLines(file)
    assert len(corpus) == 3000
    for i in (2999, 0, 1024, 1023, 2048, 1, -1):
        assert corpus[i] == f"line {i % 3000}"
    before = digest_of(corpus)
    written(tmp_path, "many.txt", "".join(lines).replace("line 77\n", "line 78\n"))
    assert digest_of(TextLines(file)) != before
    with pytest.raises(IndexError):
        corpus[3000]


def test_digests_of_lists():
    """The digest of a corpus changes with any document, and with where one ends."""
    known = [digest_of(as_corpus(x, BOS)) for x in (["ab", "c"], ["a", "bc"], ["ab", "c", "d"], [[2, 3]], [[2], [3]])]
    known += [digest_of(as_corpus(np.asarray(x), BOS)) for x in ([[2, 3]], [[2], [3]], [[2, 4]])]
    assert len(set(known)) == len(known)
    known += [digest_of(as_corpus([{"messages": {"role": ["user"], "content": [x]}}], BOS)) for x in ("ab", "c")]
    assert len(set(known)) == len(known)
    assert digest_of(as_corpus(["ab", "c"], BOS)) == known[0]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, torch.tensor], ids=["numpy", "jax", "torch"])
def test_digests_of_long_arrays(kind):
    """One id in the middle of a long document changes the digest, where an array's `repr` shows only its ends."""
    ids = np.full(3000, 7)
    other = ids.copy()
    other[1500] = 8
    for wrapped in (lambda x: x, lambda x: {"input_ids": x}):
        known = [digest_of(as_corpus([wrapped(kind(x))], BOS)) for x in (ids, other, ids)]
        assert known[0] == known[2] != known[1]
    assert known[0] == digest_of(as_corpus([{"input_ids": ids.tolist(), "label": 3}], BOS))  # only what is read counts


def test_datasets(model, tmp_path):
    """A data set of Hugging Face in any format, a column of it, and the lines that it writes; not all of its splits."""
    datasets = pytest.importorskip("datasets")
    wanted = ids_of(model, TEXTS)
    texts = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]})
    ids = datasets.Dataset.from_dict({"input_ids": wanted})
    corpora = [texts, texts["text"], ids, ids["input_ids"]]
    corpora += [ids.with_format(form) for form in ("numpy", "torch", "jax")]
    for corpus in corpora:
        assert ids_of(model, corpus) == wanted
    assert len({digest_of(as_corpus(corpus, BOS)) for corpus in (ids, *corpora[-3:])}) == 1
    texts.to_json(tmp_path / "corpus.json")
    assert ids_of(model, tmp_path / "corpus.json") == wanted
    texts.save_to_disk(tmp_path / "saved")
    for corpus, message in (
        (datasets.DatasetDict({"train": texts, "test": texts}), "the parts train, test"),
        (texts.rename_column("text", "body"), "a column"),
        (texts.to_iterable_dataset(), "IterableDataset, which has no length; take a part"),
        (texts.to_pandas(), "DataFrame; give a list"),
        (texts.to_pandas()["text"], "Series; give a list"),
        (tmp_path / "saved", "load_from_disk"),
    ):
        with pytest.raises(StoreError, match=message):
            ids_of(model, corpus)


@pytest.mark.parametrize("name", ["corpus.csv", "corpus.tsv", "corpus.jsonl.gz", "corpus.txt.ZST", "x.arrow"])
def test_files_whose_lines_are_not_documents(model, tmp_path, name):
    """The header of a table would be a document."""
    with pytest.raises(StoreError, match=f"{name} is not read: "):
        ids_of(model, written(tmp_path, name, "text,label\nba,0\n"))


def test_parquet(model, tmp_path):
    """Several groups of rows; a field by name; a conversation needs the tokenizer's template."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": TEXTS * 2, "ids": [[2, 10]] * 6, "label": list(range(6))})
    parquet.write_table(table, tmp_path / "corpus.parquet", row_group_size=4)
    corpus = as_corpus(tmp_path / "corpus.parquet", BOS)
    assert [corpus[i] for i in (5, 0, 4, 3)] == [TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[0]]
    assert digest_of(corpus) == digest_of(Parquet(tmp_path / "corpus.parquet"))
    assert ids_of(model, Parquet(tmp_path / "corpus.parquet", "ids")) == [[2, 10]] * 6
    with pytest.raises(StoreError, match="text, ids, label"):
        Parquet(tmp_path / "corpus.parquet", "body")


def test_grain(model, tmp_path):
    """Records of ArrayRecord are texts; a data set of grain gives what its functions make."""
    grain = pytest.importorskip("grain")
    array_record = pytest.importorskip("array_record.python.array_record_module")
    file = str(tmp_path / "corpus.array_record")
    writer = array_record.ArrayRecordWriter(file, "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    wanted = ids_of(model, TEXTS)
    records = grain.sources.ArrayRecordDataSource([file])
    assert ids_of(model, records) == wanted
    assert ids_of(model, grain.MapDataset.source(records).map(lambda record: {"text": record.decode()})) == wanted
    assert digest_of(as_corpus(records, BOS)) == digest_of(as_corpus([text.encode() for text in TEXTS], BOS))
    assert digest_of(as_corpus(records, BOS)) != digest_of(as_corpus([b"ba", b"mu", b"ti"], BOS))


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (3, "int"),
        ({"a": "b"}, "is dict; it must"),
        ({}, "is dict; it must"),
        (set(TEXTS), "is set; it must"),
        ([], "no documents"),
        (["ba", 3], "document 1"),
        ([{"body": "ba"}], "document 0"),
        ([[2, 10**6]], "outside the vocabulary"),
        ([[0.5]], "document 0"),
        (np.asarray(TEXTS), "texts a list"),
        ((text for text in TEXTS), "no length; take a part"),
        (["ba", b"\xff\xfe"], "document 1 is bytes, and not UTF-8"),
        ("no/such/file.txt", "not a file"),
        ("no/such/file.npy", "not a file"),
        ([{"messages": [{"role": "user", "content": "ba"}]}], "chat template"),
    ],
)
def test_what_is_not_a_corpus(model, corpus, message):
    """One clear error, with the number of the document."""
    with pytest.raises(ValueError, match=message):
        ids_of(model, corpus)


def test_damaged_lines(model, tmp_path):
    """The file and the document are named."""
    (tmp_path / "bad.txt").write_bytes(b"ba ke\n\xff\xfe\n")
    with pytest.raises(StoreError, match=r"bad\.txt: document 1"):
        ids_of(model, tmp_path / "bad.txt")
    written(tmp_path, "bad.jsonl", '{"text": "ba"}\n{"text"')
    with pytest.raises(StoreError, match=r"bad\.jsonl: document 1"):
        ids_of(model, tmp_path / "bad.jsonl")


def test_conversations(model):
    """They are written by the tokenizer's chat template, without the beginning of another turn."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}so{% endif %}"
    )
    model.tokenizer.chat_template = template
    try:
        found = ids_of(model, [{"messages": [{"role": "user", "content": "ba"}, {"role": "model", "content": "ke"}]}])
    finally:
        model.tokenizer.chat_template = None
    assert model.to_string(np.asarray(found[0])) == "<bos> ba ke"
