"""An edit reaches what the table of sites says, and nothing else."""

import functools
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import forward
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import (
    COPIES,
    SITES,
    TOKENS,
    assert_same,
    direction,
    identity,
    nudge,
    plain,
    run,
    same,
    small,
    zero,
)


def chain(*names: str) -> dict[str, set[str]]:
    return {one: {following} for one, following in itertools.pairwise(names)}


def norm(name: str) -> dict[str, set[str]]:
    parts = {f"{name}.hook_in": {f"{name}.hook_scale", f"{name}.hook_normalized"}}
    return parts | chain(f"{name}.hook_scale", f"{name}.hook_normalized", f"{name}.hook_out")


# What is computed straight from what inside a block: the equations of the architecture, written as edges.
READS: dict[str, set[str]] = {
    "hook_in": {*COPIES, "ln1.hook_in", "hook_resid_mid"},
    "hook_attn_in": {"hook_q_input", "hook_k_input", "hook_v_input"},
    "hook_q_input": {"attn.q.hook_in"},
    "hook_k_input": {"attn.k.hook_in"},
    "hook_v_input": {"attn.v.hook_in"},
    **norm("ln1"),
    "ln1.hook_out": {"attn.hook_in"},
    "attn.hook_in": {"attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"},
    **chain("attn.q.hook_in", "attn.q.hook_out", "attn.q_norm.hook_in"),
    **chain("attn.k.hook_in", "attn.k.hook_out", "attn.k_norm.hook_in"),
    **chain("attn.v.hook_in", "attn.v.hook_out", "attn.o.hook_in"),
    **norm("attn.q_norm"),
    **norm("attn.k_norm"),
    "attn.hook_cos": {"attn.hook_rot_q", "attn.hook_rot_k"},
    "attn.hook_sin": {"attn.hook_rot_q", "attn.hook_rot_k"},
    **chain("attn.q_norm.hook_out", "attn.hook_rot_q", "attn.hook_attn_scores"),
    **chain("attn.k_norm.hook_out", "attn.hook_rot_k", "attn.hook_attn_scores"),
    **chain("attn.hook_attn_scores", "attn.hook_pattern", "attn.o.hook_in", "attn.hook_result", "attn.o.hook_out"),
    **chain("attn.o.hook_out", "attn.hook_out", "ln1_post.hook_in"),
    **norm("ln1_post"),
    "ln1_post.hook_out": {"hook_resid_mid"},
    "hook_resid_mid": {"ln2.hook_in", "hook_out"},
    **norm("ln2"),
    "ln2.hook_out": {"mlp.hook_in"},
    "mlp.hook_in": {"mlp.gate.hook_in", "mlp.in.hook_in"},
    **chain("mlp.gate.hook_in", "mlp.gate.hook_out", "mlp.out.hook_in"),
    **chain("mlp.in.hook_in", "mlp.in.hook_out", "mlp.out.hook_in"),
    **chain("mlp.out.hook_in", "mlp.out.hook_out", "mlp.hook_out", "ln2_post.hook_in"),
    **norm("ln2_post"),
    "ln2_post.hook_out": {"hook_out"},
    "hook_out": set(),
}


def reached(name: str) -> set[str]:
    """Every site of the block that an edit of `name` changes, itself included."""
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*(READS[each] for each in new)) - found
    return found


def test_the_edges_name_every_site_of_a_block():
    """Control for the reach test: its graph leaves no site out."""
    prefix = "blocks.1."
    assert set(READS) == {n.removeprefix(prefix) for n in SITES if n.startswith(prefix)}


@flax.struct.dataclass
class NudgeAt:
    """Nudge one site and leave all others as they are; which one is traced, so that one program serves all sites."""

    target: Any

    def __call__(self, value, hook):
        here = SITES.index(hook.name) == self.target
        return jnp.where(here, nudge(value, hook), value)


OBSERVED = ("embed.*", "blocks.0.*", "blocks.1.**")
EDITED = tuple(f"blocks.1.{name}" for name in READS)
PLAIN_EDITED = tuple(name for name in EDITED if not name.endswith(COPIES))


@functools.cache
def program(beside_copies: bool):
    """A jitted run of two blocks with one nudge in the second, among identity edits at all its other sites.

    It captures what is observed, or with identity edits of the per-head copies among the others, nothing.
    """
    capture, edited = ((), EDITED) if beside_copies else (OBSERVED, PLAIN_EDITED)
    return jax.jit(lambda target: forward(*small(), TOKENS, capture, {edited: NudgeAt(target)}, stop_at_layer=2))


@functools.cache
def nudged(name: str | None, beside_copies: bool = False):
    """The stream that leaves the second block, and captures, with that site nudged (None: no site)."""
    out, cache = program(beside_copies)(-1 if name is None else SITES.index(name))
    return out, {name: np.asarray(value) for name, value in cache.items()}


