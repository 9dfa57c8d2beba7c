"""Additional rows of a batch, whose results are dropped: for batches of one size, and for meshes of devices.

Axes: b batch, p position.
"""

from __future__ import annotations

import numpy as np

from gemma3_jax.inputs import Inputs
from gemma3_jax.meshes import DATA, mesh_of
from gemma3_jax.types import Params


def with_more_rows(inputs: Inputs, rows: int, *, masked: bool = True) -> Inputs:
    """The inputs with `rows` copies of the last row appended; the result always has a mask.

    A loss must not count the copies, so they are masked unless `masked` is False.
    """
    mask = np.ones_like(inputs.tokens) if inputs.attention_mask is None else inputs.attention_mask
    extra = (0, rows), (0, 0)
    positions, documents, labels = (
        None if x is None else np.pad(x, extra, mode="edge")
        for x in (inputs.positions, inputs.segment_ids, inputs.labels)
    )
    return Inputs(
        np.pad(inputs.tokens, extra, mode="edge"),
        np.pad(mask, extra, mode="constant" if masked else "edge"),
        positions,
        documents,
        labels,
    )


def rows_on_mesh(params: Params, b: int) -> int:
    """The number of rows, at least b, that the mesh of the parameters divides; one row stays one.

    >>> rows_on_mesh({"embed": {"weight": np.ones((3, 2))}}, 5)
    5
    """
    mesh = mesh_of(params)
    devices = 1 if mesh is None else mesh.shape.get(DATA, 1)
    return b if b == 1 else b + -b % devices
