"""From a corpus to a store: run the units that have no file, and write a file for each.

Axes: b row, p column, n kept tokens in the corpus' order, d features.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.descriptions import size_text
from gemma3_jax.harvest import files
from gemma3_jax.harvest.documents import bos_of
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.manifest import (
    Array,
    arrays_in,
    bytes_of_token,
    check_same,
    new_manifest,
    read_manifest,
    with_plan,
    write_manifest,
)
from gemma3_jax.harvest.packing import Pack
from gemma3_jax.harvest.parts import part_of, units_of
from gemma3_jax.harvest.places import place_of
from gemma3_jax.harvest.sources import Corpus, as_corpus
from gemma3_jax.harvest.statistics import moments_of
from gemma3_jax.harvest.storage import Claim, Place
from gemma3_jax.harvest.units import Keep, Layout, Plan, Unit, make_plan, make_unit
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.inputs import Inputs
from gemma3_jax.run.selection import ReducedCapture
from gemma3_jax.types import PyTree

_WAITING = 2  # units that wait for the writer
_PADDING = 0.02  # as much is usual
_log = logging.getLogger(__name__)


def harvest(
    model: HookedGemma3,
    corpus: object,
    sites: ReducedCapture,
    out: str | os.PathLike[str],
    rows: int = 64,
    length: int = 1024,
    part: tuple[int, int] | str = (0, 1),
    seed: int = 0,
    *,
    pack: Pack = True,
    drop_bos: bool = False,
    sample: int | None = None,
    keep: Keep | None = None,
    repair: bool = False,
    progress: bool | None = None,
) -> None:
    """Write the activations of a corpus to a store, which `ActivationStore` reads.

    The corpus is cut into numbered units of `rows` x `length` tokens. A unit is a pure function of the corpus, of these
    arguments and of its number, and gets one file, whole or not at all. A run does the units that have no file. So it
    may be killed at any moment and started again, by any number of processes: the files are the same, byte for byte.
    The model runs up to the last site. The next unit runs while one is copied and another is written.

    Args:
        model: the model.
        corpus: a text file (a document in each line), a JSONL, Parquet or NumPy file, a folder of text files; a list of
            texts or of rows of ids, an array of ids, a Hugging Face dataset, or anything with a length and items: see
            `gemma3_jax.harvest.sources`. A text gets exactly one BOS.
        sites: what to capture, as in `run_with_cache`: names, globs, or a mapping from them to a reduction, a list of
            reductions, or None. A result must keep the axes of rows and tokens. With `pack=False` it may also have one
            value for each row, as `reductions.At(-1)` and `reductions.Mean()`.
        out: the folder of the store; or a name such as "s3://bucket/folder", for any store that `fsspec` knows.
        rows: rows of a unit, which run together.
        length: tokens of a row. A document that is longer is cut; the pieces do not see each other, and each begins
            with BOS if the document does.
        part: (number, count), the part of the units that this process does; "environment", the part that Slurm,
            Kubernetes or Cloud TPU gives this process; or "claim": whatever no other process is doing.
        seed: for `sample`.
        pack: pack several documents into a row, which do not see each other; a document that fits a row is whole. "cut"
            leaves no padding: a document that does not fit what is left of a row is cut there. False gives each row one
            document, and makes a unit as wide as its longest document.
        drop_bos: do not keep BOS.
        sample: keep only so many tokens of each document, by chance, and no BOS.
        keep: keep only tokens for which `keep(tokens, positions)` is true; it takes and returns NumPy arrays [n].
        repair: read all units first, and do those again that are damaged.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        UnknownSite, TypeError, ValueError: `sites` is wrong, as for every capture.
        StoreError: the store has the activations of another run (the message names the difference); a unit is damaged;
            the disk is too small, full or lost (what is finished is kept); or the corpus is not one.
        MemoryError: a unit needs more memory than the device has (what is finished is kept).

    >>> import tempfile
    >>> from gemma3_jax import TINY, HookedGemma3
    >>> from gemma3_jax.harvest import ActivationStore, harvest
    >>> model, out = HookedGemma3.from_pretrained(TINY), tempfile.mkdtemp()
    >>> harvest(model, ["ba ke lo", "mu ti"], {"blocks.{1,3}.hook_resid_post": None}, out, rows=2, length=8)
    >>> store = ActivationStore(out)
    >>> len(store), store["resid_post", 3].rows(0, 4).shape, store.tokens(0, 4).tolist()
    (7, (4, 96), [2, 4, 40, 47])
    """
    if jax.process_count() > 1:
        raise StoreError(
            "harvest runs in processes that do not know each other: leave jax.distributed out, and give part"
        )
    mine, place = part_of(part), place_of(out)
    if not (isinstance(sites, str | Mapping) or callable(sites)):
        sites = tuple(sites)  # an iterator can be read only once
    layout = Layout(rows, length, seed, pack, drop_bos, sample, keep)
    with _in_words(place, layout):
        texts = as_corpus(corpus, bos_of(model))
        plan, arrays = _prepared(model, texts, sites, layout, place, progress)
        job = _Job(model, texts, sites, layout, place, plan, arrays)
        _run(job, mine, _missing(place, plan, repair), progress)
        files.remove_abandoned(place)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all units of a harvest share."""

    model: HookedGemma3
    corpus: Corpus
    sites: ReducedCapture
    layout: Layout
    out: Place
    plan: Plan
    arrays: list[Array]


