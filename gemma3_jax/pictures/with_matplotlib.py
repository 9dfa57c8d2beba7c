"""Pictures as PNG. Each figure has its own canvas and matplotlib's default style; pyplot and windows are not used."""

import dataclasses
import functools
import io
import math
from typing import Any

import numpy as np

from gemma3_jax.extras import needs_extra
from gemma3_jax.pictures.data import Panel, Panels, Tokens
from gemma3_jax.pictures.labels import escaped, visible
from gemma3_jax.pictures.layout import (
    LINE_WIDTH,
    NAME_SIZE,
    PAD,
    PITCH,
    TICK_SIZE,
    Box,
    Text,
    arrange,
    check_size,
    heading,
    text_width,
)
from gemma3_jax.pictures.scale import GREY_NOTE, Scale

with needs_extra("plots", "pictures need"):
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.patches import Rectangle

_PER_INCH = 100  # pixels of a layout
_SHARPNESS = 1.5  # pixels of a PNG per pixel of its layout
_TOKEN_LINE = 26  # distance between two lines of tokens
_BAR_LENGTH, _BAR_WIDTH = 240, 10  # below the tokens
_PLAIN, _MONOSPACED = "DejaVu Sans", "DejaVu Sans Mono"  # they come with matplotlib


@matplotlib.style.context("default")
def heatmaps_png(heatmaps: Panels) -> bytes:
    """The contents of a PNG file."""
    heatmaps = _all_drawable(heatmaps)
    layout = arrange(heatmaps)
    paper = _paper(layout.width, layout.height)
    for panel, box in zip(heatmaps.panels, layout.panels, strict=True):
        _draw_panel(_axes(paper, box), heatmaps, panel, layout.turned)
    _draw_bar(_axes(paper, layout.bar), heatmaps.scale, "vertical")
    for text in layout.texts:
        _write(paper, text)
    return _contents(paper)


@matplotlib.style.context("default")
def token_flow_png(flow: Tokens) -> bytes:
    """The contents of a PNG file; a line breaks if it is full, or after a token that ends in a newline."""
    texts = [_drawable(visible(token), _MONOSPACED) for token in flow.tokens]
    boxes = _flow([text_width(text, NAME_SIZE) + 6 for text in texts], [t.endswith("\n") for t in flow.tokens])
    width = max(420, *(box.left + box.width for box in boxes)) + PAD
    titles, top = heading(flow.title, width)
    bottom = top + boxes[-1].top + _TOKEN_LINE + PAD
    check_size(width, bottom + 50)
    paper = _paper(width, bottom + 50)
    for text, value, box in zip(texts, flow.values, boxes, strict=True):
        corner = (box.left, top + box.top)
        paper.add_patch(Rectangle(corner, box.width, box.height, color=flow.scale.colour(value), linewidth=0))
        token = Text(text, box.left + box.width / 2, top + box.top + box.height / 2)
        _write(paper, token, _MONOSPACED, flow.scale.ink(value))
    _draw_bar(_axes(paper, Box(2 * PAD, bottom, _BAR_LENGTH, _BAR_WIDTH)), flow.scale, "horizontal")
    notes = "   ".join([flow.scale.label, *([GREY_NOTE] if np.isnan(flow.values).any() else [])])
    middle = 4 * PAD + _BAR_LENGTH + text_width(notes, TICK_SIZE) / 2
    for line in (*titles, Text(notes, middle, bottom + _BAR_WIDTH / 2, TICK_SIZE)):
        _write(paper, line)
    return _contents(paper)


def _flow(widths: list[float], line_ends: list[bool]) -> list[Box]:
    """Boxes with those widths, from left to right in lines."""
    left, top = float(PAD), 0.0
    boxes: list[Box] = []
    for width, line_end in zip(widths, line_ends, strict=True):
        if left + width > LINE_WIDTH - PAD and left > PAD:
            left, top = float(PAD), top + _TOKEN_LINE
        boxes.append(Box(left, top, width, _TOKEN_LINE - 4))
        left, top = (float(PAD), top + _TOKEN_LINE) if line_end else (left + width + 2, top)
    return boxes


