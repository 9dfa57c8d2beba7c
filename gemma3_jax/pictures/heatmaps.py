"""Heatmaps that share their axes and colours."""

from gemma3_jax.pictures.data import Panels
from gemma3_jax.pictures.picture import Picture


class Heatmaps(Panels, Picture):
    """Panels with the same rows, columns and scale; plotly draws them in HTML, matplotlib in PNG.

    A notebook shows the HTML page in a frame. The notebook file contains the page and plotly's script, 6 MB for each
    picture, so the saved notebook shows it offline.
    """

    def to_html(self) -> str:
        """An HTML page of 5 MB, most of which is plotly's script."""
        from gemma3_jax.pictures import with_plotly

        return with_plotly.to_html(self)

    def to_png(self) -> bytes:
        """The picture of the HTML, at 1.5 times its pixels per side. Peak memory: about 8 bytes per PNG pixel."""
        from gemma3_jax.pictures import with_matplotlib

        return with_matplotlib.heatmaps_png(self)

    def _repr_html_(self) -> str:
        from gemma3_jax.pictures import with_plotly

        return with_plotly.to_frame(self)
