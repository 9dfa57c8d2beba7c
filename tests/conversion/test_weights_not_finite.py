"""Weights that are NaN or infinite: the file, the tensor and the element are named, in reading, saving and export."""

import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conversion import (
    CheckpointError,
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    load_params,
    save_params,
)
from gemma3_jax.conversion import store
from gemma3_jax.conversion.finite import first_not_finite, is_finite
from tests.conversion.checkpoint_files import EMBED, GATE, SINGLE, Q, said
from tests.helpers.random_models import hf_multimodal

NORM = "model.layers.2.post_attention_layernorm.weight"
# A tensor of each step and each way to copy it, and an element of it.
PLACES = {EMBED: (100, 47), Q: (79, 0), GATE: (0, 47), NORM: (3,), "model.norm.weight": (0,)}
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("value", [np.nan, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", NUMBERS)
def test_weights_that_are_not_finite_are_named(stored, dtype, value, good, tmp_path):
    """Whatever the tensor, its dtype, and what it is converted to: file, tensor and the element, in a file and shards;
    and of a state dict the tensor."""
    config = convert_checkpoint(good["sharded"])[0]
    for layout in ("single", "sharded"):
        shutil.copytree(good[layout], tmp_path / layout)
        for file in (tmp_path / layout).glob("*.safetensors"):
            save_file({key: array.astype(stored) for key, array in load_file(file).items()}, file)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    for key, place in PLACES.items():
        shard = next(file for file in shards if key in load_file(file))
        for file in (tmp_path / "single" / SINGLE, shard):
            sound = load_file(file)
            broken = sound[key].copy()
            broken[place] = value
            save_file({**sound, key: broken}, file)
            with pytest.raises(CheckpointError) as caught:
                convert_checkpoint(file.parent, dtype=dtype)
            said(caught, file, key, f"has NaN or infinity, first at {list(place)}")
            with pytest.raises(CheckpointError) as caught:
                convert_state_dict({**load_file(tmp_path / "single" / SINGLE), key: broken}, config, dtype=dtype)
            said(caught, key, f"has NaN or infinity, first at {list(place)}")
            save_file(sound, file)
            convert_checkpoint(file.parent, dtype=dtype)  # control


def test_a_weight_that_is_too_large_for_the_dtype_is_named(good, tmp_path):
    """The largest float32 numbers are infinite in bfloat16; in float32 they are numbers."""
    directory = shutil.copytree(good["single"], tmp_path / "large")
    for key in (EMBED, Q, GATE):
        sound = load_file(good["single"] / SINGLE)
        sound[key][1, 2] = -3.4e38
        save_file(sound, directory / SINGLE)
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(directory, dtype="bfloat16")
        said(caught, SINGLE, key, "too large for bfloat16", "use float32")
        convert_checkpoint(directory)


def test_vision_tensors_are_not_read(tmp_path):
    """NaN in a tensor that the text model does not use is not an error."""
    hf_multimodal().save_pretrained(tmp_path)
    held = load_file(tmp_path / SINGLE)
    for key in held:
        if "vision_tower" in key:
            held[key] = np.full_like(held[key], np.nan)
    save_file(held, tmp_path / SINGLE)
    convert_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("path", [("embed",), ("blocks_1", "attn", "q"), ("blocks_2", "ln1_post")], ids="/".join)
def test_parameters_that_are_not_finite_are_named(path, value, good, tmp_path, monkeypatch):
    """They are neither saved nor exported, and nothing is left; what was saved unchecked names its directory, too."""
    config, params = convert_checkpoint(good["single"])
    inner = params
    for key in path:
        inner = inner[key]
    inner["weight"] = inner["weight"].at[(1,) * inner["weight"].ndim].set(value)
    name = "/".join((*path, "weight"))
    for write in (save_params, export_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            write(config, params, tmp_path / "out")
        said(caught, name, "has NaN or infinity")
        assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as unchecked:
        unchecked.setattr(store, "check_params", lambda config, params: params)
        save_params(config, params, tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        load_params(tmp_path / "out")
    said(caught, tmp_path / "out", name, "has NaN or infinity")


@given(
    dtype=st.sampled_from([np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("float16")]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    specials=st.lists(st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, 1.99, 2.0, -2.0, 6e4, -6e4, 0.0, -0.0])),
    seed=st.integers(0, 2**32 - 1),
    any_bits=st.booleans(),
)
@settings(deadline=None)
def test_finite_is_what_numpy_finds_finite(dtype, size, specials, seed, any_bits):
    """Of any bits and of chosen numbers, contiguous and not; and the first element that is not finite is found."""
    rng = np.random.default_rng(seed)
    unsigned = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    array = rng.normal(size=size).astype(dtype)
    if any_bits:
        array = rng.integers(0, np.iinfo(unsigned).max, size, unsigned, endpoint=True).view(dtype)
    for value in specials:
        array[rng.integers(size[0]), rng.integers(size[1])] = value
    good = np.isfinite(array.astype(np.float32))
    for view in (array, array.T, array[:, ::2], array[::-1]):
        assert is_finite(view) == np.isfinite(view.astype(np.float32)).all()
    if not good.all():
        assert first_not_finite(array) == np.argwhere(~good)[0].tolist()
    largest = np.array([jnp.finfo(dtype).max, jnp.finfo(dtype).min]).astype(dtype)
    assert is_finite(largest)
