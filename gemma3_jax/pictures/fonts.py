"""Fonts for the characters of a PNG: those that come with matplotlib, then whatever the machine has."""

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gemma3_jax.extras import needs_extra
from gemma3_jax.pictures.labels import width

with needs_extra("plots", "pictures need"):
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager, get_font

_BOX = "\u25a1"
PLAIN, MONOSPACED = "DejaVu Sans", "DejaVu Sans Mono"  # they come with matplotlib
_REMEDY = (
    "install fonts that have them (Debian: apt-get install fonts-noto-core fonts-noto-cjk fonts-symbola; "
    "others: fonts.google.com/noto) and restart Python, or save as .html"
)


def families(texts: Iterable[str], first: str) -> list[str]:
    """Font families that have the characters of the texts, `first` before all others."""
    others = {_family_with(c) for c in sorted(set().union(*texts)) if not _has(findfont(first), c)}
    return [first, *sorted(family for family in others if family)]


def drawable(text: str) -> str:
    """`text` with an empty box for each letter that no font has."""
    return "".join(c if _family_with(c) else _BOX if width(c) else "" for c in text)


def warn_of_missing(texts: Iterable[str]) -> None:
    """A warning that says what no font has, and the remedy."""
    missing = "".join(c for c in sorted(set().union(*texts)) if not _family_with(c))
    if missing:
        some = missing if len(missing) <= 8 else f"{missing[:8]} and {len(missing) - 8} more"
        message = f"no font on this machine has the characters {some}; the PNG shows boxes. To see them, {_REMEDY}"
        warnings.warn(message, UserWarning, stacklevel=2)


@functools.cache
def _family_with(character: str) -> str | None:
    """The first family that has a character."""
    for family in (MONOSPACED, PLAIN):
        if _has(findfont(family), character):
            return family
    for file in _installed():
        if _has(file, character):
            family = get_font(file).family_name
            # Matplotlib keeps a list of fonts, which is older than fonts that were installed since.
            if family not in fontManager.get_font_names():
                fontManager.addfont(file)
            return family
    return None


@functools.cache
def _installed() -> list[str]:
    """The files of the machine's fonts: Noto's first, and regular ones before others."""
    return sorted(findSystemFonts(), key=lambda file: (*_rank(Path(file).stem), file))


def _rank(stem: str) -> tuple[bool, bool, bool]:
    return not stem.startswith("NotoSans"), not stem.startswith("Noto"), not stem.endswith("Regular")


def _has(file: str, character: str) -> bool:
    return ord(character) in _characters(file)


@functools.cache
def _characters(file: str) -> np.ndarray:
    """The code points of a font; none if matplotlib cannot draw it, as with bitmaps of coloured emoji."""
    try:
        font = get_font(file)
    except (OSError, RuntimeError):
        return np.zeros(0, np.uint32)
    return np.array(list(font.get_charmap()) if font.scalable else [], np.uint32)
