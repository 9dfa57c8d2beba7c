"""What a layout makes of the data, and what a renderer draws: shapes and texts, in pixels from the top left corner."""

import dataclasses
from typing import NamedTuple

import numpy as np

TICK_SIZE, NAME_SIZE, TITLE_SIZE = 10, 12, 15  # of fonts
BLACK, PALE = "#000000", "#888888"


class Box(NamedTuple):
    """A rectangle."""

    left: float
    top: float
    width: float
    height: float

    def shifted(self, x: float, y: float) -> "Box":
        """The rectangle, moved to the right and down."""
        return self._replace(left=self.left + x, top=self.top + y)


class Text(NamedTuple):
    """A text at (`x`, `y`), half of its height above; with `upward`, it is rotated to be read upward.

    `anchor` says what of the text is at that point: its "start", "middle" or "end".
    """

    text: str
    x: float
    y: float
    size: int = NAME_SIZE
    upward: bool = False
    anchor: str = "middle"
    monospaced: bool = False
    colour: str = BLACK

    def shifted(self, x: float, y: float) -> "Text":
        """The text, moved to the right and down."""
        return self._replace(x=self.x + x, y=self.y + y)


class Area(NamedTuple):
    """A filled rectangle, or the edge of one, or both."""

    box: Box
    fill: str | None = None
    edge: str | None = None

    def shifted(self, x: float, y: float) -> "Area":
        """The area, moved to the right and down."""
        return self._replace(box=self.box.shifted(x, y))


class Line(NamedTuple):
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str = BLACK
    width: float = 1

    def shifted(self, x: float, y: float) -> "Line":
        """The line, moved to the right and down."""
        return self._replace(x1=self.x1 + x, x2=self.x2 + x, y1=self.y1 + y, y2=self.y2 + y)


class Grid(NamedTuple):
    """A box with cells of equal size, filled with colours [r, c, 3] uint8."""

    box: Box
    colours: np.ndarray

    def shifted(self, x: float, y: float) -> "Grid":
        """The grid, moved to the right and down."""
        return self._replace(box=self.box.shifted(x, y))


class Tips(NamedTuple):
    """A box with cells of equal size, and what HTML shows over one: the text of its row, of its column and its own.

    `name` stands before the text of every cell.
    """

    box: Box
    rows: list[str]
    columns: list[str]
    cells: list[list[str]]  # [r, c]
    name: str = ""

    def shifted(self, x: float, y: float) -> "Tips":
        """The box, moved to the right and down."""
        return self._replace(box=self.box.shifted(x, y))


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """A picture's size and what it consists of, from the lowest to the highest."""

    width: float
    height: float
    areas: list[Area] = dataclasses.field(default_factory=list)
    grids: list[Grid] = dataclasses.field(default_factory=list)
    lines: list[Line] = dataclasses.field(default_factory=list)
    texts: list[Text] = dataclasses.field(default_factory=list)
    tips: list[Tips] = dataclasses.field(default_factory=list)

    def add(self, other: "Drawing", x: float = 0, y: float = 0) -> None:
        """Put what another drawing consists of on this one, moved to the right and down."""
        self.areas.extend(each.shifted(x, y) for each in other.areas)
        self.grids.extend(each.shifted(x, y) for each in other.grids)
        self.lines.extend(each.shifted(x, y) for each in other.lines)
        self.texts.extend(each.shifted(x, y) for each in other.texts)
        self.tips.extend(each.shifted(x, y) for each in other.tips)
