"""Conversion between Hugging Face checkpoints and the parameters of `gemma3_jax`."""

from conversion.checkpoint import convert_checkpoint, convert_state_dict, export_checkpoint
from conversion.files import CheckpointError

__all__ = ["CheckpointError", "convert_checkpoint", "convert_state_dict", "export_checkpoint"]
