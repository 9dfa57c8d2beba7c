"""Generation: the tokens of Hugging Face, and captures and edits that are those of one forward over the whole text."""

import functools
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from lively_model import at_real_tokens, lively
from random_models import random_tokens
from small_model import difference, direction, nudge

from conversion import convert_checkpoint
from gemma3_jax import TINY, Gemma3Config, HookedGemma3, edits, forward
from gemma3_jax.generation import decoding, writing
from gemma3_jax.generation import generate as module
from gemma3_jax.generation.generate import generate

BAR = 5e-6
_, CONFIG, PARAMS = lively()
LENGTHS = (12, 5, 9)
NEW = 40  # with the prompt, seven windows of 7
P = max(LENGTHS)
TOKENS = random_tokens((3, P))
MASK = (np.arange(P) >= P - np.asarray(LENGTHS)[:, None]).astype(np.int32)


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


def write(new=NEW, config=CONFIG, params=PARAMS, **options):
    return generate(config, params, TOKENS, new, **{"attention_mask": MASK, "stop_at_eos": False, **options})


@functools.cache
def full(capture=(), new=NEW):
    """Logits and sites of one forward over the text that is written greedily."""
    found = write(new)
    run = jax.jit(lambda tokens, mask: forward(CONFIG, PARAMS, tokens, capture, attention_mask=mask))
    return run(found.tokens, found.attention_mask)


# Hugging Face


def hf_greedy(model, tokens, mask, new, **options):
    with torch.no_grad():
        out = model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False, **options
        )
    return out.numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_tokens_are_those_of_hugging_face(tied):
    """Rows of unequal length, padded on the left, 64 new tokens: ten windows."""
    model, config, params = lively(tied)
    theirs = hf_greedy(model, TOKENS, MASK, 64, eos_token_id=None)
    ours = np.asarray(write(64, config, params).tokens)
    np.testing.assert_array_equal(ours[:, P:], theirs[:, P:])
    assert min(len(set(row)) for row in theirs[:, P:]) > 12  # control: a text that repeats itself would show little


def test_a_wrong_window_writes_other_tokens():
    """Control: a window of 8 in place of 7 does not write the same text."""
    other = Gemma3Config.from_hf({**CONFIG.to_hf(), "sliding_window": 8})
    assert (write(64).tokens != write(64, other).tokens).any()


def test_greedy_tokens_of_the_shipped_model_are_those_of_hugging_face():
    """A trained model in float32: rows of unequal length, several windows of 16."""
    model = transformers.Gemma3ForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config, params = convert_checkpoint(TINY, dtype="float32")
    tokens = random_tokens((3, P), config.vocab_size, seed=1)
    tokens[np.arange(3), P - np.asarray(LENGTHS)] = config.bos_token_id
    theirs = hf_greedy(model, tokens, MASK, 64)
    ours = np.asarray(generate(config, params, tokens, 64, attention_mask=MASK).tokens)
    np.testing.assert_array_equal(ours[:, P:], theirs[:, P:])


def test_rows_end_at_their_eos_as_in_hugging_face():
    """Several stop tokens: each row is padded behind its own, and the text ends with the last row."""
    model, _, _ = lively()
    free = np.asarray(write(64).tokens)[:, P:]
    stop = [int(free[0, 5]), int(free[1, 11]), int(free[2, 30])]
    theirs = hf_greedy(model, TOKENS, MASK, 64, eos_token_id=stop)
    found = write(64, stop_at_eos=True, eos_token_id=stop)
    np.testing.assert_array_equal(np.asarray(found.tokens)[:, P:], theirs[:, P:])
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in theirs[:, P:]]
    assert len(set(ends)) > 1
    assert theirs.shape[1] == P + max(ends) + 1 < P + 64
    columns = np.arange(max(ends) + 1)
    np.testing.assert_array_equal(found.attention_mask[:, P:], columns <= np.asarray(ends)[:, None])
    behind = columns > np.asarray(ends)[:, None]
    assert (np.asarray(found.log_probs)[behind] == 0).all()
    assert (np.asarray(found.log_probs)[~behind] < 0).all()
    assert (np.asarray(found.tokens)[:, P:][behind] == CONFIG.pad_token_id).all()


