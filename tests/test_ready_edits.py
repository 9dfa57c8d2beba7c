"""The ready-made edits: what they compute at every kind of site, in which order and in which precision."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from random_models import random_tokens
from small_model import SITES, assert_same, jitted, same, small

from gemma3_jax import Gemma3, Gemma3Config, Hook, HookedGemma3, edits, forward
from gemma3_jax.hooks import apply_edits
from gemma3_jax.positions import default_positions
from gemma3_jax.sites import layer_of, site

# Rows of unequal length, padded on both sides.
ROWS = jnp.asarray(random_tokens((3, 9), seed=1), jnp.int32)
MASK = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 1, 1, 1, 1, 1, 1, 0, 0]])

# A site with each kind of axes, but for that of ids.
KINDS = (
    "embed.hook_out",
    "blocks.0.attn.k.hook_out",
    "blocks.0.attn.hook_rot_k",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.o.hook_in",
    "blocks.1.ln1.hook_scale",
    "blocks.1.attn.q_norm.hook_scale",
    "blocks.1.hook_out",
)


def hook_at(name: str) -> Hook:
    """What an edit is told at that site, in a run of these rows."""
    return Hook(name, layer_of(name), default_positions(MASK.shape, MASK), jnp.asarray(MASK))


@functools.cache
def values() -> dict[str, np.ndarray]:
    """The unedited values of these sites, in float64."""
    _, cache = jitted()(*small(), ROWS, KINDS, attention_mask=MASK)
    return {name: np.asarray(value, np.float64) for name, value in cache.items()}


def vector(name: str, seed: int = 0) -> np.ndarray:
    """[d], random, for that site's last axis."""
    return np.random.default_rng(seed).normal(size=values()[name].shape[-1]).astype(np.float32)


def factors(name: str) -> np.ndarray:
    """One number for each place of the last two axes, in eighths, exact in any dtype."""
    return np.random.default_rng(2).integers(-20, 20, values()[name].shape[-2:]).astype(np.float32) / 8


def unit(name: str) -> np.ndarray:
    long = vector(name).astype(np.float64)
    return long / np.linalg.norm(long)


