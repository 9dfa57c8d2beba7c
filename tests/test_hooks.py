"""`forward`: what is captured is what was computed, what is edited reaches what the table says, under any transform."""

import concurrent.futures
import functools
import itertools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from random_models import SMALL, hf_config, hf_model, random_tokens

from conversion import convert_state_dict
from gemma3_jax import Gemma3, Gemma3Config, HookedGemma3, UnknownSite, forward, next_token_loss, site_names
from gemma3_jax.sites import site

LAYERS = 2  # a sliding and a full one
KINDS = SMALL["layer_types"]
SITES = site_names(Gemma3Config.from_hf(hf_config(num_hidden_layers=LAYERS, layer_types=KINDS[:LAYERS])))
# One shape for all, so that operations compile once.
TOKENS = jnp.asarray(random_tokens((2, 9)), jnp.int32)
COPIES = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")  # of the residual stream, for each head
LEFT_PADDED = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9], jnp.int32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These tests compile many programs and time none: nearly half of their time would go to XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def small(layers: int = LAYERS) -> tuple[Gemma3Config, Any]:
    """The model; gradients compile slowly, and are content with one layer."""
    model = hf_model(num_hidden_layers=layers, layer_types=KINDS[:layers])
    config = Gemma3Config.from_hf(model.config)
    with jax.ensure_compile_time_eval():  # the first to ask may be a function that is being traced
        return config, convert_state_dict(model.state_dict(), config)


def run(capture=(), edits=None, tokens=TOKENS, *arguments, **options):
    """Forward of the small model, not jitted."""
    return forward(*small(), tokens, capture, edits, *arguments, **options)


def jitted():
    """Forward under a jit of its own, with what must be static as static arguments."""
    static = ("config", "capture", "stop_at_layer", "return_type")
    return jax.jit(functools.partial(forward), static_argnames=static)


@functools.cache
def plain():
    """Logits and every captured value of an unedited run."""
    return run("**")


@functools.cache
def padded():
    """Logits of an unedited run with padding on the left of the first row."""
    return run(attention_mask=LEFT_PADDED)


def difference(ours, theirs) -> float:
    """Largest difference, relative to the largest value; infinite where one is NaN and the other is not."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return np.inf
    # masked scores are the lowest float32, which would drown all others
    ours, theirs = (np.where(x < -1e30, -1e30, x) for x in (ours, theirs))
    size = np.abs(theirs[theirs > -1e30]).max(initial=0)
    return float(np.nanmax(np.abs(ours - theirs), initial=0) / max(size, 1e-30))


def same(ours, theirs, bound: float = 2e-5) -> bool:
    return difference(ours, theirs) < bound


def assert_same(ours, theirs, bound: float = 2e-5) -> None:
    assert difference(ours, theirs) < bound


def identity(value, hook):
    return value


def nudge(value, hook):
    """Change every element a little, each by its own value, so that no norm undoes it; ids take their neighbour's."""
    if jnp.issubdtype(value.dtype, jnp.integer):
        return (value + 1) % SMALL["vocab_size"]
    return value + 0.05 * jnp.cos(value)


def zero(value, hook):
    return jnp.zeros_like(value)


# --- capture, and function transforms -------------------------------------------------------------------------------

SOME = ("blocks.*.hook_resid_post", "blocks.0.attn.hook_pattern", "blocks.*.attn.hook_z", "unembed.hook_out")


