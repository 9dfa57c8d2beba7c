"""Heatmaps that share their axes and their colours."""

import dataclasses

import numpy as np

from gemma3_jax.pictures.picture import Picture
from gemma3_jax.pictures.scale import Scale


@dataclasses.dataclass(frozen=True)
class Axis:
    """What the rows or the columns are, and the label of each; no two are equal."""

    name: str
    labels: list[str]

    def __post_init__(self):
        if not self.labels:
            raise ValueError(f"there is nothing to draw: the {self.name} axis is empty")
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            raise ValueError(
                f"several entries of the {self.name} axis are labelled {repeated[0]!r}; each needs its own"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One heatmap: values [r, c] float32, NaN where there is none, and what to write in each cell, if anything.

    `details` are what the HTML tells of a cell under the mouse, besides its labels and its value.
    """

    title: str
    values: np.ndarray
    texts: list[list[str]] | None = None
    details: list[list[str]] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Heatmaps(Picture):
    """Panels with the same rows, columns and scale; plotly draws them in HTML, matplotlib in PNG.

    A notebook shows the HTML page in a frame. The page is in the notebook's file, plotly's script and all: 6 MB for
    each picture, which the saved notebook then shows without network.
    """

    title: str
    panels: list[Panel]
    rows: Axis
    columns: Axis
    scale: Scale

    def __post_init__(self):
        if not self.panels:
            raise ValueError("there is nothing to draw: no head is named")

    def to_html(self) -> str:
        """A page of 5 MB, nearly all of it plotly's script."""
        from gemma3_jax.pictures import with_plotly

        return with_plotly.to_html(self)

    def to_png(self) -> bytes:
        """The HTML's picture, at 1.5 pixels for each of its own. Peak memory: about 8 bytes a pixel of the PNG."""
        from gemma3_jax.pictures import with_matplotlib

        return with_matplotlib.heatmaps_png(self)

    def _repr_html_(self) -> str:
        from gemma3_jax.pictures import with_plotly

        return with_plotly.to_frame(self)
