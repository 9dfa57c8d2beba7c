"""A text whose tokens are coloured by their values."""

import html

import numpy as np

from gemma3_jax.pictures.data import Tokens
from gemma3_jax.pictures.labels import token_labels, visible
from gemma3_jax.pictures.layout import LINE_WIDTH
from gemma3_jax.pictures.picture import Picture, page
from gemma3_jax.pictures.scale import GREY_NOTE


class TokenFlow(Tokens, Picture):
    """Tokens in reading order, each on the colour of its value [p] float32 (grey for NaN).

    A token that ends in a newline ends its line. In HTML, hovering over a token shows its position and value, without a
    script.
    """

    def to_html(self) -> str:
        """An HTML page of about 200 bytes per token."""
        return page(self.title, self._repr_html_())

    def to_png(self) -> bytes:
        """The same picture as the HTML, at 1.5 times its pixels per side."""
        from gemma3_jax.pictures import with_matplotlib

        return with_matplotlib.token_flow_png(self)

    def _repr_html_(self) -> str:
        spans = "".join(map(self._span, self.tokens, token_labels(self.tokens), self.values.tolist()))
        note = GREY_NOTE if np.isnan(self.values).any() else ""
        ticks = "".join(f"<span>{label}</span>" for label in self.scale.tick_labels())
        return (
            f'<div style="max-width:{LINE_WIDTH}px;padding:12px;background:#fff;color:#000;font:13px/2 monospace">'
            f'<div style="font:15px sans-serif;text-align:center">{html.escape(self.title)}</div>{spans}'
            '<div style="display:flex;gap:12px;margin-top:12px;font:11px/1.5 sans-serif">'
            f'<div style="width:240px"><div style="height:10px;background:{self._gradient()}"></div>'
            f'<div style="display:flex;justify-content:space-between">{ticks}</div></div>'
            f"<div>{html.escape(self.scale.label)}</div><div>{note}</div></div></div>"
        )

    def _span(self, token: str, label: str, value: float) -> str:
        colours = f"background:{self.scale.colour(value)};color:{self.scale.ink(value)}"
        style = f"{colours};padding:2px 3px;margin:0 1px;white-space:nowrap"
        tooltip = html.escape(f"{label}: {value:.4g}")
        line_end = "<br>" if token.endswith("\n") else "<wbr>"
        return f'<span style="{style}" title="{tooltip}">{html.escape(visible(token))}</span>{line_end}'

    def _gradient(self) -> str:
        return f"linear-gradient(to right, {', '.join(self.scale.stops())})"
