"""GGUF files that cannot be read: one clear line for each."""

import struct

import numpy as np
import pytest

from conversion import CheckpointError, convert_checkpoint
from gemma3_jax.conversion.gguf_header import read_header
from tests.conversion.gguf_files import ONE_LAYER, write

pytestmark = pytest.mark.usefixtures("gguf_cache")


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("gemma-embedding", {}, "is an EmbeddingGemma in GGUF"),
        ("clip", {"type": ("mmproj",)}, r"is the vision half of a multimodal model \(mmproj\)"),
        ("llama", {}, "has architecture 'llama'; this library reads 'gemma3'"),
        ("gemma3n", {}, "has architecture 'gemma3n'"),
        ("gemma3", {"type": ("adapter",)}, "is of type 'adapter'"),
        ("gemma3", {"uint16": ("split.count", 3)}, "is one of the 3 parts of a model; merge them"),
    ],
)
def test_other_models(architecture, fields, message, tmp_path):
    """One line names the file and the remedy."""
    file = write(tmp_path / "a.gguf", ONE_LAYER, architecture=architecture, fields=fields)
    with pytest.raises(CheckpointError, match=rf"a\.gguf {message}"):
        convert_checkpoint(file)


def test_vision_tensors_are_left_out(tmp_path, caplog):
    """Ollama's files hold both halves; other tensors are an error."""
    file = write(tmp_path / "a.gguf", ONE_LAYER, extra=[("v.blk.0.attn_q.weight", (32, 32)), ("mm.a.weight", (32, 32))])
    convert_checkpoint(file)
    assert "left out 2 vision tensors" in caplog.text
    file = write(tmp_path / "b.gguf", ONE_LAYER, extra=[("rope_freqs.weight", (32, 32))])
    with pytest.raises(CheckpointError, match=r"b\.gguf has rope_freqs\.weight, which its config does not have"):
        convert_checkpoint(file)


def test_a_missing_tensor_and_a_wrong_shape(tmp_path):
    """The metadata promises two layers; a head is larger than its tensor."""
    file = write(tmp_path / "a.gguf", ONE_LAYER, fields={"uint32": ("gemma3.attention.value", 1)})
    two = file.read_bytes().replace(b"gemma3.block_count\x04\0\0\0\x01", b"gemma3.block_count\x04\0\0\0\x02")
    file.write_bytes(two)
    with pytest.raises(CheckpointError, match=r"a\.gguf lacks model\.layers\.1\.input_layernorm\.weight"):
        convert_checkpoint(file)


def test_not_a_number(tmp_path):
    """A weight that is NaN is refused with the file and the tensor."""
    file = write(tmp_path / "a.gguf", ONE_LAYER)
    stored = read_header(file).tensors["blk.0.ffn_gate.weight"]
    with file.open("r+b") as opened:
        opened.seek(stored.start)
        opened.write(np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match=r"a\.gguf: model\.layers\.0\.mlp\.gate_proj\.weight has NaN"):
        convert_checkpoint(file)


def corrupt(data: bytes, what: str) -> bytes:
    tensor = data.index(b"blk.0.attn_q.weight")  # its axes, shape, type and offset follow
    place = tensor + len(b"blk.0.attn_q.weight")
    change = {
        "truncated data": lambda: data[:-100],
        "truncated header": lambda: data[: tensor + 4],
        "few bytes": lambda: data[:10],
        "no bytes": lambda: b"",
        "magic": lambda: b"GGML" + data[4:],
        "git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "version": lambda: data[:4] + struct.pack("<I", 1) + data[8:],
        "big-endian": lambda: data[:4] + struct.pack(">I", 3) + data[8:],
        "many fields": lambda: data[:16] + struct.pack("<Q", 2**60) + data[24:],
        "many tensors": lambda: data[:8] + struct.pack("<Q", 2**60) + data[16:],
        "long key": lambda: data[:24] + struct.pack("<Q", 2**63) + data[32:],
        "axes": lambda: data[:place] + struct.pack("<I", 2**31) + data[place + 4 :],
        "type": lambda: data[: place + 20] + struct.pack("<I", 999) + data[place + 24 :],
        "offset": lambda: data[: place + 24] + struct.pack("<Q", 0) + data[place + 32 :],
        "blocks": lambda: data[: place + 4] + struct.pack("<Q", 255) + data[place + 12 :],
        "not UTF-8": lambda: data[:tensor] + b"\xff" + data[tensor + 1 :],
    }
    return change[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated data", "is truncated or corrupt: .* ends at byte [0-9,]+ of a file of [0-9,]+; download it again"),
        ("truncated header", "is truncated or corrupt: its header goes on after the last of [0-9,]+ bytes"),
        ("few bytes", "is truncated: it has 10 bytes"),
        ("no bytes", "is not a GGUF file"),
        ("magic", "is not a GGUF file: it does not begin with GGUF"),
        ("git-lfs", "is a Git LFS pointer, without the content; run `git lfs pull`"),
        ("version", "has version 1 of GGUF; this library reads versions 2 and 3"),
        ("big-endian", "is big-endian; convert it"),
        ("many fields", "is truncated or corrupt"),
        ("many tensors", "is truncated or corrupt"),
        ("long key", "is truncated or corrupt: its header goes on after"),
        ("axes", r"is truncated or corrupt: blk\.0\.attn_q\.weight has 2147483648 axes"),
        ("type", r": blk\.0\.attn_q\.weight has quantisation type 999, .* upgrade it: pip install --upgrade gguf"),
        ("offset", "is truncated or corrupt: .* overlaps the tensor before it"),
        (
            "blocks",
            r"is truncated or corrupt: blk\.0\.attn_q\.weight has shape \[512, 255\], but Q5_0 has blocks of 32",
        ),
        ("not UTF-8", "is truncated or corrupt"),
    ],
)
def test_damaged_files(what, message, tmp_path):
    """One line, and no array of 2**60 elements."""
    file = write(tmp_path / "a.gguf", ONE_LAYER)
    convert_checkpoint(file)  # control
    file.write_bytes(corrupt(file.read_bytes(), what))
    with pytest.raises(CheckpointError, match=rf"a\.gguf ?{message}") as raised:
        convert_checkpoint(file)
    assert "\n" not in str(raised.value)


def test_where_a_file_is_looked_for(tmp_path):
    """A missing file is not looked for on the hub, a folder of GGUF files names one, and Ollama's have no suffix."""
    with pytest.raises(CheckpointError, match=r"there is no file missing\.gguf"):
        convert_checkpoint("missing.gguf")
    file = write(tmp_path / "a.gguf", ONE_LAYER)
    with pytest.raises(CheckpointError, match=r"has no config\.json; to read a\.gguf, give the file: .*a\.gguf"):
        convert_checkpoint(tmp_path)
    assert convert_checkpoint(file.rename(tmp_path / "sha256-0123"))[0].num_hidden_layers == 1


@pytest.mark.parametrize(
    ("name", "of_gemma", "other"), [("causal_attention", True, False), ("rope_dimension_count", 256, 128)]
)
def test_what_another_model_computes_is_refused(name, of_gemma, other, tmp_path):
    """These fields change every number, and the config of a Gemma 3 does not have them."""
    with pytest.raises(CheckpointError, match=f"is {other}; this library reads Gemma 3 with {of_gemma}"):
        convert_checkpoint(write(tmp_path / "x.gguf", ONE_LAYER, fields={name: (other,)}))
    convert_checkpoint(write(tmp_path / "y.gguf", ONE_LAYER, fields={name: (of_gemma,)}))  # control
