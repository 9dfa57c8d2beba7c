"""A check of a parameter pytree against its config."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from etils import epy

from gemma3_jax.config import Gemma3Config
from gemma3_jax.conversion import files
from gemma3_jax.conversion.dtypes import known_dtypes
from gemma3_jax.conversion.finite import all_finite
from gemma3_jax.conversion.gemma3 import entries
from gemma3_jax.conversion.words import listed
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Params

with epy.lazy_imports():  # a third of a second, which `gemma3-jax info` does not need
    import flax.traverse_util


def check_params(config: Gemma3Config, params: Params) -> dict[str, jax.Array]:
    """The leaves of a parameter pytree by adapter key, after a check against the config.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape, or has NaN or infinity.
    """
    flat = flax.traverse_util.flatten_dict(params)
    check_shapes(config, flat)
    for path, leaf in flat.items():
        if not all_finite(leaf):
            raise CheckpointError(f"{'/'.join(path)} has NaN or infinity")
    return {entry.ours: flat[entry.path] for entry in entries(config)}


def check_shapes(config: Gemma3Config, flat: Mapping[tuple[str, ...], jax.Array | jax.ShapeDtypeStruct]) -> None:
    """Check the shapes and dtypes of parameters by path against the config.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape or dtype.
    """
    expected = {entry.path: entry for entry in entries(config)}
    missing, extra = sorted(set(expected) - set(flat)), sorted(set(flat) - set(expected))
    if missing:
        raise CheckpointError(f"the parameters lack {listed(['/'.join(path) for path in missing])}")
    if extra:
        raise CheckpointError(
            f"the parameters have {listed(['/'.join(path) for path in extra])}, which the config does not have"
        )
    for path, entry in expected.items():
        name, leaf = "/".join(path), flat[path]
        if getattr(leaf, "shape", None) != entry.shape:
            actual = list(leaf.shape) if hasattr(leaf, "shape") else type(leaf).__name__
            raise CheckpointError(f"{name} has shape {actual}; the config requires {list(entry.shape)}")
        if jnp.dtype(leaf.dtype).name not in files.DTYPES:
            raise CheckpointError(f"{name} has dtype {leaf.dtype}; parameters must be {known_dtypes()}")
