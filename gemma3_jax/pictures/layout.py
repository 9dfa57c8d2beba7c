"""The layout of heatmaps, in pixels from the top left corner of the picture; HTML and PNG share it."""

import dataclasses
import math

import numpy as np

from gemma3_jax.pictures.data import Axis, Panel, Panels
from gemma3_jax.pictures.drawing import (
    BLACK,
    NAME_SIZE,
    TICK_SIZE,
    Area,
    Box,
    Drawing,
    Grid,
    Line,
    Text,
    Tips,
)
from gemma3_jax.pictures.labels import printable
from gemma3_jax.pictures.parts import LINE, PAD, check_size, heading, longest, upright_bar
from gemma3_jax.pictures.scale import GREY_NOTE

PITCH = 12  # smallest distance between two tick labels
_TICK = 3
_BAR_WIDTH, _BAR_LENGTH, _BAR_ROOM = 14, 200, 100
ROW_OF_PANELS = 1600  # width of a screen


@dataclasses.dataclass(frozen=True)
class Layout:
    """The size of the picture, its panels in order, its colour bar, and all texts except tick labels."""

    width: float
    height: float
    panels: list[Box]
    bar: Box
    texts: list[Text]
    turned: bool  # the labels of columns are read upward


def draw(heatmaps: Panels) -> Drawing:
    """The drawing of heatmaps.

    Raises:
        ValueError: the picture would be too large to draw.
    """
    layout = arrange(heatmaps)
    drawing = Drawing(layout.width, layout.height, texts=list(layout.texts))
    drawing.add(upright_bar(heatmaps.scale, layout.bar))
    for panel, box in zip(heatmaps.panels, layout.panels, strict=True):
        _draw_panel(drawing, heatmaps, panel, box)
        _draw_ticks(drawing, heatmaps, box, layout.turned)
    return drawing


def arrange(heatmaps: Panels) -> Layout:
    """Lay out `Panels`: as many panels side by side as fit a screen, with the colour bar on their right.

    Raises:
        ValueError: the picture would be too large to draw.
    """
    rows, columns, panels = heatmaps.rows, heatmaps.columns, heatmaps.panels
    cell_width, cell_height = _cell(heatmaps)
    wide, high = cell_width * len(columns.labels), cell_height * len(rows.labels)
    label = longest(columns.labels, TICK_SIZE)
    turned = label + 10 > cell_width
    name = NAME_SIZE * LINE
    # Space around each panel: for its title above, for the labels and name of rows on the left, and of columns below.
    left = longest(rows.labels, TICK_SIZE) + name + PAD
    above = name + 4 if any(panel.title for panel in panels) else PAD
    below = (label if turned else TICK_SIZE * LINE) + name + 2 * PAD
    slot_width = left + max(wide, longest([panel.title for panel in panels], NAME_SIZE)) + PAD
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
    if any(np.isnan(panel.values).any() for panel in panels):
        texts.append(Text(GREY_NOTE, bar.left + 40, bar.top + bar.height + 1.5 * name, TICK_SIZE))
    return Layout(total_width, total_height, boxes, bar, [text for text in texts if text.text], turned)


def _cell(heatmaps: Panels) -> tuple[float, float]:
    """Width and height of a cell: enough for its text, or a square that keeps many panels small."""
    texts = [text for panel in heatmaps.panels for row in panel.texts or [] for text in row]
    if texts:
        return max(24, longest(texts, TICK_SIZE) + 8), 20
    panels = len(heatmaps.panels)
    largest, side = (24, 128 * PITCH) if panels == 1 else (16, 64 * PITCH) if panels <= 4 else (16, 32 * PITCH)
    square = min(largest, side / max(len(heatmaps.rows.labels), len(heatmaps.columns.labels)))
    return square, square


def _across(panels: int, slot_width: float) -> int:
    """The number of panels side by side, such that rows are as even as the screen's width allows."""
    most = max(1, int(ROW_OF_PANELS / slot_width))
    return math.ceil(panels / math.ceil(panels / most))


def _draw_panel(drawing: Drawing, heatmaps: Panels, panel: Panel, box: Box) -> None:
    scale, rows, columns = heatmaps.scale, heatmaps.rows, heatmaps.columns
    drawing.grids.append(Grid(box, scale.colours(panel.values)))
    drawing.areas.append(Area(box, edge=BLACK))
    cells = panel.details or [[_told(value) for value in row] for row in panel.values.tolist()]
    name = "" if panel.details else f"{printable(scale.label)} "
    drawing.tips.append(Tips(box, _named(rows), _named(columns), cells, name))
    across, down = box.width / len(columns.labels), box.height / len(rows.labels)
    for r, row in enumerate(panel.texts or []):
        for c, text in enumerate(row):
            x, y = box.left + (c + 0.5) * across, box.top + (r + 0.5) * down
            drawing.texts.append(Text(text, x, y, TICK_SIZE, monospaced=True, colour=scale.ink(panel.values[r, c])))


def _told(value: float) -> str:
    return "has no value" if np.isnan(value) else f"{value:.4g}"


def _named(axis: Axis) -> list[str]:
    return [f"{printable(axis.name)} {label}" for label in axis.labels]


def _draw_ticks(drawing: Drawing, heatmaps: Panels, box: Box, turned: bool) -> None:
    """A tick and a label for each row and column, or for every second, third... if there is too little space."""
    bottom = box.top + box.height
    for label, y in _spread(heatmaps.rows.labels, box.top, box.height):
        drawing.lines.append(Line(box.left - _TICK, y, box.left, y))
        drawing.texts.append(Text(label, box.left - 2 * _TICK, y, TICK_SIZE, anchor="end", monospaced=True))
    for label, x in _spread(heatmaps.columns.labels, box.left, box.width):
        drawing.lines.append(Line(x, bottom, x, bottom + _TICK))
        y = bottom + 2 * _TICK + (0 if turned else TICK_SIZE / 2)
        anchor = "end" if turned else "middle"
        drawing.texts.append(Text(label, x, y, TICK_SIZE, upward=turned, anchor=anchor, monospaced=True))


def _spread(labels: list[str], start: float, length: float) -> list[tuple[str, float]]:
    """Labels at the middles of equal parts of a length, at least `PITCH` apart."""
    every = math.ceil(round(PITCH * len(labels) / length, 6))
    return [(labels[i], start + (i + 0.5) * length / len(labels)) for i in range(0, len(labels), every)]
