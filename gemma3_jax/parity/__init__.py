"""Is the port as near to the truth as Hugging Face is? At every site, for the logits, and for gradients.

The truth is Hugging Face's model in float64 throughout.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import transformers

from gemma3_jax.extras import needs_extra

with needs_extra("parity", "parity needs"):
    import torch

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.export import export_checkpoint
from gemma3_jax.conversion.sources import Sources, convert_sources, load_tokenizer, locate_sources, read_config
from gemma3_jax.conversion.store import is_converted, load_params
from gemma3_jax.parity import huggingface
from gemma3_jax.parity.measure import at_sites, compare, most_logits, of_gradients, port_gradients
from gemma3_jax.parity.port import activations as our_activations
from gemma3_jax.parity.prompts import page_ids, prompts_for
from gemma3_jax.parity.report import Report, Row, compare_sites, judge, worst_rows
from gemma3_jax.types import Params

__all__ = ["Report", "Row", "compare", "compare_sites", "our_activations", "parity"]

# How near to the truth, relative in norm, the port's float32 is on small random models; a plain implementation reaches
# 1e-6.
SMALL_BAR = 5e-6
# Random ids vary more than text in how much they amplify rounding, so a median over them needs more prompts.
_TEXTS, _RANDOM = 3, 9
_SHORT = 64


def parity(
    source: str | os.PathLike[str],
    dtype: Literal["float32", "bfloat16"] = "float32",
    tokens: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    *,
    adapter: str | os.PathLike[str] | None = None,
) -> Report:
    """Run a checkpoint through Hugging Face (torch, on the CPU) and the port (JAX's default device), and compare.

    The report has the distance of each from Hugging Face's model in float64, at every site and in a few gradients. In
    float32, the port's distance may be twice Hugging Face's, as a median over prompts. In bfloat16, it may not be
    larger, up to the sampling error of that comparison (`gemma3_jax.parity.report.judge`).

    Memory: the checkpoint in float32, for bfloat16 also in bfloat16, the port's parameters, and about 1.5 GB. Layers
    are compared one at a time.

    Args:
        source: directory or hub id; or a GGUF file, an adapter or a directory that `save_params` wrote, which are
            exported for Hugging Face.
        dtype: of the weights and activations on both sides.
        tokens: length of the prompts, at most the model's context; by default 64, and 64 more than the sliding window.
            The prompts are English text that ships with this package, or random ids if the checkpoint has no tokenizer
            for English.
        revision: branch, tag or commit on the hub.
        seed: seed of the random ids.
        adapter: directory or hub id of a PEFT adapter, which is merged into the source.

    >>> from gemma3_jax.parity import parity
    >>> from gemma3_jax import TINY
    >>> parity(TINY).passed
    True
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; parity takes 'float32' and 'bfloat16'")
    if tokens is not None and tokens < 2:
        raise ValueError(f"tokens is {tokens}; a loss needs at least 2 tokens")
    sources = locate_sources(source, revision, adapter)
    context = read_config(sources).max_position_embeddings
    if tokens is not None and tokens > context:
        raise ValueError(f"tokens is {tokens}; the model's context has {context} tokens")
    tokenizer = load_tokenizer(sources)
    config, params = _load(sources, dtype)
    # Hugging Face's model has no embedding head: the parity is that of the text model.
    config = dataclasses.replace(config, embedding_head=None)
    lengths = (tokens,) if tokens else _default_lengths(config)
    count, kind = (_RANDOM, "sequences of random ids") if page_ids(config, tokenizer) is None else (_TEXTS, "texts")
    batches = {length: prompts_for(config, tokenizer, length, count, seed) for length in lengths}
    beginnings = [ids[:, : most_logits(config)] for ids in batches[lengths[0]]]
    # Before Hugging Face's models are in memory: the port's gradient of the embedding takes three times its size.
    gradients = [port_gradients(config, params, ids) for ids in beginnings]

    rows = []
    with _as_checkpoint(sources) as checkpoint:
        reference = huggingface.load(checkpoint, torch.float32)
        model = reference if dtype == "float32" else huggingface.load(checkpoint, torch.bfloat16)
        for length, batch in batches.items():
            rows += judge([at_sites(reference, model, config, params, ids) for ids in batch], length, dtype)
        found = [
            of_gradients(reference, model, config, ours, ids) for ours, ids in zip(gradients, beginnings, strict=True)
        ]
        rows += judge(found, beginnings[0].shape[1], dtype)
    return Report(
        source=os.fspath(source),
        dtype=dtype,
        tokens=lengths,
        prompts=f"{count} {kind}",
        platform=_platform(),
        rows=worst_rows(rows),
        note=_note(config, lengths),
    )


def _default_lengths(config: Gemma3Config) -> tuple[int, ...]:
    window = config.sliding_window
    return (_SHORT, window + _SHORT) if window >= _SHORT else (_SHORT,)


def _load(sources: Sources, dtype: str | None) -> tuple[Gemma3Config, Params]:
    is_ours = is_converted(sources.base)
    return load_params(sources.base, dtype) if is_ours else convert_sources(sources, dtype)


@contextlib.contextmanager
def _as_checkpoint(sources: Sources) -> Iterator[Path]:
    """The directory that Hugging Face reads: that of the source itself, or what it is exported to."""
    if not (is_converted(sources.base) or sources.header or sources.adapters):
        yield sources.base
        return
    with tempfile.TemporaryDirectory() as temporary:
        # In float32, as norms are, whatever the other parameters' dtype.
        read = _load(sources, None if is_converted(sources.base) else "float32")
        export_checkpoint(*read, Path(temporary) / "exported", "float32")
        yield Path(temporary) / "exported"


def _platform() -> str:
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device.platform} ({device.device_kind}), {versions}"


def _note(config: Gemma3Config, lengths: tuple[int, ...]) -> str:
    """What the prompts could not show, and what was taken at some tokens only."""
    notes = []
    window, most = config.sliding_window, most_logits(config)
    if max(lengths) <= window:
        notes.append(f"no token is further than the window of {window} from another; ask for more tokens")
    if max(lengths) > most:
        notes.append(f"of a longer prompt, logits are compared at {most} tokens, evenly spread")
    if lengths[0] > most:
        notes.append(f"gradients are those of the loss over the first {most} tokens")
    return "; ".join(notes)
