"""Reductions: what a function keeps of a site is what NumPy makes of the value, and nothing takes it for the whole."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from gemma3_jax import ActivationCache, Hook, HookedGemma3, analysis, edits, forward, grad_at
from gemma3_jax.generation.loop import generate
from gemma3_jax.hooks.reductions import At, Cast, Mean, Project, TopK, as_steps
from gemma3_jax.positions import Extent, default_positions
from gemma3_jax.sites.names import resolve
from gemma3_jax.sites.table import shape_of, site
from tests.helpers.programs import programs
from tests.helpers.random_models import SMALL
from tests.helpers.small_model import LAYERS, LEFT_PADDED, TOKENS, assert_same, nudge, plain, run, same, small

B, P = TOKENS.shape
RESID = "blocks.*.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"
Z = "blocks.1.attn.hook_z"
Z_OF_HF = "model.layers.1.self_attn.o_proj.input"
Q_OF_HF = "model.layers.1.self_attn.q_norm.output"
# Which of an axis's indices is which real token's: padding on the left, on both sides, none.
MASKS = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]), np.asarray([[0, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9])


def matrix(seed: int = 0, size: int = SMALL["hidden_size"]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, 3)).astype(np.float32)


def kept(capture, **options):
    return run(capture, **options)[1]


@functools.cache
def padded_values():
    """Every site, with padding."""
    return run("**", attention_mask=LEFT_PADDED)[1]


# --- the ready-made ones ----------------------------------------------------------------------------------------------


def picked(value: np.ndarray, axis: int, wanted: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """By NumPy: of each row the real tokens that are wanted, NaN where it has no such one."""
    rows = []
    wanted = np.broadcast_to(wanted, (len(value), wanted.shape[-1]))
    for row, real, mine in zip(value, mask.astype(bool), wanted, strict=True):
        at = np.flatnonzero(real)
        places = [at[i] if -len(at) <= i < len(at) else None for i in mine]
        hole = np.full_like(np.take(row, 0, axis - 1), np.nan)
        rows.append(np.stack([hole if i is None else np.take(row, i, axis - 1) for i in places], axis - 1))
    return np.stack(rows)


@st.composite
def choices(draw):
    """A site, positions of any of the shapes that they may have, and a mask."""
    name = draw(st.sampled_from(["blocks.1.hook_out", "blocks.1.attn.hook_rot_k", PATTERN, Z, Q_OF_HF, Z_OF_HF]))
    one = st.integers(-P, P - 1)
    several = st.lists(one, min_size=2, max_size=2)
    return name, draw(one | several | st.lists(several, min_size=B, max_size=B)), draw(st.sampled_from(MASKS))


@given(choices())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_positions_are_those_of_the_tokens(choice):
    """`At` picks along the token axis of every layout by the tokens' positions, in padded batches too."""
    name, wanted, mask = choice
    match = resolve(name, small()[0])
    ours = np.random.default_rng(0).normal(size=shape_of(match.name, small()[0], B, P)).astype(np.float32)
    hook = Hook(match.name, 1, default_positions((B, P), jnp.asarray(mask)), jnp.asarray(mask))
    steps = as_steps(At(wanted), match, Extent(B, P))
    axes = site(match.name).axes.split()
    expected = picked(ours, axes.index("p" if "p" in axes else "k"), np.atleast_1d(wanted), mask)
    if name == Q_OF_HF:
        expected = expected.transpose(0, 2, 1, 3)
    if name == Z_OF_HF:
        expected = expected.reshape(*expected.shape[:2], -1)
    np.testing.assert_array_equal(steps(jnp.asarray(ours), hook), expected)