def test_the_repetition_penalty_is_that_of_hugging_face():
    """Prompt and new tokens are penalised; row by row, as Hugging Face would count padding as a token."""
    model, _, _ = lively()
    found = write(32, repetition_penalty=1.4)
    for i, length in enumerate(LENGTHS):
        row = TOKENS[i : i + 1, P - length :]
        theirs = hf_greedy(model, row, np.ones_like(row), 32, eos_token_id=None, repetition_penalty=1.4)
        np.testing.assert_array_equal(np.asarray(found.tokens)[i, P - length :], theirs[0])
    assert (found.tokens != write(32).tokens).any()


# Other arithmetic


def test_in_bfloat16_the_cache_changes_nothing_but_rounding():
    """As near to float32 as one forward in bfloat16 is, and its tokens wherever that forward's choice is clear."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    found = write(64, params=params, return_logits=True, capture="blocks.*.hook_out")
    assert found.cache["blocks.0.hook_out"].dtype == jnp.bfloat16
    run = jax.jit(lambda p, mask: forward(CONFIG, p, found.tokens, "blocks.*.hook_out", attention_mask=mask))
    (narrow, ours), (exact, theirs) = run(params, found.attention_mask), run(wide, found.attention_mask)
    narrow, exact = (np.asarray(logits)[:, P - 1 : -1] for logits in (narrow, exact))
    real = np.asarray(found.attention_mask)[:, :-1].astype(bool)
    pairs = {"logits": (found.logits, narrow, exact)}
    for name in found.cache:
        pairs[name] = tuple(at_real_tokens(name, x[name], real) for x in (found.cache, ours, theirs))
    for name, (cached, uncached, truth) in pairs.items():
        # Two roundings of the same sums: the root mean squares of their errors differ by a few percent.
        assert error(cached, truth) < 1.2 * error(uncached, truth), name
    # What rounding moves a logit by at most, twice: a larger gap no rounding closes.
    gap = np.diff(np.sort(exact, axis=-1)[..., -2:])[..., 0]
    clear = gap > 2 * np.abs(narrow - exact).max()
    assert clear.mean() > 0.5
    tokens = np.asarray(found.tokens)[:, P:]
    np.testing.assert_array_equal(tokens[clear], exact.argmax(axis=-1)[clear])
    # control: a cache with a window of 8 in place of 7
    other = write(64, Gemma3Config.from_hf({**CONFIG.to_hf(), "sliding_window": 8}), params, return_logits=True)
    assert error(other.logits, exact) > 2 * error(narrow, exact)
    assert (np.asarray(other.tokens)[:, P:][clear] != tokens[clear]).any()


def error(value, truth):
    """Root mean square of the difference."""
    return float(np.sqrt(np.mean(np.square(np.asarray(value, np.float64) - np.asarray(truth, np.float64)))))


def test_capped_logits_are_those_of_hugging_face():
    """With final_logit_softcapping: the tokens, and the logits and probabilities that come back."""
    model, config, params = lively(final_logit_softcapping=0.5)
    theirs = hf_greedy(model, TOKENS, MASK, 24, eos_token_id=None)
    found = write(24, config, params, return_logits=True)
    np.testing.assert_array_equal(np.asarray(found.tokens)[:, P:], theirs[:, P:])
    with torch.no_grad():
        out = model(torch.tensor(theirs), attention_mask=torch.tensor(np.asarray(found.attention_mask)))
    before = out.logits.numpy()[:, P - 1 : -1]
    assert difference(found.logits, before) < BAR
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(before)), theirs[:, P:, None], axis=-1)[..., 0]
    assert difference(found.log_probs, log_probs) < BAR
    # control: the cap is at work
    assert difference(write(24, return_logits=True).logits, before) > 0.1


# Probabilities and captures


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_k": 30, "seed": 5}], ids=["greedy", "drawn"])
def test_log_probs_and_logits_are_those_of_a_forward(how):
    """Of the tokens that came back, under the mask that came back, whatever they were drawn with."""
    found = write(return_logits=True, **how)
    logits, _ = jax.jit(functools.partial(forward, CONFIG))(PARAMS, found.tokens, attention_mask=found.attention_mask)
    before = logits[:, P - 1 : -1]
    assert difference(found.logits, before) < BAR
    new = found.tokens[:, P:, None]
    theirs = jnp.take_along_axis(jax.nn.log_softmax(before), new, axis=-1)[..., 0]
    assert difference(found.log_probs, theirs) < BAR
    # control: one position further
    other = jnp.take_along_axis(jax.nn.log_softmax(logits[:, P:]), new, axis=-1)[..., 0]
    assert difference(found.log_probs, other) > 0.01


def test_every_site_is_captured_as_in_a_forward():
    """All sites at once, aligned with the tokens: P + N - 1 columns of queries and of keys."""
    found = write(capture="**")
    _, theirs = full("**")
    assert list(found.cache) == list(theirs)
    real = np.asarray(found.attention_mask)[:, :-1].astype(bool)
    for name, value in found.cache.items():
        expected = at_real_tokens(name, theirs[name], real)
        assert value.shape == expected.shape, name
        assert difference(at_real_tokens(name, value, real), expected) < BAR, name
    # control: a column further is another value
    name = "blocks.2.hook_out"
    assert difference(found.cache[name][:, :-1], theirs[name][:, 1:-1]) > 0.1


@pytest.mark.parametrize("name", ["lm_head.output", "blocks.0.hook_q_input"])
def test_a_site_is_captured_alone(name):
    """What a capture needs is computed for it, and not because others are captured too."""
    found = write(capture=name)
    real = np.asarray(found.attention_mask)[:, :-1].astype(bool)
    (canonical,) = found.cache
    theirs = full("**")[1]
    ours = at_real_tokens(canonical, found.cache[name], real)
    assert difference(ours, at_real_tokens(canonical, theirs[canonical], real)) < BAR


# Edits


def greedy_by_forward(placed, new):
    """Tokens from full forwards, without a cache; one shape, as keys to the right are not seen."""
    # [b, p + new], padded on the right with what no token sees
    tokens = jnp.asarray(np.pad(TOKENS, ((0, 0), (0, new)), constant_values=3))
    mask = jnp.asarray(np.pad(MASK, ((0, 0), (0, new)), constant_values=1))

    @jax.jit
    def step(tokens, n):
        # What is not written yet is padding, so that no edit sees it.
        real = mask * (jnp.arange(P + new) < n)
        logits = forward(CONFIG, PARAMS, tokens, (), placed, attention_mask=real)[0]
        return tokens.at[:, n].set(jnp.argmax(logits[:, n - 1], axis=-1))

    for n in range(P, P + new):
        tokens = step(tokens, n)
    return np.asarray(tokens)


STEER = edits.Add(0.6 * direction())
ROWS = edits.Add(0.6 * direction(), scale=np.asarray([0.0, 1.0, -2.0], np.float32)[:, None, None])
# Several in each, as each is compiled three times.
EDITS = {
    "residual stream, by position": {
        "blocks.0.hook_resid_post": ROWS,
        "blocks.1.hook_resid_post": [edits.only(STEER, positions=[2, 4, 13, 16]), edits.ProjectOut(direction(1))],
        "blocks.2.hook_out": edits.only(STEER, positions=[[1, 15], [2, 6], [3, 10]]),
        "hook_embed": edits.Scale(2.0),
    },
    "heads, neurons and rows": {
        "blocks.*.attn.hook_z": edits.only(edits.Replace(0.0), heads=[0, 3, 7]),
        "blocks.*.attn.hook_result": edits.only(edits.Scale(2.0), heads=[2]),
        "blocks.*.mlp.hook_post": edits.only(edits.Scale(3.0), features=[1, 5, 60]),
        "blocks.*.mlp.hook_out": edits.only(edits.Scale(-1.0), rows=[0, 2]),
    },
    "queries, keys and values": {
        "blocks.*.attn.hook_rot_k": nudge,
        "blocks.0.attn.hook_k": edits.Scale(-1.0),
        "blocks.*.attn.hook_v": edits.only(edits.Scale(-1.5), heads=1),
        "blocks.*.attn.q_norm.hook_out": edits.Scale(2.0),
    },
    "hook_attn_in": {"blocks.*.hook_attn_in": edits.only(edits.Add(direction()), heads=[1, 2, 6])},
    "inputs of q, k and v": {f"blocks.1.hook_{x}_input": edits.only(edits.Scale(-1.0), heads=1) for x in "qkv"},
    "scores and patterns": {
        "blocks.*.attn.hook_attn_scores": edits.only(edits.Scale(3.0), heads=[0, 4]),
        "blocks.*.attn.hook_pattern": edits.only(edits.Scale(-2.0), heads=[0, 5]),
    },
    "patterns, by key": {
        "blocks.*.attn.hook_pattern": edits.only(edits.Replace(0.0), keys=[2, 4, 13, 14], positions=range(5, 20)),
    },
    "logits": {
        "unembed.hook_out": [
            edits.only(edits.Add(0.3), features=[7, 8, 9]),
            edits.only(edits.Scale(-1.0), positions=[3, 4, 11, 14]),
        ],
    },
}


@pytest.mark.parametrize("placed", EDITS.values(), ids=EDITS.keys())
def test_an_edit_writes_what_it_writes_in_forwards(placed):
    """The same tokens as greedily from full forwards with the same edit; and others than without it."""
    found = write(12, edits=placed)
    np.testing.assert_array_equal(np.asarray(found.tokens)[MASK_12], greedy_by_forward(placed, 12)[MASK_12])
    assert (found.tokens != write(12).tokens).any()


MASK_12 = np.pad(MASK, ((0, 0), (0, 12)), constant_values=1).astype(bool)


@flax.struct.dataclass
class Watch:
    """Tells the host what an edit sees."""

    seen: list = flax.struct.field(pytree_node=False)

    def __call__(self, value, hook):
        jax.debug.callback(lambda at: self.seen.append((hook.phase, hook.layer, np.asarray(at))), hook.positions)
        return value

    def __hash__(self):
        return id(self)


def test_what_an_edit_is_told():
    """The phase, and absolute positions: those of the prompt once, then one of each token, counted over real tokens."""
    watch = Watch([])
    write(5, edits={"blocks.1.hook_out": watch})
    jax.effects_barrier()
    seen = sorted(watch.seen, key=lambda entry: (entry[0] == "generation", entry[2].max()))
    phases, layers, positions = zip(*seen, strict=True)
    assert phases == ("prompt",) + 4 * ("generation",)
    assert set(layers) == {1}
    lengths = np.asarray(LENGTHS)[:, None]
    np.testing.assert_array_equal(positions[0], np.maximum(np.arange(P) - (P - lengths), 0))
    for n, at in enumerate(positions[1:]):
        np.testing.assert_array_equal(at, lengths + n)


def test_an_edit_limited_to_a_phase():
    """In the captures: the prompt's columns are touched, or those behind it, and not the others."""
    site = "blocks.1.hook_out"
    plain, real = np.asarray(write(capture=site).cache[site]), MASK.astype(bool)
    for phase in ("prompt", "generation"):
        edit = edits.only(edits.Replace(0.0), phase=phase)
        value = np.asarray(write(capture=site, edits={site: edit}).cache[site])
        touched = (value == 0).all(axis=(0, 2))
        np.testing.assert_array_equal(touched, (np.arange(P + NEW - 1) < P) == (phase == "prompt"))
        if phase == "generation":
            assert difference(value[:, :P][real], plain[:, :P][real]) < BAR


