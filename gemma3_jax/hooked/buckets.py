"""Prompts run at one of a few lengths, so that prompts of many lengths share programs.

A prompt is padded on the right with masked columns, and the results are cut back. This is exact, up to rounding, where
no result of a column of the prompt depends on the columns after the prompt, which `Request.present` marks. Elsewhere
the prompt runs at its own length, for which a program is compiled.

Axes: b batch, p position.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from gemma3_jax.hooks.needs import depends_on_length
from gemma3_jax.hooks.reductions import Steps, is_ready
from gemma3_jax.hooks.tracing import Traced
from gemma3_jax.meshes import mesh_of
from gemma3_jax.run.request import Request
from gemma3_jax.sites.table import HEAD_COPIES, site
from gemma3_jax.types import Params, PyTree

SHORTEST = 16


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


def in_bucket(params: Params, request: Request) -> Request | None:
    """The request at the length of its bucket, always with a mask; None if it must run at its own length.

    The last column is repeated, so that no new token id, whose embedding might not be finite, comes in.

    It runs at its own length if

    - it is traced, or its parameters are on a mesh of several devices,
    - it has positions, documents or embeddings of its own,
    - it has functions of the user, or an edit whose result depends on the length: see `gemma3_jax.hooks.needs`,
    - it reduces a site that also has an axis of keys.
    """
    if _is_traced((params, request)) or mesh_of(params) is not None:
        return None
    others = request.positions, request.segment_ids, request.first_layer, request.past
    if not request.has_tokens or any(other is not None for other in others):
        return None
    tokens = np.asarray(request.source)
    mask = np.ones_like(tokens) if request.attention_mask is None else np.asarray(request.attention_mask)
    if not (_edits_fit(request) and _reductions_fit(request)):
        return None
    extra = (0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])
    # [1, p]
    present = np.pad(np.ones_like(tokens[:1], bool), extra)
    tokens, mask = np.pad(tokens, extra, mode="edge"), np.pad(mask, extra)
    labels = None if request.labels is None else np.pad(request.labels, extra, mode="edge")
    return dataclasses.replace(request, source=tokens, attention_mask=mask, labels=labels, present=present)


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _edits_fit(request: Request) -> bool:
    """Whether no edit depends on the length."""
    # With copies for each head, the inputs of q, k and v have another axis, which values may vary along.
    copies = any(name.endswith(HEAD_COPIES) for name in request.edits)
    inputs = any(name.endswith((".attn.q.hook_in", ".attn.k.hook_in", ".attn.v.hook_in")) for name in request.edits)
    if copies and inputs:
        return False
    return not any(depends_on_length(edit, name) for name, edits in request.edits.items() for edit in edits)


def _reductions_fit(request: Request) -> bool:
    return all(_fits(name, steps) for name, steps in zip(request.names, request.reductions, strict=True))


def _fits(name: str, steps: Steps | Traced | None) -> bool:
    """Whether the result of a reduction has the axis of tokens of its site, or none, and reads no padding."""
    if steps is None:
        return True
    return isinstance(steps, Steps) and is_ready(steps) and not {"p", "k"} <= set(site(name).axes.split())
