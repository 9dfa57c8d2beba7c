"""Pictures as people see them: HTML in a browser without network, PNG as pixels, and the notebook's cell."""

import dataclasses
import functools
import io
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import sync_playwright

from gemma3_jax import Gemma3Config, pictures
from gemma3_jax.pictures.labels import token_labels, visible
from gemma3_jax.pictures.layout import PITCH, arrange

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
GREY, TOLERANCE = (0xBD, 0xBD, 0xBD), 6  # of 255: the two libraries interpolate between the same eleven colours
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


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, one for the session."""
    path = shutil.which("chromium")
    if path is None:
        message = "no chromium on PATH: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments.split())
        yield chromium
        chromium.close()


@dataclasses.dataclass
class View:
    """What the browser made of a page."""

    page: object
    problems: list[str]  # console messages, errors, and requests for anything but the page
    texts: dict[str, list[float]]  # every text that is shown: x, y, width, height, in pixels
    panels: list[list[float]]  # boxes of the heatmaps
    pixels: np.ndarray  # [height, width, 3] uint8


_TEXTS = """() => {
    const seen = {}, nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = new Range();
    while (nodes.nextNode()) {
        const style = getComputedStyle(nodes.currentNode.parentElement);
        range.selectNodeContents(nodes.currentNode);
        const box = range.getBoundingClientRect();
        if (box.width * box.height > 0 && style.visibility == 'visible' && style.opacity > 0 && style.fill != 'none')
            seen[nodes.currentNode.data] = [box.x, box.y, box.width, box.height];
    }
    return seen;
}"""
_PANELS = """() => [...document.querySelectorAll('.hm image')].map(
    image => { const box = image.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })"""


@pytest.fixture(scope="session")
def look(browser):
    """A function that opens a file, or HTML in an empty page, in a tab where every way out is blocked and watched."""
    context = browser.new_context(viewport={"width": 1800, "height": 1000})
    context.route(lambda url: url.startswith(("http", "ws")), lambda route: route.abort())

    def open_(source) -> View:
        page, problems = context.new_page(), []
        own = "" if isinstance(source, str) else source.as_uri()
        page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: request.url == own or problems.append(f"request: {request.url}"))
        if own:
            page.goto(own)
        else:
            page.set_content(source)
        inside = page.frames[-1]  # of a notebook's cell, the frame
        inside.wait_for_load_state("load")
        pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
        return View(page, problems, inside.evaluate(_TEXTS), inside.evaluate(_PANELS), pixels)

    yield open_
    context.close()


@pytest.fixture(scope="session")
def view_of(look, tmp_path_factory):
    """A function that opens one of HEATMAPS, once."""
    return functools.cache(lambda name: look(saved(HEATMAPS[name], tmp_path_factory.mktemp("picture"))))


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


@pytest.mark.parametrize("name", HEATMAPS)
def test_html_is_seen_without_network(name, view_of):
    """No error, no message, no request; every label is shown, uncut; every cell has the colour of its value."""
    picture, view = HEATMAPS[name], view_of(name)
    assert view.problems == []
    assert labels(picture) <= view.texts.keys()
    assert all(word in " ".join(view.texts) for word in picture.title.split())
    layout = arrange(picture)
    for text, (x, y, width, height) in view.texts.items():
        assert 0 <= x <= x + width <= layout.width, text
        assert 0 <= y <= y + height <= layout.height, text
    assert_drawn(picture, view.pixels, view.panels)
    assert view.page.evaluate("window.hit") is None


@pytest.mark.parametrize("name", HEATMAPS)
def test_png_is_the_same_picture(name):
    """The colours of the values, at the places that HTML has them; ink beside them for labels; nothing cut."""
    picture = HEATMAPS[name]
    layout = arrange(picture)
    pixels = np.asarray(Image.open(io.BytesIO(picture.to_png())).convert("RGB"))
    assert np.abs(np.array(pixels.shape[:2]) - SHARPNESS * np.array([layout.height, layout.width])).max() <= 1
    boxes = [[SHARPNESS * side for side in box] for box in layout.panels]
    assert_drawn(picture, pixels, boxes)
    for left, top, width, height in np.array(boxes).astype(int):
        for beside in (
            pixels[top : top + height, left - 60 : left - 8],
            pixels[top + height + 8 :, left : left + width],
        ):
            assert beside.min() < 100
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert edge.min() == 255


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ("<script src='https://cdn.plot.ly/plotly-2.35.2.min.js'></script>", "request: https://cdn"),
        ("<img src='http://example.org/a.png'>", "request: http://example"),
        ("<script>throw new Error('broken')</script>", "error: broken"),
        ("<script>console.error('bad')</script>", "console error: bad"),
        ("<script>fetch('https://example.org')</script>", "request: https://example"),
    ],
)
def test_a_bad_page_is_caught(html, problem, look, tmp_path):
    """Negative control of the check: what other tools write is seen to be wrong."""
    file = tmp_path / "bad.html"
    file.write_text(f"<!doctype html><body>{html}</body>")
    assert any(each.startswith(problem) for each in look(file).problems)


def test_what_is_hidden_is_not_seen(look, tmp_path):
    """Negative control of the check: labels that are in the page and not shown do not count."""
    page = look(saved(HEATMAPS["heads"], tmp_path)).page
    for style in ("text {visibility: hidden !important}", "text {fill: none !important}", "svg {display: none}"):
        tag = page.add_style_tag(content=style)
        assert not labels(HEATMAPS["heads"]) & page.evaluate(_TEXTS).keys(), style
        tag.evaluate("tag => tag.remove()")
    assert labels(HEATMAPS["heads"]) <= page.evaluate(_TEXTS).keys()


def test_the_page_itself_refuses_the_network(look, tmp_path):
    """A script from elsewhere, put into a saved page, is stopped by the page's own policy."""
    file = saved(pictures.token_values(["ba"], [1.0]), tmp_path)
    file.write_text(file.read_text().replace("</body>", "<script src='https://cdn.plot.ly/p.js'></script></body>"))
    assert any("Content Security Policy" in problem for problem in look(file).problems)


