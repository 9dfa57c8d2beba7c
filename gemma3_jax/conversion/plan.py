"""Which tensor of a checkpoint becomes which parameter: every key and shape is checked before data is read."""

import collections
import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion.dtypes import known_dtypes
from gemma3_jax.conversion.files import DTYPES
from gemma3_jax.conversion.gemma3 import (
    Entry,
    entries,
    find_heads,
    find_prefixes,
    is_buffer,
    is_other_head,
    is_vision,
)
from gemma3_jax.conversion.tensors import Tensors
from gemma3_jax.conversion.words import listed
from gemma3_jax.messages import printable
from gemma3_jax.reading import CheckpointError

_log = logging.getLogger(__name__)

_COMPARED = 2000  # keys; comparing a million would take a minute


def plan_of(config: Gemma3Config, tensors: Tensors) -> dict[Entry, str]:
    """The key of each entry, after a check of every key, shape and dtype against the config."""
    shapes = tensors.shapes
    prefix, head = find_prefix(config, tensors), find_head(tensors)
    plan = {entry: prefix + entry.hf if entry.in_text_model else entry.hf for entry in entries(config)}
    if head is not None:
        plan = {entry: head if key == "lm_head.weight" else key for entry, key in plan.items()}
    missing = [key for key in plan.values() if key not in shapes]
    if missing:
        near = difflib.get_close_matches(missing[0], list(shapes.keys() - plan.values())[:_COMPARED], 1)
        found = f"; it has {near[0]}" if near else ""
        reason = f"its config requires{found}"
        if missing == ["lm_head.weight"]:  # the caller may have asked for it, and not the config
            reason = "untied embeddings require; with tie_word_embeddings=True, the embedding is the unembedding"
        raise CheckpointError(f"{tensors.checkpoint} lacks {listed(missing)}, which {reason}")
    extra = sorted(set(shapes) - set(plan.values()) - {head})
    vision = [key for key in extra if is_vision(key)]
    others = [key for key in extra if is_other_head(key, prefix)]
    unexpected = [key for key in extra if not (is_vision(key) or is_buffer(key) or is_other_head(key, prefix))]
    if unexpected:
        raise CheckpointError(
            f"{tensors.file_of(unexpected[0])} has {listed(unexpected)}, which its config does not have"
        )
    for entry, key in plan.items():
        if tensors.dtypes[key] not in DTYPES:
            dtype, known = tensors.dtypes[key], known_dtypes()
            raise CheckpointError(f"{tensors.file_of(key)}: {key} has dtype {dtype}; this port reads {known}")
        if shapes[key] != entry.hf_shape:
            stored, required = list(shapes[key]), list(entry.hf_shape)
            raise CheckpointError(f"{tensors.file_of(key)}: {key} has shape {stored}; its config requires {required}")
    if vision:
        message = "%s: left out %d vision tensors, which the text model does not use: %s"
        _log.warning(message, tensors.checkpoint, len(vision), _grouped(vision))
    if others:
        message = "%s: left out %d tensors of other heads, which conversion.read_heads returns: %s"
        _log.warning(message, tensors.checkpoint, len(others), _grouped(others))
    return plan


def find_prefix(config: Gemma3Config, tensors: Tensors) -> str:
    """What stands before the keys of the one text model."""
    prefixes = find_prefixes(tensors.shapes)
    if not prefixes:
        raise CheckpointError(f"{tensors.checkpoint} has no Gemma 3 text model: no key ends in embed_tokens.weight")
    if len(prefixes) > 1:
        models = []
        for prefix in prefixes:
            missing = [prefix + entry.hf for entry in entries(config) if prefix + entry.hf not in tensors.shapes]
            missing = [key for key in missing if not key.endswith("lm_head.weight")]
            models.append(f"one at {prefix!r}" + (f", which lacks {listed(missing)}" if missing else ""))
        raise CheckpointError(
            f"{tensors.checkpoint} has several text models: {'; '.join(models)}. Convert the tensors of one of them "
            "with convert_state_dict"
        )
    return prefixes[0]


def find_head(tensors: Tensors) -> str | None:
    """The key of the unembedding, or None if there is none."""
    heads = find_heads(tensors.shapes)
    if len(heads) > 1:
        raise CheckpointError(f"{tensors.checkpoint} has several unembeddings: {listed(heads)}; a model has one")
    return heads[0] if heads else None


def check_tied(tensors: Tensors, plan: Mapping[Entry, str], parts: Iterable[tuple[slice, ...]]) -> None:
    """Raise if a tied checkpoint has a head that differs from its embedding: the head would be lost silently.

    Only these parts of both are compared: those that this process loads.
    """
    head = find_head(tensors)
    if head is None:
        return
    embedding = next(key for entry, key in plan.items() if entry.ours == "embed.weight")
    ours, theirs = tensors.open(embedding), tensors.open(head)
    if not all(equal_bits(ours(part[0])[part], theirs(part[0])[part]) for part in parts):
        raise CheckpointError(
            f"{tensors.checkpoint}: {head} differs from {embedding}, but its config has tie_word_embeddings; pass "
            "tie_word_embeddings=False to use the head, or True to use the embedding in its place"
        )


def _grouped(keys: Sequence[str]) -> str:
    """Keys that differ only in numbers, each group with its size."""
    groups = collections.Counter(re.sub(r"\.\d+\.", ".*.", key) for key in keys)
    return printable(", ".join(name if n == 1 else f"{name} ({n})" for name, n in groups.items()))


def equal_bits(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    """Whether two arrays have equal bytes, without a copy of either."""
    return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows))
