"""Masks with holes: padding between real tokens counts in their positions, as in Hugging Face's forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import convert_state_dict
from gemma3_jax import Gemma3, Gemma3Config, edits, forward, reductions, site_names, stack_layers
from gemma3_jax.compute.attention import SHORT
from gemma3_jax.parity import SMALL_BAR, compare_sites
from gemma3_jax.positions import at_positions, default_positions
from tests.helpers.random_models import hf_model, random_tokens
from tests.helpers.small_model import assert_same, run, same, small
from tests.reference.hf_forward import hf_sites

VARIANTS = {
    "causal": {},
    "both ways": {"use_bidirectional_attention": True, "sliding_window": 9},
    "window of one": {"sliding_window": 1},
}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
LENGTH, LONG = 30, SHORT + 88  # several windows; and enough for attention in a band and in chunks
# Sites that say where a token stands: a shift of a whole row moves them, and nothing else.
ABSOLUTE = ("hook_cos", "hook_sin", "hook_rot_q", "hook_rot_k")
HOLES = np.array([[1, 1, 0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0]])  # for the tokens of `small_model`


def with_holes(length: int, before: int = 0) -> np.ndarray:
    """[2, p]: holes shorter and longer than the window, `before` columns of padding in front and one row's end."""
    mask = np.ones((2, length), np.int64)
    mask[0, [3, 7, length // 2]] = 0
    mask[1, length // 3 : length // 3 + 11] = 0
    mask[:, :before] = 0
    mask[1, -4:] = 0
    return mask


def counted(mask: np.ndarray) -> np.ndarray:
    """[b, p]: the number of real tokens before each, which is not how a forward pass numbers them."""
    return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)


@functools.cache
def models(variant: str, long: bool = False):
    """Hugging Face's model, and config and params of the port."""
    model = hf_model(**VARIANTS[variant], **(TWO_LAYERS if long else {}))
    config = Gemma3Config.from_hf(model.config)
    return model, config, convert_state_dict(model.state_dict(), config)


@functools.partial(jax.jit, static_argnames=("config", "names"))
def ours(config, params, tokens, mask, positions=None, names=("**",)):
    logits, cache = forward(config, params, tokens, names, attention_mask=mask, positions=positions)
    return {**cache, "logits": logits}


def failures(wanted, found, mask):
    found = {name: np.asarray(value) for name, value in found.items()}
    wanted = {name: wanted[name] for name in found}
    return [row for row in compare_sites(wanted, found, SMALL_BAR, mask) if not row.passed]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_is_hugging_faces(variant):
    """With holes, each site at each real token is that of a plain call of Hugging Face; counting tokens it is not."""
    model, config, params = models(variant)
    tokens, mask = random_tokens((2, LENGTH)), with_holes(LENGTH)
    wanted = hf_sites(model, tokens, attention_mask=mask)
    assert not failures(wanted, ours(config, params, tokens, mask), mask)
    control = ours(config, params, tokens, mask, counted(mask))
    assert "logits" in {row.kind for row in failures(wanted, control, mask)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_in_front_shifts_positions_alone(variant):
    """Rows whose first token is further in equal a plain call of Hugging Face, but for the angles, which shift."""
    model, config, params = models(variant)
    tokens, mask = random_tokens((2, LENGTH)), with_holes(LENGTH, before=2)
    found = ours(config, params, tokens, mask)
    plain = hf_sites(model, tokens, attention_mask=mask)
    assert {row.kind.rsplit(".", 1)[-1] for row in failures(plain, found, mask)} <= set(ABSOLUTE)
    positions = np.maximum(np.arange(LENGTH) - 2, 0)[None].repeat(2, axis=0)
    shifted = hf_sites(model, tokens, attention_mask=mask, position_ids=positions)
    assert not failures(shifted, found, mask)


@pytest.mark.parametrize("variant", ["causal", "both ways"])
def test_long_prompts(variant):
    """Attention in a band and in chunks, which hold no scores: each other site is Hugging Face's."""
    model, config, params = models(variant, long=True)
    tokens, mask = random_tokens((2, LONG)), with_holes(LONG)
    names = tuple(name for name in site_names(config) if not name.endswith(("hook_attn_scores", "hook_pattern")))
    wanted = hf_sites(model, tokens, attention_mask=mask)
    assert not failures(wanted, ours(config, params, tokens, mask, names=names), mask)
    assert failures(wanted, ours(config, params, tokens, mask, counted(mask), names=names), mask)  # control


def test_both_layouts_of_parameters_and_the_plain_module():
    """Stacked parameters and `Gemma3` itself number the columns too."""
    config, params = small()
    wanted = run(attention_mask=HOLES)[0]
    tokens = jnp.asarray(random_tokens((2, 9)), jnp.int32)
    real = HOLES.astype(bool)
    assert_same(forward(config, stack_layers(config, params), tokens, attention_mask=HOLES)[0][real], wanted[real])
    module = Gemma3(config).apply({"params": params}, tokens, attention_mask=jnp.asarray(HOLES))
    assert_same(module[real], wanted[real])
    control = run(attention_mask=HOLES, positions=counted(HOLES))[0]
    assert not same(control[real], wanted[real], 1e-3)


# --- positions ------------------------------------------------------------------------------------------------------

P = 11
ROWS = st.lists(st.lists(st.integers(0, 1), min_size=P, max_size=P), min_size=2, max_size=2).map(np.array)


def documents(cuts) -> np.ndarray:
    """[p] numbers of documents that begin at these columns."""
    return np.cumsum(np.isin(np.arange(P), list(cuts)))


CUTS = st.none() | st.lists(st.sets(st.integers(1, P - 1)), min_size=2, max_size=2).map(
    lambda rows: np.stack([documents(cuts) for cuts in rows])
)


def by_hand(mask: np.ndarray, ids: np.ndarray) -> list[list[int]]:
    """Positions of a row's tokens, one document after the other."""
    positions = []
    for document in np.unique(ids):
        here = np.flatnonzero(ids == document)
        real = [column for column in here if mask[column]]
        positions += [max(column - real[0], 0) if real else 0 for column in here]
    return positions


@settings(deadline=None, max_examples=60)
@given(ROWS, CUTS)
def test_default_positions_are_columns_of_a_document(mask, ids):
    """Each counts columns from its document's first real token, and none is negative; with no mask from its start."""
    for given_mask in (mask, None):
        positions = default_positions((2, P), given_mask, None if ids is None else jnp.asarray(ids))
        assert positions.dtype == np.int32
        whole = np.ones_like(mask) if given_mask is None else mask
        numbers = np.zeros_like(mask) if ids is None else ids
        assert positions.tolist() == [by_hand(*row) for row in zip(whole, numbers, strict=True)]


@settings(deadline=None, max_examples=60)
@given(ROWS, CUTS, st.lists(st.integers(-P, P - 1), min_size=2, max_size=2))
def test_wanted_positions_are_those_of_every_document(mask, ids, wanted):
    """From the front and from the end, in each document: real tokens only, -1 always one, -2 perhaps a hole."""
    numbers = np.zeros_like(mask) if ids is None else ids
    expected = np.zeros((2, 2, P), bool)
    for row in range(2):
        for document in np.unique(numbers[row]):
            real = np.flatnonzero((numbers[row] == document) & (mask[row] == 1))
            for n, position in enumerate(wanted if len(real) else ()):
                column = real[0] + position if position >= 0 else real[-1] + position + 1
                if column in real:
                    expected[row, n, column] = True
    ids = None if ids is None else jnp.asarray(ids)
    found = at_positions(jnp.asarray(wanted), default_positions((2, P), mask, ids), jnp.asarray(mask), ids)
    np.testing.assert_array_equal(found, expected)


def test_a_hole_is_no_token():
    """-1 is each row's last real token; a position that falls on a hole gives NaN, and no edit acts there."""
    whole = run(attention_mask=HOLES)[0]
    logits = run(attention_mask=HOLES, logits_at=[0, -1, -3])[0]
    for row, (first, last, third) in enumerate([(0, 8, None), (1, 6, 4)]):
        assert_same(logits[row, :2], whole[row, [first, last]], 1e-6)
        assert np.isnan(logits[row, 2]).all() if third is None else same(logits[row, 2], whole[row, third], 1e-6)
    name = "blocks.0.hook_out"
    kept = run({name: reductions.At(-3)}, attention_mask=HOLES)[1][name]
    assert np.isnan(kept[0]).all()
    assert np.isfinite(kept[1]).all()
    edited = run(name, {name: edits.only(edits.Replace(0.0), positions=-3)}, attention_mask=HOLES)[1][name]
    assert np.argwhere(~np.asarray(edited).any(axis=-1)).tolist() == [[1, 4]]
