"""Loss per token and the ranks of an answer: against the logits of the whole model."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from conversion import convert_state_dict
from gemma3_jax import TINY, Gemma3, Gemma3Config, HookedGemma3
from gemma3_jax.analysis import loss_per_token
from gemma3_jax.analysis import prompts as prompts_module
from gemma3_jax.analysis import test_prompt as ask  # under its own name pytest must not collect it: see below
from gemma3_jax.run.request import new_request
from tests.helpers.programs import programs
from tests.helpers.random_models import hf_model
from tests.helpers.small_model import KINDS, LAYERS, LEFT_PADDED, TOKENS, assert_same, same, small

RIGHT_PADDED = LEFT_PADDED[:, ::-1]


@functools.cache
def tiny() -> HookedGemma3:
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def model() -> HookedGemma3:
    return HookedGemma3(*small())


def exact_losses(m: HookedGemma3, mask=None) -> np.ndarray:
    """[b, p - 1] float64, from the model's logits."""
    logits = np.asarray(m(TOKENS, attention_mask=mask), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs[:, :-1], np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]


# ---- loss_per_token


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_losses(chunk_size):
    """Against float64 on the logits; in chunks that leave a remainder, or that take all positions."""
    losses = loss_per_token(model(), TOKENS, chunk_size=chunk_size)
    assert losses.dtype == jnp.float32
    assert_same(losses, exact_losses(model()), 2e-6)
    assert not same(losses[:, ::-1], exact_losses(model()))  # control
    assert losses.mean() == pytest.approx(float(model()(TOKENS, "loss")), rel=1e-6)


@pytest.mark.parametrize("variant", [{"tie_word_embeddings": False}, {"final_logit_softcapping": 3.0}], ids=str)
def test_losses_of_other_heads(variant):
    """An unembedding of its own, and capped logits."""
    hf = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], **variant)
    config = Gemma3Config.from_hf(hf.config)
    m = HookedGemma3(config, convert_state_dict(hf.state_dict(), config))
    assert_same(loss_per_token(m, TOKENS), exact_losses(m), 2e-6)


@pytest.mark.parametrize("mask", [LEFT_PADDED, RIGHT_PADDED], ids=["left", "right"])
def test_padding_is_nan(mask):
    """Where the token or the one before it is padding; the mean of the others is the model's own loss."""
    losses = loss_per_token(model(), TOKENS, mask)
    real = np.asarray(mask, bool)
    np.testing.assert_array_equal(np.isnan(losses), ~(real[:, 1:] & real[:, :-1]))
    assert jnp.nanmean(losses) == pytest.approx(float(model()(TOKENS, "loss", attention_mask=mask)), rel=1e-6)
    kept = ~np.isnan(losses)
    assert_same(np.asarray(losses)[kept], exact_losses(model(), mask)[kept], 2e-6)
    if mask is LEFT_PADDED:  # padding on the right is seen by no real token
        unmasked = np.asarray(loss_per_token(model(), TOKENS))
        assert not same(unmasked[kept], exact_losses(model(), mask)[kept])  # control


def test_a_batch_of_texts():
    """The shorter text is padded, and its losses are those that it has alone."""
    texts = ["ba ke lo ba ke lo", "so re"]
    losses = loss_per_token(tiny(), texts)
    assert np.isnan(losses).sum(axis=1).tolist() == [0, 4]
    assert_same(losses[1:, 4:], loss_per_token(tiny(), "so re"), 1e-5)


def test_losses_compose():
    """Under jit and vmap; the gradient is that of the model's loss, and padding leaves it finite."""
    m = HookedGemma3(*small(1))
    losses = loss_per_token(m, TOKENS)
    rows = jax.jit(lambda m, tokens: jax.vmap(lambda row: loss_per_token(m, row)[0])(tokens))(m, TOKENS)
    assert_same(rows, losses, 1e-5)
    ours = jax.grad(lambda m: jnp.nanmean(loss_per_token(m, TOKENS, LEFT_PADDED, chunk_size=3)))(m)
    theirs = jax.grad(lambda m: m(TOKENS, "loss", attention_mask=LEFT_PADDED))(m)
    jax.tree.map(lambda a, b: assert_same(a, b, 1e-5), ours, theirs)
    assert not same(ours.params["embed"]["weight"], 1.01 * theirs.params["embed"]["weight"])  # control


def test_losses_compile_once():
    """Other tokens and weights of the same shape run the compiled function."""
    loss_per_token(model(), TOKENS)
    before = programs()
    loss_per_token(HookedGemma3(model().config, jax.tree.map(lambda x: 0.9 * x, model().params)), TOKENS[::-1])
    assert programs() == before