OTHER = edits.FromCache({"blocks.1.hook_out": jax.random.normal(jax.random.key(0), (3, P, CONFIG.hidden_size))})
SOME = edits.only(STEER, positions=MASK.astype(bool) & (np.arange(P) % 3 == 1))
WHOLE = {
    "blocks.0.attn.hook_in": SOME,
    "blocks.0.hook_out": edits.only(STEER, positions=[1, -1]),
    "blocks.1.attn.hook_out": edits.Mean(),
    "blocks.1.hook_out": OTHER,
    "blocks.2.attn.hook_pattern": edits.only(edits.Scale(2.0), keys=MASK.astype(bool) & (np.arange(P) % 3 == 1)),
}


def test_what_needs_a_whole_text_works_on_the_prompt():
    """Booleans, places from the end, `Mean` and `FromCache`, kept to the prompt, do what they do in a forward."""
    kept = {name: edits.only(edit, phase="prompt") for name, edit in WHOLE.items()}
    found = write(4, edits=kept, capture=list(WHOLE), return_logits=True)
    run = jax.jit(lambda placed: forward(CONFIG, PARAMS, TOKENS, list(WHOLE), placed, MASK))
    logits, cache = run(WHOLE)
    plain = run({})[1]
    for name in WHOLE:
        ours, theirs, unedited = (at_real_tokens(name, x[name], MASK) for x in (found.cache, cache, plain))
        assert difference(ours, theirs) < BAR, name
        assert difference(ours, unedited) > 0.01, name  # control
    assert difference(found.logits[:, 0], logits[:, -1]) < BAR
    tokens = HookedGemma3(CONFIG, PARAMS).generate(
        TOKENS, 4, attention_mask=MASK, fwd_hooks=list(kept.items()), names_filter=list(WHOLE), stop_at_eos=False
    )[0]
    np.testing.assert_array_equal(tokens, found.tokens)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        *zip(WHOLE, WHOLE.values(), ["booleans", "counted from the end", "Mean", "FromCache", "keys"], strict=True),
        ("blocks.1.hook_out", edits.only(OTHER, phase="generation"), "FromCache"),
        ("blocks.1.hook_out", edits.only(edits.only(SOME, heads=None), rows=1), "booleans"),
    ],
)
def test_what_needs_a_whole_text_is_refused_where_tokens_come_one_by_one(name, edit, says):
    """One error that names the site, the edit and the remedy; however the edit is wrapped."""
    for call in (
        lambda: write(4, edits={name: edit}),
        lambda: HookedGemma3(CONFIG, PARAMS).generate(TOKENS, 4, attention_mask=MASK, fwd_hooks=[(name, edit)]),
    ):
        with pytest.raises(ValueError, match=re.escape('edits.only(edit, phase="prompt")')) as refused:
            call()
        assert name in str(refused.value)
        assert says in str(refused.value)