def test_labels_do_not_collide(view_of):
    """Of 62 layers and 128 tokens each has its label, and no two lie on each other."""
    view = view_of("large")
    rows = sorted(view.texts[label][1] for label in HEATMAPS["large"].rows.labels)
    columns = sorted(view.texts[label][0] for label in HEATMAPS["large"].columns.labels)
    assert min(np.diff(rows).min(), np.diff(columns).min()) > PITCH - 1


@pytest.mark.parametrize(("name", "told"), [("patching", "logits"), ("lens", None)])
def test_the_mouse_tells_a_cell(name, told, view_of):
    """Over a cell: its layer, its token, and its value, or all k tokens of a lens."""
    picture, view = HEATMAPS[name], view_of(name)
    left, top, width, height = view.panels[0]
    view.page.mouse.move(left + 1.5 * width / len(WORDS), top + 5.5 * height / 18)
    view.page.wait_for_selector(".hoverlayer text")
    shown = " ".join(view.page.evaluate("[...document.querySelectorAll('.hoverlayer tspan')].map(e => e.textContent)"))
    assert "5 global" in shown
    assert "1 ba" in shown
    panel = picture.panels[0]
    expected = [f"{told} {panel.values[5, 1]:.4g}"] if told else panel.details[5][1].split("\n")
    assert all(text in shown for text in expected)


@pytest.mark.parametrize(
    "values", [np.array([0.5, -1, 0.1, np.nan, 0, 2, 1]), np.arange(7) / 2], ids=["signed", "positive"]
)
def test_tokens_are_coloured(values, look, tmp_path):
    """Each token, also markup and white space, is shown on the colour of its value, and nothing in it is run."""
    picture = pictures.token_values(HOSTILE, values, title="<i>Loss</i>", quantity="nats & more")
    view = look(saved(picture, tmp_path))
    assert view.problems == []
    assert view.page.evaluate("window.hit") is None
    assert {*map(visible, HOSTILE), "<i>Loss</i>", "nats & more"} <= view.texts.keys()
    assert ("grey: no value" in view.texts) == np.isnan(values).any()
    assert "3 $\\frac$: " + ("nan" if np.isnan(values[3]) else "1.5") in view.page.content()
    low, name = (-2, "RdBu") if np.nanmin(values) < 0 else (0, "Blues")
    colours = matplotlib.colormaps[name]((values - low) / (np.nanmax(values) - low), bytes=True)[:, :3]
    expected = np.where(np.isnan(values)[:, None], GREY, colours)
    corners = [view.texts[visible(token)][:2] for token in HOSTILE]
    drawn = np.array([view.pixels[round(y) + 1, round(x) - 2] for x, y in corners], int)
    assert np.abs(drawn - expected).max() <= 1
    png = np.asarray(Image.open(io.BytesIO(picture.to_png())).convert("RGB"), int)
    for colour in expected:
        assert (np.abs(png - colour).max(-1) <= 1).sum() > 100
    assert png[:2].min() == png[-2:].min() == png[:, :2].min() == 255


