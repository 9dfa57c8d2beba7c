"""Every script is legible: fonts by fallback, labels that are cut where letters end, and a warning with a remedy."""

import io

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from gemma3_jax import pictures
from gemma3_jax.pictures import fonts
from gemma3_jax.pictures.labels import shortened, token_labels, visible, width
from tests.pictures.drawn import CONFIG

SCRIPTS = ["北京是中国的首都", "สวัสดีชาวโลก", "नमस्ते दुनिया", "مرحبا بالعالم", "👩🏽🎉", "한국어", "Ελλάδα", "e\u0301"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without fonts; the function installs one whose only glyph is a black square."""
    caches = fonts._family_with, fonts._installed, fonts._characters
    files = []
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(file) for file in files])

    def install(character: str) -> None:
        files.append(tmp_path / "NotoSquare.ttf")
        builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
        for step, point in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
            (pen.lineTo if step else pen.moveTo)(point)
        pen.closePath()
        builder.setupGlyphOrder([".notdef", "square"])
        builder.setupCharacterMap({ord(character): "square"})
        builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
        builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
        builder.setupHorizontalHeader(ascent=900, descent=-100)
        builder.setupNameTable({"familyName": "Square of a test", "styleName": "Regular"})
        builder.setupOS2()
        builder.setupPost()
        builder.save(files[-1])
        for cache in caches:
            cache.cache_clear()

    for cache in caches:
        cache.cache_clear()
    yield install
    for cache in caches:
        cache.cache_clear()


def ink(picture) -> int:
    """The number of black pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.to_png())).convert("L"))
    return int((pixels < 30).sum())


def test_a_font_of_the_machine_is_used(machine):
    """What matplotlib's fonts lack is drawn with one that has it, also if that was installed a moment ago."""
    picture = pictures.token_values(["北"] * 3, [0.0] * 3, title="")
    with pytest.warns(UserWarning, match=r"no font on this machine has the characters 北;.*fonts-noto-cjk.*\.html"):
        boxes = ink(picture)
    machine("北")
    assert ink(picture) > boxes + 3 * 100


def test_what_has_a_font_does_not_warn(machine):
    """Negative control of the warning: Latin, Greek, Arabic and the signs for white space come with matplotlib."""
    assert ink(pictures.token_values(["été", "Ελλάδα", "مرحبا", " \n\t", "\x00"], range(5)))


def test_html_has_the_letters():
    """HTML and notebooks have the letters themselves, wherever they are drawn."""
    for script in SCRIPTS:
        page = pictures.token_values([script], [1.0]).to_html()
        assert visible(script) in page
        assert "\\u" not in page


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_are_cut_where_letters_end(script):
    """A long label is cut by its width; no letter loses its marks, and no escape is cut in two."""
    cut = shortened(visible(script * 20))
    assert cut.endswith("…")
    assert width(cut) <= 16
    kept = cut.removesuffix("…")
    rest = visible(script * 20)[len(kept) :]
    assert visible(rest) == rest, "the rest begins with a mark"
    assert not shortened("x" * 11 + visible("\u202e\u202e")).removesuffix("…").endswith("\\u")


def test_marks_alone_have_a_place():
    """A token that is half of a syllable is shown on a dotted circle, and not on the number before it."""
    assert token_labels(["क", "ा"]) == ["0 क", "1 ◌ा"]


@pytest.mark.parametrize("control", ["\u202e", "\u200b", "\x1b", "\x00", "\ud800"])
def test_what_controls_is_shown(control):
    """Characters that reorder, hide or end a text are escapes, in titles and names, too."""
    picture = pictures.patching_heatmap(
        np.zeros((18, 1)), CONFIG, [f"a{control}b"], title=f"t{control}t", quantity=f"q{control}q"
    )
    escape = control.encode("unicode_escape", "surrogatepass").decode()
    flow = pictures.feature_on_texts([[f"a{control}"]], [[1.0]], title=f"t{control}t", quantity=f"q{control}q")
    for html in (picture.to_html(), flow.to_html(), flow._repr_html_(), picture._repr_html_()):
        assert control not in html
    assert escape in picture.columns.labels[0]
    assert picture.to_png()
