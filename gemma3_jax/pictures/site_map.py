"""The map of one block: where each of its sites is, from the table of sites."""

import dataclasses
import itertools
import re
from itertools import groupby
from typing import TypeAlias

from gemma3_jax.pictures.drawing import BLACK, NAME_SIZE, PALE, TICK_SIZE, Area, Box, Drawing, Line, Text, Tips
from gemma3_jax.pictures.parts import PAD, heading, longest
from gemma3_jax.pictures.picture import Picture
from gemma3_jax.sites.table import SITES, Site

_BLOCK = "blocks.{i}."
# What runs in parallel has a column for each path.
_PATH = re.compile(r"[._](q|k|v)(?:[._]|$)|\.(gate|in)\.")
_COLUMN_OF = {"q": 0, "k": 1, "v": 2, "gate": 0, "in": 1}
_COLUMNS, _GAP = 3, 16
_ROW, _MARGIN = 17, 8
_STREAM = 46  # x of the residual stream
_ON_DEMAND = "#fff2c4"
Band: TypeAlias = dict[int | None, list[Site]]
_LEGEND = (
    "Each name follows blocks.{i}. and may be used as it is; grey: TransformerLens' other name for it. "
    "Brackets: b batch, p position, k key position, h query heads, g key/value heads, e head_dim, d hidden_size, "
    "f intermediate_size.",
    "Yellow: computed only if it is captured or edited. In HTML, the mouse tells what a site holds, what an edit there "
    "reaches, and Hugging Face's name.",
)


@dataclasses.dataclass(frozen=True, repr=False)
class BlockMap(Picture):
    """The sites of a block in the order of computation, from top to bottom, beside the residual stream."""

    title: str

    def drawing(self) -> Drawing:
        """The shapes and texts of the picture."""
        left, columns = _STREAM + 40.0, _Columns()
        texts, top = heading(self.title, left + columns.total + PAD)
        drawing = Drawing(left + columns.total + PAD, 0, texts=texts)
        bands, y = _bands(), top + PAD
        for before, band, after in zip([None, *bands], bands, [*bands[1:], None], strict=False):
            bottom = y + _ROW * max(map(len, band.values()))
            for column, sites in band.items():
                _draw_sites(drawing, sites, left, y, columns, column)
            if _on_stream(band):
                _draw_way(drawing, y + _ROW / 2, left, PALE, "•")
            else:
                if before is None or _on_stream(before):
                    _draw_way(drawing, y + _ROW / 2, left, BLACK, "•")
                if after is None or _on_stream(after):
                    _draw_way(drawing, bottom - _ROW / 2, left, BLACK, "+")
                else:
                    drawing.texts.append(Text("▼", left + columns.total / 2, bottom + _GAP / 2, TICK_SIZE))
            y = bottom + _GAP
        drawing.areas.insert(0, Area(Box(_STREAM - 1.5, top, 3, y - top), fill=BLACK))
        drawing.texts.append(Text("residual stream", _STREAM - 20, (top + y) / 2, upward=True))
        for i, line in enumerate(_LEGEND, start=1):
            drawing.texts.append(Text(line, PAD, y + i * _ROW, TICK_SIZE, anchor="start"))
        return dataclasses.replace(drawing, height=y + (len(_LEGEND) + 1) * _ROW)


def block_map() -> BlockMap:
    """The map of one block with the name of each site, drawn from the table of sites.

    The canonical name and TransformerLens' are beside each other, with the axes of the value. All blocks are alike.

    >>> from gemma3_jax import pictures
    >>> pictures.block_map()
    BlockMap('The sites of a block of Gemma 3')
    """
    return BlockMap("The sites of a block of Gemma 3")


class _Columns:
    """The widths of columns and of the parts of a row: name, other name, axes."""

    def __init__(self) -> None:
        every = [row for row in SITES if row.name.startswith(_BLOCK)]
        parallel = [row for row in every if _column(row) is not None]
        self.names, self.others, self.axes = (
            longest([part(row) for row in parallel], TICK_SIZE) + _MARGIN for part in (_name, _other_name, _axes)
        )
        self.one = 2 * _MARGIN + self.names + self.others + self.axes
        self.total = _COLUMNS * self.one + (_COLUMNS - 1) * _GAP


def _bands() -> list[Band]:
    """The sites of a block from top to bottom: each band has a column for each parallel path, or one."""
    inside = [row for row in SITES if row.name.startswith(_BLOCK)]
    bands: list[Band] = []
    for is_parallel, rows in groupby(inside, key=lambda row: _column(row) is not None or _name(row).partition(".")[0]):
        band: Band = {}
        for row in rows:
            band.setdefault(_column(row) if is_parallel is True else None, []).append(row)
        bands.append(band)
    return bands


def _on_stream(band: Band) -> bool:
    """Whether the band is a value of the residual stream itself."""
    [first, *_] = band.values()
    return "." not in _name(first[0]) and first[0].axes == "b p d"


def _column(site: Site) -> int | None:
    found = _PATH.search(site.name.removeprefix(_BLOCK))
    return _COLUMN_OF[found[1] or found[2]] if found else None


def _name(site: Site) -> str:
    return site.name.removeprefix(_BLOCK)


def _other_name(site: Site) -> str:
    return (site.legacy or "").removeprefix(_BLOCK)


def _axes(site: Site) -> str:
    return f"[{site.axes}]"


def _draw_sites(
    drawing: Drawing, sites: list[Site], left: float, y: float, columns: _Columns, column: int | None
) -> None:
    """A frame with a row for each site; over the whole width, a row also says what the site holds."""
    width = columns.total if column is None else columns.one
    x = left if column is None else left + column * (columns.one + _GAP)
    for i, site in enumerate(sites):
        box = Box(x, y + i * _ROW, width, _ROW)
        if site.computed != "always":
            drawing.areas.append(Area(box, fill=_ON_DEMAND))
        places = itertools.accumulate((_MARGIN, columns.names, columns.others, columns.axes))
        parts = (_name(site), BLACK), (_other_name(site), PALE), (_axes(site), BLACK), (site.holds, BLACK)
        for place, (text, colour) in list(zip(places, parts, strict=True))[: 4 if column is None else 3]:
            middle = box.top + _ROW / 2
            drawing.texts.append(Text(text, x + place, middle, TICK_SIZE, False, "start", True, colour))
        drawing.tips.append(Tips(box, [site.name], [""], [[_told(site)]]))
    drawing.areas.append(Area(Box(x, y, width, _ROW * len(sites)), edge=BLACK))


def _told(site: Site) -> str:
    names = [f"TransformerLens: {site.legacy}"] * bool(site.legacy) + [f"Hugging Face: {site.hf}"] * bool(site.hf)
    return "\n".join([*names, f"{_axes(site)} {site.dtype}: {site.holds}", f"an edit reaches {site.reaches}"])


def _draw_way(drawing: Drawing, y: float, left: float, colour: str, sign: str) -> None:
    """A line between the residual stream and the boxes, and a sign where it meets the stream."""
    drawing.lines.append(Line(_STREAM + 7, y, left, y, colour))
    drawing.areas.append(Area(Box(_STREAM - 7, y - 7, 14, 14), fill="#ffffff", edge=BLACK))
    drawing.texts.append(Text(sign, _STREAM, y, NAME_SIZE))
