"""A function means what Python says it means at every call: nothing that it read before is used again."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.tree_util import Partial

from gemma3_jax import HookedGemma3, analysis, edits, patching
from gemma3_jax.run import compiled as compiled_module
from gemma3_jax.run.compiled import KEPT
from tests.helpers.programs import programs
from tests.helpers.small_model import TOKENS, assert_same, direction, forward, run, same, small

SITE = "blocks.0.hook_out"
FACTOR = 1.0
SETTINGS = types.SimpleNamespace(factor=1.0)


class Counter:
    """A callable object, with a method, an attribute of its own and one of its class."""

    shared = 1.0

    def __init__(self):
        self.factor = 1.0

    def __call__(self):
        return self.factor

    def method(self):
        return self.factor

    def of_class(self):
        return Counter.shared


def read_global():
    return FACTOR


def of_global():
    def set_to(value):
        global FACTOR
        FACTOR = value

    return read_global, set_to


def of_cell():
    factor = 1.0

    def set_to(value):
        nonlocal factor
        factor = value

    return lambda: factor, set_to


def of_default():
    def read(factor=1.0):
        return factor

    def set_to(value):
        read.__defaults__ = (value,)

    return read, set_to


def of_object(attribute):
    counter = Counter()
    return getattr(counter, attribute), functools.partial(setattr, counter, "factor")


def of_class():
    return Counter().of_class, functools.partial(setattr, Counter, "shared")


def of_module():
    return lambda: SETTINGS.factor, functools.partial(setattr, SETTINGS, "factor")


def of_container(container):
    return lambda: container["factor"], functools.partial(container.__setitem__, "factor")


def of_list():
    values = [1.0]
    return lambda: values[-1], values.append


def of_array(make):
    array = make()

    def set_to(value):
        array[...] = value

    return lambda: array, set_to


def of_partial():
    values = [1.0]
    return functools.partial(lambda values: values[0], values), functools.partial(values.__setitem__, 0)


def of_jax_array():
    values = [jnp.float32(1)]
    return lambda: values[0], lambda value: values.__setitem__(0, jnp.float32(value))


STATES = {
    "global": of_global,
    "closure cell": of_cell,
    "default argument": of_default,
    "callable object": lambda: of_object("__call__"),
    "bound method": lambda: of_object("method"),
    "class attribute": of_class,
    "attribute of a module": of_module,
    "dict": lambda: of_container({"factor": 1.0}),
    "list": of_list,
    "functools.partial": of_partial,
    "NumPy array": lambda: of_array(lambda: np.ones(1, np.float32)),
    "NumPy array of float64": lambda: of_array(lambda: np.ones(1)),
    "torch tensor": lambda: of_array(lambda: torch.ones(1)),
    "scalar of JAX": of_jax_array,
}


@functools.cache
def model():
    return HookedGemma3(*small())


def scaled(read):
    """A hook that reads its factor."""
    return lambda value, hook: value * read()


def first_logit(read):
    """A metric that reads its factor."""
    return lambda logits: logits[0, -1, 7] * read()


# For each entry a call that uses the function; its result is to follow the factor.
ENTRIES = {
    "run_with_hooks": lambda read: model().run_with_hooks(TOKENS, [(SITE, scaled(read))]),
    "run_with_hooks by glob": lambda read: model().run_with_hooks(TOKENS, [("blocks.*.hook_out", scaled(read))]),
    "run_with_hooks by path": lambda read: model().run_with_hooks(
        TOKENS, [("model.layers.0.mlp.gate_proj.output", scaled(read))]
    ),
    "a restricted edit": lambda read: model().run_with_hooks(
        TOKENS, [("blocks.*.hook_out", edits.only(scaled(read), layer=0, positions=[1, 2]))]
    ),
    "a Partial over it": lambda read: model().run_with_hooks(TOKENS, [(SITE, Partial(scaled(read)))]),
    "names_filter": lambda read: model().run_with_cache(TOKENS, {SITE: scaled(read)})[1][SITE],
    "a list of reductions": lambda read: model().run_with_cache(TOKENS, {SITE: [scaled(read), jnp_mean]})[1][SITE],
    "loss_fn": lambda read: (
        model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=first_logit(read))[1].grads[SITE]
    ),
    "activations": lambda read: next(model().activations([TOKENS], {SITE: scaled(read)}))[SITE],
    "sweep, edits": lambda read: analysis.sweep(
        model(), TOKENS, lambda item: {SITE: edits.Scale(item * read())}, np.ones(2, np.float32), lambda x: x[0, -1, 7]
    ),
    "sweep, function in edits": lambda read: analysis.sweep(
        model(),
        TOKENS,
        lambda item: {SITE: lambda value, hook: value * item * read()},
        np.ones(2),
        lambda x: x[0, -1, 7],
    ),
    "sweep, metric": lambda read: analysis.sweep(
        model(), TOKENS, lambda item: {SITE: edits.Scale(item)}, np.ones(2, np.float32), first_logit(read)
    ),
    "patching": lambda read: patching.get_act_patch_resid_pre(model(), TOKENS, TOKENS + 1, first_logit(read)),
    "path patching": lambda read: analysis.path_patching(
        model(), TOKENS, TOKENS + 1, first_logit(read), [("logits",)], [("embed",)]
    ),
    "attribution": lambda read: analysis.attribution_patching(
        model(), TOKENS, TOKENS + 1, first_logit(read), "resid_pre", ("layer", "pos")
    ),
    "edge attribution": lambda read: analysis.edge_attribution(model(), TOKENS, TOKENS + 1, first_logit(read)),
    "integrated gradients": lambda read: analysis.integrated_gradients(
        model(), TOKENS, "hook_embed", first_logit(read), steps=2
    )[0],
    "generate": lambda read: (
        model()
        .generate(TOKENS, 3, fwd_hooks=[(SITE, scaled(read))], return_logits=True, stop_at_eos=False)[1]
        .log_probs
    ),
    "forward": lambda read: forward(*small(), TOKENS, edits={SITE: scaled(read)})[0],
}


def jnp_mean(value, hook):
    return jnp.mean(value, axis=1)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_hook_reads_its_state_at_every_call(state):
    """Wherever the factor is kept, a new value acts at once, and the old one comes back with it."""
    read, set_to = state()
    expected = {factor: run(edits={SITE: edits.Scale(factor)})[0] for factor in (1.0, 3.0)}
    for factor in (1.0, 3.0, 1.0):
        set_to(factor)
        assert_same(model().run_with_hooks(TOKENS, [(SITE, scaled(read))]), expected[factor])
    assert not same(expected[1.0], expected[3.0], 1e-2)  # control
    set_to(1.0)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_entry_reads_functions_at_every_call(entry):
    """One function object, whose factor changes: each result is that of a function that never had another factor."""
    values = [1.0]
    once = entry(lambda: values[0])
    values[0] = 3.0
    changed = entry(lambda: values[0])
    assert_same(changed, entry(lambda: 3.0), 1e-5)
    assert not same(once, changed, 1e-3)


def test_the_same_function_object_at_every_entry():
    """Not only a fresh closure: the very same object, of which JAX remembers what it computed."""
    values = [1.0]

    def hook(value, hook):
        return value * values[0]

    def metric(logits):
        return logits[0, -1, 7] * values[0]

    def one_edit(item):
        return {SITE: edits.Scale(item * values[0])}

    def all_of_them():
        return (
            model().run_with_hooks(TOKENS, [(SITE, hook)]),
            model().run_with_cache(TOKENS, {SITE: hook})[1][SITE],
            model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=metric)[0],
            analysis.sweep(model(), TOKENS, one_edit, np.ones(2, np.float32), lambda x: x[0, -1, 7]),
            analysis.sweep(model(), TOKENS, lambda item: {SITE: edits.Scale(item)}, np.ones(2, np.float32), metric),
            patching.get_act_patch_resid_pre(model(), TOKENS, TOKENS + 1, metric),
            analysis.attribution_patching(model(), TOKENS, TOKENS + 1, metric, "resid_pre", ("layer", "pos")),
            model().generate(TOKENS, 2, fwd_hooks=[(SITE, hook)], return_logits=True, stop_at_eos=False)[1].log_probs,
        )

    once, values[0] = all_of_them(), 2.0
    for before, after in zip(once, all_of_them(), strict=True):
        assert not same(before, after, 1e-3)
    values[0] = 1.0
    for before, after in zip(once, all_of_them(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_random_numbers_are_drawn_at_every_call():
    """A generator of NumPy's gives a hook other noise in each run, and other noise in each layer."""
    rng = np.random.default_rng(0)

    def noise(value, hook):
        return value + rng.normal(size=value.shape)

    def noisy():
        return model().run_with_hooks(TOKENS, [("blocks.*.hook_out", noise)])

    before = noisy()
    compiled = programs()
    assert not same(before, noisy(), 1e-3)
    assert programs() == compiled  # the noise is data


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray, torch.tensor, np.float64], ids=lambda kind: kind.__name__)
def test_a_fresh_lambda_over_another_array_compiles_nothing(kind):
    """The README's loop over vectors, twenty times: one program."""
    compiled_module._program.cache_clear()
    expected, compiled = [], None
    for seed in range(20):
        vector = kind(direction(seed))
        steered = model().run_with_hooks(TOKENS, [(SITE, lambda z, hook, vector=vector: z + vector)])
        compiled = programs() if compiled is None else compiled
        expected.append((steered, direction(seed)))
    assert programs() == compiled
    for steered, vector in expected[:3]:
        assert_same(steered, run(edits={SITE: edits.Add(vector)})[0])
    model().run_with_hooks(TOKENS, [(SITE, lambda z, hook: z - vector)])
    assert programs() == compiled + 1  # control: other code


