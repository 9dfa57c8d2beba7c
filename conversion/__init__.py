"""Conversion between Hugging Face checkpoints and the parameters of `gemma3_jax`."""

from conversion.checkpoint import convert_checkpoint, convert_state_dict, export_checkpoint
from conversion.files import CheckpointError
from conversion.store import load_params, save_params

__all__ = [
    "CheckpointError",
    "convert_checkpoint",
    "convert_state_dict",
    "export_checkpoint",
    "load_params",
    "save_params",
]
