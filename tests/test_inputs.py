"""One entrance for inputs: text and ids of any library are checked, padded and masked alike wherever they come in."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax import TINY, ActivationCache, HookedGemma3, analysis, edits, forward, grad_at, patching
from gemma3_jax.generation.loop import generate
from gemma3_jax.hooked.text_generation import decoded
from gemma3_jax.inputs import padding_mask
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import assert_same, at_once, same, small

TEXTS = ["ba ke lo", "ba ke lo mu ti so re na"]
RESID = "blocks.1.hook_resid_post"


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def last_logit(logits):
    return logits[0, -1, 30]


# Every way in, as a function of the input.
ENTRIES = {
    "call": lambda model, x: model(x),
    "run_with_cache": lambda model, x: model.run_with_cache(x, RESID)[1][RESID],
    "run_with_hooks": lambda model, x: model.run_with_hooks(x, [(RESID, edits.Scale(0.5))]),
    "gradients": lambda model, x: model.run_with_cache(x, RESID, incl_bwd=True)[1].grads[RESID],
    "loss": lambda model, x: model(x, "loss"),
    "activations": lambda model, x: next(model.activations([x], RESID))[RESID],
    "generate": lambda model, x: model.generate(x, 3, return_type="tokens"),
    "generate_stream": lambda model, x: next(np.asarray(each) for each in model.generate_stream(x, 3) if len(each)),
    "logit_lens": lambda model, x: analysis.logit_lens(model, x, k=2).logits,
    "loss_per_token": lambda model, x: np.nan_to_num(analysis.loss_per_token(model, x)),
    "detect_heads": lambda model, x: analysis.detect_heads(model, x, "previous_token_head"),
    "direct_logit_attribution": lambda model, x: analysis.direct_logit_attribution(model, x, 30)[0],
    "sweep": lambda model, x: analysis.sweep(
        model, x, lambda item: {RESID: edits.Scale(item)}, np.ones(2, np.float32), last_logit, progress=False
    ),
    "patching": lambda model, x: patching.get_act_patch_resid_pre(model, x, x, last_logit, progress=False),
    "path patching": lambda model, x: analysis.path_patching(
        model, x, x, last_logit, [("logits",)], [("embed",)], progress=False
    ),
    "attribution": lambda model, x: analysis.attribution_patching(
        model, x, x, last_logit, "resid_pre", ("layer", "pos")
    ),
    "edge attribution": lambda model, x: analysis.edge_attribution(model, x, x, last_logit),
    "integrated gradients": lambda model, x: analysis.integrated_gradients(model, x, RESID, last_logit, steps=1)[0],
}
IDS = np.array([[2, 10, 20, 30], [2, 11, 21, 31]])
KINDS = {
    "list": lambda ids: ids.tolist(),
    "NumPy int64": lambda ids: ids,
    "NumPy uint8": lambda ids: ids.astype(np.uint8),
    "JAX": jnp.asarray,
    "torch": torch.tensor,
    "mapping": lambda ids: {"input_ids": ids.tolist()},
    "BatchEncoding": lambda ids: transformers.BatchEncoding(
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}
    ),
}


@functools.cache
def logits_of_ids():
    return at_once(forward, tiny().config, tiny().params, jnp.asarray(IDS))[0]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_ids(kind):
    """Ids are the same ids whatever holds them."""
    assert_same(tiny()(kind(IDS)), logits_of_ids())
    np.testing.assert_array_equal(tiny().generate(kind(IDS), 3, return_type="tokens"), tiny().generate(IDS, 3))


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_what_a_tokenizer_returns_works_at_every_entry(entry):
    """A BatchEncoding of padded texts gives what the texts give."""
    encoded = tiny().tokenizer(TEXTS, return_tensors="pt", padding=True)
    expected = entry(tiny(), TEXTS)
    if np.asarray(expected).dtype.kind == "U":  # texts are continued as texts, and ids as ids
        assert len(entry(tiny(), encoded)) == len(TEXTS)
        return
    assert_same(entry(tiny(), encoded), expected, 1e-5)


@pytest.mark.parametrize("bad", [-1, 104, 2**32 + 5])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_ids_out_of_range_are_named_at_every_entry(entry, bad):
    """Below 0, at the end of the vocabulary, and beyond 32 bits, where a cast would make another token of it."""
    ids = IDS.copy()
    ids[1, 2] = bad
    for kind in (ids, {"input_ids": ids}, torch.tensor(ids)):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 104"):
            entry(tiny(), kind)
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 104"):
        generate(tiny().config, tiny().params, ids, 2)


def with_soft_token():
    """The shipped model, whose tokenizer has one token more than its embedding: as Gemma's <image_soft_token>."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return HookedGemma3(tiny().config, tiny().params, tokenizer)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_text_with_a_token_that_has_no_embedding(entry):
    """It is refused by its name, not run as NaN."""
    with pytest.raises(ValueError, match="'<image_soft_token>', token 104, which is outside the vocabulary of 104"):
        entry(with_soft_token(), "ba <image_soft_token> ke")


