"""What layouts share: the width of a text, the title of a picture and its colour bar."""

import textwrap

from gemma3_jax.pictures.drawing import BLACK, NAME_SIZE, TICK_SIZE, TITLE_SIZE, Area, Box, Drawing, Grid, Line, Text
from gemma3_jax.pictures.labels import width as columns
from gemma3_jax.pictures.scale import Scale

LINE = 1.5  # height / size of a font
PAD = 12
_CHARACTER = 0.61  # width / size in a monospaced font; more than the average in a proportional font
_TICK = 3
_LARGEST_SIDE = 20_000


def upright_bar(scale: Scale, box: Box) -> Drawing:
    """A bar from the highest value down, with ticks and the name of the values on its right."""
    bar = Drawing(0, 0, [Area(box, edge=BLACK)], [Grid(box, scale.stops()[::-1, None])])
    right = box.left + box.width
    for tick, label in scale.ticks().items():
        y = box.top + box.height * (scale.high - tick) / (scale.high - scale.low)
        bar.lines.append(Line(right, y, right + _TICK, y))
        bar.texts.append(Text(label, right + 2 * _TICK, y, TICK_SIZE, anchor="start"))
    name_left = right + 8 + longest(list(scale.ticks().values()), TICK_SIZE)
    middle = box.top + box.height / 2
    bar.texts.append(Text(scale.label, name_left + NAME_SIZE * LINE / 2, middle, upward=True))
    return bar


def lying_bar(scale: Scale, box: Box, note: str = "") -> Drawing:
    """A bar with ticks below, and the name of the values and a note on its right."""
    bar = Drawing(0, 0, [Area(box, edge=BLACK)], [Grid(box, scale.stops()[None])])
    bottom, right = box.top + box.height, box.left + box.width
    for tick, label in scale.ticks().items():
        x = box.left + box.width * (tick - scale.low) / (scale.high - scale.low)
        bar.lines.append(Line(x, bottom, x, bottom + _TICK))
        bar.texts.append(Text(label, x, bottom + _TICK + 8, TICK_SIZE))
    notes = "   ".join(filter(None, (scale.label, note)))
    bar.texts.append(Text(notes, right + 2 * PAD, box.top + box.height / 2, TICK_SIZE, anchor="start"))
    return bar


def heading(title: str, width: float) -> tuple[list[Text], float]:
    """The lines of a title above a picture of that width, and the y coordinate where they end."""
    high = TITLE_SIZE * LINE
    most = (width - 2 * PAD) / max(1, text_width(title, TITLE_SIZE)) * len(title)
    lines = textwrap.wrap(title, max(1, int(most)))
    texts = [Text(line, width / 2, PAD + (i + 0.5) * high, TITLE_SIZE) for i, line in enumerate(lines)]
    return texts, PAD + len(lines) * high


def text_width(text: str, size: int) -> float:
    """An upper estimate of the width of a text, in pixels."""
    return columns(text) * size * _CHARACTER


def longest(texts: list[str], size: int) -> float:
    """The width of the longest text."""
    return max((text_width(text, size) for text in texts), default=0)


def check_size(width: float, height: float) -> None:
    """Raise a ValueError if a picture would be too large to draw."""
    if max(width, height) > _LARGEST_SIDE:
        raise ValueError(
            f"the picture would be {width:,.0f} x {height:,.0f} pixels; the limit is {_LARGEST_SIDE:,} pixels a side. "
            "Use fewer heads, layers or positions"
        )
