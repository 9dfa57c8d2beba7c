"""Documents that share a row: each is computed as it is alone, and as Hugging Face computes positions that restart."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import convert_state_dict
from gemma3_jax import Gemma3, Gemma3Config, forward, site_names, stack_layers
from gemma3_jax.compute.attention import SHORT
from gemma3_jax.parity import SMALL_BAR, compare_sites
from gemma3_jax.sites.table import site
from tests.helpers.random_models import hf_model, random_tokens
from tests.helpers.small_model import assert_same, same, small
from tests.reference.hf_forward import hf_sites

VARIANTS = {
    "causal": {},
    "both ways": {"use_bidirectional_attention": True, "sliding_window": 9},
    "window of one": {"sliding_window": 1},
    "all full": {"layer_types": ["full_attention"] * 3},
}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# Of each row the lengths of its documents: longer than the window and shorter, down to one token.
SHORT_ROWS = [[11, 1, 10, 8], [30]]
LONG = SHORT + 88  # attention in a band and in chunks, whose blocks of 128 begin and end within documents
LONG_ROWS = [[200, 3, 150, LONG - 353], [128, 128, LONG - 256]]


def restarting(rows) -> np.ndarray:
    """[b, p] positions from 0 in each document."""
    return np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in rows])


def numbered(rows) -> np.ndarray:
    """[b, p] ids of documents that are neither sorted nor counted, and come back: 5, -3, 5, ..."""
    return np.stack([np.repeat([(5, -3)[i % 2] for i in range(len(lengths))], lengths) for lengths in rows])


@functools.cache
def models(variant: str, long: bool = False):
    """Hugging Face's model, and config and params of the port."""
    model = hf_model(**VARIANTS[variant], **(TWO_LAYERS if long else {}))
    config = Gemma3Config.from_hf(model.config)
    return model, config, convert_state_dict(model.state_dict(), config)


@functools.partial(jax.jit, static_argnames=("config", "names"))
def sites(config, params, tokens, names=("**",), **options):
    logits, cache = forward(config, params, tokens, names, **options)
    return {**cache, "logits": logits}


def failures(wanted, found):
    found = {name: np.asarray(value) for name, value in found.items()}
    return [row for row in compare_sites({name: wanted[name] for name in found}, found, SMALL_BAR) if not row.passed]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_is_hugging_faces(variant):
    """Positions that restart, and segment ids, give what Hugging Face makes of the positions; one text does not."""
    model, config, params = models(variant)
    tokens, positions = random_tokens((2, 30)), restarting(SHORT_ROWS)
    wanted = hf_sites(model, tokens, position_ids=positions)
    assert not failures(wanted, sites(config, params, tokens, positions=positions))
    assert not failures(wanted, sites(config, params, tokens, segment_ids=numbered(SHORT_ROWS)))
    # Controls: one text; and the same positions within one text, which is what a mask says.
    assert "logits" in {row.kind for row in failures(wanted, sites(config, params, tokens))}
    one_text = sites(config, params, tokens, positions=positions, attention_mask=np.ones_like(tokens))
    assert "logits" in {row.kind for row in failures(wanted, one_text)}
    assert not failures(hf_sites(model, tokens, position_ids=positions, attention_mask=np.ones_like(tokens)), one_text)


@pytest.mark.parametrize("variant", ["causal", "both ways"])
def test_long_prompts(variant):
    """In a band and in chunks no score is held, and each other site is Hugging Face's."""
    model, config, params = models(variant, long=True)
    tokens, positions = random_tokens((2, LONG)), restarting(LONG_ROWS)
    names = tuple(name for name in site_names(config) if not name.endswith(("hook_attn_scores", "hook_pattern")))
    wanted = hf_sites(model, tokens, position_ids=positions)
    assert not failures(wanted, sites(config, params, tokens, names, positions=positions))
    assert not failures(wanted, sites(config, params, tokens, names, segment_ids=numbered(LONG_ROWS)))
    moved = [[n + (i == 0) - (i == 1) for i, n in enumerate(lengths)] for lengths in LONG_ROWS]
    assert failures(wanted, sites(config, params, tokens, names, segment_ids=numbered(moved)))  # control: one token


def test_inferred_documents_are_hugging_faces():
    """Steps of 0, 2 and -3 begin documents too, as do all tokens of stretched positions; zeros as ids say one text."""
    model, config, params = models("causal")
    tokens = random_tokens((3, 12))
    odd = np.array([[3, 4, 5, 5, 6, 8, 9, 6, 7, 8, 0, 1], range(0, 24, 2), range(100, 112)])
    wanted = hf_sites(model, tokens, position_ids=odd)
    assert not failures(wanted, sites(config, params, tokens, positions=odd))
    one_text = sites(config, params, tokens, positions=odd, segment_ids=np.zeros_like(odd))
    assert not failures(hf_sites(model, tokens, position_ids=odd, attention_mask=np.ones_like(odd)), one_text)
    assert not same(one_text["logits"][1], wanted["logits"][1], 1e-3)  # control
    assert_same(one_text["logits"][2], wanted["logits"][2])