def length(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def along(x: np.ndarray, name: str) -> np.ndarray:
    return (x * unit(name)).sum(axis=-1, keepdims=True)


def bounds(name: str) -> tuple[float, float]:
    """Between which 40 % of the components lie: some are too low, some too high, some are left alone."""
    low, high = np.quantile(along(values()[name], name), [0.3, 0.7])
    return float(low), float(high)


def clamped(x: np.ndarray, name: str, low: float, high: float) -> np.ndarray:
    return x + (np.clip(along(x, name), low, high) - along(x, name)) * unit(name)


# Each edit at a site, and what it must make of the value x there.
CASES = {
    "nothing": (lambda name: edits.Scale(1.0), lambda x, name: x),
    "Add": (lambda name: edits.Add(vector(name)), lambda x, name: x + vector(name)),
    "Add, scaled": (lambda name: edits.Add(vector(name), 0.5), lambda x, name: x + 0.5 * vector(name)),
    "Add, relative": (
        lambda name: edits.Add(vector(name) * 7, -0.3, relative=True),
        lambda x, name: x - 0.3 * length(x) * unit(name),
    ),
    "Scale": (lambda name: edits.Scale(-2.0), lambda x, name: -2 * x),
    "Scale, each": (lambda name: edits.Scale(factors(name)), lambda x, name: factors(name) * x),
    "Replace": (
        lambda name: edits.Replace(vector(name)),
        lambda x, name: np.broadcast_to(vector(name).astype(np.float64), x.shape),
    ),
    "Replace, where": (
        lambda name: edits.Replace(3.25, factors(name) > 0),
        lambda x, name: np.where(factors(name) > 0, 3.25, x),
    ),
    "ProjectOut": (lambda name: edits.ProjectOut(vector(name) * 7), lambda x, name: x - along(x, name) * unit(name)),
    "Clamp": (lambda name: edits.Clamp(vector(name), *bounds(name)), lambda x, name: clamped(x, name, *bounds(name))),
    "Clamp, low": (
        lambda name: edits.Clamp(vector(name) * 7, low=bounds(name)[0]),
        lambda x, name: clamped(x, name, bounds(name)[0], np.inf),
    ),
    "Clamp, high": (
        lambda name: edits.Clamp(vector(name) / 7, high=bounds(name)[1]),
        lambda x, name: clamped(x, name, -np.inf, bounds(name)[1]),
    ),
    "FromRow": (lambda name: edits.FromRow(-1), lambda x, name: np.broadcast_to(x[2], x.shape)),
    "FromRow, partners": (lambda name: edits.FromRow(np.asarray([2, 0, 1])), lambda x, name: x[[2, 0, 1]]),
    "Mean": (
        lambda name: edits.Mean(),
        lambda x, name: np.broadcast_to(x[MASK == 1].mean(axis=0), x.shape),
    ),
}


@functools.cache
def results() -> dict[tuple[str, str], np.ndarray]:
    """What each edit makes of each site's value, applied as `forward` does, all of it in one unedited run."""

    @jax.jit
    def every_edit(given):
        made = {}

        def look(value, hook):
            made.update({key: apply_edits([edit], value, hook) for key, edit in given.items() if key[1] == hook.name})
            return value

        forward(*small(), ROWS, edits={KINDS: look}, attention_mask=MASK)
        return made

    given = {(case, name): make(name) for case, (make, _) in CASES.items() for name in KINDS}
    del given["Mean", "blocks.0.attn.hook_pattern"]
    return jax.tree.map(np.asarray, every_edit(given))


@pytest.mark.parametrize("case", CASES)
def test_each_does_what_it_says(case):
    """In float32 what NumPy makes of the value in float64; and not what another edit does, or none."""
    for name in [name for each, name in results() if each == case]:
        ours, x = results()[case, name], values()[name]
        assert ours.dtype == np.float32
        others = [other for other, where in results() if where == name]
        assert [other for other in others if same(ours, CASES[other][1](x, name))] == [case], name


def test_the_sites_have_every_kind_of_axes():
    """Control: none in the table is missing above but that of ids, whichever heads and features they are."""
    kinds, known = ({site(name).axes.translate(str.maketrans("gdfV", "heee")) for name in x} for x in (KINDS, SITES))
    assert known - kinds == {"b p"}


call = jitted()


def logits_of(tokens, placed=None, mask=None):
    return call(*small(), tokens, (), placed, mask)[0]


@pytest.mark.parametrize(
    ("case", "name"), [("Add, relative", "blocks.0.attn.o.hook_in"), ("Mean", "blocks.0.attn.hook_rot_k")]
)
def test_a_placed_edit_is_captured(case, name):
    """What `results` shows is what arrives at the site."""
    _, cache = call(*small(), ROWS, name, {name: CASES[case][0](name)}, MASK, return_type=None)
    assert_same(cache[name], results()[case, name], 1e-6)


def test_a_mean_over_tokens_needs_tokens():
    """The rows of a pattern are no tokens' values."""
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_pattern has axes b h p k"):
        jax.eval_shape(lambda: logits_of(ROWS, {"blocks.0.attn.hook_pattern": edits.Mean()}))


def test_token_ids_can_be_replaced():
    """At `embed.hook_in` an edit exchanges tokens, whole ids, for the rest of the model."""
    replaced = logits_of(ROWS, {"embed.hook_in": edits.Replace(7, np.asarray([[True], [False], [False]]))})
    assert_same(replaced, logits_of(ROWS.at[0].set(7)), 1e-6)
    assert not same(replaced, logits_of(ROWS))


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 1e25])
def test_projecting_out_leaves_nothing(size):
    """No component stays, whatever the length of the direction; another direction's stays (the control)."""
    name = "blocks.1.hook_out"
    x, value = values()[name], jnp.asarray(values()[name], jnp.float32)
    out = np.asarray(edits.ProjectOut(vector(name) * np.float32(size))(value, None), np.float64)
    rounding = np.finfo(np.float32).eps * length(x)
    assert (np.abs(along(x, name)) > 1000 * rounding).mean() > 0.9
    assert (np.abs(along(out, name)) < 4 * rounding).all()
    other = vector(name, seed=5)
    assert (np.abs(out @ other) > 1000 * rounding[..., 0]).mean() > 0.9


