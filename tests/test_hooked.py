"""`HookedGemma3`: text in, text out, one BOS, weights by their names, and runs with captures and edits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.tree_util import Partial
from random_models import SMALL, hf_model, random_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conversion import convert_state_dict
from gemma3_jax import Gemma3Config, HookedGemma3, UnknownSite, next_token_loss, site_names
from gemma3_jax.sites import SITES, site

LAYERS = 2
BLOCKS = [f"blocks.{i}.hook_out" for i in range(LAYERS)]
WORDS = ["red", "blue", "green", "sun", "moon", "sea", "and", "the", "over", "under"]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
PAD, BOS = VOCABULARY["<pad>"], VOCABULARY["<bos>"]
SENTENCE = "the sun over the sea"
SENTENCE_IDS = [VOCABULARY[word] for word in SENTENCE.split()]
# Ids as the model gets them. One shape for most tests, so that each program compiles once: a text of nine tokens with
# its BOS, a padded batch of two, and the ids.
LONG = "red moon under the green sea and sun"
PADDED = ["sun", LONG]
IDS = random_tokens((2, 9))


def make_tokenizer(adds_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Words to ids; `adds_bos` also puts a BOS before every text, as Gemma's tokenizer does."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@functools.cache
def hf():
    return hf_model(num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"])


@functools.cache
def hooked(adds_bos: bool = True, tokenizer: bool = True) -> HookedGemma3:
    config = Gemma3Config.from_hf(hf().config)
    params = convert_state_dict(hf().state_dict(), config)
    return HookedGemma3(config, params, make_tokenizer(adds_bos) if tokenizer else None)


@functools.cache
def hf_values() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hugging Face's logits on `IDS`, and the input and output of every module, by path."""
    model, values = hf(), {}

    def record(name):
        def hook(module, args, kwargs, out):
            values[f"{name}.input"] = args[0] if args else kwargs["hidden_states"]
            values[f"{name}.output"] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in model.named_modules() if hooks(m)]
    with torch.no_grad():
        logits = model(torch.as_tensor(IDS)).logits
    for handle in handles:
        handle.remove()
    return logits, values


def hooks(module: torch.nn.Module) -> bool:
    return type(module).__name__ not in ("Gemma3ForCausalLM", "Gemma3TextModel", "ModuleList", "Gemma3RotaryEmbedding")


def assert_close(ours, theirs, bound: float = 2e-5) -> None:
    """Equal within a fraction of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def differ(ours, theirs) -> bool:
    return bool(np.abs(np.asarray(ours) - np.asarray(theirs)).max() > 1e-3)


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain tokenizer", "tokenizer that adds BOS"])
@pytest.mark.parametrize("text", [SENTENCE, f"<bos> {SENTENCE}", f"<bos>{SENTENCE}"])
def test_one_bos_and_never_two(adds_bos, text):
    """A row starts with one BOS, whether the tokenizer adds it, the text spells it, or neither."""
    tokenizer = hooked(adds_bos).tokenizer
    assert (tokenizer(SENTENCE)["input_ids"][0] == BOS) == adds_bos
    if adds_bos and text != SENTENCE:  # control: the tokenizer alone gives two
        assert tokenizer(text)["input_ids"][:2] == [BOS, BOS]
    tokens = hooked(adds_bos).to_tokens(text)
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == [[BOS, *SENTENCE_IDS]]
    assert hooked(adds_bos).to_tokens([text, SENTENCE]).tolist() == [[BOS, *SENTENCE_IDS]] * 2


@pytest.mark.parametrize("adds_bos", [False, True])
def test_no_bos_when_none_is_wanted(adds_bos):
    """`prepend_bos=False` adds none, not even the tokenizer's; one that the text spells out stays."""
    model = hooked(adds_bos)
    assert model.to_tokens(SENTENCE, prepend_bos=False).tolist() == [SENTENCE_IDS]
    assert model.to_tokens(f"<bos>{SENTENCE}", prepend_bos=False).tolist() == [[BOS, *SENTENCE_IDS]]
    assert model.to_tokens("").tolist() == [[BOS]]