def test_a_long_text_wraps(look, tmp_path):
    """Lines no wider than a screen in HTML and PNG, and a token's newline ends its line."""
    picture = pictures.token_values(["word"] * 200 + ["\n", "end"], np.linspace(0, 1, 202))
    view = look(saved(picture, tmp_path))
    assert view.texts["↵"][1] < view.texts["end"][1] < 400
    assert all(x + width < 900 for x, _, width, _ in view.texts.values())
    assert Image.open(io.BytesIO(picture.to_png())).size[0] <= 920 * SHARPNESS


@pytest.mark.parametrize("name", ["patching", "tokens"])
def test_a_notebook_shows_it_without_network(name, look):
    """`_repr_html_`, as an output of a saved notebook: nothing is loaded, whatever other outputs there are."""
    flow = pictures.token_values(WORDS, range(6))
    picture = flow if name == "tokens" else HEATMAPS[name]
    view = look(f"<!doctype html><body><div class=output>{picture._repr_html_()}</div></body>")
    assert [problem for problem in view.problems if "about:srcdoc" not in problem] == []
    assert (labels(picture) if name == "patching" else set(map(visible, WORDS))) <= view.texts.keys()
    if name == "patching":
        # Texts and panels are measured inside of the frame.
        frame = view.page.query_selector("iframe").bounding_box()
        left, top, width, height = view.panels[0]
        assert_drawn(picture, view.pixels, [(left + frame["x"], top + frame["y"], width, height)])
        assert frame["height"] >= arrange(picture).height


def test_numbers_of_any_kind():
    """JAX arrays, bfloat16 and lists draw what float32 draws."""
    exact = np.round(np.nan_to_num(EFFECTS) * 4) / 4
    for values in (exact, exact.astype(np.float32), exact.tolist(), jnp.asarray(exact, jnp.bfloat16)):
        picture = pictures.patching_heatmap(values, CONFIG, WORDS)
        np.testing.assert_array_equal(picture.panels[0].values, exact)
        assert picture.panels[0].values.dtype == np.float32
    assert np.any(exact)


def test_what_is_not_finite_is_not_drawn():
    """One infinity leaves the scale to the other cells; where all is 0 or unfinished, there still is a scale."""
    values = np.ones((18, 6))
    values[3, 4] = np.inf
    picture = pictures.patching_heatmap(values, CONFIG, WORDS)
    assert (picture.scale.low, picture.scale.high) == (-1, 1)
    assert np.isnan(picture.panels[0].values[3, 4])
    for empty in (0 * EFFECTS, np.full_like(EFFECTS, np.nan)):
        assert pictures.patching_heatmap(empty, CONFIG, WORDS).to_png()


def test_labels_of_axes():
    """Layers with their reach; heads; all tokens apart; numbers pick, strings stand for themselves."""
    picture = pictures.patching_heatmap(
        EFFECTS[:2, :2], CONFIG, WORDS, labels={"layer": [5, "final"], "position": [3, 1]}
    )
    assert picture.rows.labels == ["5 global", "final"]
    assert picture.columns.labels == ["3 ba", "1 ba"]
    assert HEATMAPS["panels"].panels[3].title == "part v"
    by_layer = pictures.patching_heatmap(np.zeros((18, 4, 6)), CONFIG, WORDS, axes=("layer", "head", "pos"))
    assert [panel.title for panel in by_layer.panels][4:6] == ["layer 4 local", "layer 5 global"]
    assert by_layer.rows.labels == ["0", "1", "2", "3"]
    key_value = pictures.patching_heatmap(np.zeros((18, 1)), CONFIG, axes="layer head")
    assert key_value.columns.labels == ["0"]
    assert pictures.patching_heatmap(np.zeros((18, 2)), CONFIG).columns.labels == ["0", "1"]


