"""Adapters that cannot be merged: each is one clear line, and nothing is loaded."""

import shutil

import numpy as np
import pytest

from conversion import CheckpointError, convert_checkpoint
from tests.conversion.adapter_files import LORA, edit_config, edit_weights, lora, write_base

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied embeddings and unused options


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tied model of three layers, with a tokenizer nowhere."""
    return write_base(tmp_path_factory.mktemp("base"))


def _pickled(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


WRONG = {
    "pickle": (_pickled, "adapter_model.bin is not read.*save_pretrained"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "not JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    "other type": (lambda a: edit_config(a, peft_type="OFT"), "peft_type is 'OFT'.*merge_and_unload.*save_pretrained"),
    "no type": (lambda a: edit_config(a, peft_type=None), "peft_type is None"),
    "pissa": (lambda a: edit_config(a, init_lora_weights="pissa"), "'pissa', with which PEFT changes the base"),
    "variant": (lambda a: edit_config(a, use_qalora=True), "sets use_qalora"),
    "rank": (lambda a: edit_config(a, r=4), r"lora_A.weight has shape \[8, 32\].*require \[4, 32\]"),
    "no rank": (lambda a: edit_config(a, r=0), "r is 0; it must be a positive integer"),
    "alpha": (lambda a: edit_config(a, lora_alpha="x"), "lora_alpha of .* is 'x'"),
    "pattern": (lambda a: edit_config(a, rank_pattern={"(": 1}), r"pattern .* is not valid"),
    "not targeted": (lambda a: edit_config(a, target_modules=["v_proj"]), "but adapter_model.safetensors"),
    "fewer layers": (lambda a: edit_config(a, layers_to_transform=[0]), "does not target .*layers.[12]"),
    "not saved": (lambda a: edit_config(a, modules_to_save=["lm_head"]), "lm_head in modules_to_save.*lacks"),
    "no dora": (lambda a: edit_config(a, use_dora=True), "lacks lora_magnitude_vector"),
    "half": (lambda a: edit_weights(a, lambda t: t.pop(next(k for k in t if "lora_B" in k))), "lacks lora_B.weight"),
    "empty": (lambda a: edit_weights(a, lambda t: t.clear()), "has no tensors"),
    "other key": (lambda a: edit_weights(a, lambda t: t.update(x=np.ones(1))), "has x, which this library does not"),
    "deeper": (
        lambda a: edit_weights(a, lambda t: t.update({k.replace("rs.2", "rs.9"): v for k, v in t.items()})),
        "weights for model.layers.9.self_attn.q_proj, which the base model does not have",
    ),
    "wider": (
        lambda a: edit_weights(a, lambda t: t.update({k: np.ones((8, 40), "f") for k in t if "lora_A" in k})),
        r"has shape \[8, 40\].*require \[8, 32\]",
    ),
    "NaN": (
        lambda a: edit_weights(a, lambda t: t.update({k: np.nan * v for k, v in t.items() if "lora_A" in k})),
        r"adapter_model.safetensors: .*lora_A.weight has NaN or infinity, first at \[0, 0\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_one_line(base, tmp_path, name):
    """Each fault is one line that names the file, and nothing is loaded."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    break_it, message = WRONG[name]
    break_it(adapter)
    with pytest.raises(CheckpointError, match=message) as raised:
        convert_checkpoint(base, adapter=adapter)
    assert "\n" not in str(raised.value)


def test_sources_that_cannot_be_resolved(base, tmp_path):
    """No base, a base that is not there, a base that is the adapter, and a folder that is both."""
    adapter = lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    for value, message in [
        (None, "does not name a base model; give the base"),
        ("/nowhere/model", "names its base model, but there is no directory /nowhere/model; give the base"),
        (str(adapter), "whose base is the adapter itself"),
    ]:
        edit_config(adapter, base_model_name_or_path=value)
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(adapter)
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="a whole model and an adapter"):
        convert_checkpoint(both)
    convert_checkpoint(both, adapter=both)


BACKTRACKING = r"((.|.)(.|.))*\1\d\Z"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", BACKTRACKING),
        ("rank_pattern", {BACKTRACKING: 2}),
        ("exclude_modules", BACKTRACKING),
    ],
)
def test_patterns_that_backtrack_end(base, tmp_path, field, value):
    """After a second of computing; `re` would take years."""
    adapter = lora(base, tmp_path / "adapter", **LORA["plain"])
    edit_config(adapter, **{field: value})
    with pytest.raises(CheckpointError, match=r"has the pattern .*, which takes more than 1 s to match"):
        convert_checkpoint(base, adapter=adapter)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_must_be_mappings(base, tmp_path, name):
    """A list would be read as no pattern."""
    adapter = lora(base, tmp_path / "adapter", **LORA["plain"])
    edit_config(adapter, **{name: ["q_proj"]})
    with pytest.raises(CheckpointError, match=rf"{name} is \['q_proj'\]; it must map patterns to numbers"):
        convert_checkpoint(base, adapter=adapter)
