"""Generation: the tokens and log-probabilities of Hugging Face and of one forward, whatever the padding and buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from conversion import convert_checkpoint
from gemma3_jax import TINY, Gemma3Config, HookedGemma3, edits, forward
from gemma3_jax.compute import cpu
from gemma3_jax.generation.loop import generate
from tests.helpers.greedy_texts import BAR, CONFIG, LENGTHS, MASK, NEW, TOKENS, P, parameters, write
from tests.helpers.lively_model import at_real_tokens, lively
from tests.helpers.programs import programs
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import difference, direction, identity


@pytest.fixture(params=["by rows", "by turns"])
def every_product(request, monkeypatch):
    """The usual products, and those that decoding several rows by large weights has on a CPU."""
    if request.param == "by rows":
        yield
        return
    monkeypatch.setattr(cpu, "LARGE", 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


# Hugging Face


def hf_greedy(model, tokens, mask, new, **options):
    with torch.no_grad():
        out = model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False, **options
        )
    return out.numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_tokens_are_those_of_hugging_face(every_product, tied):
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


def test_in_bfloat16_the_cache_changes_nothing_but_rounding(every_product):
    """As near to float32 as one forward in bfloat16 is, and its tokens wherever that forward's choice is clear."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
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


# Probabilities


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_k": 30, "seed": 5}], ids=["greedy", "drawn"])
def test_log_probs_and_logits_are_those_of_a_forward(how):
    """Of the tokens that came back, under the mask that came back, whatever they were drawn with."""
    found = write(return_logits=True, **how)
    logits, _ = jax.jit(functools.partial(forward, CONFIG))(
        parameters(), found.tokens, attention_mask=found.attention_mask
    )
    before = logits[:, P - 1 : -1]
    assert difference(found.logits, before) < BAR
    new = found.tokens[:, P:, None]
    theirs = jnp.take_along_axis(jax.nn.log_softmax(before), new, axis=-1)[..., 0]
    assert difference(found.log_probs, theirs) < BAR
    # control: one position further
    other = jnp.take_along_axis(jax.nn.log_softmax(logits[:, P:]), new, axis=-1)[..., 0]
    assert difference(found.log_probs, other) > 0.01


# Compilation


def compilations(function):
    """How many programs a call adds."""
    before = programs()
    function()
    return programs() - before


def test_nearby_lengths_share_a_compilation():
    """Prompts of 9 to 16 tokens, and 9 to 16 new ones, also with ready-made edits; 17 are another program."""

    def write_one(p, new=16, placed=None):
        generate(CONFIG, parameters(), random_tokens((2, p)), new, stop_at_eos=False, edits=placed)

    steering = {"blocks.0.hook_out": edits.only(edits.Add(direction()), positions=[1, 10])}
    for placed in (None, steering):
        write_one(11, placed=placed)
        lengths = zip(range(11, 17), range(9, 15), strict=True)
        assert compilations(lambda several=lengths, placed=placed: [write_one(*each, placed) for each in several]) == 0
    assert compilations(lambda: write_one(17)) == 2


def test_with_one_new_token_no_step_is_compiled():
    """It is written when the prompt has been read; a second one needs a step."""
    tokens = random_tokens((7, 9))
    assert compilations(lambda: generate(CONFIG, parameters(), tokens, 1)) == 1
    assert compilations(lambda: generate(CONFIG, parameters(), tokens, 2, stop_at_eos=False)) == 1  # control


def test_bucketing_changes_nothing():
    """Each length gives what it gives with functions as edits, which are not bucketed; ready-made edits are."""
    steering, tokens = edits.Add(direction()), random_tokens((2, 9))
    for placed, function in ((None, identity), (steering, lambda value, hook: steering(value, hook))):
        ours, theirs = (
            generate(CONFIG, parameters(), tokens, 8, stop_at_eos=False, edits=each and {"blocks.0.hook_out": each})
            for each in (placed, function)
        )
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert difference(ours.log_probs, theirs.log_probs) < BAR


