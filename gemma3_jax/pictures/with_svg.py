"""A drawing as SVG, for web pages and notebooks.

A notebook gets the SVG as an image: notebook programs remove SVG elements, frames and scripts from outputs that they do
not trust, and leave images. What the mouse tells comes from an attribute of the element around the picture. So each
output works alone, whether all outputs share a page or each has a frame, and without it the picture is still seen.
"""

import base64
import html
import io
import json
from collections.abc import Iterator

import numpy as np

from gemma3_jax.extras import needs_extra
from gemma3_jax.pictures.drawing import Area, Drawing, Grid, Line, Text, Tips
from gemma3_jax.pictures.labels import as_html

with needs_extra("plots", "pictures need"):
    from matplotlib.image import imsave

_FAMILIES = "DejaVu Sans, Verdana, sans-serif", "DejaVu Sans Mono, Menlo, Consolas, monospace"
# The style is set with the text, so that an untrusted notebook, which drops "hidden", has no empty frame.
_TIP_STYLE = (
    "position:absolute;left:0;top:0;padding:3px 6px;background:#fff;color:#000;border:1px solid #888;"
    "font:12px/1.4 monospace;white-space:pre;pointer-events:none"
)
# Finds the cell below the mouse by the fractions of the picture's sides, and shows its text beside the mouse.
_TELL = (
    f"""const style = '{_TIP_STYLE}';"""
    + """
const p = this.firstElementChild.getBoundingClientRect(), box = this.getBoundingClientRect();
const tip = this.lastElementChild, grids = this.grids ??= JSON.parse(this.dataset.tips);
const x = (event.clientX - p.left) / p.width, y = (event.clientY - p.top) / p.height;
let text = '';
for (const [left, top, width, height, rows, columns, cells, name] of grids) {
const r = Math.floor((y - top) / height * rows.length), c = Math.floor((x - left) / width * columns.length);
if (r in cells && c in cells[r]) text = [rows[r], columns[c], name + cells[r][c]].filter(Boolean).join('\\n');
}
tip.textContent = text;
tip.hidden = !text;
tip.style.cssText = style;
tip.style.left = event.clientX - box.left + this.scrollLeft + 'px';
tip.style.top = event.clientY - box.top + 'px';
tip.style.transform = (x > 0.5 ? 'translateX(calc(-100% - 12px))' : 'translateX(12px)')
+ (y > 0.5 ? ' translateY(-100%)' : '');
""".replace("\n", " ")
)


def inline(drawing: Drawing, title: str) -> str:
    """HTML with an SVG element, whose texts can be selected and searched."""
    return _with_tips(drawing, svg(drawing, title))


def as_image(drawing: Drawing, title: str) -> str:
    """HTML with an image, for a notebook."""
    source = base64.b64encode(svg(drawing, title).encode()).decode()
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" style="max-width:none;margin:0"'
    return _with_tips(drawing, f'<img alt="{as_html(title)}" {size} src="data:image/svg+xml;base64,{source}">')


def svg(drawing: Drawing, title: str) -> str:
    """The drawing as an SVG document."""
    width, height = f"{drawing.width:.0f}", f"{drawing.height:.0f}"
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{as_html(title)}" style="vertical-align:top;max-width:none">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *map(_area, drawing.areas),
        *map(_grid, drawing.grids),
        *map(_line, drawing.lines),
        *_texts(drawing.texts),
        "</svg>",
    ]
    return "\n".join(elements)


def _with_tips(drawing: Drawing, picture: str) -> str:
    tips = json.dumps([_fractions(tip, drawing) for tip in drawing.tips], ensure_ascii=False, separators=(",", ":"))
    # Single quotes, since JSON has many double ones.
    data = tips.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")
    return (
        f"<div style=\"position:relative;overflow-x:auto;background:#fff;color:#000\" data-tips='{data}' "
        f'onpointermove="{html.escape(_TELL, quote=False)}" onpointerleave="this.lastElementChild.hidden = true">'
        f"{picture}<div hidden></div></div>"
    )


def _fractions(tips: Tips, drawing: Drawing) -> list[object]:
    left, top, width, height = tips.box
    sides = left / drawing.width, top / drawing.height, width / drawing.width, height / drawing.height
    return [*(round(side, 6) for side in sides), tips.rows, tips.columns, tips.cells, tips.name]


def _area(area: Area) -> str:
    return f'<rect {_box(area)} fill="{area.fill or "none"}" stroke="{area.edge or "none"}"/>'


def _grid(grid: Grid) -> str:
    """An image of one pixel per cell."""
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(grid.colours), format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<image {_box(grid)} preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _box(shape: Area | Grid) -> str:
    left, top, width, height = map(_number, shape.box)
    return f'x="{left}" y="{top}" width="{width}" height="{height}"'


def _line(line: Line) -> str:
    x1, y1, x2, y2 = map(_number, line[:4])
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{line.colour}" stroke-width="{line.width}"/>'


def _texts(texts: list[Text]) -> Iterator[str]:
    """The texts, in a group for each style."""
    styles: dict[tuple[object, ...], list[str]] = {}
    for text in texts:
        style = text.size, text.anchor, text.monospaced, text.colour
        styles.setdefault(style, []).append(_text(text))
    for (size, anchor, monospaced, colour), elements in styles.items():
        yield (
            f'<g font-size="{size}" text-anchor="{anchor}" font-family="{_FAMILIES[bool(monospaced)]}" '
            f'fill="{colour}" dominant-baseline="central">{"".join(elements)}</g>'
        )


def _text(text: Text) -> str:
    x, y = _number(text.x), _number(text.y)
    turn = f' transform="rotate(-90 {x} {y})"' if text.upward else ""
    return f'<text x="{x}" y="{y}"{turn}>{as_html(text.text)}</text>'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
