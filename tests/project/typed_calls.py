"""Read by mypy in test_types.py, and never run: the types that calls have in a user's code."""

from typing import assert_type

import jax
import numpy as np

from gemma3_jax import ActivationCache, Gemma3Config, HookedGemma3, features, forward
from gemma3_jax.types import Params

Both = tuple[jax.Array, jax.Array]


def of_a_run(model: HookedGemma3) -> None:
    """`return_type` gives the type of the result."""
    assert_type(model("a text"), jax.Array)
    assert_type(model("a text", return_type="loss"), jax.Array)
    assert_type(model("a text", "both"), Both)
    assert_type(model("a text", None), None)


def of_captures(model: HookedGemma3) -> None:
    """So it does with captures."""
    assert_type(model.run_with_cache("a text"), tuple[jax.Array, ActivationCache])
    assert_type(model.run_with_cache("a text", "**", return_type="loss"), tuple[jax.Array, ActivationCache])
    assert_type(model.run_with_cache("a text", "**", return_type="both"), tuple[Both, ActivationCache])
    assert_type(model.run_with_cache("a text", "**", return_type=None), tuple[None, ActivationCache])


def of_gradients(model: HookedGemma3) -> None:
    """With `incl_bwd`, the result is the value of the loss."""
    assert_type(model.run_with_cache("a text", "**", incl_bwd=True), tuple[jax.Array, ActivationCache])


def of_edits(model: HookedGemma3) -> None:
    """With `names_filter`, a run with edits returns its captures too."""
    assert_type(model.run_with_hooks("a text"), jax.Array)
    assert_type(model.run_with_hooks("a text", return_type="both"), Both)
    assert_type(model.run_with_hooks("a text", return_type=None), None)
    assert_type(model.run_with_hooks("a text", names_filter="**"), tuple[jax.Array, ActivationCache])
    assert_type(model.run_with_hooks("a text", names_filter="**", return_type="both"), tuple[Both, ActivationCache])


def of_forward(config: Gemma3Config, params: Params, tokens: jax.Array) -> None:
    """The pure function has the same types."""
    assert_type(forward(config, params, tokens), tuple[jax.Array, ActivationCache])
    assert_type(forward(config, params, tokens, return_type="both"), tuple[Both, ActivationCache])
    assert_type(forward(config, params, tokens, return_type=None), tuple[None, ActivationCache])


def of_inputs(model: HookedGemma3, ids: np.ndarray) -> None:
    """Ids and masks may be arrays or lists."""
    model([[2, 3]], attention_mask=[[1, 1]], logits_at=-1)
    model(ids, attention_mask=np.ones_like(ids), positions=ids)


def of_features(model: HookedGemma3, sae: features.SparseAutoencoder, values: np.ndarray) -> None:
    """What `splice`, `steer` and `train` return can be passed on, without a cast."""
    edits = [features.splice(sae, ablate=[3], only={"phase": "generation"}), features.steer(sae, 3, 0.5)]
    assert_type(model.run_with_hooks("a text", edits), jax.Array)
    features.save(features.train(values, 16, site_in="blocks.1.hook_out"), "sae")


def mistakes(model: HookedGemma3, sae: features.SparseAutoencoder) -> None:
    """Negative controls: mypy reports each of these lines, or `unused-ignore`."""
    assert_type(model("a text", "both"), jax.Array)  # error: assert-type
    assert_type(model.run_with_cache("a text"), jax.Array)  # error: assert-type
    model.run_with_cache("a text", "**", return_type="both", incl_bwd=True)  # error: call-overload
    model("a text", return_type="losses")  # error: call-overload
    model("a text", stop_at_layer="first")  # error: call-overload
    features.splice(sae, only={"phase": "prompts"})  # error: arg-type
    features.splice(sae, only={"layers": 3})  # error: arg-type
