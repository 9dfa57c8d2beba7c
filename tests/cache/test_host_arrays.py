"""bfloat16 in host memory and on disk: `cache.numpy(dtype=)`, `cache.save`, and what `np.save` does to it."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma3_jax import ActivationCache, Gemma3Config

CONFIG = Gemma3Config.preset("270m")
SITE, IDS = "blocks.0.hook_out", "embed.hook_in"


def cache():
    values = {IDS: jnp.ones((1, 2), jnp.int32), SITE: jnp.full((1, 2, 640), 1 / 3, jnp.bfloat16)}
    return ActivationCache(CONFIG, values, grads=ActivationCache(CONFIG, {SITE: -values[SITE]}))


def test_a_dtype_for_what_has_a_floating_one():
    """Values and gradients, exactly where the dtype is wider; token ids stay integers, and None changes nothing."""
    own = cache().numpy()
    assert (own[SITE].dtype, own.grads[SITE].dtype, own[IDS].dtype) == ("bfloat16", "bfloat16", "int32")
    for dtype in ("float32", np.float64, jnp.float32):
        wide = cache().numpy(dtype=dtype)
        assert (wide[SITE].dtype, wide.grads[SITE].dtype) == (np.dtype(dtype), np.dtype(dtype))
        assert (wide[IDS].dtype, type(wide[SITE])) == (np.dtype("int32"), np.ndarray)
        np.testing.assert_array_equal(wide[SITE], own[SITE].astype(dtype))
    for wrong in ("int32", bool, "nope"):
        with pytest.raises(ValueError, match="must be a floating-point dtype"):
            cache().numpy(dtype=wrong)


def test_which_files_keep_the_type(tmp_path):
    """`np.save` loses bfloat16, as the documentation says; `save` keeps it, and float32 goes through either."""
    np.save(tmp_path / "value.npy", cache().numpy()[SITE])
    assert np.load(tmp_path / "value.npy").dtype == "V2"
    np.save(tmp_path / "value.npy", cache().numpy(dtype="float32")[SITE])
    np.testing.assert_array_equal(np.load(tmp_path / "value.npy"), cache()[SITE])
    cache().save(tmp_path / "cache.safetensors")
    back = ActivationCache.load(tmp_path / "cache.safetensors")
    assert back[SITE].dtype == "bfloat16"
    np.testing.assert_array_equal(back[SITE], cache()[SITE])