def test_what_the_table_says_of_each_value_holds():
    """Captured values obey the equations and the equalities that the table states between sites."""
    config, params = small()
    logits, cache = plain()
    cache = {name: np.asarray(value) for name, value in cache.items()}
    for i in range(LAYERS):
        at = {name.removeprefix(f"blocks.{i}."): v for name, v in cache.items() if name.startswith(f"blocks.{i}.")}
        assert_same(at["hook_resid_mid"], at["hook_in"] + at["ln1_post.hook_out"])
        assert_same(at["hook_out"], at["hook_resid_mid"] + at["ln2_post.hook_out"])
        powers = np.exp(at["attn.hook_attn_scores"] - at["attn.hook_attn_scores"].max(axis=-1, keepdims=True))
        assert_same(at["attn.hook_pattern"], powers / powers.sum(axis=-1, keepdims=True))
        values = np.repeat(at["attn.v.hook_out"], 4, axis=2)
        assert_same(at["attn.o.hook_in"], np.einsum("bhpk,bkhe->bphe", at["attn.hook_pattern"], values))
        w_o = np.asarray(params[f"blocks_{i}"]["attn"]["o"]["weight"])
        assert_same(at["attn.hook_result"], np.einsum("bphe,hed->bphd", at["attn.o.hook_in"], w_o))
        assert_same(at["attn.o.hook_out"], at["attn.hook_result"].sum(axis=2))
        gate = at["mlp.gate.hook_out"]
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        assert_same(at["mlp.out.hook_in"], gelu * at["mlp.in.hook_out"])
        for norm in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm"):
            x, scale = at[f"{norm}.hook_in"], at[f"{norm}.hook_scale"]
            assert_same(scale, np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps))
            assert_same(at[f"{norm}.hook_normalized"], x / scale)
        equal = {
            "ln1.hook_in": "hook_in",
            "ln2.hook_in": "hook_resid_mid",
            "mlp.hook_in": "ln2.hook_out",
            "attn.hook_in": "ln1.hook_out",
            "attn.hook_out": "attn.o.hook_out",
            "mlp.hook_out": "mlp.out.hook_out",
            "attn.q_norm.hook_in": "attn.q.hook_out",
            "attn.k_norm.hook_in": "attn.k.hook_out",
        }
        for one, other in equal.items():
            np.testing.assert_array_equal(at[one], at[other])
        assert not same(at["attn.o.hook_out"], at["ln1_post.hook_out"])  # control: before and after a norm
        for name in COPIES:
            np.testing.assert_array_equal(at[name], np.broadcast_to(at["hook_in"][:, :, None], at[name].shape))
    np.testing.assert_array_equal(cache["unembed.hook_out"], logits)
    np.testing.assert_array_equal(cache["unembed.hook_in"], cache["ln_final.hook_out"])


def test_capture_inside_jit():
    """Under jit the same values come out as without, in the model's order, under all their names."""
    logits, cache = jitted()(*small(), TOKENS, SOME)
    assert [name for name in SITES if name in cache] == list(cache)
    assert len(cache) == 2 * LAYERS + 2
    expected_logits, expected = plain()
    assert_same(logits, expected_logits)
    for name, value in cache.items():
        assert_same(value, expected[name])


@pytest.mark.parametrize("entry", ["jit", "HookedGemma3"])
def test_a_second_call_is_not_served_by_the_code_of_the_first(entry):
    """Another capture or another edited site gives its own result, however the calls alternate."""
    call, model = jitted(), HookedGemma3(*small())

    def result(capture, edited):
        if entry == "jit":
            edits = {edited: Partial(zero)} if edited else {}
            return call(*small(), TOKENS, capture, edits, stop_at_layer=1)
        hooks = [(edited, zero)] if edited else []
        return model.run_with_hooks(TOKENS, hooks, names_filter=capture, stop_at_layer=1)

    # Each call: what it captures, and the site that it zeroes.
    calls = [
        ("blocks.0.attn.hook_z", None),
        ("blocks.0.hook_resid_mid", None),
        ("blocks.0.hook_resid_mid", "blocks.0.attn.hook_out"),
    ]
    expected = [run(capture, {edited: zero} if edited else {}, stop_at_layer=1) for capture, edited in calls]
    for (capture, edited), (own_out, own) in [*zip(calls, expected, strict=True)] * 2:
        out, cache = result(capture, edited)
        assert list(cache) == list(own)
        assert_same(out, own_out)
        assert_same(cache[capture], own[capture])
    outs = [out for out, _ in expected]
    assert same(outs[0], outs[1])
    assert not same(outs[1], outs[2])
    if entry == "jit":
        assert call._cache_size() == len(calls)


def test_an_interceptor_around_a_jitted_function_is_ignored():
    """Control: the trap that `forward` avoids is real, and entering inside is what makes the difference."""
    config, params = small()
    apply = jax.jit(lambda params: Gemma3(config).apply({"params": params}, TOKENS, stop_at_layer=0))
    seen = []

    def record(next_fun, args, kwargs, context):
        seen.append(context.module.path)
        return next_fun(*args, **kwargs)

    apply(params)
    with nn.intercept_methods(record):
        apply(params)
    assert not seen
    _, cache = jax.jit(lambda params: forward(config, params, TOKENS, "embed.hook_out", stop_at_layer=0))(params)
    assert list(cache) == ["embed.hook_out"]