def moved(name: str, before, after) -> set[str]:
    """The sites whose values differ between two runs, of which the second has `name` nudged."""
    assert list(before) == list(after)
    assert_same(after[name], nudge(before[name], None))
    assert all(np.isfinite(value).all() for value in after.values())
    return {each for each in before if not same(after[each], before[each])}


# A factor common to all of q or of k is undone by their norms.
UNDONE = {"ln1.hook_scale": {each for part in "qk" for each in reached(f"attn.{part}_norm.hook_normalized")}}
UNDONE["ln1.hook_scale"] -= reached("attn.hook_pattern") - {"attn.hook_pattern"}


@pytest.mark.parametrize("name", READS)
def test_an_edit_reaches_what_it_should_and_nothing_else(name):
    """An edit moves exactly the sites computed from it, and the stream that leaves the block."""
    expected = {f"blocks.1.{each}" for each in reached(name) - UNDONE.get(name, set())}
    name = f"blocks.1.{name}"
    if name.endswith(COPIES):
        before, after = (run(OBSERVED, {name: edit}, stop_at_layer=2) for edit in (identity, nudge))
    else:
        before, after = nudged(None), nudged(name)
    assert moved(name, before[1], after[1]) == expected
    assert not same(after[0], before[0])


@pytest.mark.parametrize("name", [name for name in SITES if not name.startswith("blocks.")] + ["blocks.1.hook_out"])
def test_edits_between_the_blocks(name):
    """An edit before, between or behind the blocks moves all that comes after it, and nothing before."""
    logits, after = run("**", {name: nudge})
    later = SITES[SITES.index(name) :]
    assert moved(name, plain()[1], after) == {each for each in later if not each.endswith(("hook_cos", "hook_sin"))}
    assert not same(logits, plain()[0])


@pytest.mark.parametrize("copies", [False, True], ids=["without per-head copies", "with per-head copies"])
def test_identity_edits_at_every_site(copies):
    """Edits that change no value leave logits and captures as they are, to float32 rounding, wherever they stand."""
    edited = tuple(name for name in SITES if copies or not name.endswith(COPIES))
    logits, cache = run("**", {edited: identity})
    assert_same(logits, plain()[0], 1e-5)
    other_shapes = [name for name, value in cache.items() if value.shape != plain()[1][name].shape]
    for name in set(cache) - set(other_shapes):
        assert_same(cache[name], plain()[1][name], 1e-5)
    # With copies edited, each query head has its own input, keys and values.
    assert bool(other_shapes) == copies
    assert all(cache[name].shape[2] == SMALL["num_attention_heads"] for name in other_shapes)
    assert not same(run((), {edited: nudge})[0], logits, 1e-2)  # control


@pytest.mark.parametrize("copy", COPIES)
def test_identity_edits_of_single_copies(copy):
    """Each kind of per-head copy alone, edited with the identity, changes nothing; nudged, it does."""
    unedited = plain()[1]["ln_final.hook_in"]
    assert_same(run((), {f"blocks.1.{copy}": identity}, stop_at_layer=2)[0], unedited, 1e-5)
    alone = run((), {f"blocks.1.{copy}": nudge}, stop_at_layer=2)[0]
    assert not same(alone, unedited)
    assert_same(alone, nudged(f"blocks.1.{copy}", beside_copies=True)[0])


@pytest.mark.parametrize("name", [name for name in READS if not name.endswith(COPIES)])
def test_no_edit_switches_another_off(name):
    """An edit does the same beside identity edits of the per-head copies, which take another path through attention."""
    name = f"blocks.1.{name}"
    assert_same(nudged(name, beside_copies=True)[0], nudged(name)[0])
    assert not same(nudged(name)[0], plain()[1]["ln_final.hook_in"])


@pytest.mark.parametrize(
    ("edited", "cut", "after", "skips"),
    [
        ("hook_in", "attn.hook_out", "hook_resid_mid", True),
        ("ln1.hook_in", "attn.hook_out", "hook_resid_mid", False),
        ("hook_attn_in", "attn.hook_out", "hook_resid_mid", False),
        ("hook_resid_mid", "mlp.hook_out", "hook_out", True),
        ("ln2.hook_in", "mlp.hook_out", "hook_out", False),
    ],
)
def test_the_skip_connection(edited, cut, after, skips):
    """With the branch cut off, an edit of the stream still arrives, whole; an edit of the branch's input does not."""
    edited, cut, after = (f"blocks.1.{name}" for name in (edited, cut, after))
    _, before = run(after, {cut: zero}, return_type=None)
    _, both = run((edited, after), {cut: zero, edited: nudge}, return_type=None)
    change = both[edited] - plain()[1][edited]
    assert np.abs(change).max() > 0.01
    assert_same(both[after] - before[after] + 1, (change if skips else jnp.zeros_like(before[after])) + 1)


