"""Pictures as people see them: HTML in a browser without network, PNG as pixels, and the notebook's cell."""

import dataclasses
import functools
import io
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from gemma3_jax import pictures
from gemma3_jax.pictures.labels import visible
from gemma3_jax.pictures.layout import PITCH, arrange
from tests.pictures.drawn import GREY, HEATMAPS, HOSTILE, SHARPNESS, WORDS, assert_drawn, labels, saved


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
# The colour bar is drawn first.
_TIP = "[data-tips] > div:not([hidden])"
_PANELS = """() => [...document.querySelectorAll('image')].slice(1).map(
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
        page.wait_for_load_state("load")
        pixels = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
        return View(page, problems, page.evaluate(_TEXTS), page.evaluate(_PANELS), pixels)

    yield open_
    context.close()


@pytest.fixture(scope="session")
def view_of(look, tmp_path_factory):
    """A function that opens one of HEATMAPS, once."""
    return functools.cache(lambda name: look(saved(HEATMAPS[name], tmp_path_factory.mktemp("picture"))))


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


def test_other_pictures_are_seen_without_network(look, tmp_path):
    """A map: no error, no message, no request, every name, and what the mouse tells."""
    view = look(saved(pictures.block_map(), tmp_path))
    assert view.problems == []
    assert {"attn.q_norm.hook_normalized", "hook_resid_post", "softmax of the scores"} <= view.texts.keys()
    x, y, *_ = view.texts["attn.hook_pattern"]
    view.page.mouse.move(x + 300, y + 2)
    assert "an edit reaches the layer's attention output" in view.page.inner_text(_TIP)


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
    shown = view.page.inner_text(_TIP)
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


def test_a_notebook_of_ten_pictures(look):
    """Ten heatmaps are outputs of one page: each is drawn and tells its cells, and together they are small."""
    outputs = [HEATMAPS["patching"]._repr_html_() for _ in range(10)]
    assert sum(map(len, outputs)) < 500_000
    view = look("<!doctype html><body>" + "".join(f"<div class=output>{output}</div>" for output in outputs))
    assert view.problems == []
    [box] = arrange(HEATMAPS["patching"]).panels
    images = view.page.query_selector_all("img")
    corners = [image.bounding_box() for image in images]
    for image, corner in zip(images, corners, strict=True):
        assert_drawn(HEATMAPS["patching"], view.pixels, [box.shifted(corner["x"], corner["y"])])
        image.scroll_into_view_if_needed()
        at = image.bounding_box()
        view.page.mouse.move(at["x"] + box.left + 2, at["y"] + box.top + 2)
        assert "0 <bos>" in view.page.inner_text(_TIP)


def test_a_picture_survives_an_untrusted_notebook(look):
    """JupyterLab drops attributes that run or hide, and svg: the picture is the same, pixel by pixel."""
    output = HEATMAPS["patching"]._repr_html_()
    assert set(re.findall("<[a-z]+", output)) == {"<div", "<img"}
    attributes = r" (data-[a-z]+='[^']*'|on[a-z]+=\"[^\"]*\"|hidden)(?=[ >])"
    trusted, untrusted = (look(f"<!doctype html><body>{html}") for html in (output, re.sub(attributes, "", output)))
    assert re.search("pointer|hidden|data-", untrusted.page.content()) is None
    np.testing.assert_array_equal(untrusted.pixels, trusted.pixels)
    box = arrange(HEATMAPS["patching"]).panels[0]
    corner = untrusted.page.query_selector("img").bounding_box()
    assert_drawn(HEATMAPS["patching"], untrusted.pixels, [box.shifted(corner["x"], corner["y"])])


@pytest.mark.parametrize("name", HEATMAPS)
def test_a_notebook_shows_it_without_network(name, look):
    """`_repr_html_`, as an output of a saved notebook: the picture of the page, and nothing is loaded."""
    picture = HEATMAPS[name]
    view = look(f"<!doctype html><body style='margin:0'>{picture._repr_html_()}</body>")
    assert view.problems == []
    assert_drawn(picture, view.pixels, arrange(picture).panels)


def test_a_notebook_shows_tokens(look):
    """The text is in the page."""
    view = look(f"<!doctype html><body>{pictures.token_values(WORDS, range(6))._repr_html_()}</body>")
    assert view.problems == []
    assert set(map(visible, WORDS)) <= view.texts.keys()