class Probe(nn.Module):
    """`forward` inside another Linen module, for `nn.remat`."""

    @nn.compact
    def __call__(self, params):
        return captures(params)


def captures(params, tokens=TOKENS):
    return forward(small(1)[0], params, tokens, SOME)


def vmapped(params):
    out = jax.vmap(lambda row: captures(params, row[None]))(TOKENS)
    return jax.tree.map(lambda value: value[:, 0], out)


def through_the_gradient(params):
    def loss(params):
        logits, cache = jax.checkpoint(captures)(params)
        return jnp.sum(logits**2), (logits, cache)

    return jax.grad(loss, has_aux=True)(params)[1]


@pytest.mark.parametrize(
    "transform",
    [vmapped, lambda params: nn.remat(Probe)().apply({}, params), through_the_gradient],
    ids=["vmap", "nn.remat", "grad of checkpoint"],
)
def test_captures_survive_transforms(transform):
    """vmap, remat, and checkpoint under grad around `forward` return the captures of a plain call."""
    logits, cache = jax.jit(transform)(small(1)[1])
    expected_logits, expected = captures(small(1)[1])
    assert_same(logits, expected_logits)
    assert list(cache) == list(expected)
    for name, value in expected.items():
        assert_same(cache[name], value)


# --- edits as pytrees -----------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Steer:
    """Add strength * vector at one position of one layer; everything but the count of traces is traced."""

    vector: jax.Array
    strength: Any
    position: Any = -1
    layer: Any = 1
    traces: list = flax.struct.field(pytree_node=False, default_factory=list)

    def __call__(self, value, hook):
        self.traces.append(hook.name)
        here = (hook.positions == self.position) | (jnp.asarray(self.position) < 0)
        step = self.strength * (hook.layer == jnp.asarray(self.layer)) * self.vector
        return value + here[..., None] * step

    def __hash__(self):
        return 0


def add(vector, value, hook):
    return value + vector


def direction(seed: int = 0) -> np.ndarray:
    """[d], a direction to steer in."""
    return np.random.default_rng(seed).normal(size=SMALL["hidden_size"]).astype(np.float32)


def test_vmap_over_the_strength_of_an_edit():
    """One vmapped call gives what a call for each strength gives."""
    strengths = jnp.asarray([0.0, 0.5, 2.0])

    def out(strength):
        edits = {"blocks.0.hook_resid_mid": Steer(direction(), strength, layer=0)}
        return forward(*small(1), TOKENS, "blocks.0.hook_out", edits)

    logits, cache = jax.jit(jax.vmap(out))(strengths)
    for i, strength in enumerate(strengths):
        alone, captured = out(strength)
        assert_same(logits[i], alone)
        assert_same(cache["blocks.0.hook_out"][i], captured["blocks.0.hook_out"])
    assert_same(logits[0], forward(*small(1), TOKENS)[0])
    assert not same(logits[1], logits[2])


def test_gradients_with_respect_to_an_edit():
    """The gradient of a vector added to every embedding is the sum of the gradients of `inputs_embeds`."""
    config, params = small(1)
    embeddings, _ = forward(config, params, TOKENS, stop_at_layer=0)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(vector, embeddings):
        edits = {"hook_embed": Partial(add, vector)}
        logits, cache = forward(config, params, inputs_embeds=embeddings, capture=SOME, edits=edits)
        return jnp.sum(jnp.sin(logits)), cache

    (ours, theirs), cache = gradients(jnp.zeros_like(direction()), embeddings)
    assert_same(ours, theirs.sum(axis=(0, 1)), 1e-4)
    assert not same(ours, theirs.sum(axis=1)[0], 1e-4)  # control: one row's share is not all
    for name, value in captures(params)[1].items():
        assert_same(cache[name], value)


