"""The logit lens: equal to the model's own head in float64, in bounded memory, under every transformation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import convert_state_dict
from gemma3_jax import TINY, Gemma3, Gemma3Config, HookedGemma3, UnknownSite
from gemma3_jax.analysis import direct_logit_attribution, lens_table, logit_lens, readout
from gemma3_jax.analysis import lens as lens_module
from gemma3_jax.run.request import new_request
from tests.helpers.programs import programs
from tests.helpers.random_models import hf_model
from tests.helpers.small_model import KINDS, LAYERS, LEFT_PADDED, TOKENS, assert_same, difference, same

VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "softcapped": {"final_logit_softcapping": 3.0},
}
RESIDUALS = "blocks.*.hook_resid_post"


@functools.cache
def model(variant: str = "tied") -> HookedGemma3:
    hf = hf_model(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS], **VARIANTS[variant])
    config = Gemma3Config.from_hf(hf.config)
    return HookedGemma3(config, convert_state_dict(hf.state_dict(), config))


@functools.cache
def tiny() -> HookedGemma3:
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@functools.cache
def run(variant: str = "tied"):
    """(logits, cache of the residual streams)."""
    return model(variant).run_with_cache(TOKENS, RESIDUALS)


def exact_logits(variant: str) -> np.ndarray:
    """[L, b, p, V] float64, from captured values and the weights alone."""
    m = model(variant)
    x = np.stack([np.asarray(value, np.float64) for value in run(variant)[1].values()])
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + m.config.rms_norm_eps)
    logits = x * np.asarray(m.params["ln_final"]["weight"]) @ np.asarray(m.W_U, np.float64)
    cap = m.config.final_logit_softcapping
    return logits if cap is None else cap * np.tanh(logits / cap)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_readout_is_the_models_head(variant):
    """On the last residual stream it gives the model's logits to the bit; on the one before, others."""
    m = model(variant)
    logits, cache = run(variant)
    read = [readout(m.config, m.params, value) for value in cache.values()]
    assert_same(read[-1], logits, 1e-6)
    assert not same(read[0], logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_float64(variant):
    """Ids, logits and log-probabilities of the best, and probability and rank of targets, at every layer."""
    logits = exact_logits(variant)
    targets = np.roll(np.asarray(TOKENS), -1, axis=1)
    lens = logit_lens(model(variant), TOKENS, targets=targets)
    assert lens.names == tuple(f"blocks.{i}.hook_out" for i in range(LAYERS))
    np.testing.assert_array_equal(lens.tokens, np.argsort(-logits, axis=-1)[..., :5])
    best = np.take_along_axis(logits, np.asarray(lens.tokens), -1)
    assert_same(lens.logits, best)
    log_probs = log_softmax(logits)
    assert_same(lens.log_probs, np.take_along_axis(log_probs, np.asarray(lens.tokens), -1))
    where = np.broadcast_to(targets, logits.shape[:3])[..., None]
    assert_same(lens.target_log_probs, np.take_along_axis(log_probs, where, -1)[..., 0])
    larger = (logits > np.take_along_axis(logits, where, -1)).sum(-1)
    np.testing.assert_array_equal(lens.target_ranks, larger)
    # controls: one layer off, and the logits of a head without its norm, are seen
    assert not same(lens.logits[::-1], best)
    assert not same(lens.log_probs, best)


def test_one_target_and_none():
    """One id stands for every position; without targets there is nothing about them."""
    one = logit_lens(model(), TOKENS, targets=7)
    each = logit_lens(model(), TOKENS, targets=np.full(TOKENS.shape, 7))
    np.testing.assert_array_equal(one.target_ranks, each.target_ranks)
    np.testing.assert_array_equal(one.target_log_probs, each.target_log_probs)
    none = logit_lens(model(), TOKENS)
    assert none.target_ranks is None
    assert none.target_log_probs is None
    other = logit_lens(model(), TOKENS, targets=8)
    assert not same(one.target_log_probs, other.target_log_probs)  # control


@pytest.mark.parametrize("chunk_size", [1, 7, 18])
def test_chunks_change_nothing(chunk_size):
    """36 rows, in chunks that divide them, or leave a remainder; the default is larger."""
    lens = logit_lens(model(), TOKENS, targets=3, chunk_size=chunk_size)
    whole = logit_lens(model(), TOKENS, targets=3)
    jax.tree.map(functools.partial(assert_same, bound=1e-6), lens, whole)


def test_sites_by_any_name():
    """Any [b, p, d] sites, in the model's order; only the blocks that are needed run."""
    names = ["hook_embed", "blocks.0.hook_resid_mid", "model.layers.0.output"]
    lens = logit_lens(model(), TOKENS, names_filter=names)
    assert lens.names == ("embed.hook_out", "blocks.0.hook_resid_mid", "blocks.0.hook_out")
    assert_same(lens.logits[2], logit_lens(model(), TOKENS).logits[0], 1e-6)


def test_padding():
    """A padded row reads as it does alone, whichever its batch."""
    lens = logit_lens(model(), TOKENS, attention_mask=LEFT_PADDED)
    alone = logit_lens(model(), TOKENS[:1, 3:])
    assert_same(lens.log_probs[:, :1, 3:], alone.log_probs)
    unmasked = logit_lens(model(), TOKENS)
    assert not same(unmasked.log_probs[:, :1, 3:], alone.log_probs)  # control


def test_low_precision():
    """A bfloat16 model is read in bfloat16 with float32 logits: its own, to one rounding of the normed residual."""
    low = HookedGemma3.from_pretrained(TINY)
    text = "ba ke lo mu ti so re ba ke lo"
    lens = logit_lens(low, text, k=1)
    assert lens.log_probs.dtype == lens.logits.dtype == jnp.float32
    logits = low(text).max(-1)
    assert difference(lens.logits[-1, ..., 0], logits) < 2**-8
    assert difference(lens.logits[-2, ..., 0], logits) > 2**-8  # control


def test_table():
    """Strings and probabilities of one row, for a picture."""
    texts = ["ba ke lo mu ti ba ke lo", "so re na du pi so re na"]
    lens = logit_lens(tiny(), texts, k=2)
    tokens, probabilities = lens_table(tiny(), lens, row=1)
    assert np.shape(tokens) == probabilities.shape == (4, 9, 2)
    assert tokens[-1][-1][0] == "du"
    assert tokens[0][3] == tiny().to_str_tokens(lens.tokens[0, 1, 3])
    np.testing.assert_allclose(probabilities, np.exp(lens.log_probs[:, 1]), rtol=1e-6)
    assert lens_table(tiny(), lens)[0][-1][-1][0] == "mu"  # the other row
    for row in (2, -3):  # of which JAX would give the nearest
        with pytest.raises(ValueError, match=f"row is {row}; the lens has 2 rows"):
            lens_table(tiny(), lens, row)
    ranks = logit_lens(tiny(), texts, k=2, targets="du").target_ranks[-1, :, -1]
    assert ranks[1] == 0 < ranks[0]


def test_composes_with_jit_and_vmap():
    """Under jit with the model as an argument, and under vmap over tokens."""
    lens = logit_lens(model(), TOKENS, targets=5)

    @jax.jit
    def by_row(m, tokens, target):
        return jax.vmap(lambda row: logit_lens(m, row, targets=target))(tokens)

    rows = by_row(model(), TOKENS, jnp.int32(5))
    jax.tree.map(lambda row, whole: assert_same(row[:, :, 0].swapaxes(0, 1), whole, 1e-5), rows, lens)


def test_gradient():
    """Equal to the gradient of a lens that keeps all logits."""
    values = list(run()[1].values())

    def by_lens(norm):
        m = HookedGemma3(model().config, {**model().params, "ln_final": {"weight": norm}})
        return logit_lens(m, TOKENS, targets=5, chunk_size=16).target_log_probs.sum()

    def directly(norm):
        params = {**model().params, "ln_final": {"weight": norm}}
        logits = [readout(model().config, params, value) for value in values]
        return jax.nn.log_softmax(jnp.stack(logits))[..., 5].sum()

    norm = model().params["ln_final"]["weight"]
    ours, theirs, elsewhere = (
        jax.jit(jax.grad(f))(x) for f, x in ((by_lens, norm), (directly, norm), (directly, 1.1 * norm))
    )
    assert_same(ours, theirs)
    assert not same(ours, elsewhere)  # control


def test_new_values_compile_nothing():
    """Other tokens, targets and weights of the same shape run the compiled function."""
    logit_lens(model(), TOKENS, targets=5)
    before = programs()
    other = HookedGemma3(model().config, jax.tree.map(lambda x: 0.9 * x, model().params))
    for m, tokens, target in ((model(), TOKENS[::-1], 6), (other, TOKENS, 7)):
        logit_lens(m, tokens, targets=target)
    assert programs() == before
    logit_lens(model(), TOKENS, k=2, targets=5)
    assert programs() == before + 1  # control: the count sees a new k


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_at_the_real_vocabulary(dtype):
    """Compiled at V = 262144, not run: within the docstring's formula, and far from [layers, tokens, V]."""
    layers, length, chunk = 4, 200, 64
    config = dataclasses.replace(
        Gemma3Config.preset("270m"), num_hidden_layers=layers, layer_types=(), intermediate_size=64
    )
    abstract = jax.eval_shape(Gemma3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype), abstract)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    sites = tuple(f"blocks.{i}.hook_out" for i in range(layers))
    request = new_request(config, np.ones((1, length), int), sites, return_type=None)
    size = jnp.dtype(dtype).itemsize

    def temporary(function):
        return function.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    def lens(params, tokens):
        return lens_module._lens(params, request, tokens, k=5, chunk_size=chunk)

    def naive(params, tokens):
        residual = jnp.ones((1, layers * length, config.hidden_size), dtype)
        return jax.lax.top_k(readout(config, params, residual), 5)

    before_the_head = 20e6  # generous: at 200 tokens, attention and MLP of one layer at a time
    values = 3 * layers * length * config.hidden_size * size
    turned = config.vocab_size * config.hidden_size * size if dtype == "bfloat16" else 0
    bound = 8 * chunk * config.vocab_size + values + turned + before_the_head
    assert temporary(jax.jit(lens)) < bound
    assert temporary(jax.jit(naive)) > bound  # control: the measure sees [layers, tokens, V]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names_filter": "blocks.*.attn.hook_pattern"}, ValueError, r"blocks.0.attn.hook_pattern is \[b h p k\]"),
        ({"names_filter": "blocks.*.hook_resid_posts"}, UnknownSite, "hook_resid_post"),
        ({"names_filter": lambda name: False}, ValueError, "does not match a site"),
        ({"k": 0}, ValueError, "k is 0; it must be between 1 and the vocabulary's 101"),
        ({"k": 102}, ValueError, "k is 102"),
        ({"k": 2.0}, TypeError, "k is 2.0; it must be an integer"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size is 2.5; it must be an integer"),
        ({"targets": 101}, ValueError, "token id 101 is outside the vocabulary of 101"),
        ({"targets": np.zeros((2, 8), int)}, ValueError, "broadcast"),
    ],
)
def test_errors(options, error, message):
    """Each names what is wrong."""
    with pytest.raises(error, match=message):
        logit_lens(model(), TOKENS, **options)


