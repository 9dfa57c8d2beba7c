"""Export is the inverse of conversion: tensors bit for bit, an equal config, identical logits, and the tokenizer."""

import json

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file

from conversion import convert_checkpoint, export_checkpoint
from gemma3_jax.conversion import transforms
from tests.conversion.key_map import DTYPES, KINDS, assert_identical, flat, loaded, logits
from tests.helpers.random_models import random_tokens


@pytest.mark.parametrize(
    ("kind", "shard"), [*((kind, None) for kind in KINDS), ("tied", "40KB"), ("untied", 60_000), ("bf16", "40KB")]
)
def test_export_is_the_inverse(kind, shard, models, saved, tmp_path):
    """Every tensor comes back bit for bit (float32 norms within 2**-24), the config equal, the logits identical.

    float16, which is loaded in float32, comes back as float16 where that is asked for.
    """
    config, params = convert_checkpoint(saved[kind])
    dtype = "float16" if kind == "f16" else None
    export_checkpoint(config, params, tmp_path / "out", dtype, **({} if shard is None else {"max_shard_size": shard}))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 2) == (shard is not None)
    back = {key: array for file in files for key, array in load_file(file).items()}
    stored = load_file(saved[kind] / "model.safetensors")
    for key in [key for key in stored if "norm" in key and stored[key].dtype == np.float32]:
        np.testing.assert_allclose(back[key], stored[key], rtol=0, atol=2.0**-23)
        np.testing.assert_array_equal(1 + back[key], 1 + stored[key])
        assert back.pop(key).dtype == stored.pop(key).dtype
    assert_identical(back, stored)

    read, again = convert_checkpoint(tmp_path / "out")
    assert read == config
    assert_identical(flat(again), flat(params))
    theirs, original = loaded(tmp_path / "out"), loaded(saved[kind])
    assert theirs.dtype == original.dtype == models[kind].dtype
    tokens = random_tokens((2, 17))
    assert torch.equal(logits(theirs, tokens), logits(original, tokens))


def test_export_that_drops_a_step_is_seen(models, saved, tmp_path, monkeypatch):
    """Negative control: with norms exported as 1 + w, the identical-logits check above fails."""
    config, params = convert_checkpoint(saved["tied"])
    monkeypatch.setattr(transforms.AddOne, "revert", lambda self, tensor: tensor)
    export_checkpoint(config, params, tmp_path / "out")
    tokens = random_tokens((2, 17))
    assert not torch.allclose(logits(loaded(tmp_path / "out"), tokens), logits(models["tied"], tokens), atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_dtype(dtype, models, saved, tmp_path):
    """A dtype casts every tensor as torch does, and config.json says so; an existing empty directory is filled."""
    config, params = convert_checkpoint(saved["untied"])
    export_checkpoint(config, params, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    back = load_file(tmp_path / "model.safetensors")
    wanted = {k: v.to(getattr(torch, dtype)) for k, v in models["untied"].state_dict().items() if "norm" not in k}
    wanted = {key: np.array(jax.dlpack.from_dlpack(tensor)) for key, tensor in wanted.items()}
    assert {array.dtype for array in back.values()} == {DTYPES[dtype]}
    assert_identical({key: array for key, array in back.items() if "norm" not in key}, wanted)


@pytest.mark.parametrize("as_object", [False, True])
def test_export_takes_a_tokenizer(as_object, saved, tmp_path):
    """Tokenizer files of a directory are copied as they are, other files are not; a tokenizer object saves itself."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>")
    source = tmp_path / "tokenizer"
    tokenizer.save_pretrained(source)
    (source / "notes.txt").write_text("stays behind")
    config, params = convert_checkpoint(saved["tied"])
    export_checkpoint(config, params, tmp_path / "out", tokenizer=tokenizer if as_object else source)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("a b b")["input_ids"] == tokenizer("a b b")["input_ids"] == [3, 4, 4]
    assert not (tmp_path / "out" / "notes.txt").exists()
    if not as_object:
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert convert_checkpoint(tmp_path / "out")[0] == config


def test_files_are_those_of_safetensors(saved, tmp_path):
    """Byte for byte what `safetensors` writes of the same tensors, of three dtypes and in its order."""
    config, params = convert_checkpoint(saved["untied"])
    params["embed"]["weight"] = params["embed"]["weight"].astype("bfloat16")
    params["blocks_1"]["attn"]["q"]["weight"] = params["blocks_1"]["attn"]["q"]["weight"].astype("float16")
    export_checkpoint(config, params, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16", "float16", "float32"}
    save_file(dict(reversed(tensors.items())), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
