"""Pictures of several prompts and texts, of a generation, of a block and of a parity report."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from gemma3_jax import pictures
from gemma3_jax.pictures import site_map
from gemma3_jax.pictures.parts import text_width
from gemma3_jax.sites.table import SITES
from tests.pictures.drawn import CONFIG, EFFECTS, HEATMAPS, WORDS

ROW = {"kind": "logits", "hf": 1e-6, "port": 2e-6, "ratio": 2.0, "bar": 2.0, "passed": True}
REPORT = {"source": "tiny", "dtype": "float32", "rows": [ROW, ROW | {"kind": "bad", "port": 1e-4, "passed": False}]}
FLOWS = [pictures.token_values(WORDS[:n], np.arange(n), title=f"{n} tokens") for n in (1, 6, 3)]
EVERY = {
    "flows": pictures.side_by_side(FLOWS, title="One scale"),
    "maps": pictures.side_by_side([HEATMAPS["heads"], HEATMAPS["panels"], *FLOWS]),
    "feature": pictures.feature_on_texts([WORDS, WORDS[:2]], [range(6), [7, -7]]),
    "generation": pictures.generated_values(WORDS[:3], WORDS[3:], [-1, -0.5, np.nan]),
    "block": pictures.block_map(),
    "parity": pictures.parity_picture(REPORT),
}


@pytest.mark.parametrize("name", EVERY)
def test_everything_is_on_the_paper(name):
    """Each text ends before the edge, and no two texts of a picture lie on each other."""
    drawing = EVERY[name].drawing()
    boxes = []
    for text in drawing.texts:
        wide, high = text_width(text.text, text.size) * (0.9 if text.monospaced else 0.75), 0.8 * text.size
        if text.upward:
            wide, high = high, wide
        left = text.x - wide * ({"start": 0, "middle": 0.5, "end": 1}[text.anchor] if not text.upward else 0.5)
        top = text.y - high * ({"start": 1, "middle": 0.5, "end": 0}[text.anchor] if text.upward else 0.5)
        assert left >= 0 <= top, text
        assert left + wide <= drawing.width >= 0, text
        assert top + high <= drawing.height, text
        boxes.append((left, top, left + wide, top + high, text.text))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_pictures_side_by_side_share_a_scale():
    """Equal values have equal colours; other quantities keep their own scale, and the pictures are not changed."""
    both = pictures.side_by_side([*FLOWS, HEATMAPS["attention"]])
    assert [picture.scale.high for picture in both.pictures] == [5, 5, 5, 1]
    assert FLOWS[2].scale.high == 2
    assert both.pictures[2].scale.colour(2) == FLOWS[1].scale.colour(2) != FLOWS[2].scale.colour(2)
    clipped = pictures.patching_heatmap(EFFECTS, CONFIG, WORDS, vmin=-0.1, vmax=0.1)
    plain = pictures.patching_heatmap(0 * EFFECTS, CONFIG, WORDS, vmin=-9, vmax=0.1)
    scale = pictures.side_by_side([clipped, plain]).pictures[0].scale
    assert (scale.low, scale.high, scale.beyond) == (-9, 0.1, (False, True))
    with pytest.raises(ValueError, match="nothing to draw; pass at least one picture"):
        pictures.side_by_side([])


def test_side_by_side_fills_a_screen_and_then_the_next_row():
    """Ten prompts fit the width of a screen."""
    many = pictures.side_by_side([HEATMAPS["heads"]] * 10).drawing()
    assert many.width <= 1600
    assert len(many.grids) == 20
    assert len({grid.box[:2] for grid in many.grids}) == 20


def test_the_text_with_the_largest_value_is_first():
    """Each text keeps its number; lengths differ, and all are on one scale."""
    headings = [passage.heading for passage in EVERY["feature"].passages]
    assert headings == ["text 1: at most 7", "text 0: at most 5"]
    assert [len(passage.tokens) for passage in EVERY["feature"].passages] == [2, 6]
    assert (EVERY["feature"].scale.low, EVERY["feature"].scale.high) == (-7, 7)
    with pytest.raises(ValueError, match="there are 2 texts and values for 1"):
        pictures.feature_on_texts([WORDS, WORDS], [range(6)])
    with pytest.raises(ValueError, match=r"\(5,\); 6 tokens need \(6,\)"):
        pictures.feature_on_texts([WORDS], [range(5)])


def test_a_prompt_has_no_values():
    """The prompt has no colour and no grey; a new token without a value is grey."""
    drawing = EVERY["generation"].drawing()
    assert len([area for area in drawing.areas if area.fill]) == 3
    told = [tip.cells[0][0] for tip in drawing.tips]
    assert told == ["0 <bos>", "1 ba", "2 ␣ke", "0 ba: -1", "1 ↵: -0.5", "2 mu: nan"]
    with pytest.raises(ValueError, match=r"\(6,\); 3 tokens need \(3,\)"):
        pictures.generated_values(WORDS[:3], WORDS[3:], range(6))


def test_the_map_has_every_site_once(monkeypatch):
    """Each site of the table is on the map, in a place of its own; so is one that is added to the table."""
    names = [row.name for row in SITES if row.name.startswith("blocks.")]
    assert sorted(tip.rows[0] for tip in EVERY["block"].drawing().tips) == sorted(names)
    new = dataclasses.replace(SITES[-1], name="blocks.{i}.mlp.extra.hook_in")
    monkeypatch.setattr(site_map, "SITES", (*SITES, new))
    tips = pictures.block_map().drawing().tips
    assert new.name in {tip.rows[0] for tip in tips}
    assert len({tip.box for tip in tips}) == len(names) + 1


def test_the_map_follows_the_computation():
    """What runs in parallel is side by side, and what follows is below."""
    boxes = {tip.rows[0].removeprefix("blocks.{i}."): tip.box for tip in EVERY["block"].drawing().tips}
    for side in (("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"), ("mlp.gate.hook_in", "mlp.in.hook_in")):
        assert len({boxes[name].top for name in side}) == 1
        assert len({boxes[name].left for name in side}) == len(side)
    chain = "hook_in ln1.hook_in attn.q.hook_out attn.hook_pattern ln1_post.hook_out hook_resid_mid mlp.out.hook_in"
    tops = [boxes[name].top for name in [*chain.split(), "hook_out"]]
    assert tops == sorted(set(tops))


@pytest.mark.parametrize(("port", "order"), [(0.0, -1), (1e-9, -1), (1e-6, 0), (1e-3, 1), (math.inf, 1), (math.nan, 1)])
def test_parity_marks_are_where_their_distance_is(port, order):
    """Left of Hugging Face's for a smaller distance, right of it for a larger one or for none that is a number."""
    row = ROW | {"port": port, "passed": order < 1}
    drawing = pictures.parity_picture(REPORT | {"rows": [row]}).drawing()
    [mark] = [area.box for area in drawing.areas if area.fill in ("#2166ac", "#b2182b")]
    frame = next(area.box for area in drawing.areas if area.edge)
    assert np.sign(round(mark.left - frame.left - 1, 6)) == order
    assert any(area.fill == "#b2182b" for area in drawing.areas) == (order == 1)


def test_what_is_no_report():
    """One sentence with the remedy."""
    with pytest.raises(ValueError, match=r"no rows to draw; pass Report.as_dict\(\)"):
        pictures.parity_picture({})


@pytest.mark.parametrize("name", EVERY)
def test_png_and_html(name):
    """Both are made, and hover texts are there."""
    picture = EVERY[name]
    assert picture.to_png().startswith(b"\x89PNG")
    assert "</html>" in picture.to_html()
    assert len(picture._repr_html_()) < 100_000
