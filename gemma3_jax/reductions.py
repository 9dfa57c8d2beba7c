"""Reductions of captured values on the device: the public names of `gemma3_jax.hooks.reductions`."""

from gemma3_jax.hooks.reductions import At, Cast, Int8, Int8Values, Mean, Project, TopK, TopValues

__all__ = ["At", "Cast", "Int8", "Int8Values", "Mean", "Project", "TopK", "TopValues"]
