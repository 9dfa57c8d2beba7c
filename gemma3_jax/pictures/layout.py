"""The layout of heatmaps, in pixels from the top left corner of the picture; HTML and PNG share it."""

import dataclasses
import math
import textwrap
from typing import NamedTuple

import numpy as np

from gemma3_jax.pictures.data import Panels
from gemma3_jax.pictures.labels import width
from gemma3_jax.pictures.scale import GREY_NOTE

TICK_SIZE, NAME_SIZE, TITLE_SIZE = 10, 12, 15  # of fonts
PITCH = 12  # smallest distance between two tick labels
_CHARACTER = 0.61  # width / size in a monospaced font; more than the average in a proportional font
LINE = 1.5  # height / size
PAD = 12
_BAR_WIDTH, _BAR_LENGTH, _BAR_ROOM = 14, 200, 100
_ROW_OF_PANELS = 1600
_LARGEST_SIDE = 20_000
LINE_WIDTH = 900  # width of a line of tokens


class Box(NamedTuple):
    """A rectangle."""

    left: float
    top: float
    width: float
    height: float


class Text(NamedTuple):
    """A text centred at (`x`, `y`); with `upward`, it is rotated to be read upward."""

    text: str
    x: float
    y: float
    size: int = NAME_SIZE
    upward: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """The size of the picture, its panels in order, its colour bar, and all texts except tick labels."""

    width: float
    height: float
    panels: list[Box]
    bar: Box
    texts: list[Text]
    turned: bool  # the labels of columns are read upward


def text_width(text: str, size: int) -> float:
    """An upper estimate of the width of a text, in pixels."""
    return width(text) * size * _CHARACTER


def arrange(heatmaps: Panels) -> Layout:
    """Lay out `Panels`: as many panels side by side as fit a screen, with the colour bar on their right.

    Raises:
        ValueError: the picture would be too large to draw.
    """
    rows, columns, panels = heatmaps.rows, heatmaps.columns, heatmaps.panels
    cell_width, cell_height = _cell(heatmaps)
    wide, high = cell_width * len(columns.labels), cell_height * len(rows.labels)
    label = _longest(columns.labels, TICK_SIZE)
    turned = label + 10 > cell_width
    name = NAME_SIZE * LINE
    # Space around each panel: for its title above, for the labels and name of rows on the left, and of columns below.
    left = _longest(rows.labels, TICK_SIZE) + name + PAD
    above = name + 4 if any(panel.title for panel in panels) else PAD
    below = (label if turned else TICK_SIZE * LINE) + name + 2 * PAD
    slot_width = left + max(wide, _longest([panel.title for panel in panels], NAME_SIZE)) + PAD
    slot_height = above + high + below
    across = _across(len(panels), slot_width)
    bar_left = across * slot_width + 2 * PAD
    total_width = bar_left + _BAR_ROOM
    texts, top = heading(heatmaps.title, total_width)
    total_height = top + max(slot_height * math.ceil(len(panels) / across), above + _BAR_LENGTH + 3 * name)
    check_size(total_width, total_height)

    boxes = [
        Box(PAD + left + slot_width * (i % across), top + above + slot_height * (i // across), wide, high)
        for i in range(len(panels))
    ]
    bar = Box(bar_left, top + above, _BAR_WIDTH, _BAR_LENGTH)
    for panel, box in zip(panels, boxes, strict=True):
        texts += [
            Text(panel.title, box.left + wide / 2, box.top - above / 2),
            Text(rows.name, box.left - left + name / 2, box.top + high / 2, upward=True),
            Text(columns.name, box.left + wide / 2, box.top + high + below - PAD - name / 2),
        ]
    label_left = bar.left + bar.width + 8 + _longest(heatmaps.scale.tick_labels(), TICK_SIZE)
    texts.append(Text(heatmaps.scale.label, label_left + name / 2, bar.top + bar.height / 2, upward=True))
    if any(np.isnan(panel.values).any() for panel in panels):
        texts.append(Text(GREY_NOTE, bar.left + 40, bar.top + bar.height + 1.5 * name, TICK_SIZE))
    return Layout(total_width, total_height, boxes, bar, [text for text in texts if text.text], turned)


def heading(title: str, width: float) -> tuple[list[Text], float]:
    """The lines of a title above a picture of that width, and the y coordinate where they end."""
    high = TITLE_SIZE * LINE
    lines = textwrap.wrap(title, int((width - 2 * PAD) / text_width("x", TITLE_SIZE)))
    texts = [Text(line, width / 2, PAD + (i + 0.5) * high, TITLE_SIZE) for i, line in enumerate(lines)]
    return texts, PAD + len(lines) * high


def _longest(texts: list[str], size: int) -> float:
    return max(text_width(text, size) for text in texts)


def _cell(heatmaps: Panels) -> tuple[float, float]:
    """Width and height of a cell: enough for its text, or a square that keeps many panels small."""
    texts = [text for panel in heatmaps.panels for row in panel.texts or [] for text in row]
    if texts:
        return max(24, _longest(texts, TICK_SIZE) + 8), 20
    panels = len(heatmaps.panels)
    largest, side = (24, 128 * PITCH) if panels == 1 else (16, 64 * PITCH) if panels <= 4 else (16, 32 * PITCH)
    square = min(largest, side / max(len(heatmaps.rows.labels), len(heatmaps.columns.labels)))
    return square, square


def _across(panels: int, slot_width: float) -> int:
    """The number of panels side by side, such that rows are as even as the screen's width allows."""
    most = max(1, int(_ROW_OF_PANELS / slot_width))
    return math.ceil(panels / math.ceil(panels / most))


def check_size(width: float, height: float) -> None:
    """Raise a ValueError if a picture would be too large to draw."""
    if max(width, height) > _LARGEST_SIDE:
        raise ValueError(
            f"the picture would be {width:,.0f} x {height:,.0f} pixels; the limit is {_LARGEST_SIDE:,} pixels a side. "
            "Use fewer heads, layers or positions"
        )