def test_an_edit_of_ones_own_that_fits_the_prompt_alone_is_told_so():
    """It cannot be known before a new token comes; the error then names the site and the remedy too."""
    placed = {"blocks.1.hook_out": edits.Scale(np.ones((P, 1), np.float32))}
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_out returned .*edits\.only\(edit, phase=\"prompt\"\)"):
        write(4, edits=placed)


def test_an_edit_with_values_for_the_places_of_a_prompt_refuses_that_its_rows_are_moved():
    """Rows padded on the right are moved to end together, and booleans and a cache would be off by the padding."""
    right = (np.arange(P) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    for edit in (SOME, OTHER):
        kept = {"blocks.1.hook_out": edits.only(edit, phase="prompt")}
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_out.*pad them on the left"):
            write(4, edits=kept, attention_mask=right)
        with pytest.raises(ValueError, match="pad them on the left"):
            HookedGemma3(CONFIG, PARAMS).generate(TOKENS, 4, attention_mask=right, fwd_hooks=list(kept.items()))


# Compilation


def compilations(function):
    """How many programs a call adds."""
    before = decoding.read._cache_size(), decoding.go_on._cache_size()
    function()
    return decoding.read._cache_size() - before[0], decoding.go_on._cache_size() - before[1]


def test_nearby_lengths_share_a_compilation():
    """Prompts of 9 to 16 tokens, and 9 to 16 new ones; 17 are another program."""

    def write_one(p, new=16):
        generate(CONFIG, PARAMS, random_tokens((2, p)), new, stop_at_eos=False)

    write_one(9)
    assert compilations(lambda: [write_one(p, n) for p, n in zip(range(10, 17), range(9, 16), strict=True)]) == (0, 0)
    assert compilations(lambda: write_one(17)) == (1, 1)


def test_bucketing_changes_nothing():
    """Each length gives what it gives with edits, which are not bucketed."""
    for p in (9, 17):
        tokens = random_tokens((2, p))
        ours, theirs = (
            generate(CONFIG, PARAMS, tokens, 16, stop_at_eos=False, edits=placed)
            for placed in (None, {"blocks.0.hook_out": edits.Scale(1.0)})
        )
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert difference(ours.log_probs, theirs.log_probs) < BAR


def test_the_number_of_stop_tokens_compiles_nothing():
    """None, one, and several; they still stop."""
    free = np.asarray(write(16).tokens)[:, P:]

    def ends(stop):
        return int(write(16, stop_at_eos=True, eos_token_id=stop).attention_mask[0, P:].sum())

    stops = [int(free[0, 3]), [int(free[0, 3]), 0], [0, 0, 0, int(free[0, 3])]]
    assert compilations(lambda: [ends(stop) for stop in stops]) == (0, 0)
    first = free[0].tolist().index(free[0, 3]) + 1
    assert [ends(stop) for stop in stops] == [first] * 3
    assert free.shape[1] == 16 > first


def test_new_values_compile_nothing():
    """Temperatures, filters, seeds, stop tokens, and the vectors, strengths and places of edits are data."""

    def write_one(i):
        place = edits.only(edits.Add(direction(i), scale=0.1 * i), layer=i % 3, positions=[i, 2 * i])
        generate(
            CONFIG,
            PARAMS,
            TOKENS,
            10 + i,
            temperature=0.5 + i,
            top_k=5 + i,
            top_p=0.9 - 0.1 * i,
            min_p=0.01 * i,
            repetition_penalty=1 + 0.1 * i,
            seed=i,
            eos_token_id=i,
            edits={"blocks.*.hook_out": place},
        )

    write_one(0)
    assert compilations(lambda: [write_one(i) for i in (1, 2, 3)]) == (0, 0)


# Prompts


def test_padding_on_either_side_gives_each_row_what_it_gives_alone():
    """Left, right, and none: tokens, log-probabilities and the mask that comes back."""
    right = np.stack([np.roll(row, length) for row, length in zip(TOKENS, LENGTHS, strict=True)])
    left, behind = write(), write_right(right)
    np.testing.assert_array_equal(left.tokens[:, P:], behind.tokens[:, P:])
    np.testing.assert_array_equal(left.attention_mask, behind.attention_mask)
    for i, length in enumerate(LENGTHS):
        alone = generate(CONFIG, PARAMS, TOKENS[i : i + 1, P - length :], NEW, stop_at_eos=False)
        np.testing.assert_array_equal(left.tokens[i, P - length :], alone.tokens[0])
        np.testing.assert_array_equal(behind.tokens[i, P - length :], alone.tokens[0])
        assert difference(left.log_probs[i], alone.log_probs[0]) < BAR


def write_right(tokens):
    mask = (np.arange(P) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    return generate(CONFIG, PARAMS, tokens, NEW, attention_mask=mask, stop_at_eos=False)


# Text


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ 'ba ' + message['content'] + ' ke ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'lo' }}{% endif %}"
)
TEXT = "ba ke lo mu ti so re ba ke"
TEXTS = [TEXT, "so re mu so", "ti lo lo ba mu ti lo"]


@functools.cache
def chatty():
    """The shipped model, with a chat template on a tokenizer of its own."""
    model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    model.tokenizer.chat_template = CHAT
    return model


def test_text_in_text_out():
    """One text, several, and ids; each by default comes back as it came, or as asked for."""
    one = tiny().generate(TEXT, 20)
    assert one.startswith(TEXT)
    tokens = tiny().generate(TEXT, 20, return_type="tokens")
    assert (tokens.shape, tokens.dtype) == ((1, 30), jnp.int32)
    assert int(tokens[0, 0]) == tiny().config.bos_token_id
    assert tiny().to_string(tokens[0, 1:]) == one
    np.testing.assert_array_equal(tiny().generate(np.asarray(tokens)[0, :10], 20), tokens)
    assert tiny().generate(np.asarray(tokens)[:, :10], 20, return_type="text") == [one]
    assert tiny().generate(TEXTS, 20) == [one, *(tiny().generate(text, 20) for text in TEXTS[1:])]
    text, found = tiny().generate(TEXT, 20, names_filter="blocks.*.hook_resid_post", return_logits=True)
    assert text == one
    assert found.cache["resid_post", 0].shape[1] == 29
    assert found.logits.shape[:2] == (1, 20)


def test_hooks_of_the_model_object():
    """`fwd_hooks` are those of `run_with_hooks`, plain functions included, and act on every token."""
    steer = edits.only(edits.Add(np.full(tiny().config.hidden_size, 3.0, np.float32)), features=[0, 1, 2])
    hooks = [("blocks.1.hook_resid_post", steer), ("blocks.*.mlp.hook_out", lambda value, hook: 1.5 * value)]
    tokens, found = tiny().generate(TEXT, 6, fwd_hooks=hooks, return_type="tokens", return_logits=True)
    theirs = tiny().run_with_hooks(tokens[:, :-1], hooks)
    assert difference(found.logits, theirs[:, -6:]) < BAR
    assert difference(found.logits, tiny()(tokens[:, :-1])[:, -6:]) > 0.01


def test_chat_goes_through_the_template_with_one_bos():
    """Messages become the template's text; the reply alone comes back, or all tokens."""
    messages = [{"role": "user", "content": "ke lo mu ti"}]
    reply = chatty().generate(messages, 4)
    tokens = np.asarray(chatty().generate(messages, 4, return_type="tokens"))
    written = "ba ke lo mu ti ke lo"
    np.testing.assert_array_equal(tokens[:, :-4], chatty().to_tokens(written))
    assert (tokens == chatty().config.bos_token_id).sum() == 1
    assert chatty().tokenizer.decode(tokens[0, -4:]) == reply
    both = chatty().generate([messages, [{"role": "user", "content": "so"}]], 4)
    assert both[0] == reply
    assert len(both) == 2
    assert "".join(chatty().generate_stream(messages, 4)) == reply
    with pytest.raises(ValueError, match="no chat template"):
        tiny().generate(messages, 4)


def test_a_stream_has_the_tokens_of_generate():
    """Text, texts of several lengths, and ids; rows that end go on in silence, or as padding."""
    model, how = tiny(), {"temperature": 2.0, "seed": 3}
    assert TEXT + "".join(model.generate_stream(TEXT, 20, **how)) == model.generate(TEXT, 20, **how)
    tokens = np.asarray(model.generate(TEXTS, 20, return_type="tokens", stop_at_eos=False, **how))
    stop = {"eos_token_id": [int(tokens[0, 14]), int(tokens[1, 18])], **how}
    pieces = np.asarray(list(model.generate_stream(TEXTS, 20, **stop)))
    whole = model.generate(TEXTS, 20, **stop)
    assert [text + "".join(row) for text, row in zip(TEXTS, pieces.T, strict=True)] == whole
    ids, mask = model.encode(TEXTS)
    streamed = np.stack(list(model.generate_stream(np.asarray(ids), 20, attention_mask=mask, **stop)), axis=1)
    np.testing.assert_array_equal(streamed, model.generate(TEXTS, 20, return_type="tokens", **stop)[:, ids.shape[1] :])


def test_stop_strings_end_each_row_at_its_own():
    """Behind the first token with which one is written: text and tokens are cut, with padding and zeros behind."""
    model = tiny()
    free = np.asarray(model.generate(TEXTS, 40, return_type="tokens"))
    p = free.shape[1] - 40
    spelled = [[model.tokenizer.decode(row[p : p + n + 1].tolist()) for n in range(40)] for row in free]
    # Of two tokens, so that the second completes it; the second row's comes after the first look, at 16 tokens.
    stops = [spelled[0][4][-5:], spelled[1][20][-8:]]
    ends = [next((n for n, text in enumerate(row) if any(s in text for s in stops)), 39) for row in spelled]
    assert len(set(ends)) > 1
    texts, found = model.generate(TEXTS, 40, stop_strings=stops, return_logits=True)
    assert texts == [
        text + row[end] if row[end][0] == " " else text + " " + row[end]
        for text, row, end in zip(TEXTS, spelled, ends, strict=True)
    ]
    np.testing.assert_array_equal(
        found.attention_mask.sum(axis=1) - found.attention_mask[:, :p].sum(axis=1), np.asarray(ends) + 1
    )
    for row, end, log_probs in zip(np.asarray(found.tokens), ends, np.asarray(found.log_probs), strict=True):
        assert (row[p + end + 1 :] == model.config.pad_token_id).all()
        assert (log_probs[end + 1 :] == 0).all()
        assert (log_probs[: end + 1] < 0).all()
    pieces = np.asarray(list(model.generate_stream(TEXTS, 40, stop_strings=stops)))
    assert [text + "".join(row) for text, row in zip(TEXTS, pieces.T, strict=True)] == texts
    ids, mask = model.encode(TEXTS)
    streamed = np.stack(list(model.generate_stream(np.asarray(ids), 40, attention_mask=mask, stop_strings=stops)), 1)
    np.testing.assert_array_equal(streamed, found.tokens[:, p:])


# Errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 250}, "12 tokens of the prompt and 250 new ones are more than the 256 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a positive integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"tokens": np.zeros((0, 4), int)}, "one at least"),
        ({"tokens": np.zeros((2, 0), int)}, "one at least"),
        ({"tokens": np.full((1, 4), 300)}, "token id 300 is outside the vocabulary of 101"),
        ({"tokens": np.full((1, 4), 0.5)}, "token ids"),
        ({"attention_mask": MASK * [[1], [0], [1]]}, "row 1 of attention_mask is all padding"),
        ({"attention_mask": MASK * (np.arange(P) != 9)}, "row 0 of attention_mask has padding between tokens"),
        ({"attention_mask": MASK[:, 1:]}, "attention_mask has shape (3, 11); the prompt has (3, 12)"),
        ({"eos_token_id": 101}, "eos_token_id is 101; it takes ids within the vocabulary of 101"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is [1, -1]"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"seed": [1, 2]}, "seed is [1, 2]; it takes an integer, or one for each of 3 rows"),
        ({"capture": "blocks.7.hook_out"}, "blocks.7.hook_out"),
        ({"edits": {"blocks.1.hook_out": edits.only(edits.Scale(0.0), positions=70)}}, "positions has 70"),
    ],
)
def test_bad_input_is_named(arguments, says):
    """One message with what is wrong, before anything is compiled."""
    config = Gemma3Config.from_hf({**CONFIG.to_hf(), "max_position_embeddings": 256})
    given = {"tokens": TOKENS, "max_new_tokens": 8, "attention_mask": None, **arguments}
    with pytest.raises(ValueError, match=re.escape(says)):
        generate(config, PARAMS, **given)