def _paper(width: float, height: float) -> Axes:
    """Axes that fill a new figure, with the layout's pixels as coordinates."""
    figure = Figure((width / _PER_INCH, height / _PER_INCH), dpi=_SHARPNESS * _PER_INCH)
    paper = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    paper.set_axis_off()
    return paper


def _axes(paper: Axes, box: Box) -> Axes:
    """New axes that fill the box."""
    width, height = paper.get_xlim()[1], paper.get_ylim()[0]
    bottom = height - box.top - box.height
    return paper.figure.add_axes((box.left / width, bottom / height, box.width / width, box.height / height))


def _contents(paper: Axes) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(paper.get_figure(root=True)).print_png(file)
    return file.getvalue()


def _font(size: float, family: str) -> dict[str, Any]:
    """Properties of a text: matplotlib wants sizes in points, and must not parse dollar signs as mathematics."""
    return {"size": size * 72 / _PER_INCH, "family": family, "parse_math": False}


def _write(paper: Axes, text: Text, family: str = _PLAIN, color: str = "black") -> None:
    paper.text(
        text.x,
        text.y,
        _drawable(text.text, family),
        rotation=90 if text.upward else 0,
        ha="center",
        va="center",
        color=color,
        **_font(text.size, family),
    )


def _draw_panel(axes: Axes, heatmaps: Panels, panel: Panel, turned: bool) -> None:
    scale = heatmaps.scale
    norm = Normalize(scale.low, scale.high)
    axes.imshow(panel.values, cmap=scale.colour_map(), norm=norm, aspect="auto", interpolation="none")
    _label(axes.xaxis, heatmaps.columns.labels, axes.bbox.width, rotation=90 if turned else 0)
    _label(axes.yaxis, heatmaps.rows.labels, axes.bbox.height)
    for r, row in enumerate(panel.texts or []):
        for c, text in enumerate(row):
            _write(axes, Text(text, c, r, TICK_SIZE), _MONOSPACED, scale.ink(panel.values[r, c]))


def _label(axis: Axis, labels: list[str], length: float, rotation: float = 0) -> None:
    """Label each entry of an axis, or every second, third... entry if there is not enough space for all."""
    every = math.ceil(round(PITCH * len(labels) * _SHARPNESS / length, 6))
    axis.set_ticks(range(0, len(labels), every), labels[::every], rotation=rotation, **_font(TICK_SIZE, _MONOSPACED))


def _draw_bar(axes: Axes, scale: Scale, orientation: str) -> None:
    colours = ScalarMappable(Normalize(scale.low, scale.high), scale.colour_map())
    bar = axes.figure.colorbar(colours, cax=axes, orientation=orientation)
    bar.set_ticks(scale.ticks(), labels=scale.tick_labels(), **_font(TICK_SIZE, _PLAIN))


def _all_drawable(heatmaps: Panels) -> Panels:
    """The same heatmaps with drawable labels and texts, so that the layout reserves enough space."""
    rows, columns = (
        dataclasses.replace(axis, labels=[_drawable(label, _MONOSPACED) for label in axis.labels])
        for axis in (heatmaps.rows, heatmaps.columns)
    )
    panels = [
        dataclasses.replace(panel, texts=[[_drawable(text, _MONOSPACED) for text in row] for row in panel.texts or []])
        for panel in heatmaps.panels
    ]
    return dataclasses.replace(heatmaps, rows=rows, columns=columns, panels=panels)


def _drawable(text: str, family: str) -> str:
    """`text` with Python escapes for characters that the font does not have, such as ideographs."""
    return "".join(c if _font_has(family, c) else escaped(c) for c in text)


@functools.cache
def _font_has(family: str, character: str) -> bool:
    return get_font(findfont(family)).get_char_index(ord(character)) != 0