def test_each_keeps_what_numpy_does():
    """Every ready-made reduction in a run, padded; and the wrong site does not pass for the right one."""
    values = {name: np.asarray(value) for name, value in padded_values().items()}
    real = np.asarray(LEFT_PADDED, bool)

    def one(reduction, name="blocks.1.hook_out"):
        return kept({name: reduction}, attention_mask=LEFT_PADDED)[name]

    x = values["blocks.1.hook_out"]
    assert_same(one(At([0, -1])), np.stack([x[:, 3:][0][[0, 5]], x[1][[0, 8]]]))
    assert not same(one(At([0, -1])), np.stack([x[0][[0, 8]], x[1][[0, 8]]]))  # control: by place in the array
    assert_same(one(Mean()), np.stack([row[at].mean(0) for row, at in zip(x, real, strict=True)]))
    assert not same(one(Mean()), x.mean(1))  # control: padding counted
    assert_same(
        one(Mean(), PATTERN), np.stack([row[:, at].mean(1) for row, at in zip(values[PATTERN], real, strict=True)])
    )
    assert_same(one(Project(matrix())), x @ matrix())
    assert not same(one(Project(matrix())), values["blocks.0.hook_out"] @ matrix())  # control
    assert_same(one(Project(matrix(size=10)), Z), values["blocks.1.attn.o.hook_in"] @ matrix(size=10))
    np.testing.assert_array_equal(one(Cast("bfloat16")), jnp.asarray(x, jnp.bfloat16))
    top = one(TopK(4))
    np.testing.assert_array_equal(top.indices, np.argsort(-x, -1)[..., :4])
    assert_same(top.values, np.take_along_axis(x, np.asarray(top.indices), -1))
    np.testing.assert_array_equal(one(At([2, 7]), "embed.hook_in"), [[TOKENS[0, 5], -1], [TOKENS[1, 2], TOKENS[1, 7]]])


@pytest.mark.parametrize("at", [[4, 3, 2, 1, 0, 8, 7, 6, 5], [2, 5], -1])
def test_the_unembedding_has_the_positions_of_its_logits(at):
    """With `logits_at`, what speaks of positions speaks of the tokens whose logits there are, in their order."""
    logits = plain()[0]
    last = max(np.atleast_1d(at) % P)
    assert_same(kept({"unembed.hook_out": At(-1)}, logits_at=at)["unembed.hook_out"][:, 0], logits[:, last], 1e-6)
    mean = kept({"unembed.hook_out": Mean()}, logits_at=at)["unembed.hook_out"]
    assert_same(mean, np.mean(logits[:, np.atleast_1d(at)], axis=1), 1e-5)
    edit = edits.only(edits.Replace(0.0), positions=-1)
    zero = run(edits={"unembed.hook_out": edit}, logits_at=at)[0]
    np.testing.assert_array_equal(np.all(zero == 0, axis=-1), [np.atleast_1d(at) % P == last] * B)


def test_positions_are_any_sequence():
    """A range is one, as it is for `edits.only`."""
    for name, value in kept({RESID: At(range(0, 6, 2))}).items():
        assert_same(value, plain()[1][name][:, 0:6:2], 1e-6)


def test_several_run_in_order():
    """A list is a chain: positions, then directions, then the largest; and order matters."""
    x = np.asarray(plain()[1]["blocks.0.hook_out"])
    chain = [At([-1]), Project(matrix()), TopK(1), lambda top, hook: top.values]
    assert_same(kept({"blocks.0.hook_out": chain})["blocks.0.hook_out"], (x[:, -1:] @ matrix()).max(-1, keepdims=True))
    with pytest.raises(ValueError, match=r"choose\s+positions once") as error:
        kept({"blocks.0.hook_out": [lambda value, hook: value[:, 1:], At(-1)]})
    assert "At at blocks.0.hook_out" in error.value.__notes__[0]


