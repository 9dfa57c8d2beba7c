"""The files of an embedding head: export and save keep it, damage is named, and another head is left out."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import CheckpointError, convert_checkpoint, export_checkpoint, load_params, save_params
from gemma3_jax import (
    Gemma3,
    HookedGemma3,
    stack_layers,
)
from tests.hooked.embedding.folders import (
    BAR,
    TEXTS,
    WIDE,
    D,
    apart,
    load,
)


def same(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("stacked", [False, True])
def test_export_and_save(folder, theirs, stacked, tmp_path):
    """The head comes back from both kinds of directory; `sentence_transformers` loads the exported one."""
    config, params = convert_checkpoint(folder)
    layout = stack_layers(config, params) if stacked else params
    export_checkpoint(config, layout, tmp_path / "exported", tokenizer=folder)
    save_params(config, layout, tmp_path / "saved", tokenizer=folder)
    for again in (convert_checkpoint(tmp_path / "exported"), load_params(tmp_path / "saved")):
        assert again[0] == config
        same(again[1], params)
    expected = theirs.encode(TEXTS, prompt_name="query")
    assert apart(load(tmp_path / "exported").encode(TEXTS, prompt_name="query"), expected) < BAR
    assert apart(HookedGemma3.from_pretrained(tmp_path / "saved").embed(TEXTS, "query"), expected) < BAR


def test_parameters_of_the_head_are_checked(folder, tmp_path):
    """A pytree without a dense layer is not written."""
    config, params = convert_checkpoint(folder)
    del params["dense_2"]
    for write_to in (export_checkpoint, save_params):
        with pytest.raises(CheckpointError, match="lack dense_2/weight"):
            write_to(config, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fresh = Gemma3(config).init(jax.random.key(0), jnp.ones((1, 3), int))["params"]
    assert fresh["dense_1"]["weight"].shape == (D, WIDE)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("2_Dense/model.safetensors", None, "2_Dense/model.safetensors is missing"),
        ("2_Dense/model.safetensors", b"torn", "truncated or corrupt"),
        (
            "2_Dense/config.json",
            b'{"in_features": 47, "out_features": 80, "bias": false, "activation_function": "torch.nn.Identity"}',
            "in_features is 47",
        ),
        ("modules.json", b"{}", "does not list modules"),
        ("modules.json", b'[{"path": "../x", "type": "Transformer"}]', "outside its folder"),
        ("config_sentence_transformers.json", b'{"prompts": {"query": 3}}', "must be texts"),
        ("config_sentence_transformers.json", b'{"default_prompt_name": "x"}', "no prompt of that name"),
        ("sentence_bert_config.json", b'{"max_seq_length": 0}', "max_length of embedding_head"),
    ],
)
def test_a_damaged_head(folder, tmp_path, file, content, error):
    """One error names the file or the field."""
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / file).unlink() if content is None else (damaged / file).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        convert_checkpoint(damaged)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("1_Pooling", {"pooling_mode": "lasttoken"}, "pooling mode is lasttoken"),
        ("1_Pooling", {"include_prompt": False}, "include_prompt"),
        ("2_Dense", {"activation_function": "torch.nn.modules.activation.Tanh"}, "2_Dense has .* activation Tanh"),
        ("3_Dense", {"bias": True}, "3_Dense has bias True"),
        ("3_Dense", {"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
    ],
)
def test_another_head_is_left_out(folder, tmp_path, caplog, file, change, reason):
    """The text model loads; one log message names the module and what it has; `embed` says that there is no head."""
    other = shutil.copytree(folder, tmp_path / "other")
    config = other / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    model = HookedGemma3.from_pretrained(other)
    assert model.config.embedding_head is None
    [record] = [record for record in caplog.records if record.name.endswith("conversion.sentence_transformers")]
    assert re.search(reason, record.message)
    with pytest.raises(ValueError, match="no embedding head"):
        model.embed("ba")