@given(st.lists(st.text(), min_size=1, max_size=8))
def test_labels_hide_nothing(tokens):
    """Whatever a tokenizer yields, its label prints, shows where white space is, and is nobody else's."""
    shown = [visible(token) for token in tokens]
    assert all(text.isprintable() and not set(text) & set(" \n\t") and text for text in shown)
    assert len(set(token_labels(tokens))) == len(tokens)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.attention_patterns(PATTERNS, WORDS[1:], [(0, 0)] * 3, CONFIG), r"\(3, 6, 6\).*\(3, 5, 5\)"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(0, 0)], CONFIG), r"\(3, 6, 6\).*\(1, 6, 6\)"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(18, 0)] * 3, CONFIG), "no layer 18; they are 0 to 17"),
        (lambda: pictures.attention_patterns(PATTERNS, WORDS, [(0, -1)] * 3, CONFIG), "no head -1; they are 0 to 3"),
        (lambda: pictures.attention_patterns(PATTERNS - 1, WORDS, [(0, 0)] * 3, CONFIG), "from -1 to .*patching_h"),
        (lambda: pictures.attention_patterns(PATTERNS, "abcdef", [(0, 0)] * 3, CONFIG), "tokens must be a list of str"),
        (lambda: pictures.attention_patterns(PATTERNS[:0], WORDS, [], CONFIG), "nothing to draw"),
        (lambda: pictures.patching_heatmap(EFFECTS[1:], CONFIG, WORDS), "17 entries along axis 'layer'.* 18 labels"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, WORDS[1:]), "6 entries along axis 'position'.* 5 labels"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer head"), "6 entries along axis 'head'"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer"), r"\(18, 6\).* 1;"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, axes="layer site"), "'site' is none of layer, head, posit"),
        (lambda: pictures.patching_heatmap(EFFECTS, CONFIG, labels={"laier": [1]}), "laier, which axes 'layer pos"),
        (lambda: pictures.patching_heatmap(EFFECTS[:2], CONFIG, labels={"layer": [4, 4]}), "labelled '4 local'"),
        (lambda: pictures.patching_heatmap(EFFECTS[:, :0], CONFIG), "the position axis is empty"),
        (lambda: pictures.logit_lens_table([["a"]], [[0.5, 0.5]], ["x"], CONFIG, layers=[0]), r"\(1, 2\).*\(1, 1\)"),
        (lambda: pictures.logit_lens_table([["a"]], [[0.5]], ["x"], CONFIG), r"\(1, 1\).*18 layers and 1 tokens"),
        (lambda: pictures.logit_lens_table([["a"]], [[-0.5]], ["x"], CONFIG, layers=[0]), "from -0.5 to -0.5"),
        (lambda: pictures.token_values(WORDS, [1.0]), r"\(1,\); 6 tokens need \(6,\)"),
        (lambda: pictures.patching_heatmap(np.zeros((5000, 2, 2)), CONFIG, axes="run pos src_pos",
                                           labels={"run": range(5000)}).to_html(), "20,000 a side is the most"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(draw, message):
    """One sentence that names both sizes, or the thing that is not there."""
    with pytest.raises(ValueError, match=message):
        draw()


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    """An unknown suffix or directory writes nothing; a failure leaves the former file, and no other."""
    picture = pictures.token_values(WORDS, range(6))
    with pytest.raises(ValueError, match=r"a\.svg: a picture is saved as \.html or \.png"):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        picture.save(tmp_path / "nowhere" / "a.png")
    assert list(tmp_path.iterdir()) == []
    picture.save(str(tmp_path / "A.PNG"))
    before = (tmp_path / "A.PNG").read_bytes()
    assert before == picture.to_png()
    for failing in ("to_png", "_repr_html_"):
        monkeypatch.setattr(pictures.TokenFlow, failing, functools.partial(divmod, 1, 0))
        with pytest.raises(ZeroDivisionError):
            picture.save(tmp_path / "A.PNG" if failing == "to_png" else tmp_path / "a.html")
    assert [file.name for file in tmp_path.iterdir()] == ["A.PNG"]
    assert (tmp_path / "A.PNG").read_bytes() == before


def test_a_picture_leaves_matplotlib_alone():
    """Neither what a user set changes the picture, nor the picture what a user set."""
    plain = HEATMAPS["heads"].to_png()
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30, "image.origin": "lower"}):
        assert HEATMAPS["heads"].to_png() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_importing_draws_nothing():
    """The package loads plotly and matplotlib when a picture is drawn, and not before."""
    code = "import sys, gemma3_jax.pictures; print({'plotly', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