def test_peak_memory_at_the_real_vocabulary():
    """Compiled at V = 262144, not run: as the docstring says, and far from [b, p, V]."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 262_144}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
    config = Gemma3Config(**sizes, **heads, sliding_window=16)
    params = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    request = new_request(config, np.ones((2, 256), int), return_type="loss")

    def peak(chunk_size):
        losses = functools.partial(prompts_module._losses, chunk_size=chunk_size)
        lowered = jax.jit(losses).lower(params, request)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    bound = 8 * 2 * 16 * config.vocab_size + 5e6
    assert peak(16) < bound
    assert peak(256) > 4 * bound  # control: unembedded all at once


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[5]],), {}, "one token; a loss needs a token before it, so give at least two"),
        ((TOKENS,), {"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_loss_errors(arguments, options, message):
    """Each names what is wrong."""
    with pytest.raises(ValueError, match=message):
        loss_per_token(model(), *arguments, **options)


# ---- test_prompt


def test_answer():
    """Rank, probability and the most likely tokens in place of each token of the answer, from the logits."""
    prompt, answer = "ba ke lo mu ti so re ba ke", "lo ti mu"
    result = ask(tiny(), prompt, answer, k=4)
    probs = np.asarray(jax.nn.softmax(tiny()(f"{prompt} {answer}")[0]), np.float64)
    ids = tiny().to_tokens(answer, prepend_bos=False)[0]
    assert result.prompt == tiny().to_str_tokens(prompt)
    assert result.answer == ["lo", "ti", "mu"]
    for i, token in enumerate(np.asarray(ids)):
        before = probs[9 + i]  # the prompt is <bos> and nine tokens
        order = np.argsort(-before)
        assert result.ranks[i] == list(order).index(token)
        assert result.probabilities[i] == pytest.approx(before[token], rel=1e-3)
        assert result.top_tokens[i] == tiny().to_str_tokens(order[:4])
        np.testing.assert_allclose(result.top_probabilities[i], before[order[:4]], rtol=1e-3)
    assert result.ranks[0] == 0  # it copies
    assert result.ranks[1] > 0  # control: what it does not foresee has another rank


class Metaspace:
    """A tokenizer that, like Gemma's, has a space at the beginning of a token: of letters, each with and without."""

    def __call__(self, text: str, add_special_tokens: bool):
        ids = []
        for i, letter in enumerate(text):
            if letter != " ":
                ids.append(3 + 2 * (ord(letter) - ord("a")) + (text[i - 1 : i] == " "))
        return {"input_ids": ids}

    def decode(self, ids) -> str:
        return "".join(("" if i % 2 else " ") + chr(ord("a") + (i - 3) // 2) if i > 2 else "<bos>" for i in ids)


def test_spaces():
    """An answer begins with a space unless it has one or none is wanted: to such a tokenizer that is another token."""
    m = HookedGemma3(*small(), Metaspace())
    assert m.to_str_tokens("a bc") == ["<bos>", "a", " b", "c"]
    spaced, given, bare = ask(m, "a b", "c"), ask(m, "a b", " c"), ask(m, "a b", "c", prepend_space_to_answer=False)
    assert spaced.answer == given.answer == [" c"]
    assert bare.answer == ["c"]
    assert spaced.probabilities == given.probabilities != bare.probabilities
    logits = m("a b c")[0, -2]
    assert spaced.probabilities[0] == pytest.approx(float(jax.nn.softmax(logits)[8]), rel=1e-4)


def test_it_prints():
    """As a table, by `print` and by rich: every token of the answer with rank and probability, markup left alone."""
    result = ask(tiny(), "ba ke lo mu ti so re ba ke", "lo ti", k=3)
    lines = str(result).splitlines()
    assert "'<bos>' 'ba' 'ke'" in lines[0]
    assert f"'ti' {result.probabilities[1]:.2%}" not in lines[0]
    header = "\n".join(lines[:5])
    for token, rank, probability in zip(result.answer, result.ranks, result.probabilities, strict=True):
        assert repr(token) in header
        assert f"rank {rank}, {probability:.2%}" in header
    assert sum(f"{result.top_probabilities[0, 2]:.2%}" in line for line in lines) >= 1
    console = Console(file=io.StringIO(), width=200)
    console.print(result)
    assert f"rank {result.ranks[1]}" in console.file.getvalue()
    bracketed = str(type(result)(["[bold]"], ["[/x]"], np.array([0]), np.array([1.0]), [["[red]"]], np.ones((1, 1))))
    assert "'[bold]'" in bracketed
    assert "'[/x]'" in bracketed
    assert "'[red]'" in bracketed


def test_pytest_does_not_collect_it(pytester_file):
    """A test module that imports `test_prompt` has no test of that name."""
    collected = pytester_file("from gemma3_jax.analysis import test_prompt\n\n\ndef test_mine():\n    pass\n")
    assert collected == ["test_mine"]


@pytest.fixture
def pytester_file(tmp_path, request):
    """The names of the tests that pytest collects from a module with that text."""

    def collect(text: str) -> list[str]:
        file = tmp_path / "test_collected.py"
        file.write_text(text)
        module = pytest.Module.from_parent(request.session, path=file)
        return [item.name for item in module.collect()]

    return collect


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("lo", {"k": 0}, "k is 0; it must be between 1 and the vocabulary's 104"),
        ("lo", {"k": 105}, "k is 105"),
        ("", {}, "a text has no tokens"),
    ],
)
def test_prompt_errors(answer, options, message):
    """Each names what is wrong."""
    with pytest.raises(ValueError, match=message):
        ask(tiny(), "ba ke", answer, **options)


def test_a_model_without_tokenizer():
    """Says that it has none."""
    with pytest.raises(ValueError, match="no tokenizer"):
        ask(model(), "ba ke", "lo")
