"""The picture of a parity report: how far both sides are from the truth, at each kind of site."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from gemma3_jax.pictures.drawing import BLACK, NAME_SIZE, PALE, TICK_SIZE, Area, Box, Drawing, Text, Tips
from gemma3_jax.pictures.parts import LINE, PAD, check_size, heading, longest
from gemma3_jax.pictures.picture import Picture

_PORT, _FAILED, _RULER = "#2166ac", "#b2182b", "#dddddd"
_WIDTH, _ROW, _MARK = 420, 17, 8
_RATIO, _BAR = 60, 50  # widths of the columns on the right
_KEY = "blue: the port; frame: Hugging Face; red: the port, where ratio is above bar"


class Row(TypedDict):
    """A row of a report: the distances of both sides from the truth, at a kind of site."""

    kind: str
    hf: float
    port: float
    ratio: float
    bar: float
    passed: bool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ParityPicture(Picture):
    """For each row of a report the distances of both sides, on a logarithmic axis, with the ratio and its bar."""

    title: str
    rows: list[Row]

    def drawing(self) -> Drawing:
        """The shapes and texts of the picture."""
        left = PAD + longest([row["kind"] for row in self.rows], TICK_SIZE) + PAD
        right = left + _WIDTH
        width = right + PAD + _RATIO + _BAR + PAD
        texts, top = heading(self.title, width)
        top += _ROW + PAD
        bottom = top + _ROW * len(self.rows)
        drawing = Drawing(width, bottom + 4 * NAME_SIZE * LINE, texts=texts)
        check_size(drawing.width, drawing.height)
        axis = _Axis([row[side] for row in self.rows for side in ("hf", "port")], left)
        for power, x in axis.ticks():
            drawing.areas.append(Area(Box(x - 0.5, top, 1, bottom - top), fill=_RULER))
            drawing.texts.append(Text(f"1e{power:+03d}", x, bottom + 10, TICK_SIZE))
        name = "distance from Hugging Face in float64, in its worst layer, relative to the norm"
        drawing.texts.append(Text(name, left + _WIDTH / 2, bottom + 30))
        drawing.texts.append(Text(_KEY, left + _WIDTH / 2, bottom + 50, TICK_SIZE))
        for heading_, x in (("ratio", right + PAD + _RATIO), ("bar", right + PAD + _RATIO + _BAR)):
            drawing.texts.append(Text(heading_, x, top - _ROW / 2, TICK_SIZE, anchor="end"))
        for i, row in enumerate(self.rows):
            _draw_row(drawing, row, axis, top + i * _ROW, left)
        drawing.areas.append(Area(Box(left, top, _WIDTH, bottom - top), edge=BLACK))
        return drawing


def parity_picture(report: Mapping[str, Any], *, title: str | None = None) -> ParityPicture:
    """The rows of a parity report: one kind of site or gradient each.

    Args:
        report: what `Report.as_dict` returns, or what `gemma3-jax parity --json` wrote.
        title: None: the checkpoint and the dtype.

    Raises:
        ValueError: the report has no rows, or is none.

    >>> from gemma3_jax import pictures
    >>> row = {"kind": "logits", "hf": 2e-6, "port": 1e-6, "ratio": 0.5, "bar": 2.0, "passed": True}
    >>> pictures.parity_picture({"source": "tiny", "dtype": "float32", "rows": [row]})
    ParityPicture('Parity of tiny in float32')
    """
    if not report.get("rows"):
        raise ValueError("there are no rows to draw; pass Report.as_dict() or the JSON of `gemma3-jax parity --json`")
    title = f"Parity of {report['source']} in {report['dtype']}" if title is None else title
    return ParityPicture(title, list(report["rows"]))


class _Axis:
    """A logarithmic axis of whole powers of ten; 0 is at its beginning, infinity and NaN at its end."""

    def __init__(self, values: Sequence[float], left: float) -> None:
        powers = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
        self.low, self.high, self.left = math.ceil(min(powers)) - 1, math.floor(max(powers)) + 1, left

    def x(self, value: float) -> float:
        power = self.low if value == 0 else math.log10(value) if 0 < value < math.inf else self.high
        return self.left + _MARK + (_WIDTH - 2 * _MARK) * (power - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[int, float]]:
        every = math.ceil((self.high - self.low) / 10)
        return [(power, self.x(10.0**power)) for power in range(self.low, self.high + 1, every)]


def _draw_row(drawing: Drawing, row: Row, axis: _Axis, top: float, left: float) -> None:
    y = top + _ROW / 2
    colour = _PORT if row["passed"] else _FAILED
    port, hf = axis.x(row["port"]), axis.x(row["hf"])
    drawing.areas.append(Area(Box(min(port, hf), y - 0.5, abs(port - hf), 1), fill=PALE))
    drawing.areas.append(Area(Box(port - _MARK / 2, y - _MARK / 2, _MARK, _MARK), fill=colour))
    drawing.areas.append(Area(Box(hf - _MARK / 2 - 1, y - _MARK / 2 - 1, _MARK + 2, _MARK + 2), edge=BLACK))
    drawing.texts.append(Text(row["kind"], left - 6, y, TICK_SIZE, anchor="end", monospaced=True))
    right = left + _WIDTH + PAD + _RATIO
    for number, x in ((row["ratio"], right), (row["bar"], right + _BAR)):
        drawing.texts.append(Text(f"{number:.2f}", x, y, TICK_SIZE, False, "end", True, colour))
    told = f"port {row['port']:.3g}\nHugging Face {row['hf']:.3g}\nratio {row['ratio']:.3g}, bar {row['bar']:.3g}"
    drawing.tips.append(Tips(Box(0, top, drawing.width, _ROW), [row["kind"]], [""], [[told]]))