# ---- direct logit attribution


@pytest.mark.parametrize(("variant", "by"), [("tied", "component"), ("untied", "head")])
def test_attributions_sum_to_the_logit(variant, by):
    """At every position, of an answer and of a difference; in a padded batch too."""
    m, heads = model(variant), model().config.num_attention_heads
    logits = m(TOKENS, attention_mask=LEFT_PADDED)
    answers = np.asarray([7, 9])
    parts, labels = direct_logit_attribution(m, TOKENS, answers, by=by, attention_mask=LEFT_PADDED)
    assert parts.shape == (len(labels), *TOKENS.shape)
    assert len(labels) == LAYERS * (2 if by == "component" else heads + 1) + 2
    right = np.take_along_axis(logits, answers[:, None, None], axis=-1)[..., 0]
    assert_same(parts.sum(0), right, 5e-6)
    difference_of_logits, _ = direct_logit_attribution(m, TOKENS, answers, 3, by=by, attention_mask=LEFT_PADDED)
    assert_same(difference_of_logits.sum(0), right - logits[..., 3], 5e-6)
    assert np.abs(parts[labels.index("remainder")]).max() < 1e-5 * np.abs(right).max()
    assert not same(np.delete(parts, 1, axis=0).sum(0), right)  # control: a part left out is seen


def test_attribution_on_text_at_one_position():
    """Strings that are one token; an int position drops its axis."""
    text = "ba ke lo mu ti ba ke"
    parts, labels = direct_logit_attribution(tiny(), text, "lo", "mu", pos_slice=-1)
    logits = tiny()(text)[:, -1]
    lo, mu = (tiny().to_single_token(token) for token in ("lo", "mu"))
    assert parts.shape == (len(labels), 1)
    assert_same(parts.sum(0), logits[:, lo] - logits[:, mu], 1e-5)
    by_head = jax.jit(lambda m, tokens: direct_logit_attribution(m, tokens, lo, mu, by="head", pos_slice=-1)[0])
    heads = by_head(tiny(), tiny().to_tokens(text))
    # the four heads of a layer sum to its attention output
    attention = [parts[labels.index(f"{layer}_attn_out")] for layer in range(4)]
    assert_same(heads[:16].reshape(4, 4, 1).sum(axis=1), attention, 1e-5)
    with pytest.raises(ValueError, match="2 tokens"):
        direct_logit_attribution(tiny(), text, "lo mu")
    with pytest.raises(ValueError, match="by is 'heads'; it must be 'component' or 'head'"):
        direct_logit_attribution(tiny(), text, "lo", by="heads")
