"""Ready-made edits, and `only`, which restricts any edit: the public names of `gemma3_jax.hooks.edits`."""

from gemma3_jax.hooks.edits import (
    Add,
    Clamp,
    FromCache,
    FromRow,
    Mean,
    Noise,
    Only,
    ProjectOut,
    Replace,
    Scale,
    only,
)

__all__ = [
    "Add",
    "Clamp",
    "FromCache",
    "FromRow",
    "Mean",
    "Noise",
    "Only",
    "ProjectOut",
    "Replace",
    "Scale",
    "only",
]