def test_a_projection_accumulates_in_float32():
    """Of a bfloat16 site and directions the products are summed in float32, and are not rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 1, 4096), (4096, 8)))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert_same(Project(w)(x, None), exact, 1e-6)
    assert not same(jnp.asarray(exact, jnp.bfloat16), exact, 1e-4)  # control


# --- where they run ---------------------------------------------------------------------------------------------------


def test_names_globs_and_whole_values_side_by_side():
    """Each key has its own function, None keeps the value, and names of every kind find what is kept."""
    capture = {RESID: At(-1), PATTERN: None, "hook_embed": [], Z_OF_HF: lambda z, hook: z[:, -1]}
    cache = HookedGemma3(*small()).run_with_cache(TOKENS, capture)[1]
    whole = plain()[1]
    assert cache["resid_post", 1].shape == (B, 1, 48)
    assert_same(cache["model.layers.0.output"], whole["blocks.0.hook_out"][:, -1:])
    assert_same(cache["hook_embed"], whole["hook_embed"])
    assert_same(cache[PATTERN], whole[PATTERN])
    # The function saw Hugging Face's layout, and what it returned is given as it is, under either name.
    assert_same(cache[Z_OF_HF], whole["blocks.1.attn.o.hook_in"][:, -1].reshape(B, -1))
    assert cache[Z] is cache[Z_OF_HF]
    assert set(cache.reduced) == {"blocks.0.hook_out", "blocks.1.hook_out", "blocks.1.attn.o.hook_in"}


def test_they_see_the_edited_value_and_the_hook():
    """They run behind the edits of the same site, with its name, layer and positions."""
    told = []

    def look(value, hook):
        told.append((hook.name, hook.layer, hook.positions.shape))
        return value

    edited = kept({"blocks.1.hook_out": look}, edits={"blocks.1.hook_out": nudge})["blocks.1.hook_out"]
    expected = nudge(plain()[1]["blocks.1.hook_out"], None)
    assert_same(edited, expected)
    assert not same(edited, plain()[1]["blocks.1.hook_out"])  # control
    assert told == [("blocks.1.hook_out", 1, (B, P))]


@flax.struct.dataclass
class Encoder:
    """An SAE encoder, as a user writes it."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, value, hook):
        return {"features": jax.nn.relu(value @ self.weight + self.bias), "norm": jnp.linalg.norm(value, axis=-1)}


def test_new_values_compile_nothing_and_any_pytree_comes_out():
    """Weights of a class, of a Partial, and positions are data; a dictionary of arrays is kept as one."""
    model, x = HookedGemma3(*small()), np.asarray(plain()[1]["blocks.0.hook_out"])

    def scale(by, value, hook):
        return by * value

    def encode(seed, place):
        capture = {"blocks.0.hook_out": Encoder(matrix(seed), np.float32(seed)), "blocks.1.hook_out": At([place])}
        capture["hook_embed"] = Partial(scale, np.float32(seed))
        return model.run_with_cache(TOKENS, capture, return_type=None)[1]

    for seed, place in ((0, 1), (1, -2), (2, 5)):
        cache = encode(seed, place)
        if seed == 0:
            compiled = programs()
        found = cache["blocks.0.hook_out"]
        assert_same(found["features"], np.maximum(x @ matrix(seed) + seed, 0))
        assert_same(found["norm"], np.linalg.norm(x, axis=-1))
        assert_same(cache["blocks.1.hook_out"], plain()[1]["blocks.1.hook_out"][:, [place]])
        assert_same(cache["hook_embed"], seed * np.asarray(plain()[1]["hook_embed"]))
    assert programs() == compiled
    assert not same(found["features"], np.maximum(x @ matrix(1) + 1, 0))  # control: not the first weights forever
    model.run_with_cache(TOKENS, {"blocks.0.hook_out": lambda value, hook: value}, return_type=None)
    assert programs() == compiled + 1  # control: another function does