def test_a_loop_over_a_coefficient_compiles_once():
    """Numbers that scale, shift, bound or replace are data, in hooks, reductions and metrics; an exponent is not."""
    compiled_module._program.cache_clear()
    vector = direction()

    def at_each_coefficient(make, coefficients=(0.0, 5.0, 50.0)):
        before = programs()
        found = [make(coefficient) for coefficient in coefficients]
        assert not same(*found[-2:], 1e-4)
        return programs() - before

    def hooked(function):
        return lambda c: model().run_with_hooks(TOKENS, [(SITE, lambda value, hook: function(value, c))])

    for function in (
        lambda value, c: value + c * vector,
        lambda value, c: value * c - 1.0,
        lambda value, c: value / (c + 2.0),
        lambda value, c: jnp.where(value > c / 100, value, c),
        lambda value, c: jnp.clip(value, -c / 50, c / 50),
        lambda value, c: jnp.maximum(value, c / 50),
    ):
        assert at_each_coefficient(hooked(function)) == 1
    assert at_each_coefficient(hooked(lambda value, c: jnp.abs(value) ** (c + 0.5)), (1.0, 2.0)) == 2  # control
    assert at_each_coefficient(lambda c: model().run_with_cache(TOKENS, {SITE: lambda v, hook: v * c})[1][SITE]) == 1
    assert at_each_coefficient(lambda c: ENTRIES["sweep, metric"](lambda: c + 1)) <= 3


def test_programs_that_nobody_uses_are_dropped():
    """Three hundred different hooks leave the documented number of programs, and the oldest must compile again."""

    def shifted(i):
        # An exponent is a constant of the program; a number that is added would be an input.
        return model().run_with_hooks(
            TOKENS, [("embed.hook_in", lambda ids, hook: ids ** (i + 1) % 101)], stop_at_layer=0
        )

    first = shifted(0)
    for i in range(1, KEPT + 10):
        shifted(i)
    assert compiled_module._program.cache_info().currsize == KEPT
    before = programs()
    shifted(KEPT + 9)
    assert programs() == before
    np.testing.assert_array_equal(shifted(0), first)
    assert programs() == before + 1