def test_the_number_of_stop_tokens_compiles_nothing():
    """None, one, and several; they still stop."""
    free = np.asarray(write(16).tokens)[:, P:]

    def ends(stop):
        return int(write(16, stop_at_eos=True, eos_token_id=stop).attention_mask[0, P:].sum())

    stops = [int(free[0, 3]), [int(free[0, 3]), 0], [0, 0, 0, int(free[0, 3])]]
    assert compilations(lambda: [ends(stop) for stop in stops]) == 0
    first = free[0].tolist().index(free[0, 3]) + 1
    assert [ends(stop) for stop in stops] == [first] * 3
    assert free.shape[1] == 16 > first


def test_new_values_compile_nothing():
    """Temperatures, filters, seeds, stop tokens, and the vectors, strengths and places of edits are data."""

    def write_one(i):
        place = edits.only(edits.Add(direction(i), scale=0.1 * i), layer=i % 3, positions=[i, 2 * i])
        generate(
            CONFIG,
            parameters(),
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
    assert compilations(lambda: [write_one(i) for i in (1, 2, 3)]) == 0


def test_any_kind_of_number_compiles_nothing():
    """A strength that is an integer, a float, or NumPy's, in an edit of a run or of generation."""
    model, numbers = HookedGemma3(CONFIG, parameters()), (2, 2.0, np.float32(2), np.float64(2), np.int64(2))

    def steered(number):
        edit = edits.only(edits.Add(direction(0), number), layer=1)
        return write(2, edits={"blocks.*.hook_out": edit}).log_probs, model.run_with_hooks(
            TOKENS, [("blocks.1.hook_out", edits.Scale(number))]
        )

    first, runs = steered(numbers[0]), programs()
    assert compilations(lambda: [steered(number) for number in numbers]) == 0
    assert programs() == runs
    model.run_with_hooks(TOKENS, [("blocks.1.hook_out", edits.Scale(np.ones((P, 1), np.float32)))])
    assert programs() == runs + 1  # control: another shape
    for number in numbers:
        for ours, theirs in zip(steered(number), first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# Prompts


def test_columns_that_are_padding_in_every_row_stay():
    """Tokens are [b, p + n] of the prompt that was given; what is written is the same."""
    # Of the model's positions they take none.
    config = Gemma3Config.from_hf({**CONFIG.to_hf(), "max_position_embeddings": P + NEW})
    wider, mask = np.pad(TOKENS, ((0, 0), (3, 2))), np.pad(MASK, ((0, 0), (3, 2)))
    found, plain = generate(config, parameters(), wider, NEW, attention_mask=mask, stop_at_eos=False), write()
    assert found.tokens.shape == found.attention_mask.shape == (3, P + 5 + NEW)
    real = np.asarray(plain.attention_mask).astype(bool)
    np.testing.assert_array_equal(found.tokens[:, 5:][real], plain.tokens[real])
    np.testing.assert_array_equal(found.attention_mask[:, 5:], plain.attention_mask)
    assert not found.attention_mask[:, :5].any()
    with pytest.raises(ValueError, match=f"has {P} tokens; with {NEW + 1} new tokens, the text exceeds"):  # control
        generate(config, parameters(), wider, NEW + 1, attention_mask=mask)


def test_padding_on_either_side_gives_each_row_what_it_gives_alone():
    """Left, right, and none: tokens, log-probabilities and the mask that comes back."""
    right = np.stack([np.roll(row, length) for row, length in zip(TOKENS, LENGTHS, strict=True)])
    left, behind = write(), write_right(right)
    np.testing.assert_array_equal(left.tokens[:, P:], behind.tokens[:, P:])
    np.testing.assert_array_equal(left.attention_mask, behind.attention_mask)
    for i, length in enumerate(LENGTHS):
        alone = generate(CONFIG, parameters(), TOKENS[i : i + 1, P - length :], NEW, stop_at_eos=False)
        np.testing.assert_array_equal(left.tokens[i, P - length :], alone.tokens[0])
        np.testing.assert_array_equal(behind.tokens[i, P - length :], alone.tokens[0])
        assert difference(left.log_probs[i], alone.log_probs[0]) < BAR


def write_right(tokens):
    mask = (np.arange(P) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    return generate(CONFIG, parameters(), tokens, NEW, attention_mask=mask, stop_at_eos=False)
