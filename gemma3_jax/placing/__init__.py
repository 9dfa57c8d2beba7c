"""Meshes and shardings: a model on several devices, on one host or many."""

from etils import epy

# A name is imported when it is first used.
with epy.lazy_api_imports(globals()):
    from gemma3_jax.meshes import make_mesh
    from gemma3_jax.placing.fitting import Fit, fits
    from gemma3_jax.placing.parameters import param_shardings

__all__ = ["Fit", "fits", "make_mesh", "param_shardings"]