def test_padding():
    """Texts of unequal length are padded to the longest, on the side that is asked for."""
    texts = ["sun", SENTENCE, "red moon"]
    rows = [[BOS, *(VOCABULARY[word] for word in text.split())] for text in texts]
    right = hooked().to_tokens(texts).tolist()
    left = hooked().to_tokens(texts, padding_side="left").tolist()
    for row, padded_right, padded_left in zip(rows, right, left, strict=True):
        padding = [PAD] * (6 - len(row))
        assert padded_right == row + padding
        assert padded_left == padding + row
    assert hooked().to_tokens(["sun", "red moon"], prepend_bos=False).tolist() == [
        [VOCABULARY["sun"], PAD],
        [VOCABULARY["red"], VOCABULARY["moon"]],
    ]


def test_to_string():
    """Ids of one row or of several, as lists or arrays, become the text; special tokens are spelled out."""
    model = hooked()
    text = f"<bos> {SENTENCE}"
    tokens = model.to_tokens(SENTENCE)
    for row in (tokens[0], np.asarray(tokens[0]), tokens[0].tolist()):
        assert model.to_string(row) == text
    assert model.to_string(tokens) == [text]
    assert model.to_string(model.to_tokens(["sun", "red moon"])) == ["<bos> sun <pad>", "<bos> red moon"]
    assert model.to_string(VOCABULARY["sun"]) == model.to_string(np.int32(VOCABULARY["sun"])) == "sun"


def test_to_str_tokens():
    """Each token on its own: of a text, of several, and of ids."""
    model = hooked()
    words = ["<bos>", *SENTENCE.split()]
    assert model.to_str_tokens(SENTENCE) == words
    assert model.to_str_tokens(SENTENCE, prepend_bos=False) == words[1:]
    assert model.to_str_tokens(["sun", SENTENCE]) == [["<bos>", "sun"], words]
    tokens = model.to_tokens(SENTENCE)
    for ids in (tokens[0], np.asarray(tokens[0]), tokens[0].tolist()):
        assert model.to_str_tokens(ids) == words
    assert model.to_str_tokens(tokens) == [words]


def test_to_single_token():
    """A word is its id, never with a BOS; more than one token, or none, is an error that shows them."""
    assert [hooked().to_single_token(word) for word in WORDS] == [VOCABULARY[word] for word in WORDS]
    assert hooked().to_single_token("<eos>") == VOCABULARY["<eos>"]
    with pytest.raises(ValueError, match=r"2 tokens.*'red', 'sun'"):
        hooked().to_single_token("red sun")
    with pytest.raises(ValueError, match="0 tokens"):
        hooked().to_single_token("")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.to_tokens([]), "text without tokens"),
        (lambda model: model.to_tokens("", prepend_bos=False), "text without tokens"),
        (lambda model: model.to_tokens(["sun", ""], prepend_bos=False), "text without tokens"),
        (lambda model: model.to_tokens("sun", padding_side="middle"), "padding_side is 'middle'"),
        (lambda model: model([]), "at least one"),
        (lambda model: model([[]]), "at least one token"),
        (lambda model: model([1.0, 2.0]), "integer token ids"),
        (lambda model: model([[1, 2], [3]]), "integer token ids"),
        (lambda model: model(np.zeros((1, 2, 3), int)), "integer token ids"),
        (lambda model: model(np.array([True, False])), "integer token ids"),
        (lambda model: model(5), "token ids"),
        (lambda model: model(None), "token ids"),
        (lambda model: model([3, 101]), "token id 101 is outside the vocabulary of 101"),
        (lambda model: model([3, -1]), "token id -1 is outside"),
        (lambda model: model(IDS, return_type="logit"), "return_type is 'logit'"),
        (lambda model: model(IDS, return_type="loss", stop_at_layer=1), "whole model"),
        (lambda model: model(IDS, stop_at_layer=3), "2 layers"),
        (lambda model: model(IDS, attention_mask=np.ones((2, 3), int)), "attention_mask has shape"),
        (lambda model: model.run_with_cache(IDS, "blocks.0.hook_outt"), "no site is named"),
        (lambda model: model.run_with_cache(IDS, "blocks.1.hook_out", stop_at_layer=1), "never runs"),
        (lambda model: model.run_with_hooks(IDS, [("blocks.9.hook_out", lambda v, h: v)]), "no site is named"),
        (lambda model: model.run_with_hooks(IDS, [("blocks.0.hook_out", lambda v, h: None)]), "returned None"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", remove_batch_dim=True), "batch of 1"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", pos_slice=9), "position"),
        (lambda model: model.run_with_cache(IDS, "hook_embed", pos_slice=-10), "position"),
    ],
)
def test_bad_arguments(call, says):
    """Each is one error that says what is wrong."""
    with pytest.raises((ValueError, TypeError, IndexError), match=says):
        call(hooked())


