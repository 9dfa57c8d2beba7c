"""Pictures of what an analysis found: they show themselves in a notebook and save as HTML or PNG, without network.

Each takes plain arrays (NumPy or JAX, any float dtype) and the model's config, for the names of its layers:

>>> from gemma3_jax import Gemma3Config, pictures
>>> picture = pictures.patching_heatmap([[0.0] * 4] * 26, Gemma3Config.preset("1b"), axes="layer head")
>>> picture
Heatmaps('Activation patching')
>>> picture.save("patching.jpg")
Traceback (most recent call last):
ValueError: patching.jpg: a picture is saved as .html or .png

Heatmaps are drawn by plotly in HTML, where they zoom and tell each cell's value, and by matplotlib in PNG.
"""

from gemma3_jax.pictures.analyses import attention_patterns, logit_lens_table, patching_heatmap, token_values
from gemma3_jax.pictures.heatmaps import Heatmaps
from gemma3_jax.pictures.token_flow import TokenFlow

__all__ = [
    "Heatmaps",
    "TokenFlow",
    "attention_patterns",
    "logit_lens_table",
    "patching_heatmap",
    "token_values",
]
