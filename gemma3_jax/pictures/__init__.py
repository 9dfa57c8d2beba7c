"""Pictures of the results of an analysis. They render inline in a notebook, and save as HTML or PNG that work offline.

Each function takes plain arrays (NumPy or JAX, any float dtype), and most take the model's config to name its layers:

>>> from gemma3_jax import Gemma3Config, pictures
>>> picture = pictures.patching_heatmap([[0.0] * 4] * 26, Gemma3Config.preset("1b"), axes="layer head")
>>> picture
Heatmaps('Activation patching')
>>> picture.save("patching.jpg")
Traceback (most recent call last):
ValueError: patching.jpg: a picture is saved as .html or .png

HTML is SVG, with the value of each cell under the mouse, or running text; matplotlib draws the PNG. Every script that
Gemma writes is legible where the browser, or the machine that draws the PNG, has fonts for it.
"""

from gemma3_jax.pictures.analyses import attention_patterns, logit_lens_table, patching_heatmap
from gemma3_jax.pictures.beside import SideBySide, side_by_side
from gemma3_jax.pictures.distances import ParityPicture, parity_picture
from gemma3_jax.pictures.heatmaps import Heatmaps
from gemma3_jax.pictures.site_map import BlockMap, block_map
from gemma3_jax.pictures.texts import feature_on_texts, generated_values, token_values
from gemma3_jax.pictures.token_flow import TokenFlow

__all__ = [
    "BlockMap",
    "Heatmaps",
    "ParityPicture",
    "SideBySide",
    "TokenFlow",
    "attention_patterns",
    "block_map",
    "feature_on_texts",
    "generated_values",
    "logit_lens_table",
    "parity_picture",
    "patching_heatmap",
    "side_by_side",
    "token_values",
]