def test_the_plain_module_takes_the_same():
    """`Gemma3.apply` packs by ids and by positions."""
    _, config, params = models("causal")
    tokens, positions = random_tokens((2, 30)), restarting(SHORT_ROWS)
    wanted = sites(config, params, tokens, (), positions=positions)["logits"]
    for given_as in ({"positions": positions}, {"segment_ids": numbered(SHORT_ROWS)}):
        given_as = {name: jnp.asarray(value) for name, value in given_as.items()}
        assert_same(Gemma3(config).apply({"params": params}, jnp.asarray(tokens), **given_as), wanted, 1e-6)


# --- each document is what it is alone ------------------------------------------------------------------------------

P = 24
LENGTHS = (1, 4, 9)  # few, as each compiles


@st.composite
def rows(draw):
    """A seed; segment ids [2, p]; a mask [2, p] or None; and of each document the row and the columns."""
    ids, mask, documents = np.zeros((2, P), int), np.zeros((2, P), int), []
    own = draw(st.booleans())  # whether padding is a document, which needs no mask, or belongs to the one beside it
    for row in range(2):
        start = draw(st.integers(0, 5))
        ids[row, :start] = 0 if own else 1
        for i, length in enumerate(draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=8))):
            if start + length > P:
                break
            ids[row, start : start + length] = 2 - (i + 1) % 2
            mask[row, start : start + length] = 1
            documents.append((row, slice(start, start + length)))
            start += length
        ids[row, start:] = 0 if own else ids[row, start - 1]
    return draw(st.integers(0, 3)), ids, None if own and draw(st.booleans()) else mask, documents


def of_document(name: str, value, row: int, columns: slice) -> np.ndarray:
    """What a site holds of one document, with a batch axis of 1."""
    axes = ["b", "p", "V"] if name == "logits" else site(name).axes.split()
    cut = [slice(row, row + 1) if axis == "b" else columns if axis in "pk" else slice(None) for axis in axes]
    return np.asarray(value)[tuple(cut)]


@settings(deadline=None, max_examples=12)
@given(rows(), st.booleans())
def test_each_document_is_what_it_is_alone(drawn, stacked):
    """Every site of every document, behind any padding, from either layout of the parameters."""
    seed, ids, mask, documents = drawn
    config, params = small()
    tokens = random_tokens((2, P), seed=seed)
    laid_out = stack_layers(config, params) if stacked else params
    packed = sites(config, laid_out, tokens, attention_mask=mask, segment_ids=ids)
    for row, columns in documents:
        alone = sites(config, params, tokens[row : row + 1, columns])
        for name, value in alone.items():
            assert_same(of_document(name, packed[name], row, columns), value)


def test_a_neighbour_is_not_seen():
    """Control: without ids the second document of a row is not what it is alone."""
    config, params = small()
    tokens = random_tokens((1, 8))
    alone = sites(config, params, tokens[:, 4:], ())["logits"]
    ids = np.repeat([[0, 1]], 4, axis=1)
    assert_same(sites(config, params, tokens, (), segment_ids=ids)["logits"][:, 4:], alone)
    assert not same(sites(config, params, tokens, ())["logits"][:, 4:], alone, 1e-2)


@functools.partial(jax.jit, static_argnames=("config",))
def weighted_gradients(config, params, tokens, weights, segment_ids=None):
    """The gradients of the parameters for the weighted sum of the logits; and the logits."""

    def weighted(params):
        logits = forward(config, params, tokens, segment_ids=segment_ids)[0]
        return jnp.sum(logits * weights), logits

    return jax.grad(weighted, has_aux=True)(params)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers apart", "scanned"])
def test_long_rows_and_their_gradients(stacked):
    """Where no score is held, logits are those of each document alone, and gradients the sum of theirs."""
    _, config, params = models("causal", long=True)
    tokens, lengths = random_tokens((1, LONG)), LONG_ROWS[0]
    weights = np.random.default_rng(0).normal(size=(1, LONG, config.vocab_size)).astype(np.float32)
    laid_out = stack_layers(config, params) if stacked else params
    gradients, logits = weighted_gradients(config, laid_out, tokens, weights, numbered([lengths]))
    starts = np.cumsum([0, *lengths])
    alone = []
    for start, end in itertools.pairwise(starts):
        here = slice(start, end)
        each, expected = weighted_gradients(config, params, tokens[:, here], weights[:, here])
        assert_same(logits[:, here], expected)
        alone.append(each)
    total = jax.tree.map(lambda *each: np.sum(each, axis=0), *alone)
    total = stack_layers(config, total) if stacked else total
    jax.tree.map(assert_same, gradients, total)
    one_text = weighted_gradients(config, params, tokens, weights)[0]["embed"]["weight"]
    assert not same(gradients["embed"]["weight"], one_text, 1e-2)  # control


def test_the_loss_is_that_of_the_documents():
    """No pair across a border counts: Hugging Face's loss with labels of -100 at first tokens; packed and alone."""
    model, config, params = models("causal")
    tokens, positions, ids = random_tokens((2, 30)), restarting(SHORT_ROWS), numbered(SHORT_ROWS)
    labels = torch.as_tensor(np.where(positions == 0, -100, tokens))
    given = {"position_ids": torch.as_tensor(positions), "use_cache": False}
    with torch.no_grad():
        wanted = float(model(torch.as_tensor(tokens), labels=labels, **given).loss)
        other = float(model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens), **given).loss)
    for given_as in ({"positions": positions}, {"segment_ids": ids}):
        loss = float(forward(config, params, tokens, return_type="loss", **given_as)[0])
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert loss != pytest.approx(other, rel=1e-3)  # control: pairs across borders
