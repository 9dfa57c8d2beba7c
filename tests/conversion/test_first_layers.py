"""`first_n_layers` loads the first layers, reads nothing of the others, and refuses the logits of what is left."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from conversion import CheckpointError, convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import TINY, Gemma3, Gemma3Config, HookedGemma3, forward, reading
from gemma3_jax.analysis import logit_lens
from gemma3_jax.config import ConfigError

TEXT = "ba ke lo mu"
RESID = "blocks.1.hook_resid_post"
REFUSED = "first 2 of 4 layers are loaded, so the logits would not be the model's; give return_type=None"


@pytest.fixture(scope="module")
def whole():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@pytest.fixture(scope="module")
def first():
    return HookedGemma3.from_pretrained(TINY, dtype="float32", first_n_layers=2)


@pytest.fixture
def sharded(tmp_path):
    """The shipped model in many shards, each with its file name by key."""
    config, params = convert_checkpoint(TINY)
    directory = tmp_path / "sharded"
    export_checkpoint(config, params, directory, max_shard_size=30_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory, index["weight_map"]


def same(ours, theirs):
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def test_parameters_are_those_of_the_whole_model(whole, first):
    """The first layers, the embedding and the final norm, bit for bit; the config has the rest of the shape."""
    expected = {key: value for key, value in whole.params.items() if key not in ("blocks_2", "blocks_3")}
    assert same(first.params, expected)
    assert not same(first.params, {**expected, "blocks_1": whole.params["blocks_2"]})
    assert first.config == dataclasses.replace(
        whole.config, num_hidden_layers=2, layer_types=whole.config.layer_types[:2], truncated_from=4
    )


def test_captures_and_gradients_are_those_of_the_whole_model(whole, first):
    """Everything up to the last loaded layer: captures, edits, streams of activations, and gradients of a metric."""
    _, ours = first.run_with_cache(TEXT, return_type=None)
    _, theirs = whole.run_with_cache(TEXT, list(ours), return_type=None)
    assert "blocks.1.hook_out" in ours
    assert not any(name.startswith(("ln_final", "unembed")) for name in ours)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)
    [cache] = first.activations([TEXT], RESID)
    np.testing.assert_allclose(cache[RESID], ours[RESID], rtol=1e-5, atol=1e-5)

    def metric(residual):
        return residual[0, -1, 3]

    for model in (first, whole):
        value, cache = model.run_with_cache(
            TEXT, "blocks.*.attn.hook_z", incl_bwd=True, loss_fn=metric, stop_at_layer=2
        )
        model.seen = value, cache.grads["blocks.0.attn.hook_z"]
    np.testing.assert_allclose(first.seen[1], whole.seen[1], rtol=1e-4, atol=1e-5)
    _, edited = first.run_with_hooks(
        TEXT, [("blocks.0.attn.hook_z", lambda z, hook: 0 * z)], names_filter=RESID, return_type=None
    )
    assert not np.allclose(edited[RESID], ours[RESID])
    np.testing.assert_allclose(first(TEXT, stop_at_layer=2), ours[RESID], rtol=1e-5, atol=1e-5)


def test_the_logit_lens_of_loaded_layers(whole, first):
    """A readout of the residual stream is the same in either model."""
    ours, theirs = (logit_lens(model, TEXT, k=3) for model in (first, whole))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens[:2])


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(TEXT),
        lambda m: m.run_with_cache(TEXT, RESID),
        lambda m: m.run_with_hooks(TEXT, [(RESID, lambda x, hook: x)], return_type="loss"),
        lambda m: m(TEXT, "both"),
        lambda m: m.run_with_cache(TEXT, RESID, incl_bwd=True),
        lambda m: m.run_with_cache(TEXT, "unembed.hook_out", return_type=None),
        lambda m: m.generate(TEXT, 2),
        lambda m: m.generate_stream(TEXT, 2),
        lambda m: forward(m.config, m.params, np.array([[2, 3]])),
        lambda m: Gemma3(m.config).apply({"params": m.params}, np.array([[2, 3]])),
    ],
)
def test_logits_are_refused(first, use):
    """Whatever computes logits says that they are not the model's, and what to do."""
    with pytest.raises(ValueError, match=REFUSED):
        use(first)


