"""GGUF files: the same model as `transformers` reads from them.

The files are written with `gguf.GGUFWriter`. Tests marked `real` read a real file: GEMMA3_GGUF, or the one
beside the directory of `--checkpoint`.
"""

import dataclasses
import os
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from conversion import CheckpointError, convert_checkpoint, load_params
from gemma3_jax import Gemma3Config, HookedGemma3, forward
from gemma3_jax.config import PRESETS, ConfigError
from gemma3_jax.conversion import gguf as ours
from gemma3_jax.conversion import gguf_header
from gemma3_jax.conversion.assemble import assemble
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.conversion.gguf_header import Header, read_header
from gemma3_jax.reading import Stored
from tests.conversion.gguf_files import (
    BAR,
    ONE_LAYER,
    SMALL,
    TEXTS,
    TOKENS,
    differing,
    names,
    read_by_transformers,
    relative,
    write,
)

pytestmark = pytest.mark.usefixtures("gguf_cache")

FLOAT32 = np.dtype("float32")


def test_weights_are_those_that_transformers_reads(gguf_file, gguf_model):
    """Bit for bit in float32, of a file with eight types. Controls: norms with +1 twice; q permuted."""
    config, params = convert_checkpoint(gguf_file, "float32")
    state = gguf_model.state_dict()
    assert differing(config, params, state) == []
    tensors = ours.tensors_of(read_header(gguf_file), FLOAT32)
    twice = assemble(config, dataclasses.replace(tensors, norms_hold_one=False), FLOAT32)
    norms = [entry.ours for entry in entries(config) if len(entry.hf_shape) == 1]
    assert differing(config, twice, state) == norms
    assert differing(config, permuted(params), state) == [f"blocks.{i}.attn.q.weight" for i in range(6)]


def permuted(params):
    """The queries in the order that GGUF has for Llama: the two halves of each head interleaved."""

    def change(block):
        q = block["attn"]["q"]["weight"]  # [h, d, e]
        halves = jnp.stack(jnp.split(q, 2, axis=-1), axis=-1).reshape(q.shape)
        return {**block, "attn": {**block["attn"], "q": {"weight": halves}}}

    return {name: change(part) if name.startswith("blocks_") else part for name, part in params.items()}


def test_logits_are_those_of_transformers(gguf_file, gguf_model):
    """So the config is right too, past the sliding window. The same controls."""
    tokens = np.array([[2, *range(11, 30)]])
    with torch.no_grad():
        wanted = gguf_model(torch.from_numpy(tokens)).logits.numpy()
    config, params = convert_checkpoint(gguf_file, "float32")
    assert relative(forward(config, params, tokens)[0], wanted) < BAR
    assert relative(forward(config, permuted(params), tokens)[0], wanted) > 100 * BAR
    tensors = dataclasses.replace(ours.tensors_of(read_header(gguf_file), FLOAT32), norms_hold_one=False)
    assert relative(forward(config, assemble(config, tensors, FLOAT32), tokens)[0], wanted) > 100 * BAR
    wider = dataclasses.replace(config, sliding_window=5)
    assert relative(forward(wider, params, tokens)[0], wanted) > 100 * BAR


def test_bfloat16_is_the_default(gguf_file):
    """Each weight is rounded once, from float32; norms stay float32."""
    config, exact = convert_checkpoint(gguf_file, "float32")
    _, params = convert_checkpoint(gguf_file)
    for entry in entries(config):
        a, b = params, exact
        for name in entry.path:
            a, b = a[name], b[name]
        wanted = b if len(entry.hf_shape) == 1 else b.astype(jnp.bfloat16)
        assert a.dtype == wanted.dtype, entry.ours
        assert np.array_equal(np.asarray(a), np.asarray(wanted)), entry.ours