def test_inside_jit_vmap_and_grad():
    """`forward` with reductions as arguments of a transformed function, and the gradient through what is kept."""
    config, params = small(1)
    x = forward(config, params, TOKENS, "blocks.0.hook_out")[1]["blocks.0.hook_out"]

    def projected(capture, tokens=TOKENS):
        return forward(config, params, tokens, capture, return_type=None)[1]["blocks.0.hook_out"]

    capture = {"blocks.0.hook_out": Project(jnp.asarray(matrix()))}
    assert_same(jax.jit(projected)(capture), x @ matrix())
    rows = jax.vmap(lambda row: projected(capture, row[None])[0])(TOKENS)
    assert_same(rows, x @ matrix())
    grad = jax.grad(lambda capture: projected(capture).sum())(capture)["blocks.0.hook_out"].matrix
    assert_same(grad, np.broadcast_to(x.sum((0, 1))[:, None], (48, 3)), 1e-4)


def test_the_whole_value_does_not_leave_the_program():
    """Results of the compiled function are the reduced arrays only: an upper bound on its output's bytes."""

    def output_bytes(capture):
        run = functools.partial(forward, small()[0], return_type=None)
        return jitted_bytes(lambda params: run(params, TOKENS, capture)[1])

    def jitted_bytes(function):
        return jax.jit(function).lower(small()[1]).compile().memory_analysis().output_size_in_bytes

    whole, reduced = B * P * 48 * 4 * LAYERS, B * 3 * 4 * LAYERS
    slack = 8 * LAYERS  # XLA's table of results
    assert reduced <= output_bytes({RESID: [At(-1), Project(matrix())]}) <= reduced + slack
    assert whole <= output_bytes(RESID)  # control


# --- the cache says what it holds -------------------------------------------------------------------------------------


@functools.cache
def reduced_cache() -> ActivationCache:
    config, params = small()
    model = HookedGemma3(config, params)
    capture = dict.fromkeys(["ln_final.**", "blocks.*.ln1_post.**", "blocks.*.mlp.out.hook_in"])
    capture |= {RESID: [At(-1), Project(matrix())], "blocks.*.ln2_post.hook_scale": Cast("float32")}
    return model.run_with_cache(TOKENS, capture | {"blocks.*.attn.hook_z": lambda z, hook: z, "hook_embed": TopK(2)})[1]


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda cache: cache.sliced(positions=-1), "reduced by"),
        (lambda cache: cache.remove_batch_dim(), "reduced by"),
        (lambda cache: cache.stack_activation("resid_post"), "blocks.0.hook_out was reduced by At, Project"),
        (lambda cache: cache.stack_head_results(), "blocks.0.attn.o.hook_in was reduced by <lambda>"),
        (lambda cache: cache.compute_head_results(), "blocks.0.attn.o.hook_in was reduced by <lambda>"),
        (lambda cache: cache.stack_neuron_results(), "blocks.0.ln2_post.hook_scale was reduced by Cast"),
        (lambda cache: cache.get_neuron_results(1), "blocks.1.ln2_post.hook_scale was reduced by Cast"),
        (lambda cache: cache.decompose_resid(mode="attn"), "hook_embed was reduced by TopK".replace("hook_", "")),
        (lambda cache: cache.neuron_logit_attrs(3), "blocks.0.ln2_post.hook_scale was reduced by Cast"),
        (lambda cache: jax.jit(lambda c: c.sliced(batch=0))(cache), "reduced by"),
    ],
)
def test_what_needs_whole_values_says_what_was_reduced(use, said):
    """And by what; also behind `jit`, and where the shapes would fit."""
    with pytest.raises(ValueError, match=said.replace("embed was", r"embed\.hook_out was")):
        use(reduced_cache())


def test_what_needs_no_reduced_site_works():
    """Control: methods that read whole sites of the same cache give their numbers."""
    cache, whole = reduced_cache(), plain()[1].with_params(small()[1])
    stack = whole.decompose_resid()
    assert_same(cache.apply_ln_to_stack(stack), whole.apply_ln_to_stack(stack))
    assert jax.tree.map(lambda leaf: leaf, cache).reduced == cache.reduced


