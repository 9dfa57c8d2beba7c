"""Prompts run at one of a few lengths, so that prompts of many lengths share programs.

A prompt is padded on the right with masked columns, and the results are cut back. This is exact, up to rounding, where
no result of a column of the prompt depends on the columns after the prompt, which `Request.present` marks. Elsewhere
the prompt runs at its own length, for which a program is compiled.

Axes: b batch, p position.
"""

from __future__ import annotations

import dataclasses
import logging

import jax
import numpy as np

from gemma3_jax.hooks.axes import DependsOnLength
from gemma3_jax.hooks.longer import LongerMetric
from gemma3_jax.hooks.needs import some_depend_on_length
from gemma3_jax.hooks.reductions import Steps
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.meshes import mesh_of
from gemma3_jax.run.request import Reduced, Request
from gemma3_jax.run.traced import activation_dtype, longer_metric, with_longer_functions
from gemma3_jax.sites.table import site
from gemma3_jax.types import Params, PyTree

_log = logging.getLogger(__name__)

SHORTEST = 16
_NOTED = 3  # lengths of prompts, for which a function has compiled a program each
_lengths: dict[str, set[int]] = {}  # by function, up to so many


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The smallest of the common lengths that is at least `length`.

    The common lengths are `shortest`, and above it four between consecutive powers of 2: 16, 20, 24, 28, 32, 40, 48,
    56, 64, 80. The time of a run is nearly linear in its length, so more than `shortest` tokens cost less than a
    quarter more, and half of that on average. Prompts of 1 to 64 tokens have 9 programs, those up to 1,024 have 25.

    >>> [bucket(n) for n in (3, 17, 33, 64, 65, 1000)]
    [16, 20, 40, 64, 80, 1024]
    >>> [bucket(n, shortest=1) for n in (1, 3, 7, 9)]
    [1, 3, 7, 10]
    """
    step = max(1, 1 << max(0, (length - 1).bit_length() - 3))
    return max(shortest, -(-length // step) * step)


def in_bucket(
    params: Params, request: Request, metric: Traced | None = None
) -> tuple[Request, LongerMetric | None] | None:
    """The request at the length of its bucket, always with a mask, and the metric of its result there.

    None if it must run at its own length.

    The last column is repeated, so that no new token id, whose embedding might not be finite, comes in.

    It runs at its own length if

    - it is traced, or its parameters are on a mesh of several devices,
    - it has positions, documents or embeddings of its own,
    - it has a ready-made edit whose result depends on the length: see `gemma3_jax.hooks.needs`,
    - it has a function of the user whose result may depend on the length: see `gemma3_jax.hooks.longer`,
    - it has a ready-made reduction of a site that also has an axis of keys.
    """
    if _is_traced((params, request)) or mesh_of(params) is not None:
        return None
    others = request.positions, request.segment_ids, request.first_layer, request.past
    if not request.has_tokens or any(other is not None for other in others):
        return None
    tokens = np.asarray(request.source)
    mask = np.ones_like(tokens) if request.attention_mask is None else np.asarray(request.attention_mask)
    if some_depend_on_length(request.edits) or not _reductions_fit(request):
        return None
    extra = (0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])
    # [1, p]
    present = np.pad(np.ones_like(tokens[:1], bool), extra)
    tokens, mask = np.pad(tokens, extra, mode="edge"), np.pad(mask, extra)
    labels = None if request.labels is None else np.pad(request.labels, extra, mode="edge")
    wide = dataclasses.replace(request, source=tokens, attention_mask=mask, labels=labels, present=present)
    try:
        dtype = activation_dtype(params)
        measure = None if metric is None else longer_metric(metric, request, wide, dtype)
        return with_longer_functions(request, wide, dtype), measure
    except DependsOnLength as error:
        note_length(str(error), request.source.shape[1])
        return None


def longest(params: Params, request: Request) -> tuple[Request, int]:
    """The request at the length of its bucket, or as it is; and the number of columns that were added."""
    found = in_bucket(params, request)
    return (request, 0) if found is None else (found[0], found[0].source.shape[1] - request.source.shape[1])


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _reductions_fit(request: Request) -> bool:
    return all(_fits(name, steps) for name, steps in zip(request.names, request.reductions, strict=True))


def _fits(name: str, steps: Reduced) -> bool:
    """Whether a reduction is traced, or ready-made for a site without an axis of keys, whose padding it would read."""
    return not isinstance(steps, Steps) or not {"p", "k"} <= set(site(name).axes.split())


def note_length(what: str, length: int) -> None:
    """Log once, at the third length, that a function has a program for each length; `what` names it and the reason."""
    lengths = _lengths.setdefault(what, set())
    if len(lengths) < _NOTED:
        lengths.add(length)
        if len(lengths) == _NOTED:
            _log.warning(
                "%s depends on all tokens of a prompt, as far as is known, so each length of a prompt compiles a "
                "program of its own, %d so far; pad the prompts to one length, or compute at each token: "
                "hook.positions has its position, and a static index such as value[:, -1] is fine",
                what,
                _NOTED,
            )
