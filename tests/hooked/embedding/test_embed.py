"""Embeddings equal those of `sentence_transformers`, whatever the batch; a model without a head says so."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import (
    TINY,
    EmbeddingHead,
    HookedGemma3,
    edits,
    forward,
    reductions,
)
from gemma3_jax.hooked.embedding import CPU_TOKENS, _batches, _padded_length
from tests.hooked.embedding.folders import (
    BAR,
    OUT,
    PROMPTS,
    TEXTS,
    D,
    apart,
    load,
)


@pytest.mark.parametrize("prompt", ["query", "document", None])
@pytest.mark.parametrize("dim", [None, 16])
def test_embeddings_equal_those_of_sentence_transformers(model, theirs, prompt, dim):
    """Texts of 2 to 70 tokens, of which one is truncated, with each prompt, whole and cut to fewer features."""
    expected = theirs.encode(TEXTS, prompt_name=prompt, truncate_dim=dim, normalize_embeddings=True)
    assert apart(model.embed(TEXTS, prompt, dim), expected) < BAR
    assert apart(model.embed(TEXTS[1], prompt, dim), expected[1]) < BAR


def test_the_older_layout_of_the_folder(folder, theirs, tmp_path):
    """Folders of older versions, such as EmbeddingGemma's, have other keys and classes."""
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": D, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    listed = json.loads((old / "modules.json").read_text())
    for entry in listed:
        entry["type"] = f"sentence_transformers.models.{entry['type'].split('.')[-1]}"
    (old / "modules.json").write_text(json.dumps(listed))
    (old / "sentence_bert_config.json").write_text('{"max_seq_length": 10, "do_lower_case": false}')
    ours = HookedGemma3.from_pretrained(old)
    assert ours.config.embedding_head.max_length == 10
    assert apart(ours.embed(TEXTS), load(old).encode(TEXTS)) < BAR
    assert apart(ours.embed(TEXTS), theirs.encode(TEXTS)) > 100 * BAR  # control: truncated later


@pytest.mark.parametrize("fault", ["no EOS", "pads in the mean", "no prompt", "no dense layers", "causal"])
def test_controls(model, theirs, fault):
    """Each of these faults is seen."""
    expected = theirs.encode(TEXTS[:4], prompt_name="query")
    inputs = model.inputs([PROMPTS["query"] + each for each in TEXTS[:4]], return_type="embedding")
    tokens, mask, config = inputs.tokens, inputs.attention_mask, model.config
    edited: dict = {}
    if fault == "no EOS":
        mask = np.where(tokens == config.eos_token_id, 0, mask)
    elif fault == "pads in the mean":
        mask = np.ones_like(mask)
    elif fault == "no prompt":
        tokens, mask, *_ = model.inputs(TEXTS[:4], return_type="embedding")
    elif fault == "no dense layers":
        edited = {"dense_2.hook_out": lambda z, hook: z.at[:].set(1)}
    else:
        config = dataclasses.replace(config, use_bidirectional_attention=False)
    wrong = forward(config, model.params, tokens, edits=edited, attention_mask=mask, return_type="embedding")[0]
    right = forward(model.config, model.params, *inputs[:1], attention_mask=inputs[1], return_type="embedding")[0]
    assert apart(right, expected) < BAR
    assert apart(wrong, expected) > 100 * BAR


