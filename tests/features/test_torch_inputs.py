"""Torch tensors work wherever a dictionary takes arrays, also in bfloat16."""

import numpy as np
import pytest
import torch

from gemma3_jax import features
from tests.features.small_dictionaries import clt, sae, transcoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [sae, transcoder, clt])
def test_tensors_are_taken(make, dtype):
    """Their features, reconstruction and largest features are those of the same numbers in NumPy."""
    one, layers = make(), make is clt
    weights = one.W_enc[0] if layers else one.W_enc
    shape = (len(one.W_enc), 3, weights.shape[0]) if layers else (3, weights.shape[0])
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).to(dtype)
    x = tensor.float().numpy()
    f = one.encode(tensor)
    assert np.abs(f).max() > 0
    np.testing.assert_array_equal(f, one.encode(x))
    np.testing.assert_array_equal(one(tensor), one(x))
    np.testing.assert_array_equal(one.decode(torch.from_numpy(np.array(f)), tensor), one.decode(f, x))
    for ours, theirs in zip(one.encode_topk(tensor, 2), one.encode_topk(x, 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_strength_may_be_a_tensor():
    """Of `steer`."""
    (_, ours), (_, theirs) = (features.steer(sae(), 3, strength) for strength in (torch.tensor(0.5), 0.5))
    assert ours.scale == theirs.scale