@pytest.mark.parametrize("bad", [-1, 104])
@pytest.mark.parametrize(("name", "input"), [("bos_token_id", "ba ke"), ("pad_token_id", TEXTS)])
@pytest.mark.parametrize("entry", [ENTRIES["call"], ENTRIES["activations"], ENTRIES["generate"]])
def test_special_ids_outside_the_vocabulary(entry, name, input, bad):
    """They are refused by name where they would be used; ids that do not need them run."""
    model = HookedGemma3(dataclasses.replace(tiny().config, **{name: bad}), tiny().params, tiny().tokenizer)
    with pytest.raises(ValueError, match=f"the config's {name} {bad} is outside the vocabulary of 104"):
        entry(model, input)
    assert np.isfinite(model(IDS)).all()


def test_inputs_that_hold_what_the_model_does_not_read():
    """Images and embeddings would be missed in silence; token types of text are fine."""
    ids = {"input_ids": IDS, "token_type_ids": np.zeros_like(IDS)}
    assert_same(tiny()(ids), tiny()(IDS))
    for extra in ({"pixel_values": np.zeros(3)}, {"token_type_ids": np.ones_like(IDS)}, {"inputs_embeds": np.zeros(3)}):
        with pytest.raises(ValueError, match="which the text model does not read"):
            tiny()(ids | extra)
    with pytest.raises(ValueError, match="it must have input_ids"):
        tiny()({"ids": IDS})


# --- padding ----------------------------------------------------------------------------------------------------------


def alone(entry, row=0):
    return entry(tiny(), TEXTS[row])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["call", "run_with_cache", "run_with_hooks", "activations", "logit_lens"])
def test_padded_ids_without_a_mask(name, side):
    """What `to_tokens` returned, on either side, gives each text what it has alone."""
    entry = ENTRIES[name]
    tokens = tiny().to_tokens(TEXTS, padding_side=side)
    n = len(tiny().to_tokens(TEXTS[0])[0])
    columns = slice(-n, None) if side == "left" else slice(n)
    axis = 2 if name == "logit_lens" else 1
    found, expected = np.asarray(entry(tiny(), tokens)), np.asarray(alone(entry))
    row = found[:, :1] if name == "logit_lens" else found[:1]
    assert_same(np.moveaxis(np.moveaxis(row, axis, 0)[columns], 0, axis), expected, 1e-5)
    unmasked = tiny()(tokens, attention_mask=np.ones(tokens.shape, int))
    if side == "left" and name == "call":
        assert not same(unmasked[:1, columns], expected, 1e-3)  # control


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_ids_are_continued_as_texts(side):
    """Generation from ids alone, in both of its forms, writes what it writes for each text alone."""
    tokens = np.asarray(tiny().to_tokens(TEXTS, padding_side=side))
    for found in (
        tiny().generate(tokens, 4, return_type="text"),
        [decoded(tiny(), row) for row in np.asarray(generate(tiny().config, tiny().params, tokens, 4).tokens)],
    ):
        assert found == [tiny().generate(text, 4) for text in TEXTS]


def test_texts_are_padded_on_the_tokenizers_own_side():
    """On the left for Gemma, so the last column is each text's last token; on the right where the tokenizer says so."""
    logits, cache = tiny().run_with_cache(TEXTS, RESID)
    for i, text in enumerate(TEXTS):
        assert_same(logits[i, -1], tiny()(text)[0, -1], 1e-5)
    assert cache.attention_mask[0].tolist() == [0] * 5 + [1] * 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY, padding_side="right")
    right = HookedGemma3(tiny().config, tiny().params, tokenizer)
    _, cache = right.run_with_cache(TEXTS, RESID)
    assert cache.attention_mask[0].tolist() == [1] * 4 + [0] * 5
    assert right.to_tokens(TEXTS)[0, -1] == 0
    assert right.to_tokens(TEXTS, padding_side="left")[0, 0] == 0