def test_a_model_without_dense_layers_and_norm(folder, tmp_path):
    """Pooling alone is a head, too, and then the embeddings keep their length."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "modules.json").write_text(json.dumps(json.loads((bare / "modules.json").read_text())[:2]))
    ours = HookedGemma3.from_pretrained(bare)
    assert ours.config.embedding_head.dense == ()
    expected = load(bare).encode(TEXTS)
    assert apart(ours.embed(TEXTS), expected) < 1e-5 * np.abs(expected).max()
    assert apart(ours.embed(TEXTS, dim=7), expected[:, :7]) < 1e-5 * np.abs(expected).max()


def test_stacked_layers_and_bfloat16(folder, model):
    """The head is the same in both layouts; bfloat16 weights give float32 embeddings of length 1."""
    stacked = HookedGemma3.from_pretrained(folder, scan_layers=True)
    assert apart(stacked.embed(TEXTS), np.asarray(model.embed(TEXTS))) < BAR
    narrow = HookedGemma3.from_pretrained(folder, dtype="bfloat16").embed(TEXTS)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(narrow, axis=1), 1, atol=BAR)
    assert 100 * BAR < apart(narrow, np.asarray(model.embed(TEXTS))) < 0.05


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=300))
def test_batches(lengths):
    """Every text is in one batch that is long enough; few shapes serve any corpus."""
    rows = [[0] * n for n in lengths]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    batches = list(_batches(order, rows, CPU_TOKENS))
    assert [i for chosen, _ in batches for i in chosen] == order
    for chosen, (b, p) in batches:
        assert len(chosen) <= b
        assert max(lengths[i] for i in chosen) <= p == _padded_length(p)
        assert b == 1 or b * p <= CPU_TOKENS
    assert len({shape for _, shape in batches}) <= 16


def test_order_and_batches_do_not_change_a_text(model):
    """A text alone and among others has the same embedding, where it was."""
    together = np.asarray(model.embed(TEXTS))
    alone = np.stack([np.asarray(model.embed(each)) for each in TEXTS])
    assert apart(together, alone) < BAR
    assert apart(together[::-1], np.asarray(model.embed(TEXTS[::-1]))) < BAR


def test_a_model_without_a_head():
    """One clear error, from each door."""
    plain = HookedGemma3.from_pretrained(TINY)
    for call in (
        lambda: plain.embed("ba ke"),
        lambda: plain.run_with_cache("ba ke", "hook_embed", return_type="embedding"),
        lambda: forward(plain.config, plain.params, jnp.ones((1, 3), int), return_type="embedding"),
    ):
        with pytest.raises(ValueError, match=r"no embedding head.*embeddinggemma"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.embed("ba", "classify"), "no prompt 'classify'; this checkpoint has document, query"),
        (lambda model: model.embed("ba", dim=OUT + 1), f"{OUT} features"),
        (lambda model: model.embed("ba", dim=0), "dim is 0"),
        (lambda model: model.embed([]), "no texts"),
        (lambda model: model.embed(["ba", 3]), "has 3; give only texts"),
        (lambda model: model.run_with_cache("ba", "pooled"), "pooled never runs: return_type is 'logits'"),
        (lambda model: model.run_with_cache("ba", "hook_unembed", return_type="embedding"), "never runs"),
        (lambda model: model.run_with_cache("ba", "hook_embed", return_type="embedding", logits_at=-1), "logits_at"),
        (
            lambda model: model.run_with_cache([[3, 4]], "pooled", return_type="embedding", segment_ids=[[0, 1]]),
            "must hold one text",
        ),
        (
            lambda model: model.run_with_cache("ba", "pooled", return_type="embedding", incl_bwd=True),
            "needs a loss_fn",
        ),
        (
            lambda model: model.run_with_cache("ba", {"pooled": reductions.At(-1)}, return_type="embedding"),
            "no axis of tokens",
        ),
        (
            lambda model: model.run_with_hooks(
                "ba", [("pooled", edits.only(edits.Replace(0.0), positions=0))], return_type="embedding"
            ),
            "has no positions",
        ),
    ],
)
def test_refused(model, call, message):
    """Each message names the thing."""
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.real
def test_embeddinggemma():
    """Texts of 3 to 2,048 tokens, with each prompt and size. EMBEDDINGGEMMA_CHECKPOINT names its directory."""
    directory = os.environ.get("EMBEDDINGGEMMA_CHECKPOINT")
    if not directory:
        pytest.skip("needs google/embeddinggemma-300m: EMBEDDINGGEMMA_CHECKPOINT")
    jax.config.update("jax_disable_most_optimizations", False)
    model, theirs = HookedGemma3.from_pretrained(directory), load(Path(directory))
    words = ["Mars", ",", "the", "Red", "Planet", "is", "often", "called", "a", "quick", "brown", "fox", "in", "2048"]
    texts = [" ".join(np.random.default_rng(n).choice(words, n)) for n in (1, 3, 25, 100, 600, 3000)]
    lengths = sorted(len(ids) for ids in theirs.tokenizer(texts, truncation=True)["input_ids"])
    assert (lengths[0], lengths[-1]) == (3, 2048)
    assert model.config.embedding_head == EmbeddingHead(
        (3072, 768), max_length=2048, prompts=tuple(theirs.prompts.items())
    )
    try:
        expected = theirs.encode(texts)
        assert apart(model.embed(texts), expected) < BAR
        for prompt, dim in (("query", 768), ("document", 512), ("STS", 256), ("Clustering", 128)):
            expected = theirs.encode(texts[:4], prompt_name=prompt, truncate_dim=dim, normalize_embeddings=True)
            assert apart(model.embed(texts[:4], prompt, dim), expected) < BAR
            assert apart(model.embed(texts[:4], dim=dim), expected) > 100 * BAR  # control: no prompt
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