def test_an_untied_head(tmp_path):
    """`output.weight` is the head, in its own type."""
    config = dataclasses.replace(
        SMALL, num_hidden_layers=1, layer_types=("sliding_attention",), tie_word_embeddings=False
    )
    file = write(tmp_path / "untied.gguf", config, kinds={"output": Kind.Q6_K})
    read, params = convert_checkpoint(file, "float32")
    assert not read.tie_word_embeddings
    assert differing(read, params, read_by_transformers(file).state_dict()) == []


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type(kind, tmp_path, monkeypatch):
    """Bands give what `gguf` gives for the whole tensor, in every type that it dequantises; the others are named."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x40: no float16 or float32 among them is NaN, infinite or large.
    data = np.random.default_rng(0).integers(0, 0x40, (3, 5 * size), np.uint8)
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(7) + data.tobytes())
    stored = Stored(file, (3, 5 * weights), kind.name, 7)
    monkeypatch.setattr(ours, "_BAND", 2 * weights)
    try:
        wanted = gguf.dequantize(data, kind).reshape(stored.shape)
    except NotImplementedError:
        with pytest.raises(CheckpointError, match=f"has {kind.name} tensors, which the gguf package cannot dequantise"):
            ours.tensors_of(Header(file, {}, {"token_embd.weight": stored}), FLOAT32)
        return
    read = ours._dequantise("a", stored, FLOAT32)
    assert read.tobytes() == wanted.tobytes()
    assert np.array_equal(ours._dequantise("a", stored, jnp.dtype("bfloat16")), wanted.astype(jnp.bfloat16))


# --- config -----------------------------------------------------------------------------------------------------------


def header(config: Gemma3Config, **fields) -> Header:
    """The header of a published model as llama.cpp writes it; a field with None is left out."""
    known = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "rope.freq_base": 1e6,
    }
    if config.rope_full.factor != 1:
        known |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_full.factor}
    known |= {name.replace("__", "."): value for name, value in fields.items() if "tokenizer" not in name}
    others = {name.replace("__", "."): value for name, value in fields.items() if "tokenizer" in name}
    named = {f"gemma3.{name}": value for name, value in known.items() if value is not None}
    embedding = Stored(Path("a.gguf"), (config.vocab_size, config.hidden_size), "F32", 0)
    return Header(
        Path("a.gguf"), {"general.architecture": "gemma3", **named, **others}, {"token_embd.weight": embedding}
    )


@pytest.mark.parametrize("size", PRESETS)
def test_published_configs(size):
    """Also the fields that the file does not have: the 27b's scale is 168, and eps is 1e-6, not its float32."""
    assert ours.config_of(header(PRESETS[size])) == PRESETS[size]
    # A file without the factor has the published one; a fine-tune with fewer layers is that model too.
    bare = {"rope__scaling__type": None, "rope__scaling__factor": None, "block_count": 7}
    config = ours.config_of(header(PRESETS[size], **bare))
    assert config.rope_full == PRESETS[size].rope_full
    assert config.query_pre_attn_scalar == PRESETS[size].query_pre_attn_scalar


def test_other_shapes_scale_by_head_dim():
    """As llama.cpp does."""
    config = dataclasses.replace(SMALL, head_dim=128)
    assert ours.config_of(header(config)).query_pre_attn_scalar == 128


def test_newer_fields():
    """The base and pattern of local layers, of llama.cpp and of Ollama; and the softcap."""
    fields = {"rope__freq_base_swa": 20_000.0, "attention__sliding_window_pattern": 3, "final_logit_softcapping": 30.0}
    config = ours.config_of(header(SMALL, **fields))
    assert config.rope_sliding.theta == 20_000
    assert [kind == "full_attention" for kind in config.layer_types] == [False, False, True] * 2
    assert config.final_logit_softcapping == 30
    flags = [True, False, True, True, False, False]
    config = ours.config_of(header(SMALL, attention__sliding_window_pattern=flags, rope__local__freq_base=5e3))
    assert [kind == "sliding_attention" for kind in config.layer_types] == flags
    assert config.rope_sliding.theta == 5_000


def test_stop_tokens():
    """Those of the file; in a chat model also the token that ends a turn, as in generation_config.json."""
    eos = {"tokenizer__ggml__eos_token_id": 1, "tokenizer__ggml__tokens": TOKENS}
    assert ours.config_of(header(SMALL, **eos)).eos_token_id == 1
    assert ours.config_of(header(SMALL, **eos, tokenizer__chat_template="{{ a }}")).eos_token_id == (1, 7)
    assert ours.config_of(header(SMALL, **eos, tokenizer__ggml__eot_token_id=7)).eos_token_id == (1, 7)
    assert ours.config_of(header(SMALL, tokenizer__ggml__eos_token_ids=[1, 7, 1])).eos_token_id == (1, 7)


