"""Files of activation caches that are broken or hostile: each costs seconds, and is one line that names the file."""

import json

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from gemma3_jax import TINY, ActivationCache, Gemma3Config
from gemma3_jax.conversion.files import read_config
from tests.helpers.hostile_files import NESTED, NOT_A_FILE, replace
from tests.helpers.hostile_files import safetensors as header_alone

CONFIG = read_config(TINY)
SITE = "blocks.1.hook_out"


@pytest.fixture
def file(tmp_path):
    """A cache with one value, its gradient and its tokens."""
    value, tokens = np.ones((1, 3, CONFIG.hidden_size), np.float32), np.ones((1, 3), np.int32)
    cache = ActivationCache(CONFIG, {SITE: value}, grads=ActivationCache(CONFIG, {SITE: 2 * value}))
    cache.with_inputs(tokens).save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def rewrite(file, metadata=None, **arrays):
    """The file with other metadata and other arrays; None takes one away."""
    with safe_open(file, "numpy") as stored:
        old, values = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}
    values = {key: value for key, value in (values | arrays).items() if value is not None}
    texts = {key: value for key, value in (old | (metadata or {})).items() if value is not None}
    safetensors.numpy.save_file(values, file, texts)


def said(file) -> str:
    with pytest.raises(ValueError, match=file.name) as caught:
        ActivationCache.load(file)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2500
    return message


def test_control_the_file_loads(file):
    """And a rewritten one; a string names it too."""
    rewrite(file)
    cache = ActivationCache.load(str(file))
    assert (list(cache), cache.grads[SITE][0, 0, 0], cache.tokens.shape) == ([SITE], 2, (1, 3))


@pytest.mark.parametrize(("content", "says"), NOT_A_FILE.values(), ids=NOT_A_FILE)
def test_what_is_not_a_file_is_named(content, says, file):
    """Nothing waits for a FIFO."""
    replace(file, content)
    assert says in said(file)


@pytest.mark.parametrize("content", [b"", b"\0" * 20, header_alone(NESTED), header_alone(b"{}", 2**63)])
def test_bad_headers(content, file):
    """Empty, truncated, nested, or of an absurd size."""
    replace(file, content)
    assert "is truncated or corrupt" in said(file)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"config": None}, "is not an activation cache"),
        ({"config": NESTED.decode()}, "is nested too deeply"),
        ({"config": "{"}, "is not valid JSON"),
        ({"config": "[]"}, "must be a mapping"),
        ({"config": json.dumps({"num_hidden_layers": 10**9})}, "num_hidden_layers"),
        ({"reduced": "[1]"}, "its reductions are"),
        ({"reduced": json.dumps({"nothing": "Mean"})}, "its reductions are"),
        ({"batched": "9" * 5000}, "is not valid JSON"),
    ],
)
def test_bad_metadata(metadata, says, file):
    """The message names the file, whatever is wrong."""
    rewrite(file, metadata)
    assert says in said(file)


def test_names_of_another_model_are_escaped(file):
    """Neither the terminal nor a log can be made to show something else."""
    rewrite(file, None, **{"\x1b[2J\nforged": np.ones(1)})
    assert r"\x1b[2J\nforged, which its model does not have" in said(file)


def test_dtypes_that_numpy_lacks(file):
    """The message names the value."""
    header = {SITE: {"dtype": "F8_E8M0", "shape": [1, 3], "data_offsets": [0, 3]}}
    with safe_open(file, "numpy") as stored:
        header["__metadata__"] = stored.metadata()
    replace(file, header_alone(json.dumps(header).encode()) + b"123")
    assert f"{SITE} has dtype F8_E8M0" in said(file)


def test_a_mask_without_tokens_is_left_out(file):
    """It is not taken for the tokens."""
    rewrite(file, None, tokens=None)
    assert ActivationCache.load(file).tokens is None


def test_ten_thousand_layers(file):
    """The most that a config may have; the names of their sites take seconds at most."""
    large = CONFIG.to_hf() | {"num_hidden_layers": 10_000, "layer_types": None}
    rewrite(file, {"config": json.dumps(large)})
    assert ActivationCache.load(file).config == Gemma3Config.from_hf(large)
