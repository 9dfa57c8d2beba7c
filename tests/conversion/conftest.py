"""Fixtures of the tests of conversion: models and checkpoints, which no test changes."""

from pathlib import Path

import pytest
import transformers

from tests.conversion import gguf_files
from tests.conversion.key_map import KINDS
from tests.helpers.random_models import hf_model


@pytest.fixture(scope="session")
def model() -> transformers.Gemma3ForCausalLM:
    """A small float32 model."""
    return hf_model()


@pytest.fixture(scope="session")
def good(model, tmp_path_factory) -> dict[str, Path]:
    """One sound checkpoint in one file, and the same in shards."""
    root = tmp_path_factory.mktemp("good")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="50KB")
    return {"single": root / "single", "sharded": root / "sharded"}


@pytest.fixture(scope="session")
def models() -> dict[str, transformers.Gemma3ForCausalLM]:
    """A model of each of `KINDS`."""
    return {kind: hf_model(**overrides) for kind, overrides in KINDS.items()}


@pytest.fixture(scope="session")
def saved(models, tmp_path_factory) -> dict[str, Path]:
    """Each model as save_pretrained writes it, in one file."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in models}


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A small GGUF file with several quantisations."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="session")
def gguf_model(gguf_file) -> transformers.PreTrainedModel:
    """What transformers reads from the small file."""
    transformers.logging.disable_progress_bar()
    return gguf_files.read_by_transformers(gguf_file)


@pytest.fixture
def gguf_cache(tmp_path, monkeypatch) -> Path:
    """No test reads or fills the cache directory of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemma3-jax" / "tokenizers"