@pytest.mark.parametrize(
    "edit",
    [
        edits.ProjectOut(jnp.zeros(48)),
        edits.Clamp(jnp.zeros(48), 1.0, 2.0),
        edits.Clamp(jnp.ones(48)),
        edits.Add(jnp.zeros(48), 5.0, relative=True),
        edits.Add(jnp.ones(48), 0.0),
        edits.Noise(jax.random.key(0), 0.0),
    ],
    ids=["ProjectOut of zeros", "Clamp of zeros", "Clamp without bounds", "Add zeros", "Add 0 times", "Noise of 0"],
)
def test_edits_that_change_nothing(edit):
    """Bit for bit."""
    name = "blocks.1.hook_out"
    value = jnp.asarray(values()[name], jnp.float32)
    np.testing.assert_array_equal(apply_edits([edit], value, hook_at(name)), value)


def test_gradients_are_finite_where_nothing_has_a_length():
    """For zero vectors, where an optimisation begins, and at zero values; a plain norm has none there (control)."""
    name, some = "blocks.1.hook_out", vector("blocks.1.hook_out")
    zeros = np.zeros_like(some)

    @jax.jit
    @jax.vmap
    @functools.partial(jax.jacrev, argnums=(0, 1))
    def gradients(v, x):
        key = jax.random.key(0)
        relative = edits.Add(v, 0.1, relative=True), edits.Noise(key, 1.0, relative=True)
        every = *relative, edits.ProjectOut(v), edits.Clamp(v, -0.1, 0.1)
        return jnp.stack([jnp.sum(jnp.sin(edit(x, hook_at(name)))) for edit in every])

    # [pair, edit, d]
    for by in gradients(np.stack([zeros, some, zeros]), np.stack([some, zeros, zeros])):
        assert np.isfinite(by).all()
    assert np.isnan(jax.grad(jnp.linalg.norm)(zeros)).all()


PATCHED = ("blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.0.mlp.hook_post", "ln_final.hook_scale")


def test_from_cache():
    """One edit over globs of unlike sites puts another run's activation at each, and at no other site."""
    model = HookedGemma3(*small())
    other = jnp.flip(ROWS)
    kept = [*PATCHED, "unembed.hook_in", "blocks.0.hook_in"]
    clean_logits, clean = model.run_with_cache(other, kept)
    logits, plain = model.run_with_cache(ROWS, kept)
    patched, cache = model.run_with_hooks(ROWS, [(PATCHED, edits.FromCache(clean))], names_filter=kept)
    for name in set(cache) - {"blocks.0.hook_in"}:
        assert_same(cache[name], clean[name], 1e-6)
        assert not same(cache[name], plain[name])
    assert_same(cache["blocks.0.hook_in"], plain["blocks.0.hook_in"], 1e-6)
    assert_same(patched, clean_logits, 1e-6)
    assert not same(patched, logits)

    # A mapping of one's own; here the residual stream alone, and in one of two layers.
    mine = {"blocks.1.hook_out": np.asarray(clean["blocks.1.hook_out"])}
    assert_same(model.run_with_hooks(ROWS, [("blocks.1.hook_out", edits.FromCache(mine))]), clean_logits)


def test_a_cache_that_does_not_fit():
    """Names the site, what is wrong, and for shapes both."""
    model = HookedGemma3(*small())
    _, clean = model.run_with_cache(ROWS, "blocks.0.hook_out")

    def patched(cache, name, tokens=ROWS):
        return model.run_with_hooks(tokens, [(name, edits.FromCache(cache))])

    for cache in (clean, dict(clean)):
        with pytest.raises(ValueError, match=r"the cache has no blocks\.1\.hook_out; capture it"):
            patched(cache, "blocks.*.hook_out")
        with pytest.raises(ValueError, match=r"\(3, 9, 48\) at blocks\.0\.hook_out; this run has \(3, 8, 48\)"):
            patched(cache, "blocks.0.hook_out", ROWS[:, 1:])
        with pytest.raises(ValueError, match=r"\(3, 9, 48\) at blocks\.0\.hook_out; this run has \(1, 9, 48\)"):
            patched(cache, "blocks.0.hook_out", ROWS[:1])