def _prepared(
    model: HookedGemma3, corpus: Corpus, sites: ReducedCapture, layout: Layout, out: Place, progress: bool | None
) -> tuple[Plan, list[Array]]:
    """The plan and the arrays of a run, whose manifest is then in the folder."""
    new = new_manifest(model, corpus, sites, layout)
    if out.size(files.MANIFEST) is None:
        # Another process may begin in the meantime.
        if set(out.strangers()) - {files.PLAN} and out.size(files.MANIFEST) is None:
            raise StoreError(f"{out} is not empty, and is not an activation store; give another folder")
        out.prepare()
        plan = _planned(model, corpus, layout, progress)
        write_manifest(out, with_plan(new, plan))
        _write_plan(out, plan)
    old = read_manifest(out)
    check_same(out, old, new)
    known = _read_plan(out)
    if known is None or (known.units, known.tokens) != (old["units"], old["tokens"]):
        known = _planned(model, corpus, layout, progress)
        _write_plan(out, known)
    return known, arrays_in(old)


def _planned(model: HookedGemma3, corpus: Corpus, layout: Layout, progress: bool | None) -> Plan:
    with _bar(progress, total=len(corpus), desc="reading", unit=" documents", leave=False) as bar:
        plan = make_plan(model, corpus, layout, lambda done: bar.update(done - bar.n))
    # The last unit is what is left of the corpus.
    padding = 1 - int(plan.bounds[-2, 2]) / max(1, (plan.units - 1) * layout.rows * layout.length)
    if layout.pack is True and plan.units > 1 and padding > _PADDING:
        _log.warning(
            "%.0f%% of the tokens are padding, because documents fit rows of %d tokens badly; try a larger length, or "
            "pack='cut'",
            100 * padding,
            layout.length,
        )
    return plan


def _write_plan(out: Place, plan: Plan) -> None:
    content = io.BytesIO()
    np.save(content, plan.bounds)
    out.write(files.PLAN, [content.getvalue()])


def _read_plan(out: Place) -> Plan | None:
    """The plan of the store; None if it is missing or damaged."""
    try:
        bounds = np.load(io.BytesIO(out.read(files.PLAN).data))
    except (OSError, ValueError, EOFError):
        return None
    return Plan(bounds) if bounds.ndim == 2 and bounds.shape[1] == 3 and bounds.dtype == np.int64 else None


def _missing(out: Place, plan: Plan, repair: bool) -> np.ndarray:
    """The numbers of the units to do."""
    out.tidy()
    there = files.present(out, plan.units)
    damaged = files.damaged(out, np.flatnonzero(there).tolist(), whole=repair)
    if damaged and not repair:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise StoreError(f"{next(iter(damaged.values()))}{more}")
    for number in damaged:
        out.remove(files.unit_name(number))
        there[number] = False
    return np.flatnonzero(~there)


