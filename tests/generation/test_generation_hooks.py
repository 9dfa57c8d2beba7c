"""Hooks while a text is written: captures and edits are those of one forward over the whole text."""

import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import HookedGemma3, edits, forward
from tests.helpers.greedy_texts import BAR, CONFIG, LENGTHS, MASK, NEW, TOKENS, P, full, parameters, write
from tests.helpers.lively_model import at_real_tokens
from tests.helpers.small_model import difference, direction, nudge

# Captures


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
    # The cache knows its tokens, which end before the last new one.
    np.testing.assert_array_equal(found.cache.tokens, np.asarray(found.tokens)[:, :-1])
    name = "blocks.2.hook_out"
    np.testing.assert_array_equal(found.cache.real(name), np.asarray(found.cache[name])[real])
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
        # Tokens that are not written yet are padding, so edits do not see them.
        real = mask * (jnp.arange(P + new) < n)
        logits = forward(CONFIG, parameters(), tokens, (), placed, attention_mask=real)[0]
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
    "behind the window": {
        "blocks.*.attn.hook_pattern": edits.only(edits.Replace(0.5), keys=[0, 1], heads=[1, 4]),
        "blocks.0.attn.hook_attn_scores": edits.only(edits.Replace(4.0), keys=[2], heads=[2, 3]),
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


ACTIVATION = np.random.default_rng(0).normal(size=(3, P, CONFIG.hidden_size)).astype(np.float32)
OTHER = edits.FromCache({"blocks.1.hook_out": ACTIVATION})
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
    run = jax.jit(lambda placed: forward(CONFIG, parameters(), TOKENS, list(WHOLE), placed, MASK))
    logits, cache = run(WHOLE)
    plain = run({})[1]
    for name in WHOLE:
        ours, theirs, unedited = (at_real_tokens(name, x[name], MASK) for x in (found.cache, cache, plain))
        assert difference(ours, theirs) < BAR, name
        assert difference(ours, unedited) > 0.01, name  # control
    assert difference(found.logits[:, 0], logits[:, -1]) < BAR
    tokens = HookedGemma3(CONFIG, parameters()).generate(
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
        lambda: HookedGemma3(CONFIG, parameters()).generate(TOKENS, 4, attention_mask=MASK, fwd_hooks=[(name, edit)]),
    ):
        with pytest.raises(ValueError, match=re.escape('edits.only(edit, phase="prompt")')) as refused:
            call()
        assert name in str(refused.value)
        assert says in str(refused.value)


@pytest.mark.parametrize(
    ("new", "given", "acts", "says"),
    [
        (
            8,
            {"positions": P + 7},
            {"positions": P + 6},
            f"positions has {P + 7}; at blocks.1.hook_out there are {P + 7}",
        ),
        (
            8,
            {"positions": 3, "phase": "generation"},
            {"positions": P, "phase": "generation"},
            "the first new token has 5 or more",
        ),
        (1, {"phase": "generation"}, {"phase": "prompt"}, "with max_new_tokens=1 it never runs"),
    ],
    ids=["last token", "positions of the prompt", "one token"],
)
def test_an_edit_that_never_acts_is_refused(new, given, acts, says):
    """The last token is never run, and positions count from the start of the text, in both phases."""
    with pytest.raises(ValueError, match=re.escape(says)):
        write(new, edits={"blocks.1.hook_out": edits.only(STEER, **given)})
    write(new, edits={"blocks.1.hook_out": edits.only(STEER, **acts)})  # control


def test_an_edit_kept_to_both_phases_is_refused():
    """However the two are nested."""
    edit = edits.only(edits.only(STEER, phase="prompt"), phase="generation")
    for call in (
        lambda: write(4, edits={"blocks.1.hook_out": edit}),
        lambda: HookedGemma3(CONFIG, parameters()).run_with_hooks(TOKENS, [("blocks.1.hook_out", edit)]),
    ):
        with pytest.raises(ValueError, match="restricted to both phases at once"):
            call()


def test_what_needs_a_whole_text_runs_where_the_whole_text_is_there():
    """Kept to the prompt by an edit within, or with one new token, which is never run."""
    name = "blocks.1.hook_out"
    kept = edits.only(STEER, positions=-1, phase="prompt")
    nested = edits.only(edits.only(STEER, phase="prompt"), positions=-1)
    ours, theirs = (write(4, edits={name: edit}).log_probs for edit in (nested, kept))
    np.testing.assert_array_equal(ours, theirs)
    assert difference(ours, write(4).log_probs) > 1e-3  # control
    for edit in (OTHER, edits.only(STEER, positions=-1)):
        logits, _ = forward(CONFIG, parameters(), TOKENS, edits={name: edit}, attention_mask=MASK, logits_at=-1)
        assert difference(write(1, edits={name: edit}, return_logits=True).logits[:, 0], logits[:, 0]) < BAR


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
            HookedGemma3(CONFIG, parameters()).generate(TOKENS, 4, attention_mask=right, fwd_hooks=list(kept.items()))


ATTENTION = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("blocks.1.hook_out", edits.FromRow(np.asarray([1, 2, 0]))),
        ("blocks.1.hook_out", edits.Scale(np.ones((P, 1), np.float32))),
        ("blocks.1.hook_out", edits.Add(np.ones((3, P, CONFIG.hidden_size), np.float32))),
        ("blocks.1.hook_out", edits.Replace(0.0, where=np.ones((3, P, 1), bool))),
        ("blocks.1.hook_out", edits.Noise(jax.random.key(0), np.ones((P, 1), np.float32))),
        ("blocks.2.attn.hook_pattern", edits.Scale(np.ones(P, np.float32))),
        ("blocks.*.hook_resid_post", edits.Scale(np.ones((P, 1), np.float32))),
        (f"{ATTENTION}.o_proj.input", edits.Scale(np.ones((P, 1), np.float32))),
        (f"{ATTENTION}.q_norm.output", edits.Scale(np.ones((P, 1), np.float32))),
    ],
    ids=["row", "scale", "values", "where", "noise", "keys", "glob", "heads flattened", "heads first"],
)
def test_values_for_each_place_are_places_too(name, edit):
    """They would reach other tokens of moved rows than in a forward; one value for all places reaches the same."""
    right = (np.arange(P) < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    with pytest.raises(ValueError, match=r"blocks\.\d.*pad them on the left"):
        write(2, edits={name: edits.only(edit, phase="prompt")}, attention_mask=right)
    write(2, edits={name: edits.Scale(np.asarray([2.0], np.float32))}, attention_mask=right)  # control
