"""Texts whose tokens are coloured by their values."""

from gemma3_jax.pictures import token_layout
from gemma3_jax.pictures.data import Passage, Tokens
from gemma3_jax.pictures.drawing import Drawing
from gemma3_jax.pictures.labels import as_html, visible
from gemma3_jax.pictures.picture import Picture, page
from gemma3_jax.pictures.token_layout import LINE_WIDTH, grey_note, token_tips


class TokenFlow(Tokens, Picture):
    """Tokens in reading order, each on the colour of its value [p] float32 (grey for NaN).

    A token that ends in a newline ends its line. The HTML is running text without a script, so that its lines break
    where the window ends. The mouse over a token shows its position and value.
    """

    def drawing(self) -> Drawing:
        """The shapes and texts of the picture."""
        return token_layout.draw(self)

    def to_html(self) -> str:
        """An HTML page of about 200 bytes per token."""
        return page(self.title, self._repr_html_())

    def _repr_html_(self) -> str:
        passages = "".join(map(self._passage, self.passages))
        ticks = self.scale.ticks()
        places = [100 * (tick - self.scale.low) / (self.scale.high - self.scale.low) for tick in ticks]
        labels = "".join(
            f'<span style="position:absolute;left:{place:.1f}%;transform:translateX(-50%)">{label}</span>'
            for place, label in zip(places, ticks.values(), strict=True)
        )
        return (
            f'<div style="max-width:{LINE_WIDTH}px;padding:12px;background:#fff;color:#000;font:13px/2 monospace">'
            f'<div style="font:15px sans-serif;text-align:center">{as_html(self.title)}</div>{passages}'
            '<div style="display:flex;gap:24px;margin:12px;font:11px/1.5 sans-serif">'
            f'<div style="width:240px;position:relative;height:28px"><div style="height:10px;'
            f'background:{self._gradient()}"></div>{labels}</div>'
            f"<div>{as_html(self.scale.label)}</div><div>{grey_note(self)}</div></div></div>"
        )

    def _passage(self, passage: Passage) -> str:
        head = f'<div style="font:11px/2 sans-serif">{as_html(passage.heading)}</div>' if passage.heading else ""
        values = [None] * len(passage.tokens) if passage.values is None else passage.values.tolist()
        spans = map(self._span, passage.tokens, token_tips(passage), values)
        return f"{head}<div>{''.join(spans)}</div>"

    def _span(self, token: str, tip: str, value: float | None) -> str:
        """A token; `unicode-bidi` keeps scripts that run from right to left from changing the order of tokens."""
        colours = "" if value is None else f"background:{self.scale.colour(value)};color:{self.scale.ink(value)};"
        style = f"{colours}padding:2px 3px;margin:0 1px;white-space:nowrap;unicode-bidi:isolate"
        line_end = "<br>" if token.endswith("\n") else "<wbr>"
        return f'<span style="{style}" title="{as_html(tip)}">{as_html(visible(token))}</span>{line_end}'

    def _gradient(self) -> str:
        colours = (f"#{bytes(colour).hex()}" for colour in self.scale.stops()[::7])
        return f"linear-gradient(to right, {', '.join(colours)})"