def test_gradients_with_respect_to_an_edit_equal_finite_differences():
    """By the strength and by the vector of an edit in the middle, along a direction."""
    config, params = small(1)

    def out(strength, vector):
        edits = {"blocks.*.hook_resid_mid": Steer(vector, strength, position=4, layer=0)}
        return jnp.mean(forward(config, params, TOKENS, (), edits, stop_at_layer=1)[0] ** 2)

    gradients, out = jax.jit(jax.grad(out, (0, 1))), jax.jit(out)
    by_strength, by_vector = gradients(1.0, direction())
    step = 0.05
    finite = (out(1 + step, direction()) - out(1 - step, direction())) / (2 * step)
    np.testing.assert_allclose(by_strength, finite, rtol=0.02)
    np.testing.assert_allclose(by_strength, by_vector @ direction(), rtol=1e-4)
    other = direction(1)
    finite = (out(1.0, direction() + step * other) - out(1.0, direction() - step * other)) / (2 * step)
    np.testing.assert_allclose(by_vector @ other, finite, rtol=0.02)


@pytest.mark.parametrize("entry", ["jit", "HookedGemma3"])
def test_new_values_in_an_edit_compile_nothing(entry):
    """50 vectors, strengths, positions and layers go through code that was traced once."""
    model, call = HookedGemma3(*small()), jitted()
    traces, rng = [], np.random.default_rng(0)

    def out(edit):
        if entry == "jit":
            return call(*small(), TOKENS, (), {"blocks.*.hook_out": edit}, stop_at_layer=2)[0]
        return model.run_with_hooks(TOKENS, [("blocks.*.hook_out", edit)], stop_at_layer=2)

    for step in range(50):
        values = {"strength": rng.normal(), "position": int(rng.integers(9)), "layer": int(rng.integers(2))}
        steered = out(Steer(direction(step), traces=traces, **values))
        if step % 25 == 1:
            here = {f"blocks.{values['layer']}.hook_out": Steer(direction(step), **values)}
            assert_same(steered, forward(*small(), TOKENS, (), here, stop_at_layer=2)[0])
            assert not same(steered, plain()[1]["ln_final.hook_in"])
    assert traces == ["blocks.0.hook_out", "blocks.1.hook_out"]
    if entry == "jit":
        assert call._cache_size() == 1


def test_a_partial_compiles_once_and_a_closure_each_time():
    """The arrays of a `Partial` are traced; a plain function is compiled in, by identity (the control)."""
    model = HookedGemma3(*small())
    traces = []

    def counted(vector, value, hook):
        traces.append(hook.name)
        return value + vector

    def steered(edit):
        hooks = [("embed.hook_out", edit)]
        return model.run_with_hooks(TOKENS, hooks, stop_at_layer=0)

    embeddings = plain()[1]["embed.hook_out"]
    for seed in range(5):
        assert_same(steered(Partial(counted, direction(seed))), embeddings + direction(seed))
    assert len(traces) == 1
    for seed in range(5):
        closure = functools.partial(counted, direction(seed))
        assert_same(steered(lambda value, hook, closure=closure: closure(value, hook)), embeddings + direction(seed))
    assert len(traces) == 6


# --- reach ----------------------------------------------------------------------------------------------------------


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


# --- heads ----------------------------------------------------------------------------------------------------------


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


# --- what an edit sees and returns ----------------------------------------------------------------------------------


def test_edits_of_one_site_run_in_order():
    """A list of edits is applied from first to last, and the capture is taken after all of them."""

    def double(value, hook):
        return value * 2

    def plus_one(value, hook):
        return value + 1

    name = "blocks.1.hook_resid_mid"
    value = plain()[1][name]
    for edits, expected in (([double, plus_one], value * 2 + 1), ([plus_one, double], (value + 1) * 2)):
        _, cache = run((name, "blocks.1.ln2.hook_in"), {name: edits})
        assert_same(cache[name], expected)
        assert_same(cache["blocks.1.ln2.hook_in"], expected)
    assert not same(value * 2 + 1, (value + 1) * 2)


@pytest.mark.parametrize(
    "keys",
    [
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.*.hook_out", "blocks.1.hook_out"),
        ("model.layers.1.output", "blocks.1.hook_out"),
    ],
)
def test_two_keys_that_name_one_site(keys):
    """A dict has no order that survives jit, so two keys on one site are refused, by the site's name."""
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_out"):
        run((), dict.fromkeys(keys, identity))


