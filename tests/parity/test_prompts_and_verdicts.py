"""The prompts that parity runs, and its verdict on the distances that it measures."""

import dataclasses

import numpy as np
import pytest

from gemma3_jax import Gemma3Config
from gemma3_jax.parity.measure import _components
from gemma3_jax.parity.prompts import page, prompts_for
from gemma3_jax.parity.report import Distances, judge
from tests.helpers.random_models import hf_config


class Letters:
    """A tokenizer with an id for each of these letters, 3 for any other."""

    unk_token_id = 3
    all_special_ids = (0, 1, 2, 3)

    def __init__(self, letters):
        self.letters = letters

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [4 + self.letters.index(letter) if letter in self.letters else 3 for letter in text]}


ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def test_prompts_are_text_where_the_tokenizer_can_read_it():
    """From as many places of the page, BOS first; else random ids, none of which is special."""
    config = Gemma3Config.from_hf(hf_config())
    found = prompts_for(config, Letters(ALPHABET), 30, 3)
    text = page().lower()
    for prompt, start in zip(found, (0, len(page()) // 3, 2 * len(page()) // 3), strict=True):
        assert prompt.shape == (1, 30)
        assert prompt[0, 0] == config.bos_token_id
        written = "".join(ALPHABET[i - 4] if i > 3 else "?" for i in prompt[0, 1:])
        assert all(a in (b, "?") for a, b in zip(written, text[start : start + 29], strict=True))
    for tokenizer in (Letters("qz"), None):
        [prompt] = prompts_for(config, tokenizer, 4000, 1)
        assert prompt[0, 0] == config.bos_token_id
        assert set(prompt[0, 1:]) == set(range(4 if tokenizer else 3, config.vocab_size))
    # Longer than the page: it begins again.
    [long] = prompts_for(config, Letters(ALPHABET), len(page()) + 11, 1)
    assert (long[0, 1:11] == long[0, -10:]).all()


def test_prompts_without_bos():
    """A model that has none, or one outside its vocabulary, gets none."""
    for bos in (None, 101):
        config = Gemma3Config.from_hf(hf_config(bos_token_id=bos))
        [prompt] = prompts_for(config, Letters(ALPHABET), 12, 1)
        assert prompt.shape == (1, 12)
        assert prompt[0, 0] != bos


def distances(hf, port, floor=0.0, size=10**6):
    return [{"blocks.0.hook_out": Distances(*each, floor, size)} for each in zip(hf, port, strict=True)]


def test_the_median_over_prompts_is_judged():
    """One prompt that amplifies rounding decides nothing; NaN, and an error where Hugging Face has none, fail."""
    [row] = judge(distances([1e-7, 1e-7, 1e-7], [2e-7, 9e-7, 1e-7]), 64, "float32")
    assert (row.ratio, row.passed) == (pytest.approx(2.0), True)
    assert not judge(distances([1e-7] * 3, [2.1e-7, 9e-7, 1e-7]), 64, "float32")[0].passed
    assert not judge(distances([1.0], [1.01]), 64, "bfloat16")[0].passed
    assert judge(distances([1.0], [1.002]), 64, "bfloat16")[0].passed
    assert not judge(distances([0.0], [1e-9]), 64, "float32")[0].passed
    assert judge(distances([0.0], [1e-9], floor=1e-9), 64, "float32")[0].passed
    assert judge(distances([0.0], [0.0]), 64, "float32")[0].passed
    assert not judge(distances([1.0], [np.nan]), 64, "float32")[0].passed


def test_few_independent_errors_widen_the_bar():
    """The layer counts in which the port is worst: there, with one component, a norm may be four times another."""
    layers = {0: Distances(0.1, 0.35, 0.0, 1.0), 1: Distances(0.1, 0.1, 0.0, 10.0**6)}
    [row] = judge([{f"blocks.{i}.attn.q.weight (gradient)": each for i, each in layers.items()}], 32, "bfloat16")
    assert (row.bar, row.passed) == (4.0, True)
    other = {i: dataclasses.replace(each, port=0.45 - each.port) for i, each in layers.items()}
    [row] = judge([{f"blocks.{i}.attn.q.weight (gradient)": each for i, each in other.items()}], 32, "bfloat16")
    assert not row.passed


def test_independent_components_of_an_error():
    """Rows that are multiples of one vector are one component; random rows are many; NaN stays NaN."""
    rng = np.random.default_rng(0)
    vector, matrix = rng.standard_normal(64), rng.standard_normal((8, 16, 64))
    assert _components(rng.standard_normal((8, 16, 1)) * vector) == pytest.approx(1.0)
    assert 30 < _components(matrix) <= 64
    assert 10 < _components(vector) <= 64
    assert np.isnan(_components(matrix * np.nan))
