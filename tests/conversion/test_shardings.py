"""Parameters that are cut over devices have the bits of those on one device, whatever their source."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from conversion import convert_checkpoint, load_params, save_params
from gemma3_jax import TINY
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.placing import make_mesh, param_shardings
from tests.conversion.on_eight_devices import MODEL_SIZES
from tests.helpers.environment import on_devices

ROOT = Path(__file__).parents[2]
SOURCES = ("adapter", "fp8", "gguf", "safetensors", "saved")


@pytest.fixture(scope="module")
def results(gguf_file, tmp_path_factory) -> Path:
    """The directory with what a process with eight devices wrote; its report is held.json."""
    directory = tmp_path_factory.mktemp("eight")
    write_sources(directory / "sources", gguf_file)
    command = [sys.executable, "-m", "tests.conversion.on_eight_devices", directory / "sources", directory]
    done = subprocess.run(command, cwd=ROOT, env=on_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (directory / "held.json").write_text(done.stdout)
    return directory


def write_sources(directory: Path, gguf_file: Path) -> None:
    """The shipped model as it is, quantised, under an adapter, and as `save_params` writes it; and a GGUF file."""
    shutil.copytree(TINY, directory / "safetensors")
    shutil.copy(gguf_file, directory / "gguf")
    save_params(*convert_checkpoint(TINY), directory / "saved")
    tensors = load_file(TINY / "model.safetensors")
    (directory / "fp8").mkdir()
    config = json.loads((TINY / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "fp8" / "config.json").write_text(json.dumps(config))
    scales = {}
    for key in filter(lambda key: key.endswith("_proj.weight"), tensors):
        scales[f"{key}_scale_inv"] = np.abs(tensors[key].astype(np.float32)).max(axis=1, keepdims=True) / 448
        tensors[key] = (tensors[key] / scales[f"{key}_scale_inv"]).astype(ml_dtypes.float8_e4m3fn)
    save_file({**tensors, **scales}, directory / "fp8" / "model.safetensors")
    (directory / "adapter").mkdir()
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    (directory / "adapter" / "adapter_config.json").write_text(
        json.dumps({**lora, "base_model_name_or_path": str(TINY)})
    )
    rng, parts = np.random.default_rng(0), {}
    for entry in entries(convert_checkpoint(TINY)[0]):
        module = entry.hf.removesuffix(".weight")
        if module.endswith(tuple(lora["target_modules"])):
            for name, shape in (("A", (2, entry.hf_shape[1])), ("B", (entry.hf_shape[0], 2))):
                key = f"base_model.model.model.{module}.lora_{name}.weight"
                parts[key] = rng.normal(size=shape).astype(np.float32)
    save_file(parts, directory / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("model", MODEL_SIZES)
@pytest.mark.parametrize("source", SOURCES)
def test_parts_have_the_bits_of_the_whole(source, model, results):
    """From every kind of source, on the meshes (8, 1), (2, 4) and (1, 8), with the shardings that were asked for."""
    assert json.loads((results / "held.json").read_text())[f"{source}, model={model}"]


@pytest.mark.parametrize(
    "name", ["one sharding for all", "saved", "saved, read by one device", "an axis that is not divisible"]
)
def test_other_shardings_and_saving(name, results):
    """One sharding for all parameters, a cast, parameters that eight devices saved, and 4 heads on 8 devices."""
    assert json.loads((results / "held.json").read_text())[name]


def test_parts_in_the_wrong_order_are_seen(results):
    """The control of the tests above."""
    assert not json.loads((results / "held.json").read_text())["parts in the wrong order"]


def test_eight_devices_export_the_files_of_one(results):
    """Byte for byte."""
    exported, alone = results / "exported", results / "exported by one device"
    names = sorted(file.name for file in alone.iterdir())
    assert sorted(file.name for file in exported.iterdir()) == names
    assert len(names) > 5  # several shards
    assert all((exported / name).read_bytes() == (alone / name).read_bytes() for name in names)


def test_eight_devices_save_the_files_of_one(results):
    """Byte for byte, whichever axes are cut."""
    wanted, *others = [
        {str(file.relative_to(saved)): file.read_bytes() for file in saved.rglob("*") if file.is_file()}
        for saved in sorted(results.glob("saved*"))
    ]
    assert len(others) == 2
    assert len(wanted) > 100
    assert all(other == wanted for other in others)


def wrong_shardings(name: str) -> object:
    """Shardings that do not suit the shipped model."""
    config, _ = convert_checkpoint(TINY)
    mesh = make_mesh(devices=jax.devices()[:1])
    shardings = param_shardings(config, mesh)
    if name == "a layer too many":
        return {**shardings, "blocks_4": shardings["blocks_3"]}
    if name == "a layer too few":
        return {key: value for key, value in shardings.items() if key != "blocks_3"}
    if name == "stacked":
        return param_shardings(config, mesh, stacked=True)
    if name == "a spec":
        return jax.tree.map(lambda sharding: sharding.spec, shardings)
    return NamedSharding(mesh, PartitionSpec("data", None, "model"))


WRONG = {
    "a layer too many": "have blocks_4",
    "a layer too few": "lack blocks_3",
    "stacked": "stacked",
    "a spec": "give a jax.sharding.Sharding",
    "more axes than a parameter": r"weight \[.*\] has fewer axes than its spec",
}


@pytest.mark.parametrize("load", ["convert_checkpoint", "load_params"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_shardings_are_named(name, load, tmp_path):
    """Before any tensor is read."""
    save_params(*convert_checkpoint(TINY), tmp_path / "saved")
    source, call = (TINY, convert_checkpoint) if load == "convert_checkpoint" else (tmp_path / "saved", load_params)
    with pytest.raises(ValueError, match=WRONG[name]) as caught:
        call(source, shardings=wrong_shardings(name))
    assert "\n" not in str(caught.value)


def test_first_layers_into_shardings():
    """The shardings are those of the config with these layers."""
    config, whole = convert_checkpoint(TINY, first_n_layers=2)
    device = SingleDeviceSharding(jax.devices()[0])
    _, params = convert_checkpoint(TINY, first_n_layers=2, shardings=device)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, whole))
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.sharding == device, params))
    assert sorted(params) == ["blocks_0", "blocks_1", "embed", "ln_final"]
    assert config.truncated_from == 4