@pytest.mark.parametrize(
    ("path", "shape", "ours"),
    [
        ("model.layers.1.self_attn.o_proj.input", (2, 9, 80), "blocks.1.attn.o.hook_in"),
        ("model.layers.1.self_attn.q_proj.output", (2, 9, 80), "blocks.1.attn.q.hook_out"),
        ("model.language_model.layers.1.self_attn.v_proj.output", (2, 9, 20), "blocks.1.attn.v.hook_out"),
        ("layers.1.self_attn.q_norm.output", (2, 8, 9, 10), "blocks.1.attn.q_norm.hook_out"),
        ("model.layers.1.self_attn.k_norm.input", (2, 2, 9, 10), "blocks.1.attn.k_norm.hook_in"),
        ("model.layers.1.mlp.output", (2, 9, 48), "blocks.1.mlp.hook_out"),
    ],
)
def test_edits_under_hf_paths_see_hf_layout(path, shape, ours):
    """The edit gets Hugging Face's layout, the cache gives it back so, and what it returns is put back as ours."""
    seen = []

    def edit(value, hook):
        seen.append((value.shape, hook.name))
        return value.at[..., 3].multiply(-1)

    out, cache = run(path, {path: edit}, stop_at_layer=2)
    assert seen == [(shape, ours)]
    assert list(cache) == [ours]
    value = plain()[1][path]
    assert value.shape == shape
    assert_same(cache[path], value.at[..., 3].multiply(-1))
    assert cache[ours].shape == plain()[1][ours].shape
    assert not same(out, plain()[1]["ln_final.hook_in"])
    assert_same(run((), {path: identity}, stop_at_layer=2)[0], plain()[1]["ln_final.hook_in"], 5e-6)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda value, hook: None, TypeError, "None"),
        (lambda value, hook: value[:, :-1], ValueError, "shape"),
        (lambda value, hook: value[..., None], ValueError, "shape"),
        (lambda value, hook: 0.0, ValueError, "shape"),
        (lambda value, hook: (value, value), ValueError, "shape"),
        (None, (TypeError, ValueError), "edit"),
    ],
    ids=["None", "shorter", "broadcastable", "scalar", "tuple", "no edit"],
)
@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "model.layers.1.self_attn.o_proj.input"])
def test_a_bad_edit_is_an_error_that_names_the_site(edit, error, says, name):
    """An edit that returns None or another shape is an error, with the site's canonical name."""
    canonical = "blocks.1.attn.o.hook_in" if name.startswith("model.") else name
    with pytest.raises(error, match=says) as caught:
        jax.eval_shape(lambda: run((), {name: edit}, stop_at_layer=2))
    assert canonical in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "returned"),
    [
        ("blocks.1.hook_out", jnp.bfloat16, jnp.float32),
        ("blocks.1.hook_out", jnp.bfloat16, jnp.int32),
        ("blocks.1.attn.hook_pattern", jnp.float32, jnp.bfloat16),
        ("embed.hook_in", jnp.int32, jnp.float32),
    ],
)
def test_an_edits_result_is_cast_to_the_sites_dtype(name, dtype, returned):
    """Whatever dtype an edit returns, the site keeps its own."""
    config, params = small()
    params = jax.tree.map(lambda x: x if x.ndim == 1 else x.astype(jnp.bfloat16), params)
    edits = {name: lambda value, hook: value.astype(returned)}
    capture = (name, "ln_final.hook_in")
    logits, cache = jax.eval_shape(lambda params: forward(config, params, TOKENS, capture, edits), params)
    assert cache[name].dtype == dtype
    assert logits.dtype == jnp.float32
    assert cache["ln_final.hook_in"].dtype == jnp.bfloat16


def test_edits_may_return_numpy():
    """A numpy array, float64 too, is a value like any other."""
    name = "blocks.0.hook_out"
    _, cache = run(name, {name: lambda value, hook: np.asarray(value, np.float64) + 1})
    assert cache[name].dtype == jnp.float32
    assert_same(cache[name], plain()[1][name] + 1)