def test_a_mask_that_is_given_holds():
    """A mask of ones runs padding as text; one that hides more hides more."""
    tokens = np.asarray(tiny().to_tokens(TEXTS))
    ones = np.ones_like(tokens)
    pure = at_once(forward, tiny().config, tiny().params, jnp.asarray(tokens))[0]
    assert_same(tiny()(tokens, attention_mask=ones), pure, 1e-6)
    assert_same(tiny()({"input_ids": tokens, "attention_mask": ones}), pure, 1e-6)
    assert not same(tiny()(tokens), pure, 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pure_functions_warn_of_padding_without_a_mask(side, caplog):
    """`forward` and `grad_at` run it as text, as Hugging Face's forward pass does, and say so."""
    model = tiny()
    row = [0, 0, 2, 10, 20] if side == "left" else [2, 10, 20, 0, 0]
    ids = np.array([[2, 10, 20, 30, 10], row])

    def run(function, ids, **options):  # traced only: the warning depends on the ids alone, which are known
        jax.eval_shape(lambda params: function(model.config, params, ids, **options), model.params)

    for function in (forward, functools.partial(grad_at, capture="blocks.0.hook_out")):
        caplog.clear()
        run(function, ids)
        [record] = caplog.records
        assert "row 1 begins or ends with the padding token 0" in record.getMessage()
    caplog.clear()
    run(forward, ids[:1])
    run(forward, ids, attention_mask=np.ones_like(ids))
    model(ids)
    assert not caplog.records


def test_texts_beyond_the_context_are_warned_of(caplog):
    """Also under jit, where the mask is unknown; not packed texts, nor padding."""
    config, params = dataclasses.replace(tiny().config, max_position_embeddings=4), tiny().params
    ids = np.full((2, 5), 9)

    def messages(ids, **options):
        caplog.clear()
        jax.eval_shape(lambda params, ids: forward(config, params, ids, **options), params, ids)
        return [record.getMessage() for record in caplog.records]

    assert messages(ids) == [
        "the input has 5 tokens, and the model's context is 4: what it computes after that is unreliable"
    ]
    assert messages(ids, attention_mask=[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert not messages(ids, attention_mask=[[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert not messages(ids, segment_ids=[[0, 0, 0, 1, 1]] * 2)
    assert not messages(ids[:, :4])
    HookedGemma3(config, params)(ids, return_type=None)
    assert "5 tokens" in caplog.text


def test_under_jit_padding_is_unknown():
    """Ids that are being traced have no values to look at: they run as they are, with the mask that is given."""
    tokens = jnp.asarray(tiny().to_tokens(TEXTS))
    run = jax.jit(lambda tokens, mask: tiny()(tokens, attention_mask=mask))
    assert_same(run(tokens, tiny().attention_mask(tokens)), tiny()(tokens), 1e-6)


PAD, BOS, EOS = 0, 2, 1


@pytest.mark.parametrize(
    ("special", "rows", "masks"),
    [
        ({}, [[0, 0, 2, 5, 0, 6], [2, 5, 6, 7, 0, 0]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        ({}, [[0, 0, 0]], [[1, 1, 1]]),
        ({"pad_token_id": 1}, [[1, 1, 2, 5, 6, 1], [2, 5, 1, 1, 1, 1]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        ({"pad_token_id": 1, "eos_token_id": (1, 106)}, [[2, 5, 1, 1]], [[1, 1, 1, 0]]),
        ({"pad_token_id": 106, "eos_token_id": (1, 106)}, [[106, 2, 5, 106]], [[0, 1, 1, 1]]),
        ({"pad_token_id": 2}, [[2, 2, 2, 5, 6], [2, 5, 6, 2, 2]], [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
        ({"pad_token_id": 2}, [[2, 5, 6]], [[1, 1, 1]]),
        ({"pad_token_id": None}, [[0, 2, 5]], [[0, 1, 1]]),
    ],
)
def test_the_mask_of_ids(special, rows, masks):
    """Padding at either end; never a text's own first BOS or last EOS, where the padding token is that one."""
    config = dataclasses.replace(tiny().config, vocab_size=200, **special)
    assert padding_mask(config, np.array(rows)).tolist() == masks


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(3, 50), min_size=1, max_size=6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    pad=st.sampled_from([PAD, BOS, EOS]),
    ends=st.booleans(),
)
def test_the_mask_holds_every_text_whole(texts, side, pad, ends):
    """Whatever the side and the padding token, no token of a text is masked, its own BOS and EOS included."""
    rows = [[BOS, *text, *([EOS] if ends else [])] for text in texts]
    length = max(map(len, rows)) + 2
    padded = [
        [pad] * (length - len(row)) + row if side == "left" else row + [pad] * (length - len(row)) for row in rows
    ]
    mask = padding_mask(dataclasses.replace(tiny().config, pad_token_id=pad), np.array(padded))
    for row, real, found in zip(rows, mask, padded, strict=True):
        assert set(np.flatnonzero(real)) >= set(range(length - len(row), length) if side == "left" else range(len(row)))
        kept = np.array(found)[real.astype(bool)].tolist()
        own_end = pad == EOS and side == "right" and not ends
        assert kept == ([*row, EOS] if own_end else row)


# --- what caches say ------------------------------------------------------------------------------------------------


def test_caches_say_what_is_padding():
    """Tokens, mask and real values, from runs and from `activations`, sliced, saved, and of generated text."""
    _, cache = tiny().run_with_cache(TEXTS, ["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"])
    (streamed,) = tiny().activations([TEXTS], ["blocks.*.hook_resid_post"])
    for each in (cache, streamed):
        np.testing.assert_array_equal(each.tokens, tiny().to_tokens(TEXTS))
        np.testing.assert_array_equal(each.attention_mask, tiny().attention_mask(each.tokens))
        parts = [tiny().run_with_cache(text, RESID)[1][RESID][0] for text in TEXTS]
        assert_same(each.real(RESID), np.concatenate(parts), 1e-5)
        assert each.real(("resid_post", 1)).shape == (13, 96)
    assert cache.real("blocks.1.attn.hook_pattern").shape == (13, 4, 9)
    one = cache.sliced(batch=0, positions=slice(-4, None))
    assert one.attention_mask.tolist() == [[1, 1, 1, 1]]
    assert one.remove_batch_dim().tokens.tolist() == np.asarray(tiny().to_tokens(TEXTS[0]))[0].tolist()
    assert_same(one.remove_batch_dim().real(RESID), parts[0], 1e-5)
    _, unpadded = tiny().run_with_cache(TEXTS[0], RESID)
    assert unpadded.attention_mask.tolist() == [[1, 1, 1, 1]]


def test_real_values_in_every_layout(tmp_path):
    """Heads, Hugging Face's layouts, keys, gradients; a site with other positions is refused."""
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_rot_k", "model.layers.0.self_attn.q_norm.output", RESID]
    _, cache = tiny().run_with_cache(TEXTS, names, incl_bwd=True)
    config, mask = tiny().config, np.asarray(cache.attention_mask, bool)
    h, g, e = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    np.testing.assert_array_equal(cache.real(names[0]), np.asarray(cache[names[0]])[mask])
    assert cache.real("model.layers.0.self_attn.o_proj.input").shape == (13, h * e)
    assert cache.real(names[1]).shape == (13, g, e)
    assert cache.real(names[2]).shape == (13, h, e)
    np.testing.assert_array_equal(cache.real(f"{RESID}_grad"), np.asarray(cache.grads[RESID])[mask])
    for logits_at in (-1, range(8, -1, -1)):  # the second has all 9 positions, in another order
        _, cut = tiny().run_with_cache(
            TEXTS, ["unembed.hook_out", RESID], logits_at=logits_at, incl_bwd=True, loss_fn=jnp.sum
        )
        cut.save(tmp_path / "cache")
        copies = (cut, cut.numpy(), ActivationCache.load(tmp_path / "cache"), cut.sliced(batch=slice(2)))
        for copy, name in itertools.product(copies, ("unembed.hook_out", "unembed.hook_out_grad")):
            with pytest.raises(ValueError, match="logits_at"):
                copy.real(name)
            assert copy.real(RESID).shape[1:] == (96,)
    _, whole = tiny().run_with_cache(TEXTS, {RESID: lambda value, hook: value})
    with pytest.raises(ValueError, match="reduced"):
        whole.real(RESID)
    with pytest.raises(ValueError, match="with_inputs"):
        jax.tree.map(lambda leaf: leaf, cache).real(RESID)


def test_tokens_survive_a_file(tmp_path):
    """`save` and `load` keep them, and a cache without them stays without."""
    _, cache = tiny().run_with_cache(TEXTS, RESID)
    cache.save(tmp_path / "cache.safetensors")
    back = type(cache).load(tmp_path / "cache.safetensors")
    np.testing.assert_array_equal(back.tokens, cache.tokens)
    np.testing.assert_array_equal(back.real(RESID), cache.real(RESID))
    jax.tree.map(lambda leaf: leaf, cache).save(tmp_path / "bare.safetensors")
    assert type(cache).load(tmp_path / "bare.safetensors").tokens is None


def test_a_tokenizer_of_words_pads_too():
    """A tokenizer without a side of its own pads on the left."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "red": 3, "sun": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()

    def call(text, add_special_tokens):
        return {"input_ids": tokenizer.encode(text).ids}

    assert SMALL["vocab_size"] > len(words)
    model = HookedGemma3(*small(), call)
    assert model.to_tokens(["red", "red sun"]).tolist() == [[0, 2, 3], [2, 3, 4]]
