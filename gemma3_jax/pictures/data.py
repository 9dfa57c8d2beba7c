"""The data of a picture. This module does not draw."""

import dataclasses

import numpy as np

from gemma3_jax.pictures.scale import Scale


@dataclasses.dataclass(frozen=True)
class Axis:
    """The name of the rows or columns, and a label for each; labels are unique."""

    name: str
    labels: list[str]

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"there is nothing to draw: the {self.name} axis is empty")
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            raise ValueError(
                f"several entries of the {self.name} axis are labelled {repeated[0]!r}; labels must be unique"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One heatmap: values [r, c] float32, NaN where there is no value, and optional texts for the cells.

    The HTML shows `details` when the mouse is over a cell, with the labels of the cell and without its value.
    """

    title: str
    values: np.ndarray
    texts: list[list[str]] | None = None
    details: list[list[str]] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Panels:
    """Heatmaps with the same rows, columns and scale."""

    title: str
    panels: list[Panel]
    rows: Axis
    columns: Axis
    scale: Scale

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("there is nothing to draw; name at least one head")

    def every_value(self) -> np.ndarray:
        """[n], the values of all panels."""
        return np.concatenate([panel.values.ravel() for panel in self.panels])


@dataclasses.dataclass(frozen=True, eq=False)
class Passage:
    """The tokens of a text, each with its value [p] float32, NaN where there is no value; None if none has one."""

    heading: str
    tokens: list[str]
    values: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """Passages, one below the other, on one scale."""

    title: str
    passages: list[Passage]
    scale: Scale

    def __post_init__(self) -> None:
        if not self.passages:
            raise ValueError("there is nothing to draw; pass at least one text")

    def every_value(self) -> np.ndarray:
        """[n], the values of all passages."""
        valued = [passage.values for passage in self.passages if passage.values is not None]
        return np.concatenate([np.zeros(0, np.float32), *valued])
