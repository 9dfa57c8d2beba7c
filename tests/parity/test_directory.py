"""`parity` of a directory, as the command reads it: its report, and its exit code on a wrong model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gemma3_jax.parity as parity_module
from conversion import convert_checkpoint, save_params
from gemma3_jax import TINY, Gemma3Config
from gemma3_jax.conversion.sources import locate_sources
from gemma3_jax.parity import parity
from tests.helpers.random_models import hf_config, hf_model
from tests.parity.checks import WIDE, drop_one, shift_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_of_a_directory(tmp_path, dtype):
    """`parity` reads the directory on both sides, names its platform, and its report is plain data."""
    hf_model(torch.bfloat16, **WIDE).save_pretrained(tmp_path)
    report = parity(tmp_path, dtype, tokens=40)
    assert report.passed
    assert report.platform.startswith(jax.devices()[0].platform)
    assert report.prompts == "9 sequences of random ids"
    assert report.tokens == (40,)
    assert len(json.loads(json.dumps(report.as_dict()))["rows"]) == len(report.rows) > 60


def test_parity_of_what_convert_wrote(tmp_path):
    """Hugging Face is given what the parameters are exported to: the checkpoint's own tensors, norms as 1 + w."""
    hf_model(torch.bfloat16, **WIDE).save_pretrained(tmp_path / "hf")
    config, params = convert_checkpoint(tmp_path / "hf")
    save_params(config, params, tmp_path / "port")
    assert parity(tmp_path / "port", tokens=20).passed
    wanted = load_file(tmp_path / "hf" / "model.safetensors")
    with parity_module._as_checkpoint(locate_sources(tmp_path / "port")) as exported:
        found = load_file(exported / "model.safetensors")
    with parity_module._as_checkpoint(locate_sources(tmp_path / "hf")) as own:
        assert own == tmp_path / "hf"
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        own, added = wanted[key].astype(np.float32), np.float32(key.endswith("norm.weight"))
        np.testing.assert_array_equal(added + tensor, added + own)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_parity_of_an_adapter(tmp_path):
    """Both sides have the merged weights; Hugging Face's are those of `merge_and_unload`."""
    peft = pytest.importorskip("peft")
    base = hf_model(**WIDE)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert parity(tmp_path / "base", tokens=20, adapter=tmp_path / "adapter").passed
    with parity_module._as_checkpoint(locate_sources(tmp_path / "base", adapter=tmp_path / "adapter")) as exported:
        written = load_file(exported / "model.safetensors")
    merged = adapted.merge_and_unload().state_dict()
    changed = 0
    for key, tensor in load_file(tmp_path / "base" / "model.safetensors").items():
        np.testing.assert_allclose(written[key], merged[key].numpy(), rtol=0, atol=2.0**-23)
        changed += not np.allclose(written[key], tensor, atol=1e-3)
    assert changed == adapted.config.num_hidden_layers  # control


def layers_shifted(config, params):
    return config, shift_layers(params)


def one_dropped(config, params):
    return config, drop_one("ln2_post/weight")(params)


def one_rope_swapped(config, params):
    """Within the window, its type decides a layer's RoPE and nothing else."""
    first, second, *others = config.layer_types
    assert first == "sliding_attention" != second
    return dataclasses.replace(config, layer_types=(first, first, *others)), params


def window_one_off(config, params):
    return dataclasses.replace(config, sliding_window=config.sliding_window + 1), params


# What is wrong, and how many tokens show it; the shipped model's window is 16.
WRONG_MODELS = [(layers_shifted, 16), (one_dropped, 16), (one_rope_swapped, 16), (window_one_off, 18)]


@pytest.fixture(scope="module")
def passed() -> set[tuple[str, int]]:
    """The dtypes and lengths at which the right model has passed: wrong models share this control."""
    return set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("change", "tokens"), WRONG_MODELS, ids=[change.__name__ for change, _ in WRONG_MODELS])
def test_the_command_fails_on_a_wrong_model(change, tokens, dtype, passed, monkeypatch, command, tmp_path):
    """Negative control: exit code 1, and the table and the JSON say which rows fail."""
    own = parity_module.convert_sources
    file = tmp_path / "report.json"
    arguments = "parity", TINY, "--dtype", dtype, "--tokens", tokens, "--json", file
    if (dtype, tokens) not in passed:
        assert command(*arguments).returncode == 0
        passed.add((dtype, tokens))
    monkeypatch.setattr(parity_module, "convert_sources", lambda *args: change(*own(*args)))
    done = command(*arguments)
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    report = json.loads(file.read_text())
    assert not report["passed"]
    # One key more or less is within the noise of bfloat16 by the time it reaches the logits.
    changed = "blocks.{i}.attn.hook_pattern" if change is window_one_off else "logits"
    assert changed in {row["kind"] for row in report["rows"] if not row["passed"]}


@pytest.mark.parametrize(("window", "lengths"), [(16, (64,)), (63, (64,)), (64, (64, 128)), (512, (64, 576))])
def test_default_prompts_reach_past_the_window(window, lengths):
    """64 tokens, and 64 more than the window where that does not lie within them."""
    config = Gemma3Config.from_hf(hf_config(sliding_window=window))
    assert parity_module._default_lengths(config) == lengths
