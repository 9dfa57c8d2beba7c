"""A model on a mesh of eight devices computes what it computes on one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gemma3_jax import forward, grad_at
from tests.helpers.small_model import difference
from tests.placing.on_meshes import TOKENS, by_rows, config, mesh_of, on, params

BOUND = 1e-5
GRADIENTS = ("blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.1.mlp.hook_post")


def without_a_head(value, hook):
    return value.at[:, :, 3].set(0)


@functools.partial(jax.jit, static_argnums=0)
def everything(config, params, tokens):
    """Logits, every site and the gradients of the parameters; without one head, the loss and gradients at sites."""

    def run(params):
        (logits, loss), cache = forward(config, params, tokens, "**", return_type="both")
        return loss, (logits, dict(cache))

    of_parameters, (logits, sites) = jax.grad(run, has_aux=True)(params)
    edits = {"blocks.0.attn.hook_z": without_a_head}
    loss, edited = grad_at(config, params, tokens, GRADIENTS, edits=edits)
    return {
        "logits": logits,
        "sites": sites,
        "gradients of parameters": of_parameters,
        "edited": (loss, dict(edited)),
        "gradients at sites": dict(edited.grads),
    }


@functools.cache
def on_one_device(g, stacked):
    return everything(config(g), params(g, stacked), jnp.asarray(TOKENS))


@pytest.mark.parametrize("stacked", [False, True], ids=["blocks", "stacked"])
@pytest.mark.parametrize("g", [4, 1])
@pytest.mark.parametrize("model", [1, 4, 8])
def test_a_mesh_changes_no_value(model, g, stacked):
    """Of logits, sites, an edit of one head, and gradients."""
    mesh = mesh_of(model)
    with jax.set_mesh(mesh):
        ours = everything(config(g), on(mesh, g, stacked), by_rows(mesh, TOKENS))
    differences = jax.tree.map(difference, ours, on_one_device(g, stacked))
    assert max(jax.tree.leaves(differences)) < BOUND, differences


def test_negative_control_an_edit_of_a_head_changes_values():
    """The bound is far below what one head adds."""
    whole, name = on_one_device(4, False), "blocks.1.hook_out"
    _, edited = whole["edited"]
    assert difference(edited[name], whole["sites"][name]) > 100 * BOUND