def test_a_model_without_tokenizer():
    """Ids run as ever; text is an error that says what to do, from every method that would need the tokenizer."""
    model = hooked(tokenizer=False)
    assert model(IDS).shape == (2, 9, 101)
    for call in (model, model.to_tokens, model.to_str_tokens, model.to_single_token, model.run_with_cache):
        with pytest.raises(ValueError, match="no tokenizer"):
            call("sun")
    with pytest.raises(ValueError, match="no tokenizer"):
        model.to_string([1, 2])


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_hugging_faces():
    """Every W_ has its documented shape and, head by head, the values of Hugging Face's matrices."""
    model, tensors = hooked(), {name: value.numpy() for name, value in hf().state_dict().items()}
    h, g, e, d = (SMALL[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))
    f, vocabulary = SMALL["intermediate_size"], SMALL["vocab_size"]
    shapes = {
        "W_E": (vocabulary, d),
        "W_U": (d, vocabulary),
        "W_Q": (LAYERS, h, d, e),
        "W_K": (LAYERS, g, d, e),
        "W_V": (LAYERS, g, d, e),
        "W_O": (LAYERS, h, e, d),
        "W_gate": (LAYERS, d, f),
        "W_in": (LAYERS, d, f),
        "W_out": (LAYERS, f, d),
    }
    assert {name: getattr(model, name).shape for name in shapes} == shapes
    np.testing.assert_array_equal(model.W_E, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.W_U, tensors["model.embed_tokens.weight"].T)
    for i in range(LAYERS):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, proj in (("W_Q", "q_proj"), ("W_K", "k_proj"), ("W_V", "v_proj")):
            ours = getattr(model, name)[i]
            for head in range(len(ours)):
                rows = slice(head * e, (head + 1) * e)
                np.testing.assert_array_equal(ours[head].T, tensors[f"{attn}.{proj}.weight"][rows])
        for head in range(h):
            columns = tensors[f"{attn}.o_proj.weight"][:, head * e : (head + 1) * e]
            np.testing.assert_array_equal(model.W_O[i, head].T, columns)
        for name, proj in (("W_gate", "gate_proj"), ("W_in", "up_proj"), ("W_out", "down_proj")):
            np.testing.assert_array_equal(getattr(model, name)[i].T, tensors[f"{mlp}.{proj}.weight"])
    assert differ(model.W_gate, model.W_in)  # control


def test_w_u_of_an_untied_model():
    """An untied unembedding is the checkpoint's own, and no longer the embedding's transpose."""
    untied = hf_model(num_hidden_layers=1, layer_types=["full_attention"], tie_word_embeddings=False)
    config = Gemma3Config.from_hf(untied.config)
    model = HookedGemma3(config, convert_state_dict(untied.state_dict(), config))
    np.testing.assert_array_equal(model.W_U, untied.lm_head.weight.detach().numpy().T)
    assert differ(model.W_U, model.W_E.T)


# --- running --------------------------------------------------------------------------------------------------------


