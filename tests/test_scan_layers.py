"""Scanning over layers changes no number: from stacked parameters every site, edit and gradient is the unrolled one's.

Two float32 runs that are each within 5e-6 of the exact values (the bar of the parity tests) differ by 1e-5 at most.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import hf_model, random_tokens
from small_model import LEFT_PADDED, TOKENS, difference, nudge

from conversion import convert_state_dict, export_checkpoint, load_params, save_params
from conversion.parity import SMALL_BAR, compare, compare_sites, huggingface, our_activations
from gemma3_jax import (
    TINY,
    Gemma3,
    Gemma3Config,
    HookedGemma3,
    edits,
    forward,
    grad_at,
    reductions,
    site_names,
    stack_layers,
    unstack_layers,
)
from gemma3_jax.analysis import fold_ln, ov_circuit
from gemma3_jax.decomposition import HEADS
from gemma3_jax.kernels import SHORT
from gemma3_jax.scan import PER_HEAD, SCORES
from gemma3_jax.sites import SITES

BOUND = 1e-5
LOCAL, FULL = "sliding_attention", "full_attention"
# Both kinds in turn; layer 3 is in the middle.
TYPES = [LOCAL, FULL, LOCAL, FULL, LOCAL, FULL, LOCAL]
MIDDLE = 3
IN_BLOCK = [row.name.removeprefix("blocks.{i}.") for row in SITES if "{i}" in row.name]


@functools.cache
def both(types=tuple(TYPES), **overrides):
    """Config, parameters by block, and stacked."""
    model = hf_model(num_hidden_layers=len(types), layer_types=list(types), **overrides)
    config = Gemma3Config.from_hf(model.config)
    with jax.ensure_compile_time_eval():
        params = convert_state_dict(model.state_dict(), config)
        return config, params, stack_layers(config, params)


def compiled(capture=(), **options):
    """Forward of the model under jit, as a function of parameters and edits."""
    config = both()[0]
    return jax.jit(lambda params, edits: forward(config, params, TOKENS, capture, edits, **options))


@functools.cache
def plain():
    """Logits and every site of the unrolled model."""
    return compiled("**")(both()[1], {})


def exchanged(blocks):
    """The stacked blocks with two in each other's place."""
    return jax.tree.map(lambda w: w[jnp.array([2, 1, 0, 3, 4, 5, 6])], blocks)


def worst(ours, theirs) -> float:
    """Largest difference in two pytrees of one structure."""
    return max(jax.tree.leaves(jax.tree.map(difference, ours, theirs)))


@flax.struct.dataclass
class Nudge:
    """Move each element by its own value, `strength` being traced."""

    strength: jax.Array

    def __call__(self, value, hook):
        return value + self.strength * (nudge(value, hook) - value)


def test_every_site_is_that_of_the_unrolled_model():
    """All at once, one row padded; with two layers of the stack exchanged they are not."""
    _, params, stacked = both()
    run = compiled("**", attention_mask=LEFT_PADDED)
    (logits, cache), (scanned, found) = run(params, {}), run(stacked, {})
    assert list(found) == list(cache) == list(site_names(both()[0]))
    assert worst([scanned, *found.values()], [logits, *cache.values()]) < BOUND
    wrong = {**stacked, "blocks": exchanged(stacked["blocks"])}
    assert difference(run(wrong, {})[0], logits) > 1e-2


SPECIAL = [name for name in IN_BLOCK if name in PER_HEAD | SCORES]
OTHERS = [name for name in IN_BLOCK if name not in SPECIAL]


@pytest.mark.parametrize("layer", [MIDDLE, "*"], ids=["one layer", "glob"])
@pytest.mark.parametrize("kinds", [OTHERS, SPECIAL], ids=["ordinary sites", "sites that change a block"])
def test_an_edit_at_every_kind_of_site_does_what_it_does_unrolled(kinds, layer):
    """One compilation with an edit at each, of which one at a time has a strength; captures see them too."""
    _, params, stacked = both()
    run = compiled("blocks.*.hook_out")
    off = {f"blocks.{layer}.{kind}": Nudge(jnp.float32(0)) for kind in kinds}
    unedited = run(params, off)[0]
    for name in off:
        here = off | {name: Nudge(jnp.float32(1))}
        (logits, cache), (scanned, found) = run(params, here), run(stacked, here)
        assert worst([scanned, *found.values()], [logits, *cache.values()]) < 2 * BOUND, name
        assert difference(logits, unedited) > 10 * BOUND, name
    assert run._cache_size() == 2