def _run(job: _Job, part: tuple[int, int] | None, missing: np.ndarray, progress: bool | None) -> None:
    """Run and write the units of a part. While one runs, the results of another are copied, and others are written."""
    running: collections.deque[tuple[int, Claim | None, Unit]] = collections.deque()

    def batches() -> Iterator[Inputs]:
        for number, claim in units_of(part, job.out, missing):
            unit = make_unit(job.model, job.corpus, job.plan, number, job.layout)
            running.append((number, claim, unit))
            yield unit.inputs

    mine = [number for number in missing.tolist() if part is None or number % part[1] == part[0]]
    todo = sum(map(job.plan.tokens_of, mine))
    writing: collections.deque[Future[int]] = collections.deque()
    with _bar(progress, total=todo, unit=" tokens", unit_scale=True) as bar, ThreadPoolExecutor(1) as writer:
        bar.set_postfix_str(_estimate(job, todo))
        written, cells, tokens = 0, 0, 0
        for cache in job.model.activations(batches(), job.sites) if mine else ():
            number, claim, unit = running.popleft()
            writing.append(writer.submit(_write, job, number, claim, unit, cache))
            del cache
            while len(writing) > _WAITING:
                written += writing.popleft().result()
            cells, tokens = cells + unit.inputs.tokens.size, tokens + job.plan.tokens_of(number)
            bar.set_postfix_str(f"padding {1 - tokens / cells:.1%}, written {size_text(written)}")
            bar.update(job.plan.tokens_of(number))
        for each in writing:
            each.result()


def _write(job: _Job, number: int, claim: Claim | None, unit: Unit, cache: ActivationCache) -> int:
    """Write one unit; the number of its bytes."""
    contents = dict(unit.arrays)
    for array in job.arrays:
        value = cache[array.site]
        for part in array.key.removeprefix(array.site).split("/")[1:]:
            value = _entry(value, part)
        if array.axis is None:
            assert unit.documents is not None
            contents[array.key] = np.asarray(value)[: len(unit.documents)]
            contents["row_documents"] = unit.documents
        else:
            # [b, ..., p, ...] -> [b, p, ...] -> [n, ...]
            contents[array.key] = np.moveaxis(np.asarray(value), array.axis, 1)[unit.rows, unit.columns]
    for site in dict.fromkeys(array.site for array in job.arrays):
        contents |= moments_of(site, {array.key: contents[array.key] for array in job.arrays if array.site == site})
    size = files.write_unit(job.out, contents, number)
    if claim is not None:
        claim.release()
    return size


def _entry(tree: PyTree, name: str) -> PyTree:
    """The part of a pytree of that name."""
    if isinstance(tree, dict):
        return tree[name] if name in tree else tree[int(name)]
    return tree[int(name)] if name.isdecimal() else getattr(tree, name)


def _estimate(job: _Job, tokens: int) -> str:
    """What is to come, in words: bytes of a token and in all, and the room on the disk.

    Raises:
        StoreError: all tokens are kept, and the disk has no room for them.
    """
    each, room = bytes_of_token(job.arrays), job.out.room()
    words = f"{size_text(each)} a token, at most {size_text(each * tokens)}"
    if room is None:
        return words
    if each * tokens > room:
        too_small = f"{size_text(each * tokens)}, and {job.out} has {size_text(room)} free"
        if (job.layout.sample, job.layout.keep, job.layout.drop_bos) == (None, None, False):
            raise StoreError(
                f"the harvest takes {too_small}: take fewer sites, reductions.Int8 or Cast('bfloat16'), sample=n, or "
                "another folder"
            )
        _log.warning("the harvest takes up to %s", too_small)
    return f"{words}, {size_text(room)} free"


def _bar(progress: bool | None, **options: object) -> tqdm:
    return tqdm(disable=None if progress is None else not progress, dynamic_ncols=True, **options)


@contextlib.contextmanager
def _in_words(out: Place, layout: Layout) -> Iterator[None]:
    """An error of the file system, or a lack of memory, as one that says what is kept, and what to do."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            out.tidy()
        why = error.strerror or str(error)
        raise StoreError(
            f"{error.filename or out}: {why}. The finished units are kept: run again when {out} can be written, and "
            "the others are done"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"out of memory ({error}): a unit of {layout.rows} rows of {layout.length:,} tokens runs at once. Take "
            "fewer rows, fewer sites, or reductions; gemma3_jax.placing.fits says beforehand what a unit needs. The "
            "finished units are kept."
        ) from error
