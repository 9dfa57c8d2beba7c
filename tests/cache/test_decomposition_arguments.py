"""Decompositions: labels, stacks of one site, and one error for each missing capture or bad argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import ActivationCache
from gemma3_jax.cache.residual import HEADS, NEURONS, RESIDUAL
from tests.cache.captured import D, F, H, captured
from tests.helpers.small_model import LAYERS


def test_stack_activation():
    """One site of all layers, or of the first ones, with the part where its name needs one."""
    cache = captured()
    np.testing.assert_array_equal(cache.stack_activation("z"), jnp.stack([cache["z", 0], cache["z", 1]]))
    np.testing.assert_array_equal(cache.stack_activation("resid_pre", 1), cache["resid_pre", 0][None])
    scale = cache.stack_activation("scale", -1, "ln2")
    np.testing.assert_array_equal(scale, jnp.stack([cache["scale", 0, "ln2"], cache["scale", 1, "ln2"]]))


def test_labels():
    """TransformerLens' labels, in the order of the stack."""
    cache = captured("bias")
    heads = [f"L{i}H{head}" for i in range(LAYERS) for head in range(H)]
    assert cache.stack_head_results(return_labels=True)[1] == heads
    assert cache.stack_neuron_results(1, None, [7, -1], return_labels=True)[1] == ["L0N7", f"L0N{F - 1}"]
    labels = cache.get_full_resid_decomposition(1, True, False, return_labels=True)[1]
    assert labels == [*heads, "0_mlp_out", "embed", "0_attn_bias", "1_attn_bias"]


def test_what_was_not_captured_is_listed_at_once():
    """One error with every name, and each method is content with the sets of names that it asks for."""
    cache = captured()
    everything = dict(cache)

    def holding(*globs):
        kept = {name: everything[name] for name in everything if any(fits(name, glob) for glob in globs)}
        return ActivationCache(cache.config, kept, cache.params)

    residual, heads, neurons = holding(*RESIDUAL), holding(*HEADS), holding(*NEURONS)
    residual.accumulated_resid(incl_mid=True, apply_ln=True)
    residual.logit_attrs(residual.decompose_resid(1, True, apply_ln=True), 5)
    heads.stack_head_results()
    heads.compute_head_results()
    neurons.stack_neuron_results()
    holding(*RESIDUAL, *HEADS).stack_head_results(incl_remainder=True, apply_ln=True)
    holding(*RESIDUAL, *HEADS, *NEURONS).get_full_resid_decomposition(apply_ln=True)
    for call, names in (
        (
            lambda: heads.get_full_resid_decomposition(apply_ln=True),
            [*NEURONS, "embed.hook_out", "ln_final.hook_scale"],
        ),
        (
            lambda: heads.stack_head_results(1, incl_remainder=True, apply_ln=True),
            ["blocks.1.hook_in", "blocks.1.ln1.hook_scale"],
        ),
        (lambda: neurons.stack_head_results(1), ["blocks.0.attn.o.hook_in", "blocks.0.ln1_post.hook_scale"]),
        (lambda: neurons.compute_head_results(), ["blocks.*.attn.o.hook_in"]),
        (lambda: neurons.neuron_logit_attrs(5), ["ln_final.hook_scale"]),
        (lambda: heads.logit_attrs(jnp.zeros((1, 2, 9, D)), 5), ["ln_final.hook_scale"]),
        (lambda: heads.stack_activation("q"), ["blocks.*.attn.q.hook_out"]),
    ):
        with pytest.raises(KeyError, match="names_filter") as caught:
            call()
        listed = caught.value.args[0].removeprefix("not captured: ").split(";")[0].split(", ")
        assert sorted(listed) == sorted(names)


def fits(name: str, glob: str) -> bool:
    return name == glob or (glob.startswith("blocks.*") and name.split(".", 2)[2:] == glob.split(".", 2)[2:])


def test_weights_that_are_not_there():
    """A cache without parameters says how to give it some; what needs none works without."""
    cache = jax.tree.map(jnp.asarray, captured())
    assert cache.params is None
    cache.decompose_resid()
    cache.accumulated_resid()
    for call in (cache.stack_head_results, cache.stack_neuron_results, lambda: cache.decompose_resid(apply_ln=True)):
        with pytest.raises(ValueError, match=r"with_params\(params\)"):
            call()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("decompose_resid", {"layer": 3}, "it must be 0 to 2"),
        ("decompose_resid", {"layer": -2}, "it must be 0 to 2"),
        ("decompose_resid", {"mlp_input": True}, "final norm"),
        ("accumulated_resid", {"layer": 2, "mlp_input": True}, "final norm"),
        ("decompose_resid", {"mode": "heads"}, "it must be 'all', 'mlp' or 'attn'"),
        ("decompose_resid", {"layer": 0, "incl_embeds": False}, "before layer 0"),
        ("stack_head_results", {"layer": 0}, "before layer 0"),
        ("stack_activation", {"activation_name": "z", "layer": 0}, "before layer 0"),
        ("get_neuron_results", {"layer": 2}, "no layer 2"),
        ("get_neuron_results", {"layer": 0, "neuron_slice": F}, f"out of range for {F} entries"),
        ("stack_neuron_results", {"layer": 1, "neuron_slice": [0, F]}, f"out of range for {F} entries"),
        ("accumulated_resid", {"pos_slice": 9}, "out of range for 9 entries"),
        ("accumulated_resid", {"pos_slice": slice(9, None)}, "selects none of the 9"),
    ],
)
def test_arguments_out_of_range(method, arguments, message):
    """Are errors that say what there is; JAX itself would clamp an index to the last position."""
    with pytest.raises(ValueError, match=message):
        getattr(captured(), method)(**arguments)


def test_a_stack_of_other_features_is_refused():
    """One feature broadcast to all."""
    cache = captured()
    stack = cache.decompose_resid()
    for call in (cache.apply_ln_to_stack, lambda x: cache.apply_ln_to_stack(x, recompute_ln=True)):
        call(stack)  # control
        with pytest.raises(ValueError, match="must be vectors"):
            call(stack[..., :1])
    with pytest.raises(ValueError, match="must be vectors"):
        cache.logit_attrs(stack[..., :1], 3)
