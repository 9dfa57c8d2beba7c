"""Conversion between Hugging Face checkpoints and the parameters of `gemma3_jax`.

These are the public names of `gemma3_jax.conversion`, which holds the code: a file `conversion.py` of a user's own, in
the directory where Python was started, hides this package but not that one.
"""

from etils import epy

# A name is imported when it is first used.
with epy.lazy_api_imports(globals()):
    from gemma3_jax.conversion.checkpoint import convert_checkpoint, convert_state_dict, read_heads
    from gemma3_jax.conversion.export import export_checkpoint
    from gemma3_jax.conversion.store import load_params, save_params
    from gemma3_jax.reading import CheckpointError

__all__ = [
    "CheckpointError",
    "convert_checkpoint",
    "convert_state_dict",
    "export_checkpoint",
    "load_params",
    "read_heads",
    "save_params",
]