def test_logits_are_hugging_faces():
    """A plain call gives Hugging Face's logits."""
    assert_close(hooked()(IDS), hf_values()[0])


@pytest.mark.parametrize("ids", [IDS, IDS.tolist(), tuple(map(tuple, IDS)), jnp.asarray(IDS), IDS.astype(np.uint8)])
def test_ids_in_any_container(ids):
    """Lists, tuples, numpy and jax arrays of ids are one input; a row alone is a batch of one."""
    model = hooked()
    assert_close(model(ids), hf_values()[0])
    assert model(ids[0], stop_at_layer=0).shape == (1, 9, SMALL["hidden_size"])
    np.testing.assert_array_equal(model(ids[0], stop_at_layer=0), model(IDS[:1], stop_at_layer=0))


def test_texts_of_unequal_length_run_as_they_do_alone():
    """Each row of a padded batch has, at its real tokens, the logits and activations of the text alone."""
    model = hooked()
    name, together = "blocks.1.attn.hook_z", np.asarray(model(PADDED))
    assert together.shape == (2, 9, SMALL["vocab_size"])
    _, cache = model.run_with_cache(PADDED, name, return_type=None)
    for i, (text, length) in enumerate(zip(PADDED, (2, 9), strict=True)):
        alone = model(text)
        assert alone.shape == (1, length, SMALL["vocab_size"])
        assert_close(together[i, :length], alone[0])
    assert_close(cache[name][1], model.run_with_cache(LONG, name, return_type=None)[1][name][0])


def test_the_mask_of_padded_ids():
    """Padding is what rows begin or end with; the same id between two real tokens is one of them."""
    mask = hooked().attention_mask([[PAD, PAD, BOS, 5, PAD, 6], [BOS, 5, 6, 7, PAD, PAD]])
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    for side in ("left", "right"):
        tokens = hooked().to_tokens(PADDED, padding_side=side)
        assert hooked().attention_mask(tokens).sum(axis=1).tolist() == [2, 9]


def test_left_padding_by_attention_mask():
    """With its mask, a left-padded batch gives each row's own logits; without, it does not."""
    model = hooked()
    tokens = model.to_tokens(PADDED, padding_side="left")
    mask = np.asarray(tokens) != PAD
    masked, right = np.asarray(model(tokens, attention_mask=mask.astype(np.int32))), np.asarray(model(PADDED))
    assert_close(masked[0, 7:], right[0, :2])
    assert_close(masked[1], right[1])
    assert differ(np.asarray(model(tokens))[0, 7:], right[0, :2])
    # a row's mask, of booleans
    row = model(tokens[0], attention_mask=mask[0], stop_at_layer=0)
    np.testing.assert_array_equal(row, model(tokens, stop_at_layer=0)[:1])


def test_return_types():
    """Logits, the loss that Hugging Face gives for labels, both, or nothing at all."""
    model = hooked()
    with torch.no_grad():
        expected = hf()(torch.as_tensor(IDS), labels=torch.as_tensor(IDS)).loss.item()
    assert model(IDS, return_type="loss") == pytest.approx(expected, rel=1e-5)
    logits, loss = model(IDS, return_type="both")
    assert_close(logits, hf_values()[0])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss.shape == ()
    assert model(IDS, return_type=None) is None
    out, cache = model.run_with_cache(IDS, "blocks.0.hook_out", return_type=None)
    assert out is None
    assert list(cache) == ["blocks.0.hook_out"]