def test_what_a_hook_says_of_its_place():
    """Each call of an edit is told the site's canonical name, its layer and the positions of the tokens."""
    told = {}

    def edit(value, hook):
        told[hook.name] = (hook.layer, hook.positions)
        return value

    names = ("embed.hook_out", "blocks.0.hook_in", "blocks.1.attn.hook_pattern", "ln_final.hook_out")
    run((), {**dict.fromkeys(names, edit), "blocks.1.mlp.hook_post": edit})
    layers = {"embed.hook_out": None, "blocks.0.hook_in": 0, "blocks.1.mlp.out.hook_in": 1}
    layers |= {"blocks.1.attn.hook_pattern": 1, "ln_final.hook_out": None}
    assert {name: layer for name, (layer, _) in told.items()} == layers
    for _, positions in told.values():
        assert positions.dtype == jnp.int32
        np.testing.assert_array_equal(positions, np.tile(np.arange(9), (2, 1)))


def test_positions_under_left_padding():
    """A hook's positions count the real tokens, so that an edit at position 2 hits the third real token of each row."""
    seen = []

    def edit(value, hook):
        seen.append(hook.positions)
        return jnp.where((hook.positions == 2)[..., None], 0, value)

    name = "blocks.0.hook_in"
    _, cache = run(name, {name: edit}, attention_mask=LEFT_PADDED)
    np.testing.assert_array_equal(seen[0][0, 3:], np.arange(6))
    np.testing.assert_array_equal(seen[0][1], np.arange(9))
    assert np.argwhere(~np.asarray(cache[name]).any(axis=-1)).tolist() == [[0, 5], [1, 2]]

    given = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    run((), {name: lambda value, hook: seen.append(hook.positions) or value}, positions=given)
    np.testing.assert_array_equal(seen[1], given)


# --- watching, stopping, inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("watched", ["hook_attn_scores", "hook_pattern", "hook_result", *COPIES])
def test_watching_changes_no_result(watched):
    """What is only computed when somebody looks leaves the logits as they are, to rounding, padded or not."""
    logits, cache = run(f"**.{watched}", attention_mask=LEFT_PADDED)
    assert len(cache) == LAYERS
    assert_same(logits, padded()[0], 5e-6)


