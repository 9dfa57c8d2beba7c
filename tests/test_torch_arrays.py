"""Torch tensors work where NumPy arrays do, in bfloat16 too, beyond the token ids and masks of `test_inputs`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gemma3_jax import TINY, ActivationCache, FactoredMatrix, HookedGemma3, edits, forward, next_token_loss, reductions

IDS = np.array([[2, 10, 20, 30]])
SITE = "blocks.1.hook_out"


@functools.cache
def tiny():
    return HookedGemma3.from_pretrained(TINY, dtype="float32")


@functools.cache
def captured():
    return tiny().run_with_cache(IDS, ["blocks.1.hook_out", "ln_final.hook_scale"])[1]


def factors(m, n):
    """A product of two numeric factors [m, 3] and [3, n]."""
    return jnp.ones((m, 3)), jnp.ones((3, n))


# Functions of a float array [1, 4, 96]. `alike` makes an integer array of the same library.
TAKERS = {
    "inputs_embeds": lambda x, alike: forward(tiny().config, tiny().params, inputs_embeds=x, stop_at_layer=1)[0],
    "Add": lambda x, alike: tiny().run_with_hooks(IDS, (SITE, edits.Add(x[0, 0]))),
    "Project": lambda x, alike: tiny().run_with_cache(IDS, {SITE: reductions.Project(x[0].T)})[1][SITE],
    "next_token_loss": lambda x, alike: next_token_loss(x, alike([[1, 2, 3, 4]]), alike([[1, 1, 1, 0]])),
    "a cache of these": lambda x, alike: (
        ActivationCache(tiny().config, {SITE: x}).with_inputs(alike(IDS), alike([[0, 1, 1, 1]])).real(SITE)
    ),
    "such a cache in host memory": lambda x, alike: ActivationCache(tiny().config, {SITE: x}).numpy()[SITE],
    "logit_attrs": lambda x, alike: captured().logit_attrs(x[None], alike([5])),
    "apply_ln_to_stack": lambda x, alike: captured().apply_ln_to_stack(x[None]),
    "FactoredMatrix": lambda x, alike: FactoredMatrix(x[0], x[0].T).norm(),
    "FactoredMatrix @ it": lambda x, alike: (FactoredMatrix(*factors(7, 4)) @ x[0]).AB,
    "it @ FactoredMatrix": lambda x, alike: (x[0] @ FactoredMatrix(*factors(96, 5))).AB,
    "FactoredMatrix * it": lambda x, alike: (FactoredMatrix(*factors(2, 2)) * x[0, 0, 0]).AB,
    "FactoredMatrix[it]": lambda x, alike: FactoredMatrix(x, jnp.ones((1, 96, 2)))[alike([0])].AB,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("taker", TAKERS)
def test_a_tensor_is_taken_as_the_array(taker, dtype):
    """The results are bit for bit those of NumPy arrays with the same values and dtypes, and never tensors."""
    tensor = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    array = tensor.float().numpy().astype(jnp.dtype(dtype))
    ours = TAKERS[taker](array, np.asarray)
    theirs = TAKERS[taker](tensor, lambda values: torch.as_tensor(np.asarray(values)))
    assert isinstance(theirs, jax.Array | np.ndarray)
    assert theirs.dtype == ours.dtype
    np.testing.assert_array_equal(theirs, ours)
    # Negative control: other values give another result.
    assert not np.array_equal(TAKERS[taker](2 * array + 1, np.asarray), ours)