def test_the_loss_leaves_padding_out():
    """Padded texts have Hugging Face's loss with the labels at padding set aside, on either side."""
    model = hooked()
    for side in ("right", "left"):
        tokens = np.array(model.to_tokens(PADDED, padding_side=side), np.int64)
        mask = (tokens != PAD).astype(np.int32)
        labels = np.where(mask == 1, tokens, -100)
        labels[np.arange(2), mask.argmax(axis=1)] = -100  # what stands before a row's first token is no prediction
        inputs = {"attention_mask": torch.as_tensor(mask), "labels": torch.as_tensor(labels)}
        with torch.no_grad():
            expected = hf()(torch.as_tensor(tokens), **inputs).loss.item()
        assert model(tokens, return_type="loss", attention_mask=mask) == pytest.approx(expected, rel=1e-5)
    assert model(PADDED, return_type="loss") == pytest.approx(expected, rel=1e-5)
    assert abs(model(tokens, return_type="loss") - expected) > 1e-3  # control: without the mask, padding counts


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.1.hook_resid_post", BLOCKS[1:]),
        ("model.layers.1.output", BLOCKS[1:]),
        ("blocks.*.hook_resid_post", BLOCKS),
        (["blocks.1.hook_out", "blocks.0.hook_out"], BLOCKS),
        (lambda name: name.endswith("hook_resid_post"), BLOCKS),
        (None, site_names(Gemma3Config.from_hf(hf().config))),
        ([], []),
        (lambda name: False, []),
    ],
    ids=["name", "HF path", "glob", "list", "predicate", "None", "empty list", "empty predicate"],
)
def test_names_filter(names_filter, expected):
    """A name, a glob, a list or a predicate keeps those sites, in the model's order; None keeps all."""
    _, cache = hooked().run_with_cache(IDS, names_filter, return_type=None)
    assert list(cache) == list(expected)
    assert len(cache) == len(expected)
    if "blocks.1.hook_out" in expected:
        assert_close(cache["blocks.1.hook_out"], hf_values()[1]["model.layers.1.output"])


@functools.cache
def everything():
    """Every captured value on `IDS`, in numpy."""
    return jax.tree.map(np.asarray, hooked().run_with_cache(IDS, return_type=None)[1])


def test_hf_paths_have_hugging_faces_values_in_its_layout():
    """Under the path of any of Hugging Face's modules the cache gives what that module took or returned."""
    cache, values = everything(), hf_values()[1]
    paths = {row.hf.replace("{i}", str(i)) for row in SITES if row.hf for i in range(LAYERS)}
    assert paths == {path for path in values if "act_fn" not in path}
    for path in paths:
        assert cache[path].shape == tuple(values[path].shape), path
        assert_close(cache[path], values[path].numpy())
    z = "model.layers.0.self_attn.o_proj.input"
    assert cache[z].shape == (2, 9, 80)
    assert cache["blocks.0.attn.hook_z"].shape == (2, 9, 8, 10)
    other_order = np.swapaxes(cache["blocks.0.attn.hook_z"], -1, -2).reshape(2, 9, 80)
    assert differ(other_order, cache[z])  # control


def test_the_cache_takes_any_name():
    """Canonical, legacy and prefixed Hugging Face names index one value; membership and iteration agree."""
    cache = everything()
    names = ("blocks.1.hook_out", "blocks.1.hook_resid_post", "model.layers.1.output", "layers.1.output")
    for name in (*names, "model.language_model.layers.1.output", "language_model.model.layers.1.output"):
        np.testing.assert_array_equal(cache[name], cache["blocks.1.hook_out"])
        assert name in cache
        assert cache.get(name) is not None
    assert "nonsense" not in cache
    assert set(cache.keys()) == set(cache) == set(dict(cache.items()))
    assert repr(cache).startswith("ActivationCache(embed.hook_in, ")


def test_a_missing_entry_says_what_is_there():
    """A site that was not captured is a KeyError that lists what was; a name of no site is an UnknownSite."""
    _, cache = hooked().run_with_cache(IDS, BLOCKS)
    with pytest.raises(KeyError) as caught:
        cache["blocks.0.attn.hook_z"]
    message = str(caught.value)
    assert "blocks.0.attn.o.hook_in was not captured" in message
    assert all(name in message for name in BLOCKS)
    with pytest.raises(UnknownSite, match="hook_resid_post"):
        cache["blocks.0.hook_resid_psot"]
    assert "blocks.0.attn.hook_z" not in cache
    _, empty = hooked().run_with_cache(IDS, [])
    with pytest.raises(KeyError, match="nothing"):
        empty["blocks.0.hook_out"]


