"""What the compiled programs of a mesh do: how often devices talk to each other, and how much each computes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma3_jax import forward, meshes
from gemma3_jax.compute import platforms
from gemma3_jax.generation.decode import go_on, read
from gemma3_jax.generation.loop import begin
from gemma3_jax.generation.sampling import draw, row_keys, sampling
from tests.placing.on_meshes import LAYERS, TOKENS, by_rows, collectives, config, mesh_of, on, params, size_of


def compiled_forward(mesh, g, tokens, dtype="float32", stacked=False):
    """The program of a plain forward pass; a new one at each call."""
    run = jax.jit(lambda params, tokens: forward(config(g), params, tokens)[0])
    return run.lower(on(mesh, g, stacked, dtype), by_rows(mesh, tokens)).compile()


def adds_up_twice_a_layer(program, b, p, passes=2 * LAYERS + 1):
    """Whether the program adds up [b, p, d] once for the embedding and twice in each layer, and moves little else."""
    found = collectives(program)
    residual = ("all-reduce", f"f32[{b},{p},{config(1).hidden_size}]")
    most = b * config(1).vocab_size * 4 // 8  # the logits of one device
    return found.pop(residual, 0) == passes and all(size_of(shape) <= most for _, shape in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("g", [4, 1])
@pytest.mark.parametrize("tokens", [TOKENS[:2], TOKENS[:1, :1]], ids=["a prompt", "one token"])
def test_forward_adds_up_twice_a_layer(tokens, g, dtype):
    """With parameters that are placed, whether or not a mesh is set; key heads that no mesh divides cost nothing."""
    assert adds_up_twice_a_layer(compiled_forward(mesh_of(8), g, tokens, dtype), *tokens.shape)


def test_a_scan_adds_up_twice_in_its_body():
    """So stacked parameters are not gathered."""
    program = compiled_forward(mesh_of(8), 4, TOKENS[:2], stacked=True)
    assert adds_up_twice_a_layer(program, 2, TOKENS.shape[1], passes=3)


@pytest.mark.parametrize(
    ("g", "dtype", "b"), [(4, "float32", 2), (4, "bfloat16", 1), (1, "bfloat16", 2), (1, "float32", 1)]
)
def test_generation_adds_up_twice_a_layer(g, dtype, b):
    """Reading a prompt and writing tokens; the KV cache is not gathered."""
    prompt, new, mesh = TOKENS[:b, :8], 8, mesh_of(8)
    with jax.set_mesh(mesh):
        task, text, bounds = begin(config(g), on(mesh, g, dtype=dtype), prompt, new)
        reading = jax.jit(functools.partial(read, new=new)).lower(
            bounds.params, task, jnp.asarray(prompt), jnp.zeros(b, jnp.int32)
        )
        writing = jax.jit(go_on).lower(bounds.params, task, text, jnp.int32(new - 1))
    assert adds_up_twice_a_layer(reading.compile(), b, prompt.shape[1])
    assert adds_up_twice_a_layer(writing.compile(), b, 1)


def collectives_of(draw_token, b=2, v=1024):
    """Those of a function of logits, [b, v], whose vocabulary is cut over the eight devices, and of the rows' keys."""
    cut = NamedSharding(mesh_of(8), PartitionSpec(None, "model"))
    logits = jax.ShapeDtypeStruct((b, v), jnp.float32, sharding=cut)
    return collectives(jax.jit(draw_token).lower(logits, row_keys(0, b)).compile())


def test_sampling_gathers_no_logits():
    """Every filter, and the draw itself, find their token by sums over the devices of a few numbers a row."""
    how = sampling(2, temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    found = collectives_of(lambda logits, keys: draw(logits, logits > 1, keys, how))
    assert found
    assert max(size_of(shape) for _, shape in found) < 2 * 1024 * 4 / 8
    sorting = collectives_of(lambda logits, keys: jnp.sort(logits))  # the negative control
    assert max(size_of(shape) for _, shape in sorting) >= 2 * 1024 * 4 / 8


def test_rows_are_shared_out():
    """On a mesh of data alone, each device computes an eighth, and no device waits for another."""
    one = jax.jit(lambda params, tokens: forward(config(4), params, tokens)[0]).lower(params(4), TOKENS).compile()
    program = compiled_forward(mesh_of(1), 4, TOKENS)
    assert 8 * flops(program) == pytest.approx(flops(one), rel=0.05)
    assert not collectives(program)


def test_negative_control_rows_that_are_not_placed():
    """Each device then computes everything, and the check of flops sees it."""
    placed, whole = (flops(compiled_forward(mesh_of(1), 4, tokens)) for tokens in (TOKENS, TOKENS[:7]))
    assert 8 / 7 * whole > 7 * placed


@pytest.mark.parametrize("wrong", [{"h": None}, {"f": None}, {"h": None, "e": "model"}])
def test_negative_control_a_wrong_table(monkeypatch, wrong):
    """The check of collectives sees it."""
    for letter, axis in wrong.items():
        monkeypatch.setitem(meshes.MESH_AXES, letter, axis)
    assert not adds_up_twice_a_layer(compiled_forward(mesh_of(8), 1, TOKENS[:2]), 2, TOKENS.shape[1])


def test_negative_control_forms_for_one_cpu(monkeypatch):
    """On a mesh, the forms of products of one row would gather their weights."""
    monkeypatch.setattr(platforms, "several_devices", lambda *arrays: False)
    assert not adds_up_twice_a_layer(compiled_forward(mesh_of(8), 4, TOKENS[:1, :1]), 1, 1)


def flops(program):
    return program.cost_analysis()["flops"]
