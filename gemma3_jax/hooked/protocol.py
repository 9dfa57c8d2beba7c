"""What the functions of this room read of a model; `HookedGemma3` has it."""

from __future__ import annotations

from typing import Protocol

from gemma3_jax.config import Gemma3Config
from gemma3_jax.types import Params, Tokenizer


class Model(Protocol):
    """A model with its parameters and its tokenizer."""

    config: Gemma3Config
    params: Params
    tokenizer: Tokenizer | None