def test_config_errors_name_the_file():
    """A field that is missing, and values that the port does not support."""
    with pytest.raises(CheckpointError, match=r"a\.gguf lacks sliding_window in its metadata"):
        ours.config_of(header(SMALL, attention__sliding_window=None))
    with pytest.raises(ConfigError, match=r"a\.gguf: rope_type of full_attention is 'yarn'"):
        ours.config_of(header(SMALL, rope__scaling__type="yarn", rope__scaling__factor=2.0))
    with pytest.raises(ConfigError, match=r"a\.gguf: num_key_value_heads is \[1, 2\]"):
        ours.config_of(header(SMALL, attention__head_count_kv=[1, 2]))


def test_from_pretrained(gguf_file, gguf_model):
    """Text in, the logits of transformers out."""
    model = HookedGemma3.from_pretrained(gguf_file, dtype="float32")
    ids = np.asarray(model.to_tokens("the thing there"))
    with torch.no_grad():
        wanted = gguf_model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert relative(model("the thing there"), wanted) < BAR


def test_commands(gguf_file, command, tmp_path):
    """`info`, `convert` and `generate`."""
    info = command("info", gguf_file)
    assert info.returncode == 0, info.stderr
    assert "6 BF16, 6 F16, 43 F32, 6 Q4_0, 6 Q4_K, 6 Q5_0, 6 Q6_K, 1 Q8_0" in info.stdout
    file = write(tmp_path / "one.gguf", ONE_LAYER)
    done = command("convert", file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert load_params(tmp_path / "out")[0] == convert_checkpoint(file)[0]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("the") == ["the"]
    written = command("generate", file, "--prompt", "the", "--max-new-tokens", "2")
    assert written.stdout.startswith("the"), written.stderr
    bad = command("info", write(tmp_path / "bad.gguf", ONE_LAYER, architecture="llama"))
    assert bad.returncode == 1
    assert len(bad.stderr.splitlines()) == 1


def test_parity_of_a_gguf_file(tmp_path):
    """Hugging Face gets the dequantised weights as a checkpoint."""
    from gemma3_jax.parity import parity

    report = parity(write(tmp_path / "one.gguf", ONE_LAYER), tokens=8)
    assert report.passed


def test_a_header_is_read_without_the_data(gguf_file, monkeypatch):
    """`info` maps no tensor."""
    monkeypatch.setattr(np, "memmap", lambda *_: pytest.fail("data was read"))
    assert len(gguf_header.read_header(gguf_file).tensors) == len(names(SMALL))


# --- a real file ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(checkpoint) -> Path:
    beside = sorted(checkpoint.parent.glob("*.gguf"))
    file = os.environ.get("GEMMA3_GGUF") or (beside[0] if beside else None)
    return Path(file) if file else pytest.skip("needs a real GGUF: GEMMA3_GGUF, or a file beside --checkpoint DIR")


@pytest.mark.real
def test_real_weights(real):
    """Bit for bit what transformers dequantises."""
    config, params = convert_checkpoint(real, "float32")
    assert differing(config, params, read_by_transformers(real).state_dict()) == []


@pytest.mark.real
def test_real_text(real, checkpoint):
    """The tokenizer gives the ids of the checkpoint's, and the model its loss, up to the quantisation."""
    from gemma3_jax.parity.prompts import page

    model, whole = (HookedGemma3.from_pretrained(path, dtype="float32") for path in (real, checkpoint))
    assert model.config == whole.config
    texts = [page(), *page().split("\n"), "  日本語 🙂\t<start_of_turn>user\n\n\n    def f(x):", *TEXTS]
    assert [model.tokenizer(t)["input_ids"] for t in texts] == [whole.tokenizer(t)["input_ids"] for t in texts]
    tokens = model.to_tokens(page())[:, :256]
    loss, wanted = (float(m(tokens, return_type="loss")) for m in (model, whole))
    assert abs(loss - wanted) < 0.2
    other = HookedGemma3(model.config, permuted(model.params))
    assert float(other(tokens, return_type="loss")) > wanted + 1  # control
