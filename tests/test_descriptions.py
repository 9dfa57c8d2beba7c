"""What objects show at the prompt and in a notebook: a few lines without numbers, and a small table of the same."""

import functools
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import treescope

from gemma3_jax import TINY, ActivationCache, Gemma3Config, HookedGemma3, analysis, edits, reductions
from gemma3_jax.descriptions import Description
from gemma3_jax.generation.loop import Generation

CONFIG = Gemma3Config.preset("1b")


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY)


def cache():
    return ActivationCache(CONFIG, {f"blocks.{i}.hook_out": jnp.ones((1, 2, 1152)) for i in range(3)})


def lens():
    arrays = [jnp.zeros((2, 1, 3, 5), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    return analysis.LogitLens(("blocks.0.hook_out", "blocks.1.hook_out"), *arrays)


def prompt():
    best = np.array([[0.6, 0.1]], np.float32)
    return analysis.PromptResult(["<bos>", "a"], ["</td>"], np.array([1]), best[0, 1:], [["<b>", "</td>"]], best)


def generation():
    ones = jnp.ones((1, 5), jnp.int32)
    return Generation(ones, ones, jnp.zeros((1, 3)), jnp.zeros((1, 3, 1000)), cache())


# What is shown, and words that it has.
SHOWN = {
    "model": (tiny, ["343,584 parameters", "bfloat16", "tokenizer"]),
    "cache": (cache, ["3 sites", "blocks.{0..2}.hook_out", "[1, 2, 1152] float32"]),
    "config": (lambda: CONFIG, ["26 layers", "rope_full", "theta=1000000.0"]),
    "lens": (lens, ["2 sites", "blocks.1.hook_out", "log_probs", "[2, 1, 3, 5] float32"]),
    "factored": (lambda: analysis.FactoredMatrix(jnp.ones((50, 3)), jnp.ones((3, 40))), ["A @ B", "[50, 3] float32"]),
    "generation": (generation, ["3 tokens", "logits", "[1, 3, 1000] float32", "3 sites"]),
}


class Table(html.parser.HTMLParser):
    """The tags and the texts of a table; a tag that is not closed, or a script, is an error."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """It is one of a table's, and runs nothing."""
        assert tag in ("table", "caption", "tr", "td")
        assert {name for name, _ in attrs} <= {"style"}
        self.open.append(tag)

    def handle_endtag(self, tag):
        """It closes the last one."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """A cell, or the caption."""
        self.texts.append(data)


@pytest.mark.parametrize("kind", SHOWN)
def test_a_few_lines_and_a_table_of_the_same(kind):
    """Short, without the numbers in the arrays; the table has the same texts."""
    make, words = SHOWN[kind]
    shown = make()
    text, table = repr(shown), Table(shown._repr_html_())
    assert all(word in text for word in words)
    assert len(text.splitlines()) < 20
    assert "array(" not in text.lower().replace("jax.array", "")
    assert all(word in " ".join(table.texts) for word in words)
    assert text.splitlines()[0] == table.texts[0]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edits.Add(np.ones(96), 5.0), "Add(vector=[96] float64, scale=5.0)"),
        (edits.Add([1.0, -2.5], 1), "Add(vector=[1.0, -2.5], scale=1)"),
        (edits.Add(jnp.ones(3, jnp.bfloat16), relative=True), "Add(vector=[1.0, 1.0, 1.0], scale=1.0, relative=True)"),
        (edits.Replace(jnp.float32(0.5), where=False), "Replace(value=0.5, where=False)"),
        (
            edits.only(edits.Scale(2), layer=1, heads=np.array([0, 2]), phase="prompt"),
            "Only(edit=Scale(factor=2), layer=1, heads=[0, 2], phase='prompt')",
        ),
        (edits.Noise(jax.random.key(0), 0.1), "Noise(key=[] key<fry>, scale=0.1)"),
        (edits.FromCache({"hook_embed": np.ones((1, 2, 3))}), "FromCache(cache=<1 entries>)"),
        (edits.FromRow(torch.tensor([1, 0])), "FromRow(row=[2] torch.int64)"),
        (reductions.TopK(5), "TopK(k=5)"),
        (reductions.At([0, -1]), "At(positions=[0, -1])"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_an_edit_shows_its_numbers(edit, text):
    """Every number that a user gave, and long arrays by shape and dtype, in one line."""
    assert repr(edit) == text


def test_a_traced_edit_has_a_text():
    """Its numbers are not known: shapes and dtypes."""
    shown = []
    jax.jit(lambda x: shown.append(repr(edits.Scale(x))))(jnp.ones(2))
    assert shown == ["Scale(factor=[2] float32)"]


def test_texts_are_escaped():
    """A token or a name that looks like a tag is text."""
    strange = "<script>alert('1')</script> &amp;"
    table = Table(Description(strange, ((strange, "b"), ("c", strange))).html())
    assert table.texts == [strange, strange, "b", "c", strange]
    assert {"'<b>' 60.00%", "'</td>'\nrank 1, 10.00%"} <= set(Table(prompt()._repr_html_()).texts)
    with pytest.raises(AssertionError):  # negative control: the parser sees tags that are not escaped
        Table(f"<table><tr><td>{strange}</td></tr></table>")


def test_the_result_of_a_prompt_is_a_table_at_the_prompt():
    """`repr` shows what `print` does."""
    assert repr(prompt()) == str(prompt())
    assert "rank 1" in repr(prompt())


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # treescope 0.1 with NumPy 2.5
def test_treescope_shows_parameters():
    """Flax depends on treescope: it folds the tree, and has shape, dtype and range of each array."""
    text = treescope.render_to_text(tiny().params["blocks_0"]["attn"])
    assert "'weight': <jax.Array bfloat16(4, 96, 24)" in text
    assert "array(" not in text