def test_an_encoder_does_not_generate():
    """A bidirectional model has no next token."""
    config = Gemma3Config.from_hf({**CONFIG.to_hf(), "use_bidirectional_attention": True})
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        generate(config, PARAMS, TOKENS, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input": ""}, None),
        ({"input": []}, "the prompt is empty"),
        ({"input": [[]]}, "at least one token"),
        ({"stop_strings": "xylophone"}, "the stop string 'xylophone' has what the tokenizer cannot write"),
        ({"stop_strings": [""]}, "a stop string is ''"),
        ({"stop_strings": [7]}, "a stop string is 7"),
        ({"return_type": "str"}, "return_type is 'str'; it takes 'text', 'tokens' and None"),
    ],
)
def test_bad_prompts_and_strings_are_named(arguments, says):
    """The same for people; an empty text is its BOS."""
    if says is None:
        assert tiny().generate(**arguments, max_new_tokens=2, return_type="tokens").shape == (1, 3)
        return
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny().generate(**{"input": TEXT, **arguments})


def test_any_integer_counts_tokens():
    """Of NumPy and JAX too, as a length of an array is."""
    for n in (np.int32(20), np.uint8(20), jnp.int32(20)):
        assert generate(tiny().config, tiny().params, [[2] * 10], n, stop_at_eos=False).tokens.shape == (1, 30)
        assert tiny().generate([2] * 10, n, stop_at_eos=False).shape == (1, 30)
        assert len(list(tiny().generate_stream([2] * 10, n, stop_at_eos=False))) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"fwd_hooks": [("blocks.9.hook_out", STEER)]}, "blocks.9.hook_out"),
        ({"stop_strings": ""}, "a stop string is ''"),
    ],
)
def test_a_stream_reports_bad_arguments_when_it_is_called(arguments, says):
    """And not when the first piece is asked for."""
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny().generate_stream(TEXT, **arguments)


