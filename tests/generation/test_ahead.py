"""The two programs of a generation compile side by side, each once, and run as they would one after the other."""

import collections
import logging
import re
import threading

import chex
import jax
import pytest

from gemma3_jax import HookedGemma3, edits
from gemma3_jax.generation import ahead, loop
from gemma3_jax.generation.loop import generate
from tests.helpers.greedy_texts import CONFIG, parameters
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import direction, identity

SITE = "blocks.0.hook_out"
EVERYTHING = {
    "capture": [SITE],
    "edits": {SITE: identity},
    "return_logits": True,
    "temperature": 1.0,
    "top_k": 5,
    "repetition_penalty": 1.2,
}


@pytest.fixture
def compiled(caplog):
    """How often XLA has compiled each program of a generation, by its name."""
    # Not with `jax.log_compiles`, which holds in its own thread only.
    jax.config.update("jax_log_compiles", True)
    caplog.set_level(logging.WARNING, "jax")

    def count() -> dict[str, int]:
        found = [re.match(r"Finished XLA compilation of jit\((read|go_on)\)", each) for each in caplog.messages]
        return dict(collections.Counter(each[1] for each in found if each))

    yield count
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize(
    ("rows", "options", "place"),
    [
        (3, dict, None),
        (4, lambda: EVERYTHING, None),
        (5, dict, lambda params: jax.device_put(params, jax.devices()[0])),
        (6, dict, jax.device_get),
        (10, lambda: {"edits": {SITE: edits.Add(jax.device_put(direction(), jax.devices()[0]))}}, None),
    ],
    ids=["plain", "everything", "parameters on a chosen device", "parameters in NumPy", "an edit on a chosen device"],
)
def test_each_program_is_compiled_once(rows, options, place, compiled, monkeypatch):
    """Also where the arrays of the text are placed, and where they have every option; the results are the same."""
    params, options = parameters() if place is None else place(parameters()), options()
    tokens = random_tokens((rows, 5))
    together = generate(CONFIG, params, tokens, 4, stop_at_eos=False, **options)
    assert compiled() == {"read": 1, "go_on": 1}
    monkeypatch.setattr(loop, "compile_together", lambda *arguments, **settings: None)
    apart = generate(CONFIG, params, tokens, 4, stop_at_eos=False, **options)
    assert compiled() == {"read": 1, "go_on": 1}
    chex.assert_trees_all_equal(together, apart)


def test_they_compile_at_the_same_time(monkeypatch):
    """The prefill compiles in another thread; a text that is known, or shown token by token, starts none."""
    threads = []

    class Pool(ahead.ThreadPoolExecutor):
        def submit(self, function, *arguments):
            return super().submit(lambda: threads.append(threading.current_thread()) or function(*arguments))

    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Pool)
    tokens = random_tokens((7, 5))
    for _ in range(2):
        generate(CONFIG, parameters(), tokens, 4, stop_at_eos=False)
        assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
    stream = HookedGemma3(CONFIG, parameters()).generate_stream(random_tokens((8, 5)), 4, stop_at_eos=False)
    assert next(stream).shape == (8,)
    assert len(threads) == 1


def test_a_program_that_is_too_large_is_refused_when_it_runs(monkeypatch):
    """A compiler that refuses one ahead of time leaves the error to the run, which names the memory."""

    def refused(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refused)
    out = generate(CONFIG, parameters(), random_tokens((9, 5)), 4, stop_at_eos=False)
    assert out.tokens.shape == (9, 9)