def test_an_edit_knows_its_layer_and_acts_nowhere_else():
    """Hook.name and Hook.layer are static and the layer's own; the streams before it are untouched."""
    config, _, stacked = both()
    told = []

    def by_layer(value, hook):
        told.append((hook.name, hook.layer))
        return value * (1 + hook.layer)

    wanted = {name: jax.tree_util.Partial(by_layer) for name in ("blocks.1.hook_out", "blocks.5.hook_out")}
    run = compiled("blocks.*.hook_out")
    logits, cache = run(stacked, wanted)
    assert set(told) == {("blocks.1.hook_out", 1), ("blocks.5.hook_out", 5)}
    assert difference(cache["blocks.0.hook_out"], plain()[1]["blocks.0.hook_out"]) < BOUND
    assert difference(cache["blocks.1.hook_out"], 2 * plain()[1]["blocks.1.hook_out"]) < BOUND
    assert difference(logits, plain()[0]) > 1e-2
    with pytest.raises(TypeError, match=r"edit at blocks\.3\.hook_out returned None"):
        forward(config, stacked, TOKENS, edits={"blocks.3.hook_out": lambda value, hook: None})


def test_a_traced_layer_compiles_once():
    """`edits.only` with the layer as data: one program for every layer, scanned as unrolled."""
    _, params, stacked = both()
    run = compiled()
    for layer in range(7):
        ablate = {"blocks.*.attn.hook_z": edits.only(edits.Replace(0.0), layer=jnp.int32(layer), heads=[1])}
        assert difference(run(stacked, ablate)[0], run(params, ablate)[0]) < BOUND
    assert run._cache_size() == 2


def test_a_change_of_layout_at_one_layer_stays_there():
    """hook_attn_in gives the keys of its own layer a head for each query head, and leaves other layers' keys alone."""
    _, params, stacked = both()
    run = compiled("blocks.*.attn.k.hook_out")
    ablate = edits.only(edits.Replace(0.0), heads=1)
    wanted = {"blocks.3.hook_attn_in": jax.tree_util.Partial(nudge), "blocks.1.attn.hook_k": ablate}
    (logits, cache), (scanned, found) = run(params, wanted), run(stacked, wanted)
    assert [found[f"blocks.{i}.attn.k.hook_out"].shape[2] for i in (1, 3, 5)] == [2, 8, 2]
    assert worst([scanned, *found.values()], [logits, *cache.values()]) < BOUND


def test_a_capture_of_some_layers_keeps_those_only():
    """The scan carries the rows that are wanted, and one for the others; not one for every layer."""
    config, _, stacked = both()
    names = ("blocks.1.mlp.hook_post", "blocks.3.ln1.hook_scale", "blocks.5.ln1.hook_scale", "blocks.6.hook_out")
    run = compiled(names)
    found = run(stacked, {})[1]
    assert list(found) == ["blocks.1.mlp.out.hook_in", *names[1:3], "blocks.6.hook_out"]
    assert worst(dict(found), {name: plain()[1][name] for name in found}) < BOUND

    def carried(capture):
        program = jax.make_jaxpr(lambda params: forward(config, params, TOKENS, capture))(stacked)
        (scan,) = (each for each in program.eqns if each.primitive.name == "scan")
        return [value.aval.shape for value in scan.outvars]

    assert (2, 2, 9, 80) in carried("blocks.1.mlp.hook_post")
    assert (7, 2, 9, 80) in carried("blocks.*.mlp.hook_post")
    assert (7, 2, 9, 80) not in carried("blocks.1.mlp.hook_post")


@pytest.mark.parametrize(("length", "scans"), [(SHORT - 1, [7]), (SHORT, [3, 3])])
def test_a_pattern_of_one_layer_leaves_the_scan_of_a_short_text_whole(length, scans):
    """Below `SHORT` tokens every layer has its scores; from there on the one that shows them is run apart."""
    config, params, stacked = both()
    tokens = random_tokens((1, length))
    name = f"blocks.{MIDDLE}.attn.hook_pattern"

    def run(params):
        return forward(config, params, tokens, name)

    program = jax.make_jaxpr(run)(stacked)
    assert [each.params["length"] for each in program.eqns if each.primitive.name == "scan"] == scans
    (logits, cache), (scanned, found) = jax.jit(run)(params), jax.jit(run)(stacked)
    assert worst([scanned, found[name]], [logits, cache[name]]) < BOUND


