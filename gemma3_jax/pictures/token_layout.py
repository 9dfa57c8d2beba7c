"""The layout of coloured texts, in pixels from the top left corner of the picture."""

import numpy as np

from gemma3_jax.pictures.data import Passage, Tokens
from gemma3_jax.pictures.drawing import BLACK, NAME_SIZE, TICK_SIZE, Area, Box, Drawing, Text, Tips
from gemma3_jax.pictures.labels import token_labels, visible
from gemma3_jax.pictures.parts import LINE, PAD, check_size, heading, lying_bar, text_width
from gemma3_jax.pictures.scale import GREY_NOTE, Scale

LINE_WIDTH = 900  # width of a line of tokens
_LINE = 26  # distance between two lines of tokens
_BAR_LENGTH, _BAR_WIDTH = 240, 10  # below the tokens


def draw(flow: Tokens) -> Drawing:
    """The drawing of coloured texts; a line breaks if it is full, or after a token that ends in a newline.

    Raises:
        ValueError: the picture would be too large to draw.
    """
    parts = [_passage(passage, flow.scale) for passage in flow.passages]
    note = grey_note(flow)
    notes = text_width(f"{flow.scale.label}   {note}", TICK_SIZE)
    width = max(420, 4 * PAD + _BAR_LENGTH + notes, *(part.width for part in parts)) + PAD
    titles, y = heading(flow.title, width)
    bottom = y + sum(part.height for part in parts) + PAD
    drawing = Drawing(width, bottom + 50, texts=titles)
    check_size(drawing.width, drawing.height)
    for part in parts:
        drawing.add(part, 0, y)
        y += part.height
    drawing.add(lying_bar(flow.scale, Box(2 * PAD, bottom, _BAR_LENGTH, _BAR_WIDTH), note))
    return drawing


def grey_note(flow: Tokens) -> str:
    """What grey means, if a token is grey."""
    grey = any(passage.values is not None and np.isnan(passage.values).any() for passage in flow.passages)
    return GREY_NOTE if grey else ""


def token_tips(passage: Passage) -> list[str]:
    """For each token its label and value."""
    labels = token_labels(passage.tokens)
    if passage.values is None:
        return labels
    return [f"{label}: {value:.4g}" for label, value in zip(labels, passage.values.tolist(), strict=True)]


def _passage(passage: Passage, scale: Scale) -> Drawing:
    texts = [visible(token) for token in passage.tokens]
    top = NAME_SIZE * LINE + 4 if passage.heading else 0
    widths = [text_width(text, NAME_SIZE) + 6 for text in texts]
    boxes = [box.shifted(0, top) for box in _flow(widths, [token.endswith("\n") for token in passage.tokens])]
    drawing = Drawing(max(box.left + box.width for box in boxes), boxes[-1].top + _LINE)
    if passage.heading:
        drawing.texts.append(Text(passage.heading, PAD, top / 2, TICK_SIZE, anchor="start"))
    values = [None] * len(texts) if passage.values is None else passage.values.tolist()
    for text, value, box, tip in zip(texts, values, boxes, token_tips(passage), strict=True):
        ink = BLACK
        if value is not None:
            drawing.areas.append(Area(box, scale.colour(value)))
            ink = scale.ink(value)
        x, y = box.left + box.width / 2, box.top + box.height / 2
        drawing.texts.append(Text(text, x, y, monospaced=True, colour=ink))
        drawing.tips.append(Tips(box, [""], [""], [[tip]]))
    return drawing


def _flow(widths: list[float], line_ends: list[bool]) -> list[Box]:
    """Boxes with those widths, from left to right in lines."""
    left, top = float(PAD), 0.0
    boxes: list[Box] = []
    for width, line_end in zip(widths, line_ends, strict=True):
        if left + width > LINE_WIDTH - PAD and left > PAD:
            left, top = float(PAD), top + _LINE
        boxes.append(Box(left, top, width, _LINE - 4))
        left, top = (float(PAD), top + _LINE) if line_end else (left + width + 2, top)
    return boxes