def on_head(index: int, axis: int = 2):
    """An edit of one head alone."""

    def edit(value, hook):
        at = (slice(None),) * axis + (index,)
        return value.at[at].set(nudge(value[at], hook))

    return edit


def moved_heads(ours, theirs, axis: int) -> list[int]:
    ours, theirs = (np.moveaxis(np.asarray(x), axis, 0) for x in (ours, theirs))
    return [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if not same(one, other, 1e-6)]


@pytest.mark.parametrize(
    ("edited", "axis", "head", "expected"),
    [
        ("hook_attn_in", 2, 1, [1]),  # heads 0 to 3 share keys and values
        ("hook_attn_in", 2, 6, [6]),
        ("hook_q_input", 2, 5, [5]),
        ("hook_k_input", 2, 1, [4, 5, 6, 7]),
        ("hook_v_input", 2, 0, [0, 1, 2, 3]),
        ("attn.hook_q", 2, 3, [3]),
        ("attn.hook_k", 2, 0, [0, 1, 2, 3]),
        ("attn.hook_v", 2, 1, [4, 5, 6, 7]),
        ("attn.hook_rot_q", 2, 7, [7]),
        ("attn.hook_rot_k", 2, 1, [4, 5, 6, 7]),
        ("attn.hook_attn_scores", 1, 2, [2]),
        ("attn.hook_pattern", 1, 4, [4]),
        ("attn.hook_z", 2, 6, [6]),
    ],
)
def test_an_edit_of_one_head_moves_that_heads_output(edited, axis, head, expected):
    """Only the edited head's z moves, or its group's where the head is one of keys or values."""
    name, z = f"blocks.1.{edited}", "blocks.1.attn.hook_z"
    _, cache = run(z, {name: on_head(head, axis)}, return_type=None)
    assert moved_heads(cache[z], plain()[1][z], axis=2) == expected


@pytest.mark.parametrize(
    ("copy", "part"), [("hook_q_input", "q"), ("hook_k_input", "k"), ("hook_v_input", "v"), ("hook_attn_in", "q")]
)
def test_an_edited_copy_is_normed_and_projected(copy, part):
    """A head whose input is replaced has the projection that the whole layer has with that residual stream."""
    other = direction(3) * 2
    expected_at = f"blocks.1.attn.hook_{part}"
    _, expected = run(expected_at, {"blocks.1.ln1.hook_in": lambda value, hook: value * 0.5 + other})

    def swap(value, hook):
        return value.at[:, :, 1].set(value[:, :, 1] * 0.5 + other)

    _, cache = run(expected_at, {f"blocks.1.{copy}": swap})
    assert_same(cache[expected_at][:, :, 1], expected[expected_at][:, :, 1])
    assert_same(cache[expected_at][:, :, 0], plain()[1][expected_at][:, :, 0])
    assert not same(expected[expected_at], plain()[1][expected_at])


@pytest.mark.parametrize("copies", [("hook_attn_in",), ("hook_q_input", "hook_k_input", "hook_v_input")])
def test_editing_every_copy_is_editing_the_input_of_ln1(copies):
    """The same change in all copies of all heads is that change before ln1."""
    _, expected = run("blocks.1.hook_resid_mid", {"blocks.1.ln1.hook_in": nudge})
    _, cache = run("blocks.1.hook_resid_mid", {f"blocks.1.{name}": nudge for name in copies})
    assert_same(cache["blocks.1.hook_resid_mid"], expected["blocks.1.hook_resid_mid"])
    assert not same(cache["blocks.1.hook_resid_mid"], plain()[1]["blocks.1.hook_resid_mid"])


def test_an_edit_of_one_result_adds_to_the_sum():
    """What is added to one head's result is added to the attention output, before ln1_post."""
    name, out = "blocks.1.attn.hook_result", "blocks.1.attn.o.hook_out"
    _, cache = run(out, {name: lambda value, hook: value.at[:, :, 5].add(direction())})
    assert_same(cache[out], plain()[1][out] + direction())


@pytest.mark.parametrize("copy", COPIES)
def test_a_zeroed_copy_leaves_nothing_in_bfloat16(copy):
    """An edited copy replaces the head's input without a remainder, which the norms of q and k would blow up."""
    config, params = small()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)
    part = {"hook_attn_in": "q"}.get(copy, copy[5])
    site = f"blocks.1.attn.{part}.hook_out"
    _, cache = forward(config, params, TOKENS, site, {f"blocks.1.{copy}": zero})
    assert not cache[site].any()
    assert forward(config, params, TOKENS, site)[1][site].any()  # control