def test_from_row_in_a_whole_run():
    """Rows exchange their residual streams, and so their logits; one that does not exist gives no neighbour's."""
    name, expected = "blocks.1.hook_in", logits_of(ROWS)
    exchanged = logits_of(ROWS, {name: edits.FromRow(jnp.asarray([1, 2, 0]))})
    assert_same(exchanged, expected[jnp.asarray([1, 2, 0])])
    assert not same(exchanged, expected)
    lacking = logits_of(ROWS, {name: edits.FromRow(jnp.asarray([1, 3, 0]))})
    assert np.isnan(lacking[1]).all()
    assert_same(lacking[0], expected[1])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (3, r"row has 3; at blocks\.0\.hook_out there are 3"),
        ([0, 1, -4], "row has -4"),
        ([0, 1], r"row has shape \(2,\); it takes one row, or one for each of the 3"),
        (0.0, "row is 0.0; it takes an integer or several"),
        (True, "row is True"),
    ],
)
def test_a_row_that_the_batch_lacks(row, says):
    """Is one error, restricted or not, before anything runs."""
    edit = edits.FromRow(row if isinstance(row, int | float) else np.asarray(row))
    for each in (edit, edits.only(edit, rows=0), edits.only(edits.only(edit, rows=0), positions=1)):
        with pytest.raises(ValueError, match=says):
            HookedGemma3(*small()).run_with_hooks(ROWS, [("blocks.*.hook_out", each)])


NOISY = ("embed.hook_out", "blocks.1.hook_out", "blocks.0.attn.o.hook_in")


@functools.cache
def noise(scale: float, relative: bool = False) -> dict[str, np.ndarray]:
    """[key, b, p, ...], what is added to the values of these sites under each of 64 keys."""

    @jax.jit
    @jax.vmap
    def added(key):
        before = {name: jnp.asarray(values()[name], jnp.float32) for name in NOISY}
        edit = edits.Noise(key, scale, relative)
        return {name: apply_edits([edit], value, hook_at(name)) - value for name, value in before.items()}

    return {name: np.asarray(x, np.float64) for name, x in added(jax.random.split(jax.random.key(0), 64)).items()}


def is_standard_normal(x: np.ndarray) -> bool:
    return scipy.stats.kstest(x.ravel(), "norm").pvalue > 1e-3