@pytest.mark.parametrize("stop", [-4, *range(8)])
def test_stop_at_layer_runs_no_layer_behind_it(stop):
    """The stream entering each layer, with every later weight NaN."""
    config, params, _ = both()
    layers = range(7)[:stop]
    later = {f"blocks_{i}" for i in range(7)} - {f"blocks_{i}" for i in layers}
    broken = {
        key: jax.tree.map(lambda w: w * jnp.nan, value) if key in later else value for key, value in params.items()
    }
    found, _ = jax.jit(lambda params: forward(config, params, TOKENS, stop_at_layer=stop))(stack_layers(config, broken))
    wanted = plain()[1]["ln_final.hook_in" if len(layers) == 7 else f"blocks.{len(layers)}.hook_in"]
    assert difference(found, wanted) < BOUND


def test_start_at_layer_static_and_traced():
    """From each layer's own stream to the logits; the traced one also mapped over, and compiled once."""
    config, _, stacked = both()
    logits, cache = plain()
    streams = jnp.stack([cache[f"blocks.{i}.hook_in"] for i in range(7)])

    def run(stream, layer, params=stacked):
        return forward(config, params, inputs_embeds=stream, start_at_layer=layer)[0]

    for layer, params in ((MIDDLE, stacked), (-4, stacked), (-4, both()[1])):
        assert difference(jax.jit(functools.partial(run, layer=layer, params=params))(streams[layer]), logits) < BOUND
    traced = jax.jit(run)
    for layer in range(7):
        assert difference(traced(streams[layer], layer), logits) < BOUND
    assert difference(traced(streams[2], 3), logits) > 1e-2
    assert traced._cache_size() == 1
    mapped = jax.jit(jax.vmap(run))(streams, jnp.arange(7))
    assert worst(list(mapped), [logits] * 7) < BOUND


def test_gradients_at_sites_and_of_an_edit():
    """With an edit in a scanned layer; those of parameters are in the parity test. Each pass has its own rounding."""
    config, params, stacked = both(tuple(TYPES[:4]))
    sites = ("blocks.*.hook_resid_post", "blocks.1.attn.hook_z", "blocks.3.attn.hook_pattern", "ln_final.hook_in")

    @jax.jit
    def run(params, strength):
        value, cache = grad_at(config, params, TOKENS, sites, edits={"blocks.3.mlp.hook_post": Nudge(strength)})
        return value, dict(cache), dict(cache.grads)

    assert worst(run(stacked, 1.0), run(params, 1.0)) < 2 * BOUND
    assert worst(run(stacked, 0.0)[2], run(params, 1.0)[2]) > 1e-3

    def loss(strength, params):
        wanted = {"blocks.*.hook_out": Nudge(strength)}
        return forward(config, params, TOKENS, edits=wanted, return_type="loss")[0]

    slope = jax.jit(jax.grad(loss))
    assert difference(slope(1.0, stacked), slope(1.0, params)) < 2 * BOUND


def test_vmap_over_edits_and_rows():
    """A mapped edit leaf, and mapped tokens, with captures."""
    config, params, stacked = both()

    def run(params, row, strength):
        wanted = {"blocks.3.hook_resid_mid": Nudge(strength)}
        logits, cache = forward(config, params, row[None], "blocks.*.attn.hook_z", wanted)
        return logits, dict(cache)

    mapped = jax.jit(jax.vmap(run, (None, 0, 0)))
    strengths = jnp.array([0.0, 1.0])
    ours = mapped(stacked, TOKENS, strengths)
    assert worst(ours, mapped(params, TOKENS, strengths)) < BOUND
    assert worst(ours, mapped(params, TOKENS, strengths[::-1])) > 1e-3


