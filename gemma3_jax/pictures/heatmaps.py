"""Heatmaps that share their axes and colours."""

from gemma3_jax.pictures import layout
from gemma3_jax.pictures.data import Panels
from gemma3_jax.pictures.drawing import Drawing
from gemma3_jax.pictures.picture import Picture


class Heatmaps(Panels, Picture):
    """Panels with the same rows, columns and scale; in HTML, the mouse over a cell tells its value."""

    def drawing(self) -> Drawing:
        """The shapes and texts of the picture."""
        return layout.draw(self)
