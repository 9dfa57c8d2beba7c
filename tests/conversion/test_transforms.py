"""The steps of conversion: those that move values are exact, and 1 + w comes back as near as float32 allows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_jax.conversion import transforms
from tests.conversion.key_map import BITS, DTYPES, bits


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    step_and_shape=st.sampled_from(
        [
            (transforms.Keep(), lambda n, h, m: (n, m)),
            (transforms.Transpose(), lambda n, h, m: (n, m)),
            (lambda n: transforms.Rearrange("(n h) m -> n m h", n), lambda n, h, m: (n * h, m)),
            (lambda n: transforms.Rearrange("m (n h) -> n h m", n), lambda n, h, m: (m, n * h)),
            (lambda n: transforms.Rearrange("(n h) -> n h", n), lambda n, h, m: (n * h,)),
        ]
    ),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_moving_steps_are_exact(dtype, step_and_shape, sizes, seed):
    """Any bits at all, NaN payloads and -0 included, come back from every step that only moves values."""
    step, shape = step_and_shape
    step, shape = step if isinstance(step, transforms.Keep | transforms.Transpose) else step(sizes[0]), shape(*sizes)
    tensor = np.random.default_rng(seed).integers(0, 2 ** (8 * dtype.itemsize), shape).astype(BITS[dtype.itemsize])
    tensor = tensor.view(dtype)
    back = step.revert(step.convert(tensor))
    assert back.dtype == step.convert(tensor).dtype == dtype
    np.testing.assert_array_equal(bits(back), bits(tensor))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2.0**-16), ("float16", 2.0**-13)])
def test_add_one_on_every_16_bit_weight(dtype, bound):
    """Over all finite values: exact from the stated bound on, the same 1 + w below it, and the bound is tight."""
    weights = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    weights = weights[np.isfinite(weights.astype(np.float32))]
    step = transforms.AddOne()
    back = step.revert(step.convert(weights)).astype(weights.dtype)
    exact = bits(back) == bits(weights)
    large = np.abs(weights.astype(np.float64)) >= bound
    assert step.convert(weights).dtype == np.float32
    assert exact[large].all()
    assert not exact[~large].all()
    np.testing.assert_array_equal(step.convert(back), step.convert(weights))


@given(st.lists(st.floats(-(2.0**20), 2.0**20, width=32) | st.floats(-2.0, 2.0, width=32), min_size=1))
@settings(deadline=None)
def test_add_one_on_float32_weights(values):
    """What comes back is within half a unit in the last place of 1 + w, and converts to the same 1 + w."""
    weights, step = np.array(values, np.float32), transforms.AddOne()
    converted = step.convert(weights)
    back = step.revert(converted)
    change = np.abs(back.astype(np.float64) - weights)
    assert (change <= np.spacing(np.abs(converted)).astype(np.float64) / 2).all()
    assert (change[np.abs(weights) < 1] <= 2.0**-24).all()
    np.testing.assert_array_equal(step.convert(back), converted)