@pytest.mark.parametrize("function", ["read", "go_on"])
def test_out_of_memory_says_what_was_asked_for(function, monkeypatch):
    """How many bytes, and by what; any other failure passes through."""
    real = getattr(module, function)

    def fail(*arguments, **static):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return real(*arguments, **static)
        if function == "go_on":
            real(*arguments, **static)  # which uses the text up, as a loop that fails may have
        raise jax.errors.JaxRuntimeError(says)

    monkeypatch.setattr(module, function, fail)
    monkeypatch.setattr(writing, "go_on", fail)
    says = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
    with pytest.raises(MemoryError) as error:
        write(capture="blocks.*.hook_out")
    # 3 rows of 16 + 64 columns: keys and values of 2 heads of 10, in a full layer and two rings of 7
    asked = 2 * 3 * 2 * 10 * 4 * (80 + 2 * 7)
    captured = 3 * 3 * 80 * CONFIG.hidden_size * 4
    assert f"{asked:,} bytes for the keys and values of 3 rows of 80 tokens" in str(error.value)
    assert f"{captured:,} bytes for 3 captured sites" in str(error.value)
    assert "allocating 1 bytes" in str(error.value)
    # Where hook_attn_in is edited, each of the 8 query heads has keys and values of its own.
    with pytest.raises(MemoryError, match=f"{2 * 3 * 10 * 4 * (8 * 76 + 2 * 2 * 7):,} bytes for the keys and values"):
        write(edits={"blocks.1.hook_attn_in": edits.Scale(2.0)})
    with pytest.raises(MemoryError, match="keys and values"):
        HookedGemma3(CONFIG, PARAMS).generate(TOKENS, 5)
    says = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        write()