def test_the_cache_is_a_pytree():
    """tree.map and jit take a cache and give one back, with its names."""
    _, cache = hooked().run_with_cache(IDS, BLOCKS)
    doubled = jax.tree.map(lambda value: value * 2, cache)
    assert type(doubled) is type(cache)
    assert list(doubled) == BLOCKS
    np.testing.assert_array_equal(doubled["blocks.0.hook_resid_post"], cache["blocks.0.hook_out"] * 2)
    through = jax.jit(lambda cache: jax.tree.map(jnp.sum, cache))(cache)
    assert through["blocks.1.hook_out"] == pytest.approx(float(cache["blocks.1.hook_out"].sum()), rel=1e-4)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cache)]
    assert paths == [f"['{name}']" for name in BLOCKS]
    moved = jax.tree.map(lambda one, two: one - two, doubled, cache)
    np.testing.assert_array_equal(moved["blocks.1.hook_out"], cache["blocks.1.hook_out"])


@pytest.mark.parametrize("stop", [0, 1, -1])
def test_stop_at_layer(stop):
    """The stream that enters the layer is returned, and only what ran before it is kept."""
    before = stop % LAYERS
    out, cache = hooked().run_with_cache(IDS, "**.hook_out", stop_at_layer=stop)
    assert_close(out, everything()[f"blocks.{before}.hook_in"])
    assert {name.split(".")[1] for name in cache if name.startswith("blocks.")} == {str(i) for i in range(before)}
    assert "embed.hook_out" in cache


