"""Pictures of every kind, the colours that their cells must have, and the comparison with pixels."""

import matplotlib
import numpy as np

from gemma3_jax import Gemma3Config, pictures

CONFIG = Gemma3Config.preset("270m")  # 18 layers of 4 heads and 1 key/value head
HOSTILE = [
    "<bos>",
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "$\\frac$",
    "%{x}",
    " \n",
    "&lt;",
]
WORDS = ["<bos>", "ba", " ke", "ba", "\n", "mu"]
RNG = np.random.default_rng(0)
EFFECTS = RNG.normal(size=(18, len(WORDS)))
EFFECTS[15:] = np.nan
PATTERNS = np.tril(RNG.random((3, len(WORDS), len(WORDS))))
GREY, TOLERANCE = (0xBD, 0xBD, 0xBD), 6  # of 255
PROBABILITIES = -np.sort(-RNG.random((18, len(WORDS), 3)))  # the largest first
BEST = RNG.choice(WORDS, PROBABILITIES.shape).tolist()
SHARPNESS = 1.5  # pixels of a PNG for one of the browser's
HEATMAPS = {
    "attention": pictures.attention_patterns(PATTERNS, WORDS, [(4, 0), (5, 3), (11, 2)], CONFIG),
    "patching": pictures.patching_heatmap(EFFECTS, CONFIG, WORDS, title="Words of a title " * 9, quantity="logits"),
    "heads": pictures.patching_heatmap(EFFECTS[:, :4], CONFIG, axes="layer head"),
    "panels": pictures.patching_heatmap(RNG.normal(size=(5, 2, 6)), CONFIG, WORDS, axes="part layer pos",
                                        labels={"part": ["out", "q", "k", "v", "pattern"], "layer": [4, 5]}),
    "lens": pictures.logit_lens_table(BEST, PROBABILITIES, WORDS, CONFIG),
    "large": pictures.patching_heatmap(RNG.normal(size=(62, 128)), Gemma3Config.preset("27b"), ["tok"] * 128),
    "hostile": pictures.attention_patterns(np.eye(7)[None], HOSTILE, [(5, 0)], CONFIG, title="<b>$a$</b> & co"),
}  # fmt: skip


def saved(picture, directory):
    file = directory / "picture.html"
    picture.save(file)
    return file


def expected_colours(picture: pictures.Heatmaps) -> list[np.ndarray]:
    """[r, c, 3] uint8 for each panel, from the values, by matplotlib's ColorBrewer maps."""
    values = [panel.values for panel in picture.panels]
    largest = np.nanmax(np.abs(values))
    signed = min(np.nanmin(panel) for panel in values) < 0
    low, high, name = (-largest, largest, "RdBu") if signed else (0, 1, "Blues")
    colours = [matplotlib.colormaps[name]((panel - low) / (high - low), bytes=True)[..., :3] for panel in values]
    return [np.where(np.isnan(panel)[..., None], GREY, rgb) for panel, rgb in zip(values, colours, strict=True)]


def cell_colours(pixels: np.ndarray, box, shape: tuple[int, int]) -> np.ndarray:
    """[r, c, 3]: the pixel near the upper left corner of each cell, where no text is."""
    left, top, width, height = box
    rows = (top + (np.arange(shape[0]) + 0.2) * height / shape[0]).astype(int)
    columns = (left + (np.arange(shape[1]) + 0.2) * width / shape[1]).astype(int)
    return pixels[np.ix_(rows, columns)].astype(int)


def assert_drawn(picture: pictures.Heatmaps, pixels: np.ndarray, boxes) -> None:
    """Every cell of every panel has the colour of its value; and those of no other arrangement."""
    for expected, box in zip(expected_colours(picture), boxes, strict=True):
        drawn = cell_colours(pixels, box, expected.shape[:2])
        assert np.abs(drawn - expected).max() <= TOLERANCE
        for wrong in (expected[::-1], np.roll(expected, 1, axis=1)):
            assert np.abs(drawn - wrong).max() > 10 * TOLERANCE


def labels(picture: pictures.Heatmaps) -> set[str]:
    """Every text that the picture must show."""
    texts = {text for panel in picture.panels for row in panel.texts or [] for text in row}
    texts |= {panel.title for panel in picture.panels} | {picture.rows.name, picture.columns.name, picture.scale.label}
    return (texts | set(picture.rows.labels) | set(picture.columns.labels)) - {""}