def test_noise():
    """Normal, of the scale that is asked for, and drawn for each site and key on its own."""
    for name, x in noise(0.5).items():
        assert is_standard_normal(x / 0.5)
        assert not is_standard_normal(x / 0.475)  # control: 5 % off is seen
        of_the_value = 0.5 * np.sqrt(np.mean(values()[name] ** 2, axis=-1, keepdims=True))
        assert is_standard_normal(noise(0.5, relative=True)[name] / of_the_value)
        assert not is_standard_normal(noise(0.5, relative=True)[name])
    one, other = (noise(0.5)[name].ravel() for name in NOISY[:2])
    for a, b in ((one, other), (one, np.roll(one, one.size // 64))):  # of two sites, of two keys
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / one.size**0.5
    np.testing.assert_array_equal(one, noise.__wrapped__(0.5)[NOISY[0]].ravel())  # reproducible


def test_edits_of_one_site_run_in_the_order_given():
    """In a list under one name, or in pairs that name the site in several ways."""
    name, model = "blocks.1.hook_out", HookedGemma3(*small())
    x, v = values()[name], vector(name)
    add, double, turn = edits.Add(v), edits.only(edits.Scale(2.0), rows=1), edits.FromRow(np.asarray([1, 2, 0]))
    twice = np.asarray([1, 2, 1])[:, None, None]

    _, cache = call(*small(), ROWS, name, {"blocks.1.hook_resid_post": [add, double, turn]}, MASK, return_type=None)
    assert_same(cache[name], ((x + v) * twice)[[1, 2, 0]])

    pairs = [("blocks.*.hook_out", edits.only(double, layer=1)), ("model.layers.1.output", turn), (name, add)]
    _, cache = model.run_with_hooks(ROWS, pairs, names_filter=name, attention_mask=MASK)
    assert_same(cache[name], (x * twice)[[1, 2, 0]] + v)
    assert not same(cache[name], ((x + v) * twice)[[1, 2, 0]])  # control: the order matters


@functools.cache
def wide(d: int):
    """A bfloat16 model of one block with that hidden size."""
    config = Gemma3Config(
        vocab_size=8,
        hidden_size=d,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        sliding_window=4,
        query_pre_attn_scalar=4,
    )
    params = jax.jit(Gemma3(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)


def residual(d: int, massive: bool) -> np.ndarray:
    """[64, d], each of norm 25,000: Gaussian, or as trained models have it, with one feature that is most of it."""
    x = np.random.default_rng(d).normal(size=(64, d))
    x[:, 3] = 12 * d**0.5 if massive else x[:, 3]
    return x * 25_000 / length(x)


def step(d: int) -> np.ndarray:
    """[d], in a random direction, of norm 50."""
    v = np.random.default_rng(0).normal(size=d)
    return (v * 50 / length(v)).astype(np.float32)


def captured(d: int, chain: list, massive: bool = False) -> np.ndarray:
    """[64, d], the residual stream as it is captured, with the edits in place."""
    name, x = "embed.hook_out", jnp.asarray(residual(d, massive)[None], jnp.bfloat16)
    _, cache = call(*wide(d), None, name, {name: chain}, inputs_embeds=x, return_type=None)
    assert cache[name].dtype == jnp.bfloat16
    return np.asarray(cache[name][0], np.float64)


def share(d: int, chain: list, massive: bool = False) -> np.ndarray:
    """[64], how much of the step arrives at each position, along its direction; 1 is all of it."""
    return (captured(d, chain, massive) - captured(d, [], massive)) @ step(d) / 50**2


def expected_share(d: int) -> float:
    """The mean share for a Gaussian residual, when sums are rounded to the nearest bfloat16 once.

    Between 2^i and 2^(i + 1) bfloat16 values lie q = 2^(i - 7) apart. From one of them, a step s ends at the nearest
    multiple of q.
    """
    s, sigma = step(d).astype(np.float64), 25_000 / d**0.5
    edges = 2.0 ** np.arange(-30, 20)
    chance = 2 * np.diff(scipy.stats.norm.cdf(edges / sigma))
    q = edges[:-1, None] / 2**7
    return float(chance @ (s * q * np.rint(s / q)).sum(axis=1) / 50**2)


@flax.struct.dataclass
class Narrow:
    """The control: an edit whose result is rounded to bfloat16 at once."""

    edit: Any

    def __call__(self, value, hook):
        return self.edit(value.astype(jnp.bfloat16), hook)


# One step of norm 50, in one edit or in eight.
STEPS = {
    "once": lambda v: [edits.Add(v)],
    "scaled": lambda v: [edits.Add(v / 50, 50.0)],
    "relative": lambda v: [edits.Add(v, 50 / 25_000, relative=True)],
    "eight": lambda v: [edits.Add(v, 1 / 8)] * 8,
    "restricted": lambda v: [edits.only(edits.Add(v, 1 / 8), rows=0)] * 8,
}


@pytest.mark.parametrize("d", [640, 1152])
@pytest.mark.parametrize("steps", STEPS)
def test_what_arrives_in_bfloat16(steps, d):
    """Of a step of norm 50 on a Gaussian residual of norm 25,000, as much as one rounding leaves: about 80 %.

    Its larger entries have neighbours further away than the step goes. In eight edits no less arrives than in one,
    since they are cast once. On a residual with one massive feature all of it arrives.
    """
    arrived = share(d, STEPS[steps](step(d)))
    print(f"d = {d}, {steps}: {arrived.mean():.3f} of the step arrives, {expected_share(d):.3f} expected")
    error = arrived.std() / arrived.size**0.5
    assert abs(arrived.mean() - expected_share(d)) < 4 * error < 0.02
    assert 0.75 < arrived.mean() < 0.85
    assert share(d, STEPS[steps](step(d)), massive=True).mean() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("d", [640, 1152])
def test_rounding_after_each_edit_would_lose_the_step(d):
    """The control: of eight small steps, each rounded to bfloat16, little arrives."""
    rounded = share(d, [Narrow(each) for each in STEPS["eight"](step(d))]).mean()
    print(f"d = {d}, each of eight rounded: {rounded:.3f} of the step arrives")
    assert rounded < 0.2


@pytest.mark.parametrize("edit", [case for case in CASES if case != "Mean"])
def test_low_precision_is_rounded_once(edit):
    """Alone too, each edit of a bfloat16 value is its float32 self, cast."""
    name = "blocks.1.hook_out"
    value, edit = jnp.asarray(values()[name], jnp.bfloat16), CASES[edit][0](name)
    once = edit(value.astype(jnp.float32), hook_at(name)).astype(jnp.bfloat16)
    for ours in (edit(value, hook_at(name)), apply_edits([edit], value, hook_at(name))):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, once)
