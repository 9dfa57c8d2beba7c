"""Functions that a user's function calls through JAX, subclasses of ready-made edits, and arrays that change."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import HookedGemma3, edits, reductions
from gemma3_jax.hooks.tracing import traced
from tests.helpers.programs import programs
from tests.helpers.small_model import TOKENS, assert_same, run, same, small

SITE = "blocks.0.hook_out"
FACTOR = 1.0


@functools.cache
def model():
    return HookedGemma3(*small())


def with_factor(value):
    global FACTOR
    FACTOR = value
    return value


def scaled(value):
    return value * FACTOR


class Scaled:
    def __call__(self, value):
        return value * FACTOR


def body(value, _):
    return value * FACTOR, None


def counted(state):
    return state[0] + 1, state[1] * FACTOR


jitted, jitted_object = jax.jit(scaled), jax.jit(Scaled())
jitted_partial, jitted_map = jax.jit(functools.partial(scaled)), jax.jit(jax.vmap(scaled))

# JAX keeps the trace of each of these functions by its identity.
CALLS = {
    "jit": jitted,
    "jit of an object": jitted_object,
    "jit of a partial": jitted_partial,
    "jit of vmap": jitted_map,
    "jit in jit": lambda value: jax.jit(lambda x: jitted(x))(value),
    "scan": lambda value: jax.lax.scan(body, value, None, length=1)[0],
    "fori_loop": lambda value: jax.lax.fori_loop(0, 1, lambda i, x: scaled(x), value),
    "while_loop": lambda value: jax.lax.while_loop(lambda s: s[0] < 1, counted, (0, value))[1],
    "cond": lambda value: jax.lax.cond(jnp.sum(value) > -1e9, scaled, jnp.negative, value),
    "switch": lambda value: jax.lax.switch(0, [scaled, jnp.negative], value),
    "map": lambda value: jax.lax.map(scaled, value),
    "checkpoint": jax.checkpoint(scaled),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_function_called_through_jax_reads_its_state_at_every_call(call):
    """A global that the body of a loop or a jitted helper reads; once, the first factor stayed for ever."""
    for factor in (1.0, 3.0, 1.0):
        with_factor(factor)
        steered = model().run_with_hooks(TOKENS, [(SITE, lambda value, hook: call(value))])
        assert_same(steered, run(edits={SITE: edits.Scale(factor)})[0])
    with_factor(1.0)


def test_metrics_and_reductions_that_call_through_jax():
    """The same in the other functions that a run takes."""

    def values():
        _, cache = model().run_with_cache(TOKENS, {SITE: lambda value, hook: jitted(value)})
        loss, _ = model().run_with_cache(TOKENS, SITE, incl_bwd=True, loss_fn=lambda logits: jitted(logits)[0, -1, 7])
        return cache[SITE], loss

    with_factor(1.0)
    once = values()
    with_factor(3.0)
    for before, after in zip(once, values(), strict=True):
        assert_same(after, 3 * before)
    with_factor(1.0)


def test_a_function_called_through_jax_compiles_once():
    """It is traced anew, and the program stays the same; JAX's own functions are found in its caches."""
    with_factor(1.0)
    hook = CALLS["scan"]
    compiled = []
    for vector in np.eye(3, small()[0].hidden_size, dtype=np.float32):
        model().run_with_hooks(TOKENS, [(SITE, lambda value, _, vector=vector: hook(value) + vector)])
        compiled.append(programs())
    assert len(set(compiled)) == 1
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    calls = []

    def counts(value):
        calls.append(None)
        return jax.nn.softmax(jnp.where(value > 0, value, 0))

    traced(counts, shape, where="the test")
    assert len(calls) == 1
    traced(lambda value: jitted(counts(value)), shape, where="the test")
    assert len(calls) == 3  # control: with a function that JAX does not know


@flax.struct.dataclass
class Mine(edits.Scale):
    """Reads a global, unlike the edit that it extends."""

    def __call__(self, value, hook):
        return value * FACTOR


@flax.struct.dataclass
class MineOnly(edits.Only):
    def __call__(self, value, hook):
        return value * FACTOR


@flax.struct.dataclass
class MineTopK(reductions.TopK):
    def __call__(self, value, hook):
        return value * FACTOR


@pytest.mark.parametrize("edit", [Mine(1.0), MineOnly(edits.Scale(1.0)), edits.only(Mine(1.0), layer=0)])
def test_a_subclass_of_a_ready_made_edit_reads_its_state_at_every_call(edit):
    """It may read anything, so it is a function like any other."""
    for factor in (1.0, 3.0):
        with_factor(factor)
        assert_same(model().run_with_hooks(TOKENS, [(SITE, edit)]), run(edits={SITE: edits.Scale(factor)})[0])
    with_factor(1.0)


def test_a_subclass_of_a_ready_made_reduction_reads_its_state_at_every_call():
    """As edits."""
    with_factor(1.0)
    once = model().run_with_cache(TOKENS, {SITE: MineTopK(1)})[1][SITE]
    with_factor(3.0)
    assert_same(model().run_with_cache(TOKENS, {SITE: MineTopK(1)})[1][SITE], 3 * once)
    with_factor(1.0)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
@pytest.mark.parametrize("ready", [False, True], ids=["function", "ready-made"])
def test_an_array_that_changes_after_the_call_does_not_change_the_result(make, ready):
    """A program runs in the background: it read NumPy's memory after `vector[i] = 0` of the caller's next iteration."""
    tokens = np.tile(np.arange(3, 99, dtype=np.int32), (16, 4))
    expected = model()(tokens, logits_at=-1)
    site = f"blocks.{small()[0].num_hidden_layers - 1}.hook_out"
    for _ in range(3):
        array = make((*tokens.shape, small()[0].hidden_size))
        edit = edits.Add(array) if ready else lambda value, hook, array=array: value + array
        out = model().run_with_hooks(tokens, [(site, edit)], logits_at=-1)
        array[...] = 1e3
        assert same(out, expected, 1e-3)
