"""Heatmaps as HTML."""

import html
import math
from typing import Any

from gemma3_jax.extras import needs_extra
from gemma3_jax.pictures.data import Axis, Panel, Panels
from gemma3_jax.pictures.layout import PITCH, TICK_SIZE, Layout, arrange
from gemma3_jax.pictures.picture import page
from gemma3_jax.pictures.scale import NO_VALUE

with needs_extra("plots", "pictures need"):
    import plotly.graph_objects as go

_MONOSPACED = "DejaVu Sans Mono, Menlo, Consolas, monospace"


def to_html(heatmaps: Panels) -> str:
    """An HTML page that includes plotly's script."""
    options = {"displaylogo": False}
    body = _figure(heatmaps).to_html(full_html=False, include_plotlyjs=True, div_id="picture", config=options)
    return page(heatmaps.title, body)


def to_frame(heatmaps: Panels) -> str:
    """The page in a frame, which isolates its script from other versions of plotly and a notebook's module loader."""
    height = math.ceil(arrange(heatmaps).height) + 20  # for the scroll bar
    return (
        f'<iframe title="{html.escape(heatmaps.title)}" srcdoc="{html.escape(to_html(heatmaps))}" '
        f'style="width:100%;height:{height}px;border:0"></iframe>'
    )


def _figure(heatmaps: Panels) -> go.Figure:
    layout = arrange(heatmaps)
    figure = go.Figure()
    for i, panel in enumerate(heatmaps.panels, start=1):
        _add_panel(figure, i, heatmaps, panel, layout)
    return figure.update_layout(
        width=layout.width,
        height=layout.height,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        template="none",
        plot_bgcolor=NO_VALUE,
        font={"color": "black"},
        coloraxis=_colours(heatmaps, layout),
        annotations=_annotations(layout),
    )


def _add_panel(figure: go.Figure, i: int, heatmaps: Panels, panel: Panel, layout: Layout) -> None:
    """Add the i-th panel, counted from 1, with its own axes."""
    rows, columns, box = heatmaps.rows, heatmaps.columns, layout.panels[i - 1]
    axis = {
        "type": "category",
        "tickfont": {"family": _MONOSPACED, "size": TICK_SIZE},
        "ticks": "outside",
        "ticklen": 3,
        "showgrid": False,
        "showline": True,
        "mirror": True,
    }
    figure.layout[f"xaxis{i}"] = axis | {
        "anchor": f"y{i}",
        "domain": [box.left / layout.width, (box.left + box.width) / layout.width],
        "nticks": int(box.width / PITCH) + 1,
        "range": [-0.5, len(columns.labels) - 0.5],
        "tickangle": -90 if layout.turned else 0,
    }
    figure.layout[f"yaxis{i}"] = axis | {
        "anchor": f"x{i}",
        "domain": [1 - (box.top + box.height) / layout.height, 1 - box.top / layout.height],
        "nticks": int(box.height / PITCH) + 1,
        "range": [len(rows.labels) - 0.5, -0.5],
    }
    figure.add_heatmap(
        z=panel.values,
        x=_categories(columns),
        y=_categories(rows),
        xaxis=f"x{i}",
        yaxis=f"y{i}",
        coloraxis="coloraxis",
        customdata=panel.details and [[_escape(text) for text in row] for row in panel.details],
        hovertemplate=f"{_escape(rows.name)} %{{y}}<br>{_escape(columns.name)} %{{x}}<br>"
        + ("%{customdata}" if panel.details else f"{_escape(heatmaps.scale.label)} %{{z:.4g}}")
        + "<extra></extra>",
        hoverongaps=False,
    )
    if panel.texts:
        _add_texts(figure, i, heatmaps, panel)


def _add_texts(figure: go.Figure, i: int, heatmaps: Panels, panel: Panel) -> None:
    """Write in the cells with a separate trace: in a heatmap trace, texts have one colour, or too little contrast."""
    rows, columns = _categories(heatmaps.rows), _categories(heatmaps.columns)
    figure.add_scatter(
        x=columns * len(rows),
        y=[row for row in rows for _ in columns],
        xaxis=f"x{i}",
        yaxis=f"y{i}",
        mode="text",
        text=[_escape(text) for row in panel.texts or [] for text in row],
        textfont={
            "family": _MONOSPACED,
            "size": TICK_SIZE,
            "color": [heatmaps.scale.ink(value) for value in panel.values.ravel().tolist()],
        },
        hoverinfo="skip",
        showlegend=False,
    )


def _escape(text: str) -> str:
    """`text` escaped so that plotly shows it verbatim: plotly parses texts as HTML, and dollar signs as mathematics."""
    return html.escape(text, quote=False).replace("$", "&#36;").replace("\n", "<br>")


def _categories(axis: Axis) -> list[str]:
    return [_escape(label) for label in axis.labels]


def _colours(heatmaps: Panels, layout: Layout) -> dict[str, Any]:
    scale, bar = heatmaps.scale, layout.bar
    return {
        "colorscale": scale.colours,
        "cmin": scale.low,
        "cmax": scale.high,
        "colorbar": {
            "x": bar.left / layout.width,
            "y": 1 - bar.top / layout.height,
            "xanchor": "left",
            "yanchor": "top",
            "xpad": 0,
            "ypad": 0,
            "lenmode": "pixels",
            "len": bar.height,
            "thickness": bar.width,
            "tickvals": scale.ticks(),
            "ticktext": scale.tick_labels(),
            "tickfont": {"size": TICK_SIZE},
        },
    }


def _annotations(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "text": _escape(text.text),
            "x": text.x / layout.width,
            "y": 1 - text.y / layout.height,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "center",
            "yanchor": "middle",
            "showarrow": False,
            "textangle": -90 if text.upward else 0,
            "font": {"size": text.size},
        }
        for text in layout.texts
    ]
