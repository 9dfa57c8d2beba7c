"""The shape and constants of one Gemma 3 text model, read from and written to Hugging Face configs."""

from gemma3_jax.config.parts import PAST_FLOAT16, RUN_DTYPES, ConfigError, EmbeddingHead, LayerType, Rope
from gemma3_jax.config.shape import PRESETS, Gemma3Config, check_config, shape_text

__all__ = [
    "PAST_FLOAT16",
    "PRESETS",
    "RUN_DTYPES",
    "ConfigError",
    "EmbeddingHead",
    "Gemma3Config",
    "LayerType",
    "Rope",
    "check_config",
    "shape_text",
]
