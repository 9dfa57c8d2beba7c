"""Captures, edits and parts of a run in a scan over layers: each is the unrolled model's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import (
    edits,
    forward,
    reductions,
    site_names,
    stack_layers,
)
from gemma3_jax.compute.attention import SHORT
from gemma3_jax.model.scan import PER_HEAD, SCORES
from tests.helpers.random_models import random_tokens
from tests.helpers.small_model import LEFT_PADDED, TOKENS, difference, nudge
from tests.model.stacked_model import BOUND, IN_BLOCK, MIDDLE, Nudge, both, compiled, exchanged, plain, worst


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
