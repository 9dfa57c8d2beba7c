"""Names of a checkpoint's files and tensors, and the check of an error's one line."""

import pytest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def said(error: pytest.ExceptionInfo, *names: str) -> None:
    """The error is one line and holds each of `names`."""
    message = str(error.value)
    assert "\n" not in message
    for name in names:
        assert str(name) in message, message


EMBED = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
