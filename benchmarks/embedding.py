"""Embeddings of texts by a model of EmbeddingGemma's shape, beside `sentence_transformers`.

The vocabulary is small: only the rows of the texts' tokens are read.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.peers import installed
from benchmarks.rows import Row, Settings, narrow, ratio
from benchmarks.timing import interleaved
from conversion import export_checkpoint
from gemma3_jax import TINY, EmbeddingHead, Gemma3, Gemma3Config, HookedGemma3

WORDS = np.array(["ba", "ke", "lo", "mu", "ti", "so", "re", "na", "du", "pi"])
# (texts, fewest tokens, most tokens)
CASES = ((1, 16, 16), (64, 8, 128), (8, 256, 2000))
QUICK = ((3, 4, 20),)


def config_of(settings: Settings) -> Gemma3Config:
    """The shape of google/embeddinggemma-300m; of a narrow model for a quick run."""
    if settings.quick:
        return dataclasses.replace(narrow(3), use_bidirectional_attention=True, embedding_head=EmbeddingHead((96, 64)))
    return dataclasses.replace(
        Gemma3Config.preset("270m"),
        vocab_size=512,
        hidden_size=768,
        intermediate_size=1152,
        num_hidden_layers=24,
        num_attention_heads=3,
        layer_types=(),
        max_position_embeddings=2048,
        use_bidirectional_attention=True,
        embedding_head=EmbeddingHead((3072, 768), max_length=2048),
    )


def rows(settings: Settings) -> Iterator[Row]:
    """A row for each number of texts and their lengths, in float32, which both compute to 1e-6."""
    config = config_of(settings)
    params = Gemma3(config).init(jax.random.key(0), np.ones((1, 2), np.int32))["params"]
    model = HookedGemma3.from_pretrained(TINY)
    model = HookedGemma3(config, params, model.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        peers = {}
        if installed("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            export_checkpoint(config, params, Path(temporary) / "model", tokenizer=TINY)
            peers["sentence_transformers"] = SentenceTransformer(str(Path(temporary) / "model")).encode
        for count, fewest, most in QUICK if settings.quick else CASES:
            lengths = np.linspace(fewest, most, count).astype(int)
            texts = [" ".join(np.random.default_rng(i).choice(WORDS, n)) for i, n in enumerate(lengths)]
            runs = {"port": functools.partial(model.embed, texts)}
            runs |= {name: functools.partial(encode, texts) for name, encode in peers.items()}
            seconds = interleaved(runs, settings.rounds)
            figures = (ratio(seconds),) if peers else ()
            yield Row(f"{count} texts, {fewest} to {most} words", "float32", seconds, figures)