@pytest.mark.parametrize("stop", [0, 1, 2, -1, -2])
def test_stop_at_layer(stop):
    """Only the blocks before that layer run, negative from the end, and the stream that enters it is returned."""
    before = stop % LAYERS if stop < 0 else stop
    at = f"blocks.{before}.hook_in" if before < LAYERS else "ln_final.hook_in"
    out, cache = run("**", stop_at_layer=stop)
    assert_same(out, plain()[1][at])
    blocks = {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")}
    assert blocks == set(range(before))
    assert {"embed.hook_out"} < set(cache) if before else set(cache) == {"embed.hook_in", "embed.hook_out"}
    assert not same(out, plain()[1]["embed.hook_out" if before else "blocks.1.hook_in"])  # control


def equations(jaxpr):
    """All equations of a jaxpr, those of the functions that it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def work(**options) -> tuple[int, bool]:
    """How many blocks a call runs (each has one tanh, in its gelu), and whether it computes logits, of three layers."""
    config, params = small(3)
    found = list(equations(jax.make_jaxpr(lambda params: forward(config, params, TOKENS, **options))(params).jaxpr))
    unembeds = any(variable.aval.shape[-1:] == (config.vocab_size,) for eqn in found for variable in eqn.outvars)
    return sum(eqn.primitive.name == "tanh" for eqn in found), unembeds


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, True)),  # control: the count sees all blocks and the unembedding
        ({"capture": "blocks.1.hook_out"}, (3, True)),
        ({"capture": "blocks.1.hook_out", "return_type": None}, (2, False)),
        ({"capture": ("blocks.0.attn.hook_pattern", "blocks.1.hook_in"), "return_type": None}, (2, False)),
        ({"capture": "blocks.0.**", "return_type": None}, (1, False)),
        ({"capture": "blocks.2.hook_out", "return_type": None}, (3, False)),
        ({"capture": "hook_embed", "return_type": None}, (0, False)),
        ({"return_type": None}, (0, False)),
        ({"capture": "unembed.hook_out", "return_type": None}, (3, True)),
        ({"stop_at_layer": 1}, (1, False)),
        ({"stop_at_layer": -1, "return_type": None}, (2, False)),
    ],
)
def test_what_nobody_asked_for_is_not_run(options, expected):
    """Without a result to return, blocks after the last capture and the unembedding are not in the program."""
    assert work(**options) == expected


def test_return_type_none_gives_the_captures_of_a_whole_run():
    """Stopping early changes no captured value, and the result is None."""
    out, cache = run("blocks.1.**", return_type=None)
    assert out is None
    for name, value in cache.items():
        assert_same(value, plain()[1][name], 1e-6)


def test_return_types():
    """Logits, their loss, or both."""

    def expected(logits, counted):
        logits = np.asarray(logits, np.float64)
        normalised = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses = -np.take_along_axis(normalised[:, :-1], np.asarray(TOKENS)[:, 1:, None], axis=-1)[..., 0]
        return losses[counted].mean()

    loss, _ = run(return_type="loss")
    (logits, again), _ = run(return_type="both")
    assert_same(logits, plain()[0])
    everything = np.ones((2, 8), bool)
    np.testing.assert_allclose([loss, again], expected(logits, everything), rtol=1e-5)

    (logits, masked), _ = run(return_type="both", attention_mask=LEFT_PADDED)
    pairs_of_real_tokens = everything.copy()
    pairs_of_real_tokens[0, :3] = False
    np.testing.assert_allclose(masked, expected(logits, pairs_of_real_tokens), rtol=1e-5)
    np.testing.assert_allclose(next_token_loss(logits, TOKENS, LEFT_PADDED), masked, rtol=1e-6)
    assert abs(masked - expected(logits, everything)) > 1e-3  # control: the loss over padding too is another


def test_nothing_leaks_from_one_call_to_the_next():
    """After edits, after an error inside an edit, and after a capture, a plain call is as before."""

    def fail(value, hook):
        raise RuntimeError("on purpose")

    def result():
        return jax.tree.map(np.asarray, run())

    logits, cache = result()
    assert not cache
    run("blocks.*.hook_out", {"blocks.*.hook_out": nudge})
    np.testing.assert_array_equal(result()[0], logits)
    with pytest.raises(RuntimeError, match="on purpose"):
        run((), {"blocks.1.hook_out": fail})
    np.testing.assert_array_equal(result()[0], logits)
    config, params = small()
    np.testing.assert_array_equal(Gemma3(config).apply({"params": params}, TOKENS), logits)


def test_threads_do_not_see_each_others_hooks():
    """Calls in several threads at once give what each gives alone."""
    names = ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
    alone = [run(name, {name: nudge}) for name in names]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: run(name, {name: nudge}), names * 2))
    for (logits, cache), (expected_logits, expected) in zip(together, alone * 2, strict=True):
        assert list(cache) == list(expected)
        assert_same(logits, expected_logits, 1e-6)
        assert_same(next(iter(cache.values())), next(iter(expected.values())), 1e-6)
    assert not same(alone[0][0], alone[1][0])


def test_inputs_embeds_take_the_place_of_tokens():
    """The captured embedding, given as input, gives the same logits; the raw rows of W_E do not."""
    config, params = small()
    logits, cache = forward(config, params, inputs_embeds=plain()[1]["embed.hook_out"], capture="embed.hook_in")
    assert_same(logits, plain()[0], 1e-6)
    assert_same(cache["embed.hook_in"], plain()[1]["embed.hook_out"], 1e-12)
    raw = params["embed"]["weight"][TOKENS]
    assert not same(forward(config, params, inputs_embeds=raw)[0], plain()[0])
    model = Gemma3(config).apply({"params": params}, inputs_embeds=plain()[1]["embed.hook_out"])
    assert_same(model, plain()[0], 1e-6)


def test_explicit_positions():
    """Default positions written out change nothing, nor does shifting them all; stretching them does."""
    counted = jnp.broadcast_to(jnp.arange(9), (2, 9))
    assert_same(run(positions=counted)[0], plain()[0], 1e-6)
    assert_same(run(positions=counted + 100)[0], plain()[0], 1e-4)
    assert not same(run(positions=counted * 2)[0], plain()[0], 1e-3)
    counted_by_hand = jnp.stack([jnp.maximum(jnp.arange(9) - 3, 0), jnp.arange(9)])
    by_mask = padded()[0]
    by_hand = run(attention_mask=LEFT_PADDED, positions=counted_by_hand)[0]
    assert_same(by_hand, by_mask, 1e-6)
    # The row alone: what follows a token does not reach it.
    alone = run(tokens=jnp.roll(TOKENS, -3, axis=1))[0][0, :6]
    assert_same(by_mask[0, 3:], alone)
    assert not same(plain()[0][0, 3:], alone)  # control: without the mask the padding is seen


@pytest.mark.parametrize("bad", [101, 5000, -1, -100])
def test_an_id_outside_the_vocabulary(bad):
    """No other token's row stands in for it: NaN where values cannot be checked, an error where they can."""
    tokens = TOKENS.at[0, 4].set(bad)
    logits, _ = run(tokens=tokens)
    assert np.isnan(logits[0, 4:]).all()
    assert np.isfinite(logits[1]).all()
    with pytest.raises(ValueError, match=str(bad)):
        HookedGemma3(*small())(tokens)


def test_gradients_are_finite_under_padding():
    """Rows of padding see nothing at all; the loss's gradients stay finite, reach everything, and ignore padding."""
    config, params = small(1)

    @jax.jit
    @jax.grad
    def gradients(params, tokens, mask):
        return forward(config, params, tokens, (), None, mask, return_type="loss")[0]

    for mask in (LEFT_PADDED, LEFT_PADDED[:, ::-1]):
        grads = gradients(params, TOKENS, mask)
        for path, leaf in jax.tree.leaves_with_path(grads):
            assert np.isfinite(leaf).all(), path
            assert np.abs(leaf).max() > 0, path
        other = gradients(params, jnp.where(mask == 1, TOKENS, 7), mask)
        jax.tree.map(lambda one, two: assert_same(one, two, 1e-4), grads, other)
        changed = gradients(params, TOKENS.at[0, 4].set(7), mask)
        assert not same(changed["ln_final"]["weight"], grads["ln_final"]["weight"], 1e-4)  # control


# --- bad arguments --------------------------------------------------------------------------------------------------

EMBEDS = np.zeros((2, 9, 48), np.float32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": None}, "tokens or inputs_embeds"),
        ({"inputs_embeds": EMBEDS}, "exactly one"),
        ({"tokens": TOKENS[0]}, r"tokens have shape \(9,\)"),
        ({"tokens": TOKENS[:, :0]}, "token"),
        ({"tokens": np.zeros((2, 9))}, "tokens are integers"),
        ({"tokens": None, "inputs_embeds": EMBEDS[..., :-1]}, r"inputs_embeds are floats \[b, p, 48\]"),
        ({"tokens": None, "inputs_embeds": EMBEDS[0]}, "inputs_embeds are floats"),
        ({"attention_mask": np.ones((2, 8), int)}, "attention_mask has shape"),
        ({"attention_mask": np.ones(9, int)}, "attention_mask has shape"),
        ({"positions": np.arange(9)}, "positions has shape"),
        ({"return_type": "logit"}, "return_type is 'logit'"),
        ({"return_type": "loss", "stop_at_layer": 2}, "whole model"),
        ({"return_type": "both", "tokens": None, "inputs_embeds": EMBEDS}, "needs tokens"),
        ({"stop_at_layer": 4}, "3 layers"),
        ({"stop_at_layer": -4}, "3 layers"),
        ({"capture": "blocks.2.hook_out", "stop_at_layer": 2}, "never runs"),
        ({"capture": "unembed.**", "stop_at_layer": -1}, "never runs"),
        ({"edits": {"blocks.2.hook_out": identity}, "stop_at_layer": 2}, "never runs"),
        ({"capture": "blocks.3.hook_out"}, "no site is named"),
        ({"edits": {"blocks.*.hook_outt": identity}}, "no site matches"),
    ],
)
def test_bad_arguments(arguments, says):
    """Each is one error that says what is wrong, before anything runs."""
    config, params = small(3)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: forward(config, params, **{"tokens": TOKENS, **arguments}))


def test_unknown_sites_are_key_errors_too():
    """`UnknownSite` is caught as either of the two errors that it is."""
    with pytest.raises(KeyError):
        run("nonsense")
    assert issubclass(UnknownSite, ValueError)
    assert site("blocks.2.hook_out").legacy == "blocks.{i}.hook_resid_post"