# Kept from block 0 alone, so that little compiles: sites with one position axis, with two, and on the key axis.
SLICED = ("embed.hook_in", "blocks.0.hook_in", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_k")


@pytest.mark.parametrize(
    ("pos_slice", "kept"),
    [
        (3, slice(3, 4)),
        (-1, slice(8, 9)),
        (slice(2, 5), slice(2, 5)),
        (slice(-2, None), slice(7, 9)),
        (slice(None, None, 3), slice(None, None, 3)),
    ],
)
def test_pos_slice(pos_slice, kept):
    """Only those (query) positions are kept, and an int keeps its axis, of length 1."""
    _, cache = hooked().run_with_cache(IDS, SLICED, return_type=None, pos_slice=pos_slice)
    for name, value in cache.items():
        axes = site(name).axes.split()
        axis = axes.index("p" if "p" in axes else "k")
        assert_close(value, np.asarray(everything()[name])[(slice(None),) * axis + (kept,)])
    assert cache["blocks.0.attn.hook_pattern"].shape[-1] == 9


def test_remove_batch_dim():
    """A batch of one loses its axis in the cache, under every name; the result keeps it."""
    out, cache = hooked().run_with_cache(IDS[:1], SLICED, stop_at_layer=1, remove_batch_dim=True, pos_slice=-1)
    assert out.shape == (1, 9, 48)
    assert {name: value.shape for name, value in cache.items()} == {
        "embed.hook_in": (1,),
        "blocks.0.hook_in": (1, 48),
        "blocks.0.attn.hook_pattern": (8, 1, 9),
        "blocks.0.attn.hook_rot_k": (1, 2, 10),
    }
    assert_close(cache["blocks.0.hook_in"], everything()["blocks.0.hook_in"][0, -1:])
    assert cache["model.layers.0.input"].shape == (1, 48)


# --- edits ----------------------------------------------------------------------------------------------------------


def double(value, hook):
    return value * 2


def add(vector, value, hook):
    return value + vector


def test_run_with_hooks():
    """Pairs take names, globs, lists and predicates, and do what a hook on Hugging Face's module does."""
    model = hooked()
    handles = [
        layer.post_feedforward_layernorm.register_forward_hook(lambda module, args, out: out * 2)
        for layer in hf().model.layers
    ]
    with torch.no_grad():
        expected = hf()(torch.as_tensor(IDS)).logits
    for handle in handles:
        handle.remove()
    names = ["blocks.0.ln2_post.hook_out", "blocks.1.hook_mlp_out"]
    for wanted in ("blocks.*.hook_mlp_out", names, lambda name: name.endswith("hook_mlp_out")):
        assert_close(model.run_with_hooks(IDS, [(wanted, double)]), expected)
    assert differ(expected, hf_values()[0])
    assert_close(model.run_with_hooks(IDS), hf_values()[0])  # without any, and after some, it is the plain model


def test_pairs_on_one_site_run_in_order():
    """Two pairs under two names of one site are applied in the order given, and the kept value is the edited one."""
    model = hooked()
    vector = np.arange(48, dtype=np.float32)
    plus = Partial(add, vector)
    before = np.asarray(everything()["blocks.0.hook_in"])
    names = ("blocks.0.hook_in", "blocks.0.hook_resid_pre")
    for edits, expected in (((double, plus), before * 2 + vector), ((plus, double), (before + vector) * 2)):
        pairs = list(zip(names, edits, strict=True))
        out, cache = model.run_with_hooks(IDS, pairs, names_filter=names[0], stop_at_layer=1)
        assert out.shape == (2, 9, 48)
        assert_close(cache["model.layers.0.input"], expected)


def test_edits_under_hf_paths_see_hf_layout():
    """A pair under a Hugging Face path sees flattened heads, whatever kind of edit it holds."""
    model = hooked()
    path, name = "model.layers.0.self_attn.o_proj.input", "blocks.0.attn.hook_z"
    vector = np.arange(80, dtype=np.float32)
    _, cache = model.run_with_hooks(IDS, [(path, Partial(add, vector))], names_filter=name, return_type=None)
    assert_close(cache[name], everything()[name] + vector.reshape(8, 10))
    assert_close(cache[path], everything()[path] + vector)


def test_run_with_hooks_takes_the_arguments_of_run_with_cache():
    """Text, return types, positions and batches are handled as without edits."""
    model = hooked()
    hooks_ = [("blocks.0.hook_resid_mid", double)]
    options = {"return_type": "both", "remove_batch_dim": True, "pos_slice": -1}
    (logits, loss), cache = model.run_with_hooks(LONG, hooks_, names_filter="blocks.0.hook_resid_mid", **options)
    assert logits.shape == (1, 9, SMALL["vocab_size"])
    assert differ(logits, model(LONG))
    tokens = np.asarray(model.to_tokens(LONG))
    assert loss == pytest.approx(float(next_token_loss(logits, tokens)), rel=1e-5)
    assert cache["blocks.0.hook_resid_mid"].shape == (1, 48)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint with its tokenizer, as transformers writes them."""
    path = tmp_path_factory.mktemp("checkpoint")
    hf().save_pretrained(path)
    make_tokenizer(adds_bos=True).save_pretrained(path)
    return path


def test_from_pretrained(directory):
    """A directory gives the model and its tokenizer."""
    model = HookedGemma3.from_pretrained(directory)
    assert model.to_tokens(SENTENCE).tolist() == [[BOS, *SENTENCE_IDS]]
    assert_close(model(IDS), hf_values()[0])
    assert model.W_E.dtype == jnp.float32
    assert model.config == hooked().config


def test_from_pretrained_in_another_dtype(directory):
    """The parameters have the dtype that is asked for, but for the norms; a path may be a string."""
    model = HookedGemma3.from_pretrained(str(directory), dtype="bfloat16")
    assert model.W_Q.dtype == model.W_E.dtype == jnp.bfloat16
    assert model.params["ln_final"]["weight"].dtype == jnp.float32


def test_from_pretrained_without_tokenizer(tmp_path):
    """A directory without a tokenizer gives a model for ids."""
    hf().save_pretrained(tmp_path)
    model = HookedGemma3.from_pretrained(tmp_path)
    assert model.tokenizer is None
    assert_close(model(IDS), hf_values()[0])
    with pytest.raises(ValueError, match="no tokenizer"):
        model("sun")