def test_logits_that_are_asked_for_again(whole):
    """The opt-in computes what the whole model would read out after the last loaded layer."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32", first_n_layers=2, allow_truncated_logits=True)
    _, cache = whole.run_with_cache(TEXT, RESID, return_type=None)
    expected, _ = forward(whole.config, whole.params, inputs_embeds=cache[RESID], start_at_layer=4)
    np.testing.assert_allclose(model(TEXT), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(model(TEXT), whole(TEXT), atol=1e-2)
    assert model.generate(TEXT, 2).startswith(TEXT)


def test_shards_of_other_layers_need_not_exist(sharded):
    """A shard without a tensor that is needed is not opened; one with a needed tensor is."""
    directory, files = sharded
    needed = {name for key, name in files.items() if not any(f"layers.{i}." in key for i in (2, 3))}
    removed = set(files.values()) - needed
    assert removed
    expected = convert_checkpoint(directory, first_n_layers=2)[1]
    for name in removed:
        (directory / name).unlink()
    _, params = convert_checkpoint(directory, first_n_layers=2)
    assert same(params, expected)
    with pytest.raises(CheckpointError, match="is missing"):
        convert_checkpoint(directory)
    (directory / next(iter(needed))).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        convert_checkpoint(directory, first_n_layers=2)


def test_no_byte_of_other_layers_is_read(tmp_path, monkeypatch):
    """In one file, the tensors of other layers are not even mapped; NaN in them does not matter."""

    read = []
    original = reading.map_tensor
    monkeypatch.setattr(reading, "map_tensor", lambda key, stored: (read.append(key), original(key, stored))[1])
    convert_checkpoint(TINY, first_n_layers=2)
    assert any("layers.1." in key for key in read)
    assert not any("layers.2." in key or "layers.3." in key for key in read)


def test_converted_parameters(tmp_path):
    """`load_params` reads the first layers of a directory that `save_params` wrote; the rest may be missing."""
    config, params = convert_checkpoint(TINY)
    save_params(config, params, tmp_path / "whole")
    others = list((tmp_path / "whole" / "params").glob("blocks_3.*"))
    assert others
    for array in others:
        shutil.rmtree(array)
    read_config, read = load_params(tmp_path / "whole", first_n_layers=2)
    expected_config, expected = convert_checkpoint(TINY, first_n_layers=2)
    assert read_config == expected_config
    assert same(read, expected)
    model = HookedGemma3.from_pretrained(tmp_path / "whole", first_n_layers=2)
    with pytest.raises(ValueError, match=REFUSED):
        model([[2, 3]])


def test_what_is_saved_remembers(first, tmp_path):
    """Saved parameters stay truncated. An export is refused, since Hugging Face would compute the logits."""
    save_params(first.config, first.params, tmp_path / "saved")
    config, _ = load_params(tmp_path / "saved")
    assert config == first.config
    assert load_params(tmp_path / "saved", first_n_layers=1)[0].truncated_from == 4
    with pytest.raises(
        ValueError, match=r"first 2 of 4 layers .*; dataclasses\.replace\(config, allow_truncated_logits"
    ):
        export_checkpoint(first.config, first.params, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    allowed = dataclasses.replace(first.config, allow_truncated_logits=True)
    export_checkpoint(allowed, first.params, tmp_path / "export")
    config, params = convert_checkpoint(tmp_path / "export")
    assert config == first.config
    assert same(params, first.params)


def test_numbers_of_layers():
    """All layers are the whole model; other numbers are refused before a weight is read."""
    assert convert_checkpoint(TINY, first_n_layers=4)[0] == convert_checkpoint(TINY)[0]
    for wrong in (0, 5, -1, True, 2.0, "2"):
        with pytest.raises(ConfigError, match="must be an integer from 1 to 4"):
            convert_checkpoint(TINY, first_n_layers=wrong)


def test_the_config_says_so():
    """`truncated_from` survives `to_hf`, a whole config does not have it, and it must be more than the layers."""
    whole = Gemma3Config.preset("270m")
    assert "truncated_from" not in whole.to_hf()
    part = dataclasses.replace(whole, num_hidden_layers=2, layer_types=whole.layer_types[:2], truncated_from=18)
    assert Gemma3Config.from_hf(part.to_hf()) == part
    assert "allow_truncated_logits" not in part.to_hf()
    with pytest.raises(ConfigError, match="truncated_from is 18; it must be more than num_hidden_layers"):
        dataclasses.replace(whole, truncated_from=18)
