"""A drawing as PNG. Each figure has its own canvas and matplotlib's default style; pyplot and windows are not used."""

import io
import unicodedata
from typing import Any

from gemma3_jax.extras import needs_extra
from gemma3_jax.pictures.drawing import Box, Drawing, Text
from gemma3_jax.pictures.fonts import MONOSPACED, PLAIN, drawable, families, warn_of_missing
from gemma3_jax.pictures.labels import printable

with needs_extra("plots", "pictures need"):
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

_PER_INCH = 100  # pixels of a layout
_SHARPNESS = 1.5  # pixels of a PNG per pixel of its layout
_ACROSS = {"start": "left", "middle": "center", "end": "right"}
_LEFT_TO_RIGHT = "\u200e"  # a mark without a shape
_UPWARD = {"start": "bottom", "middle": "center", "end": "top"}


@matplotlib.style.context("default")
def png(drawing: Drawing) -> bytes:
    """The contents of a PNG file."""
    figure = Figure((drawing.width / _PER_INCH, drawing.height / _PER_INCH), dpi=_SHARPNESS * _PER_INCH)
    paper = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    paper.set_axis_off()
    for box, fill, _ in drawing.areas:
        if fill:
            paper.add_patch(_rectangle(box, facecolor=fill, linewidth=0))
    for box, colours in drawing.grids:
        _over(paper, box).imshow(colours, aspect="auto", interpolation="none")
    above = _over(paper, Box(0, 0, drawing.width, drawing.height))
    above.set(xlim=paper.get_xlim(), ylim=paper.get_ylim())
    for box, _, edge in drawing.areas:
        if edge:
            above.add_patch(_rectangle(box, edgecolor=edge, fill=False, linewidth=0.8))
    for line in drawing.lines:
        width = 0.8 * line.width
        above.plot((line.x1, line.x2), (line.y1, line.y2), color=line.colour, lw=width, solid_capstyle="butt")
    _write(above, drawing.texts)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _over(paper: Axes, box: Box) -> Axes:
    """New axes, without lines, that fill the box."""
    width, height = paper.get_xlim()[1], paper.get_ylim()[0]
    bottom = height - box.top - box.height
    axes = paper.figure.add_axes((box.left / width, bottom / height, box.width / width, box.height / height))
    axes.set_axis_off()
    return axes


def _rectangle(box: Box, **style: Any) -> Rectangle:
    return Rectangle((box.left, box.top), box.width, box.height, **style)


def _write(paper: Axes, texts: list[Text]) -> None:
    texts = [text._replace(text=printable(text.text)) for text in texts]
    warn_of_missing(text.text for text in texts)
    shown = [text._replace(text=drawable(text.text)) for text in texts]
    all_families = {
        monospaced: families((text.text for text in shown), MONOSPACED if monospaced else PLAIN)
        for monospaced in (True, False)
    }
    for text in shown:
        paper.text(
            text.x,
            text.y,
            _from_left(text.text),
            rotation=90 if text.upward else 0,
            ha="center" if text.upward else _ACROSS[text.anchor],
            va=_UPWARD[text.anchor] if text.upward else "center_baseline",
            color=text.colour,
            size=text.size * 72 / _PER_INCH,  # in points
            family=all_families[text.monospaced],
            parse_math=False,
        )


def _from_left(text: str) -> str:
    """`text` as part of an English picture: letters of other directions change the order of nothing but themselves."""
    other = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    return _LEFT_TO_RIGHT + text if other else text
