"""The model of a small random folder, as `sentence_transformers` and as this library load it."""

from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from gemma3_jax import HookedGemma3
from tests.hooked.embedding.folders import load, write


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The folder of the model; do not change it."""
    directory = tmp_path_factory.mktemp("embedding")
    write(directory)
    return directory / "model"


@pytest.fixture(scope="session")
def theirs(folder) -> SentenceTransformer:
    return load(folder)


@pytest.fixture(scope="session")
def model(folder) -> HookedGemma3:
    return HookedGemma3.from_pretrained(folder)
