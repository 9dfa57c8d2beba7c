"""`gemma3-jax features`: whether a dictionary is at its site, what its features are, and how one is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import numpy as np
import typer

from gemma3_jax import atomic
from gemma3_jax.cli.feature_tables import examples_table, features_table, report_as_dict, report_table, search_as_dict
from gemma3_jax.cli.harvest import corpus_of
from gemma3_jax.cli.shared import Dtype, Revision, check_devices, console, say, working

if TYPE_CHECKING:
    from gemma3_jax import HookedGemma3
    from gemma3_jax.features.parts import Feature
    from gemma3_jax.features.placement import Dictionary
    from gemma3_jax.features.searches.found import Found
    from gemma3_jax.features.training.step import Figures, Kind
    from gemma3_jax.inputs import Inputs

features = typer.Typer(
    help="Sparse autoencoders and transcoders: check, search, show and train them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(help="Checkpoint directory, GGUF file or hub id of the model.")]
Of = Annotated[str, typer.Argument(help="Directory or hub id of the dictionary.")]
Corpus = Annotated[Path, typer.Argument(help="A .txt, .jsonl, .parquet or .npy file, or a folder of text files.")]
Searched = Annotated[
    Path,
    typer.Argument(help="A .txt, .jsonl, .parquet or .npy file, a folder of text files, or a store that has the site."),
]
Inside = Annotated[str | None, typer.Option(help="Folder of the dictionary in that directory or repository.")]
SiteIn = Annotated[str | None, typer.Option(help="Site that the dictionary reads, if its files do not say it.")]
SiteOut = Annotated[str | None, typer.Option(help="Site that it writes, likewise.")]
Pinned = Annotated[str | None, typer.Option(help="Branch, tag or commit of the dictionary on the hub.")]
Field = Annotated[str | None, typer.Option(help="Field of a .jsonl or .parquet file with the text.")]
Chosen = Annotated[
    list[str] | None, typer.Option("--feature", help="A feature, such as 1234, or 9/1234 of layer 9; repeat it.")
]
Examples = Annotated[int, typer.Option("-k", "--examples", help="Examples of each feature.")]
Rows = Annotated[int, typer.Option(help="Rows that run together.")]
Length = Annotated[int, typer.Option(help="Tokens of a row; a longer document is cut.")]
State = Annotated[
    Path | None, typer.Option(help="File with how far the search is; run the same command again to continue it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@features.command()
def check(
    source: Source,
    dictionary: Of,
    corpus: Corpus,
    path: Inside = None,
    documents: Annotated[int, typer.Option(help="How many documents of the corpus, from its beginning.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a document; the others are left out.")] = 256,
    field: Field = None,
    site_in: SiteIn = None,
    site_out: SiteOut = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    revision: Revision = None,
    dictionary_revision: Pinned = None,
) -> None:
    """Measure how well a dictionary explains its site. Exit code 1 if it explains one beside it better."""
    for name, value in (("--documents", documents), ("--length", length)):
        if value < 2:
            raise ValueError(f"{name} is {value}; it must be at least 2")
    texts = corpus_of(corpus, field)
    sae = _dictionary(dictionary, path, dictionary_revision, site_in, site_out)
    model = _model(source, sae, dtype, revision)
    with working(f"checking {dictionary}"):
        report = sae.check(model, _beginnings(model, texts, documents, length))
    if as_json:
        print(json.dumps(report_as_dict(report), indent=2))
    else:
        console.print(report_table(report, dictionary))
        say(repr(report).partition("\n")[0])
    if report.better:
        raise typer.Exit(1)


@features.command()
def search(
    source: Source,
    dictionary: Of,
    corpus: Searched,
    path: Inside = None,
    feature: Chosen = None,
    examples: Examples = 10,
    most: Annotated[int, typer.Option(help="Without --feature: how many are listed, by their largest value.")] = 20,
    rows: Rows = 16,
    length: Length = 1024,
    state: State = None,
    field: Field = None,
    site_in: SiteIn = None,
    site_out: SiteOut = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    revision: Revision = None,
    dictionary_revision: Pinned = None,
) -> None:
    """Find where features are largest in a corpus, how often they are active, and which logits they raise."""
    wanted = _wanted(feature, examples, most, state)
    texts = _searched(corpus, field)
    sae = _dictionary(dictionary, path, dictionary_revision, site_in, site_out, wanted)
    model = _model(source, sae, dtype, revision)
    found = _found(model, sae, texts, wanted, examples, rows, length, state)
    shown = [found[each] for each in wanted or _largest(found, most)]
    if as_json:
        print(json.dumps(search_as_dict(found, shown), indent=2))
        return
    say(repr(found))
    if wanted is None:
        console.print(features_table(shown))
    else:
        for each in shown:
            console.print(examples_table(each))


@features.command()
def dashboard(
    source: Source,
    dictionary: Of,
    corpus: Searched,
    out: Annotated[Path, typer.Argument(help="Directory to write; it does not exist yet, or is empty.")],
    path: Inside = None,
    feature: Chosen = None,
    examples: Examples = 20,
    most: Annotated[int, typer.Option(help="Without --feature: how many have a page, by their largest value.")] = 100,
    labels: Annotated[
        Path | None, typer.Option(help='A .json file with labels of features: {"1234": "names of cities"}.')
    ] = None,
    rows: Rows = 16,
    length: Length = 1024,
    state: State = None,
    field: Field = None,
    site_in: SiteIn = None,
    site_out: SiteOut = None,
    dtype: Dtype = None,
    revision: Revision = None,
    dictionary_revision: Pinned = None,
) -> None:
    """Write a web page for each feature, and an index with a search field, in the new directory OUT."""
    from gemma3_jax.features import dashboard as write
    from gemma3_jax.pictures.scale import fitting_scale

    atomic.check_new_directory(out)
    fitting_scale("value", np.zeros(1)).stops()  # an extra that colours need is missed now, and not after the search
    wanted = _wanted(feature, examples, most, state)
    named = _labels(labels)
    texts = _searched(corpus, field)
    sae = _dictionary(dictionary, path, dictionary_revision, site_in, site_out, [*(wanted or []), *named])
    model = _model(source, sae, dtype, revision)
    found = _found(model, sae, texts, wanted, examples, rows, length, state)
    shown = wanted or _largest(found, most)
    own = {each: text for each, text in named.items() if each in shown}
    index = write(found, out, shown, labels=own, title=dictionary)
    say(str(index))


@features.command()
def train(
    store: Annotated[Path, typer.Argument(help="The folder of a store that `gemma3-jax harvest` wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; it does not exist yet, or is empty.")],
    width: Annotated[int, typer.Option(help="Number of features.")],
    kind: Annotated[str, typer.Option(help="batchtopk, jumprelu or topk.")] = "batchtopk",
    k: Annotated[int | None, typer.Option("-k", "--active", help="Active features of a token. Default: 32.")] = None,
    site_in: Annotated[str | None, typer.Option(help="Site that is read; not needed for a store of one site.")] = None,
    site_out: Annotated[str | None, typer.Option(help="Site that is written, which makes a transcoder.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: one pass over the store.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step. Default: 1024.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 2e-4 sqrt(16384 / width).")] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the tokens.")] = 0,
    format: Annotated[str, typer.Option(help="gemma_scope or saelens.")] = "gemma_scope",
    model_name: Annotated[str | None, typer.Option(help="Name of the model, for the config that is written.")] = None,
) -> None:
    """Train a sparse autoencoder, or with --site-out a transcoder, and write it to the new directory OUT."""
    from gemma3_jax.features import save
    from gemma3_jax.features import train as do
    from gemma3_jax.harvest import ActivationStore

    atomic.check_new_directory(out)
    if format not in ("gemma_scope", "saelens"):
        raise ValueError(f"--format is {format!r}; it must be gemma_scope or saelens")
    if kind == "topk" and (format == "gemma_scope" or site_out is not None):
        raise ValueError(f"--format {format} has no such dictionary with --kind topk; use batchtopk or jumprelu")
    check_devices()
    last: list[Figures] = []
    sae = do(
        ActivationStore(store),
        width,
        cast("Kind", kind),
        k=k,
        site_in=site_in,
        site_out=site_out,
        batch=batch,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        report=lambda figures: last.__setitem__(slice(None), [figures]),
    )
    save(sae, out, cast(Literal["gemma_scope", "saelens"], format), model_name=model_name)
    for each in last:
        say(f"step {each.step:,}: loss {each.loss:.3f}, L0 {each.l0:.1f}, FVU {each.fvu:.3f}, dead {each.dead:.1%}")
    say(f"{out}: {repr(sae).partition(chr(10))[0]}.")


def _wanted(names: Sequence[str] | None, examples: int, most: int, state: Path | None) -> list["Feature"] | None:
    """The features that are named; None for all of them. Raises the errors of other options too."""
    if state is not None:
        atomic.check_new_file(state)
    for option, value in (("--examples", examples), ("--most", most)):
        if value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    return [_feature(name) for name in names] if names else None


def _feature(name: str) -> "Feature":
    """A feature of a name such as 1234 or 9/1234."""
    parts = name.split("/")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"the feature is {name!r}; write its number, such as 1234, or 9/1234 for one of layer 9")
    first, *rest = map(int, parts)
    return (first, rest[0]) if rest else first


def _labels(file: Path | None) -> dict["Feature", str]:
    """The labels of a file, by feature."""
    from gemma3_jax.reading import read_json

    content = {} if file is None else read_json(file)
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"{file} must have an object with a text for each feature")
    return {_feature(name): text for name, text in content.items()}


def _searched(file: Path, field: str | None) -> object:
    """The corpus of a file or folder, or a store."""
    from gemma3_jax.harvest import ActivationStore

    if (file / "manifest.json").is_file():
        return ActivationStore(file)
    return corpus_of(file, field)


def _dictionary(
    source: str,
    path: str | None,
    revision: str | None,
    site_in: str | None,
    site_out: str | None,
    wanted: Sequence["Feature"] | None = None,
) -> "Dictionary":
    """The dictionary, if it has the features that are wanted."""
    from gemma3_jax.features import load
    from gemma3_jax.features.parts import reader_of

    check_devices()
    with working(f"loading {source}"):
        sae = load(source, path, revision, site_in=site_in, site_out=site_out)
    if isinstance(sae, list):
        raise ValueError(f"{source} has {len(sae)} dictionaries; name one with --path, such as layer_5.safetensors")
    for each in wanted or ():
        reader_of(sae, each)
    return sae


def _model(source: str, sae: "Dictionary", dtype: str | None, revision: str | None) -> "HookedGemma3":
    """The model, if it has the sites of the dictionary."""
    from gemma3_jax import HookedGemma3
    from gemma3_jax.conversion.dtypes import parameter_dtype
    from gemma3_jax.conversion.sources import locate_sources, read_config
    from gemma3_jax.sites.names import resolve

    parameter_dtype(dtype)
    config = read_config(locate_sources(source, revision, None, download=False))
    for sites in (sae.site_in, sae.site_out):
        for name in (sites,) if isinstance(sites, str) else sites:
            resolve(name, config)
    with working(f"loading {source}"):
        return HookedGemma3.from_pretrained(source, dtype, revision)


def _found(
    model: "HookedGemma3",
    sae: "Dictionary",
    texts: object,
    wanted: Sequence["Feature"] | None,
    k: int,
    rows: int,
    length: int,
    state: Path | None,
) -> "Found":
    """The search; its progress is shown on a terminal."""
    from gemma3_jax.features import search as find

    return find(model, sae, texts, k, wanted, rows=rows, length=length, state=state)


def _largest(found: "Found", most: int) -> list["Feature"]:
    """The features with the largest values, the largest first, of those that were active."""
    order = np.argsort(-found.largest, kind="stable")[:most]
    names = found.features[order[found.largest[order] > 0]].tolist()
    return [tuple(name) if isinstance(name, list) else name for name in names]


def _beginnings(model: "HookedGemma3", texts: object, most: int, length: int) -> "Inputs":
    """The first documents of a corpus, cut, as the input of a run."""
    from gemma3_jax.harvest.documents import bos_of, documents
    from gemma3_jax.harvest.sources import as_corpus
    from gemma3_jax.inputs import Inputs

    corpus = as_corpus(texts, bos_of(model))
    ids = [each[:length] for each in documents(model, corpus, 0, min(most, len(corpus)))]
    lengths = np.asarray(list(map(len, ids)))
    # [b, p]
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
    tokens = np.zeros_like(mask)
    tokens[mask > 0] = np.concatenate(ids)
    return Inputs(tokens, mask)