def test_numpy_and_files(tmp_path):
    """Reduced arrays go to the host and to a file and come back as such; pytrees go to the host only."""
    config, params = small()
    cache = HookedGemma3(config, params).run_with_cache(TOKENS, {RESID: At(-1), PATTERN: None})[1]
    cache.save(tmp_path / "cache")
    loaded = ActivationCache.load(tmp_path / "cache")
    assert loaded.reduced == cache.reduced == dict.fromkeys(["blocks.0.hook_out", "blocks.1.hook_out"], "At")
    for name in cache:
        np.testing.assert_array_equal(loaded[name], cache[name])
    assert isinstance(reduced_cache().numpy()["hook_embed"].indices, np.ndarray)
    with pytest.raises(ValueError, match=r"embed.hook_out has the result of TopK"):
        reduced_cache().save(tmp_path / "trees")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capture", "error", "said"),
    [
        ({"blocks.0.hook_out": 3}, TypeError, r"blocks.0.hook_out is 3; it must be a callable"),
        ({"blocks.0.hook_out": lambda value, hook: None}, TypeError, "returned None; it must return arrays"),
        ({"blocks.0.hook_uot": None}, ValueError, "blocks.0.hook_out"),
        ({RESID: None, "blocks.1.hook_out": At(0)}, ValueError, "two keys of the captures name blocks.1.hook_out"),
        ({RESID: At(P)}, ValueError, "positions has 9; at blocks.0.hook_out there are 9"),
        ({RESID: At([[0], [1], [2]])}, ValueError, r"positions have shape \(3, 1\); at blocks.0.hook_out they must be"),
        ({RESID: At(0.5)}, ValueError, "positions is 0.5; it takes an integer"),
        ({RESID: Project(matrix(size=10))}, ValueError, r"matrix has shape \(10, 3\); it must be \[48, n\]"),
        ({RESID: TopK(49)}, ValueError, "k is 49; the last axis has 48 features"),
        ({RESID: [At(range(P)), Mean()]}, ValueError, "blocks.0.hook_out choose positions twice"),
    ],
)
def test_what_cannot_be_meant_is_an_error(capture, error, said):
    """Which names the site and the remedy."""
    with pytest.raises(error, match=said):
        kept(capture)


def test_errors_of_a_function_name_the_site():
    """An exception says where it was raised."""
    with pytest.raises(ZeroDivisionError) as error:
        kept({"blocks.0.hook_out": lambda value, hook: 1 / 0})
    assert "blocks.0.hook_out" in error.value.__notes__[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, capture: model.run_with_cache(TOKENS, capture, incl_bwd=True),
        lambda model, capture: grad_at(*small(), TOKENS, RESID, metric_sites=capture),
        lambda model, capture: generate(*small(), TOKENS, capture=capture),
        lambda model, capture: analysis.logit_lens(model, TOKENS, names_filter=capture),
    ],
    ids=["incl_bwd", "metric_sites", "generate", "logit_lens"],
)
def test_elsewhere_functions_are_refused_not_ignored(use):
    """Where captures are read whole."""
    with pytest.raises(ValueError, match="whole values are needed here"):
        use(HookedGemma3(*small()), {RESID: Cast("bfloat16")})


def test_slices_of_a_run_are_refused():
    """`pos_slice` and `remove_batch_dim` would cut what a function has shaped."""
    for option in ({"pos_slice": -1}, {"remove_batch_dim": True}):
        with pytest.raises(ValueError, match="whole values"):
            HookedGemma3(*small()).run_with_cache(TOKENS[:1], {RESID: Cast("bfloat16")}, **option)


def test_edits_from_a_reduced_cache():
    """Patching with it fails at the shape, and works where the reduction keeps it."""
    cache = kept({RESID: At(-1)})
    with pytest.raises(ValueError, match="the cache has shape"):
        run(edits={RESID: edits.FromCache(cache)})
