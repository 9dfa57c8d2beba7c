"""Pictures beside each other, on one scale."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma3_jax.pictures.drawing import Drawing
from gemma3_jax.pictures.heatmaps import Heatmaps
from gemma3_jax.pictures.layout import ROW_OF_PANELS
from gemma3_jax.pictures.parts import PAD, check_size, heading
from gemma3_jax.pictures.picture import Picture
from gemma3_jax.pictures.scale import Scale, fitting_scale
from gemma3_jax.pictures.token_flow import TokenFlow


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SideBySide(Picture):
    """Pictures with a title each, and one above all."""

    title: str
    pictures: list[Heatmaps | TokenFlow]

    def drawing(self) -> Drawing:
        """The pictures from left to right, in as many rows as a screen's width needs."""
        drawings = [picture.drawing() for picture in self.pictures]
        places = _places(drawings)
        width = max(x + each.width for (x, _), each in zip(places, drawings, strict=True))
        titles, top = heading(self.title, width)
        height = top + max(y + each.height for (_, y), each in zip(places, drawings, strict=True))
        check_size(width, height)
        together = Drawing(width, height, texts=titles)
        for (x, y), each in zip(places, drawings, strict=True):
            together.add(each, x, top + y)
        return together


def side_by_side(pictures: Sequence[Heatmaps | TokenFlow], *, title: str = "") -> SideBySide:
    """The prompts of a batch, or other pictures, beside each other; those of the same quantity get one scale.

    Args:
        pictures: heatmaps or coloured texts. Their titles say which is which.
        title: above all.

    Raises:
        ValueError: there is no picture.

    >>> from gemma3_jax import pictures
    >>> prompts, losses = [["ba", "ke"], ["lo"]], [[0.5, 0.1], [3.0]]
    >>> each = [pictures.token_values(*pair, quantity="loss") for pair in zip(prompts, losses)]
    >>> both = pictures.side_by_side(each, title="Two prompts")
    >>> [picture.scale.high for picture in both.pictures]
    [3.0, 3.0]
    """
    if not pictures:
        raise ValueError("there is nothing to draw; pass at least one picture")
    scales = {picture.scale.label: _common(picture.scale.label, pictures) for picture in pictures}
    scaled = [dataclasses.replace(picture, scale=scales[picture.scale.label]) for picture in pictures]
    return SideBySide(title, scaled)


def _common(label: str, pictures: Sequence[Heatmaps | TokenFlow]) -> Scale:
    """One scale for the pictures of a quantity, from their lowest end to their highest."""
    same = [picture for picture in pictures if picture.scale.label == label]
    low, high = min(picture.scale.low for picture in same), max(picture.scale.high for picture in same)
    return fitting_scale(label, np.concatenate([picture.every_value() for picture in same]), low, high)


def _places(drawings: list[Drawing]) -> list[tuple[float, float]]:
    """The left upper corner of each."""
    places: list[tuple[float, float]] = []
    x = y = bottom = 0.0
    for drawing in drawings:
        if x and x + drawing.width > ROW_OF_PANELS:
            x, y = 0.0, bottom
        places.append((x, y))
        x, bottom = x + drawing.width + PAD, max(bottom, y + drawing.height)
    return places