def test_plain_linen_has_the_same():
    """init makes the stacked layout, each weight drawn by itself; apply is what forward is; own values are stacked."""
    config, params, stacked = both()
    model = Gemma3(config, scan_layers=True)
    made = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, stacked)
    weights = made["blocks"]["mlp"]["in"]["weight"]
    assert 0.015 < jnp.std(weights) < 0.025
    assert not jnp.allclose(weights[0], weights[1])

    def keep(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name == "mlp":
            context.module.sow("mine", "kept", out)
        return out

    @jax.jit
    def run(params):
        with nn.intercept_methods(keep):
            return model.apply({"params": params}, TOKENS, mutable=["mine"])

    logits, variables = run(stacked)
    assert difference(logits, plain()[0]) < BOUND
    assert difference(jax.jit(model.apply)({"params": stacked}, TOKENS), plain()[0]) < BOUND
    (out,) = variables["mine"]["blocks_0_to_6"]["mlp"]["kept"]
    assert difference(out[3], plain()[1]["blocks.3.mlp.hook_out"]) < BOUND
    with pytest.raises(ValueError, match="stack_layers"):
        model.apply({"params": params}, TOKENS)


@pytest.mark.parametrize("stop", [None, 1], ids=["scanned", "one layer"])
def test_own_values_of_every_module(stop):
    """What an interceptor stores at each call is under the name of its module, and the model's own is there once."""
    config, _, stacked = both()

    def keep(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            context.module.sow("mine", "kept", out)
        return out

    with nn.intercept_methods(keep):
        model = Gemma3(config, scan_layers=True)
        out, variables = model.apply({"params": stacked}, TOKENS, stop_at_layer=stop, mutable=["mine"])
    (own,) = variables["mine"]["kept"]
    assert difference(own, out) == 0
    (blocks,) = variables["mine"]["blocks_0" if stop else "blocks_0_to_6"]["kept"]
    last = blocks if stop else blocks[-1]
    assert difference(last, out if stop else plain()[1]["ln_final.hook_in"]) < BOUND


@pytest.mark.parametrize(
    "types",
    [[LOCAL] * 4, [LOCAL, FULL, FULL, LOCAL, FULL], [FULL]],
    ids=["one kind", "in no order", "one layer"],
)
@pytest.mark.parametrize("length", [9, SHORT + 1])
def test_layer_types_in_any_order(types, length):
    """Logits and streams, in a short text and one whose layers never hold all scores; with other types they differ."""
    config, params, stacked = both(tuple(types))
    tokens = random_tokens((1, length))

    def run(params, config=config):
        return dict(forward(config, params, tokens, ("blocks.*.hook_out", "unembed.hook_out"))[1])

    wanted = jax.jit(run)(params)
    assert worst(jax.jit(run)(stacked), wanted) < BOUND
    other = dataclasses.replace(config, layer_types=(FULL if types[0] == LOCAL else LOCAL, *types[1:]))
    assert worst(jax.jit(functools.partial(run, config=other))(stacked), wanted) > 1e-2


@pytest.mark.parametrize("length", [9, SHORT + 1])
def test_bfloat16_is_as_near_to_float32_as_unrolled(length):
    """The two round in different places: each stream's error is at most half as large again."""
    config, params, _ = both()
    tokens = random_tokens((1, length))
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    # The same values in float32.
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    run = jax.jit(lambda params: dict(forward(config, params, tokens, "blocks.*.hook_out")[1]))
    stacked = stack_layers(config, narrow)
    exact, unrolled, scanned = run(wide), run(narrow), run(stacked)

    def error(found):
        return np.array([jnp.std(found[name].astype(jnp.float32) - exact[name]) for name in exact])

    assert (error(unrolled) > 0).all()
    assert (error(scanned) < 1.5 * error(unrolled)).all()
    # Negative control: two layers in each other's place.
    wrong = run({**stacked, "blocks": exchanged(stacked["blocks"])})
    assert error(wrong)[-1] > 3 * error(unrolled)[-1]


def test_the_program_does_not_grow_with_the_depth():
    """What is compiled is as long for twelve layers as for six; unrolled, twice as long."""

    def lines(layers, scan):
        kinds = tuple(TYPES[:2] * (layers // 2))
        config = dataclasses.replace(both()[0], num_hidden_layers=layers, layer_types=kinds)
        shapes = jax.eval_shape(Gemma3(config, scan_layers=scan).init, jax.random.key(0), TOKENS)["params"]
        run = jax.jit(lambda params: forward(config, params, TOKENS)[0])
        return len(run.lower(shapes).compile().as_text().splitlines())

    assert lines(12, scan=True) < 1.05 * lines(6, scan=True)
    assert lines(12, scan=False) > 1.5 * lines(6, scan=False)


@pytest.mark.parametrize("length", [SHORT, SHORT + 130])
def test_a_long_text_has_the_gradients_and_rows_of_unrolled_layers(length):
    """From `SHORT` tokens on, layers of both kinds share a scan: parameters' gradients, and padding, of each kernel."""
    config, params, stacked = both((LOCAL, FULL, LOCAL))
    tokens = random_tokens((2, length))
    mask = jnp.ones((2, length), int).at[0, :140].set(0)

    def loss(params):
        return forward(config, params, tokens, attention_mask=mask, return_type="loss")[0]

    ours, theirs = (jax.jit(jax.grad(loss))(each) for each in (stacked, params))
    theirs = stack_layers(config, theirs)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    # A sum over all tokens, one by one, is rounded once for each.
    bound = tokens.size * np.finfo(np.float32).eps * largest
    assert worst(ours, theirs) < bound
    assert worst(ours, {**theirs, "blocks": jax.tree.map(lambda w: w[::-1], theirs["blocks"])}) > 1e-2 * largest


@given(st.lists(st.sampled_from([LOCAL, FULL]), min_size=1, max_size=24))
@settings(max_examples=30, deadline=None)
def test_round_trip(types):
    """Whatever the layer types: one entry for all blocks, each layer in its place, and back is bit for bit."""
    config = dataclasses.replace(Gemma3Config.preset("270m"), num_hidden_layers=len(types), layer_types=tuple(types))
    params = {f"blocks_{i}": {"w": np.full((2,), i, np.float32)} for i in range(len(types))} | {"embed": np.zeros(1)}
    stacked = stack_layers(config, params)
    assert set(stacked) == {"blocks", "embed"}
    assert stacked["blocks"]["w"][:, 0].tolist() == list(range(len(types)))
    again = unstack_layers(config, stacked)
    assert set(again) == set(params)
    assert all((again[key]["w"] == params[key]["w"]).all() for key in params if key != "embed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_of_a_model_is_bit_for_bit(dtype):
    """Every leaf, dtypes included, twice either way."""
    config, params, _ = both()
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    stacked = stack_layers(config, params)
    again = unstack_layers(config, stack_layers(config, stacked))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(unstack_layers(config, again)), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()


def test_parameters_that_do_not_fit_are_refused():
    """One message that names what is wrong."""
    config, params, stacked = both()
    shallow = dataclasses.replace(config, num_hidden_layers=5, layer_types=config.layer_types[:5])
    with pytest.raises(ValueError, match=r"\(7, .*this config has 5 layers"):
        forward(shallow, stacked, TOKENS)
    with pytest.raises(ValueError, match="have 'blocks_5'; the config calls for 5 blocks"):
        forward(shallow, params, TOKENS)
    with pytest.raises(ValueError, match="have 'blocks_2'; the config calls for stacked blocks alone"):
        forward(config, {**stacked, "blocks_2": params["blocks_2"]}, TOKENS)
    with pytest.raises(ValueError, match="lack 'blocks_3'"):
        stack_layers(config, {key: value for key, value in params.items() if key != "blocks_3"})
    unlike = {**params, "blocks_2": jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["blocks_2"])}
    with pytest.raises(ValueError, match="blocks_2/attn/k/weight is bfloat16"):
        stack_layers(config, unlike)


def test_hugging_face_parity():
    """Every site and gradient, several windows long, from stacked parameters; with two layers exchanged it fails."""
    model = hf_model(num_hidden_layers=7, layer_types=TYPES)
    config = Gemma3Config.from_hf(model.config)
    stacked = stack_layers(config, convert_state_dict(model.state_dict(), config))
    tokens = random_tokens((2, 30))
    assert not [row for row in compare(model, config, stacked, tokens) if not row.passed]
    wrong = {**stacked, "blocks": exchanged(stacked["blocks"])}
    rows = compare_sites(huggingface.activations(model, tokens), our_activations(config, wrong, tokens), SMALL_BAR)
    assert [row for row in rows if not row.passed]


@functools.cache
def tiny():
    """The shipped model, unrolled and scanned."""
    return [HookedGemma3.from_pretrained(TINY, dtype="float32", scan_layers=scan) for scan in (False, True)]


def test_hooked_model_weights_and_analyses():
    """Everything that reads parameters reads either layout."""
    unrolled, scanned = tiny()
    assert "blocks" in scanned.params
    text = "ba ke lo mu ti so re ba ke"
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out", "W_E", "W_U"):
        assert (getattr(scanned, name) == getattr(unrolled, name)).all()
    (logits, cache), (found, kept) = (model.run_with_cache(text, HEADS) for model in tiny())
    assert difference(found, logits) < BOUND
    assert difference(kept.stack_head_results(), cache.stack_head_results()) < BOUND
    circuits = [ov_circuit(model.config, model.params).A for model in tiny()]
    assert difference(*circuits) < BOUND
    folded = HookedGemma3(*fold_ln(scanned.config, scanned.params), scanned.tokenizer)
    assert "blocks" in folded.params
    assert difference(folded(text), logits) < 1e-4
    again = HookedGemma3(unrolled.config, unrolled.params, unrolled.tokenizer, scan_layers=True)
    assert difference(again(text), logits) < BOUND


def test_generation_and_saving(tmp_path):
    """Generation from stacked parameters writes the same, and files hold an entry for each block."""
    unrolled, scanned = tiny()
    text = "ba ke lo mu ti so re ba ke"
    options = {"max_new_tokens": 4, "names_filter": "blocks.*.hook_resid_post"}
    (wanted, _), (written, found) = unrolled.generate(text, **options), scanned.generate(text, **options)
    assert written == wanted
    assert found.cache.params is scanned.params
    save_params(scanned.config, scanned.params, tmp_path / "saved")
    config, params = load_params(tmp_path / "saved")
    assert jax.tree.structure(params) == jax.tree.structure(unrolled.params)
    export_checkpoint(config, scanned.params, tmp_path / "exported")
    exported = HookedGemma3.from_pretrained(tmp_path / "exported")
    assert worst(params, unrolled.params) == 0
    assert worst(exported.params, unrolled.params) < 1e-6
    again = HookedGemma3.from_pretrained(tmp_path / "saved", scan_layers=True)
    assert jax.tree.structure(again.params) == jax.tree.structure(scanned.params)


def test_what_a_cache_sees_is_right_unscanned_or_not():
    """`past` with stacked parameters, as a caller of forward may have it: the next token's logits are the text's."""
    from gemma3_jax.generation import kv_cache

    config, _, stacked = both()
    names = [f"blocks.{i}.attn.{name}" for i in range(7) for name in ("hook_rot_k", "v.hook_out")]

    @jax.jit
    def run(params):
        _, read = forward(config, params, TOKENS[:, :8], names)
        keys, values = ([read[name] for name in names[i::2]] for i in range(2))
        cache = kv_cache.append(kv_cache.empty_cache(config, jnp.zeros(2, jnp.int32), 9, keys), keys, values)
        past = kv_cache.past(config, cache, 1)
        return forward(config, params, TOKENS[:, 8:], positions=kv_cache.positions(cache, 1), past=past)[0]

    assert difference(run(stacked)[:, 0], plain()[0][:, -1]) < BOUND


def test_captures_are_reduced_in_the_scan():
    """A function for each layer, of results of several shapes, keeps in a scan what it keeps of unrolled layers."""
    config, params, stacked = both()
    direction = np.random.default_rng(3).standard_normal((config.hidden_size, 2)).astype(np.float32)
    wanted = {
        "blocks.0.hook_out": reductions.At(-1),
        "blocks.2.hook_out": [reductions.Project(direction), reductions.At([0, -1])],
        "blocks.4.hook_out": reductions.TopK(3),
        "blocks.6.hook_out": None,
        "blocks.*.mlp.hook_out": reductions.Project(direction),
    }
    run = jax.jit(lambda params, wanted: dict(forward(config, params, TOKENS, wanted)[1]))
    unrolled, scanned = run(params, wanted), run(stacked, wanted)
    assert worst(scanned, unrolled) < BOUND
    # Negative control: one layer's is not another's.
    assert difference(scanned["blocks.0.mlp.hook_out"], unrolled["blocks.2.mlp.hook_out"]) > 1e-2
